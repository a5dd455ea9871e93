"""What is asked of each kind of engine when it is disrupted, and what is done to its workers meanwhile."""

import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.e2e.conftest import smollm2
from tests.e2e.disrupting import Plan
from tests.e2e.questions import Nature
from tests.fakes import recorder
from tests.fakes.gateway import launched_llamacpp

SEED = 20261122
_KEYS = [{"name": f"k{n}", "tenant": f"t{n}", "key": f"fbk_tenant-number-{n}-of-the-disrupted"} for n in range(3)]
_LIFECYCLE = {"probe_interval": 0.2, "backoff_base": 0.05, "backoff_max": 0.2, "stop_timeout": 5, "drain_timeout": 60}
_VLLM_START_S = 900.0
_PREPARE = Path(__file__).resolve().parents[1] / "vllm" / "prepare.py"

FAKE = Nature(
    model="fake",
    max_tokens=(4, 10, 20, 32, 64),
    stops=("n h", "r de", "zolor", "l b"),  # from the end of a word to the next one's beginning
    pinning=({"n": 2}, {"frequency_penalty": 0.5}, {"response_format": {"type": "json_object"}}),
)
_ONE_OF_TWO = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["yes", "no"]}}}
LLAMACPP = Nature(
    model="smollm2",
    max_tokens=(6, 10, 16, 24),
    stops=(". ", "\n\n", "🐼", "7"),
    pinning=({"presence_penalty": 0.4}, {"response_format": _ONE_OF_TWO}),
    steady=("id", "object", "model"),  # llama.cpp gives every frame a time of its own
)
VLLM = Nature(
    model="smollm2",
    max_tokens=(8, 16, 24),
    stops=(". ", "\n\n", "🐼", "7"),
    pinning=({"presence_penalty": 0.4}, {"response_format": _ONE_OF_TWO}),
)


def fake_plan(*, itl_ms: int = 4) -> Plan:
    """Two fake engines of four slots that the gateway starts, and speaks to as to vLLM."""
    flags = ("--slots=4", "--tokens=40", f"--itl-ms={itl_ms}", "--ttft-ms=5", "--glyphs")
    command = [sys.executable, "-m", "engines.fake_server", "--port", "{port}", "--model", "fake", *flags]
    launch = {"command": command, "env": {"FAKE_API_KEY": "{key}"}}
    worker = {"engine": "vllm", "launch": launch, "replicas": 2, "max_inflight": 4, "lifecycle": _LIFECYCLE}
    return _plan(FAKE, {"workers": [worker]}, 16, ("kill", "kill", "drain", "restart") * 3, (0.1, 0.4))


def llamacpp_plan(directory: Path, *, slots: int = 4, times: int = 1) -> Plan:
    """Two real llama.cpp of a thread each; what they say is written down in the directory. With one slot nothing else
    is computed beside a request: its numbers, and so its answer, depend on nobody else."""
    program, record = recorder.program(directory)
    settings = launched_llamacpp(smollm2(), slots=slots, replicas=2, lifecycle=_LIFECYCLE)
    settings["workers"][0]["launch"]["program"] = str(program)
    return _plan(LLAMACPP, settings, 2 * slots + 4, ("kill", "drain", "restart") * times, (0.5, 2.0), record)


def attached_vllm_plan(url: str, key: str, *, slots: int) -> Plan:
    """A real vLLM that others have started: nothing is done to it but that tenants take its slots from each other."""
    worker = {"engine": "vllm", "url": f"{url}/v1", "key": key, "served_name": "smol", "max_inflight": slots}
    return _plan(VLLM, {"workers": [worker]}, 3 * slots, (), (1.0, 1.0))


def vllm_plan(directory: Path, *, times: int = 1) -> Plan:
    """Two real vLLM (CPU build) that the gateway starts, each in half a minute; what they say is written down."""
    prepare = subprocess.run([sys.executable, str(_PREPARE)], stdout=subprocess.PIPE, text=True, check=True)
    paths = dict(line.split("=", 1) for line in prepare.stdout.splitlines())
    program, record = recorder.program(directory, paths["vllm"])
    launch = {
        "program": str(program),
        "source": paths["model"],
        "context": 2048,
        "slots": 4,
        "args": ["--enforce-eager", "--block-size", "32", "--dtype", "bfloat16"],
        "env": {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        },
    }
    lifecycle = {**_LIFECYCLE, "start_timeout": _VLLM_START_S, "probe_interval": 0.5, "stop_timeout": 30}
    worker = {"engine": "vllm", "launch": launch, "replicas": 2, "lifecycle": lifecycle}
    return _plan(VLLM, {"workers": [worker]}, 12, ("kill", "drain") * times, (4.0, 10.0), record)


def _plan(
    nature: Nature,
    settings: dict[str, Any],
    at_once: int,
    acts: tuple[str, ...],
    pause_s: tuple[float, float],
    record: Path | None = None,
) -> Plan:
    return Plan(
        nature=nature,
        settings=settings,
        keys=_KEYS,
        at_once=at_once,
        acts=acts,
        pause_s=pause_s,
        sections={
            "start_timeout_s": _VLLM_START_S,
            "retry": {"attempts": 10},
            "timeouts": {"queue": _VLLM_START_S, "first_token": 300, "idle": 300, "total": 2 * _VLLM_START_S},
        },
        seed=SEED,
        record=record,
    )
