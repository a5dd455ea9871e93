"""What is compared: one `Arm` per gateway, with everything that it takes to install, start and address it.

Texts may hold `{bin}` (programs of the arm's environment), `{port}`, `{port2}` (the gateway's), `{mock}` (the
upstream's port), `{tmp}` (the arm's scratch folder), `{root}` (this checkout) and `{key}` (made anew per start);
other braces stand for themselves. Each gateway runs one worker process.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.loopback.venvs import environment


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A way for a request to reach the upstream; no command means straight there."""

    name: str
    note: str  # what is on and off, for the report
    command: tuple[str, ...] = ()
    ready: str = "/health"
    env: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    afterwork_s: float = 0.0  # for how long after its last answer it may still put off work for it
    key_prefix: str = ""  # not empty: the gateway checks keys, and has to refuse a request without one
    requirements: tuple[str, ...] = ()  # its own environment; empty: the project's
    packages: tuple[str, ...] = ()  # whose versions the report names

    def programs(self) -> Path:
        """The folder of the arm's interpreter and scripts, installed if need be; raises `Missing`."""
        return environment(self.name, self.requirements) if self.requirements else Path(sys.executable).parent


UVICORN = (
    "{bin}/python -m uvicorn --host 127.0.0.1 --port {port} --loop uvloop --http httptools --workers 1 "
    "--no-access-log --log-level warning --app-dir {root}"
)
ROUTER = (
    "--host 127.0.0.1 --port {port} --worker-urls http://127.0.0.1:{mock} --prometheus-port {port2} "
    "--policy round_robin"
)
FOREBAY = """\
version: 1
server: {port: {port}}
admin: {port: {port2}}
state_dir: {tmp}/state
keys: [{name: bench, tenant: bench, key: {key}, models: ["*"]}]
models:
  mock-model:
    workers: [{engine: openai, url: "http://127.0.0.1:{mock}/v1", max_inflight: 256}]
"""
LITELLM_OPTIONS = "--host 127.0.0.1 --port {port} --num_workers 1 --telemetry False"
LITELLM = """\
model_list:
  - model_name: mock-model
    litellm_params: {model: openai/mock-model, api_base: "http://127.0.0.1:{mock}/v1", api_key: unused}
general_settings: {master_key: os.environ/LITELLM_MASTER_KEY}
litellm_settings: {set_verbose: false, num_retries: 0}
"""

ARMS = (
    Arm(name="direct", note="no gateway: what the rig itself shows"),
    Arm(
        name="raw_asgi",
        note="ASGI callable + aiohttp, bytes through; no key, no parsing, no log",
        command=(*UVICORN.split(), "benchmarks.loopback.raw_asgi:app"),
        env={"UPSTREAM": "http://127.0.0.1:{mock}"},
        packages=("uvicorn", "uvloop", "httptools", "aiohttp"),
    ),
    Arm(
        name="forebay",
        note="key checked, metering, metrics and request log on; cache off",
        command=("{bin}/python", "-m", "gateway", "serve", "-c", "{tmp}/forebay.yaml"),
        ready="/health/readiness",
        files={"forebay.yaml": FOREBAY},
        afterwork_s=0.6,  # it books twice a second
        key_prefix="fbk_",
        packages=("uvicorn", "uvloop", "httptools", "aiohttp", "msgspec"),
    ),
    Arm(
        name="fastapi",
        note="FastAPI + aiohttp, bytes through; no key, no parsing, no log",
        command=(*UVICORN.split(), "benchmarks.loopback.plain_fastapi:app"),
        env={"UPSTREAM": "http://127.0.0.1:{mock}"},
        packages=("uvicorn", "uvloop", "httptools", "fastapi", "aiohttp"),
    ),
    Arm(
        name="litellm",
        note="master key checked, router, usage and cost in memory; no database, no Redis, no callbacks, no retries",
        command=("{bin}/litellm", "--config", "{tmp}/litellm.yaml", *LITELLM_OPTIONS.split()),
        ready="/health/liveliness",
        files={"litellm.yaml": LITELLM},
        env={
            "LITELLM_MASTER_KEY": "{key}",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "LITELLM_MODE": "PRODUCTION",
            "LITELLM_LOG": "ERROR",
            "DISABLE_ADMIN_UI": "True",
            "DO_NOT_TRACK": "1",
        },
        key_prefix="sk-",
        requirements=("litellm[proxy]==1.106.2",),
        packages=("litellm", "uvicorn", "fastapi", "aiohttp", "openai"),
    ),
    Arm(
        name="smg",
        note="Rust; round robin, retries, breaker, health checks and metrics as they come; no key",
        command=("{bin}/smg", "launch", *ROUTER.split(), "--log-level", "warn"),
        requirements=("smg==1.13.0",),
        packages=("smg",),
    ),
    Arm(
        name="vllm-router",
        note="Rust; round robin, retries, breaker, health checks and metrics as they come; no key",
        command=("{bin}/vllm-router", *ROUTER.split(), "--log-level", "warning"),
        requirements=("vllm-router==0.1.17",),
        packages=("vllm-router",),
    ),
)
