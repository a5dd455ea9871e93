"""The engines that clients and gateways share: started by the benchmark, so that every arm has the same ones.

``Stand`` says which; ``Stable`` keeps what takes long to start until another kind is wanted, with its caches emptied
between cells. All engines run on one core, where cores are told apart at all.
"""

import asyncio
import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import IO, Any, Literal, Self

import aiohttp

from benchmarks.contention.llamacpp import MODEL as LLAMACPP_MODEL
from benchmarks.contention.llamacpp import weights
from benchmarks.gpu_lifecycle import cpu_build
from benchmarks.loopback.cache import ROOT
from benchmarks.loopback.processes import Failed, free_ports
from core.ids import ModelName, WorkerId
from engines.drivers.llamacpp import LlamaCppEngine, num_slot_files
from engines.drivers.metrics import gauge
from engines.engine import Command
from engines.spec import Launch, WorkerSpec

Kind = Literal["fake", "llamacpp", "vllm"]
VLLM_MODEL = "m"
VLLM_START_S = 600.0
START_S = 60.0
CONTEXT = 2048
COUNTED: Mapping[Kind, tuple[str, ...]] = {
    "fake": (),
    "llamacpp": ("llamacpp:prompt_tokens_total",),
    "vllm": ("vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total"),
}
IDLE_WITHIN_S = 60.0


@dataclass(frozen=True)
class Stand:
    """What engines there are: ``workers`` of a kind with ``slots`` each. ``call_s``: how long a call takes of the fake
    one. ``is_stock``: llama.cpp with its own defaults, for clients that talk to it directly."""

    kind: Kind
    workers: int = 1
    slots: int = 4
    call_s: float = 0.0
    is_stock: bool = False


@dataclass(frozen=True)
class Running:
    """One engine. ``counted``: its count of prompt tokens that were computed, less its count of those that were not."""

    url: str
    process: "subprocess.Popen[bytes]"
    key: str = ""
    counted: tuple[str, ...] = ()

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.url.rpartition(":")[2])

    @property
    def headers(self) -> dict[str, str]:
        """Headers that it wants of every request."""
        return {"authorization": f"Bearer {self.key}"} if self.key else {}

    async def metrics(self, http: aiohttp.ClientSession) -> str:
        """Return the engine's metrics. Raises `Failed`."""
        async with http.get(self.url + "/metrics", headers=self.headers) as answer:
            if answer.status != 200:
                raise Failed(f"{self.url}/metrics: {answer.status}")
            return await answer.text()

    async def computed(self, http: aiohttp.ClientSession) -> float | None:
        """Return how many prompt tokens it has computed since its start; None if it does not tell."""
        if not self.counted:
            return None
        text = await self.metrics(http)
        plus, *minus = (gauge(text, name) or 0.0 for name in self.counted)
        return plus - sum(minus)


@dataclass(frozen=True)
class Vllm:
    """How a vLLM is started: argv without its number of slots, and what is added to the environment."""

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def on_cpu(cls) -> Self:
        """Return the tests' CPU build with SmolLM2, made ready if it is not."""
        program, source = cpu_build()
        env = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
        argv = [program, "serve", source, "--served-model-name", VLLM_MODEL, "--host", "127.0.0.1", "--port", "{port}"]
        flags = ["--enforce-eager", "--block-size", "32", "--dtype", "bfloat16", "--max-model-len", str(CONTEXT)]
        return cls((*argv, *flags), env)


def model_of(kind: Kind) -> str:
    """Return what the engine calls its model."""
    return {"fake": "fake", "llamacpp": LLAMACPP_MODEL, "vllm": VLLM_MODEL}[kind]


def worker_of(stand: Stand, engine: Running) -> dict[str, Any]:
    """Return a gateway's worker that is attached to the engine."""
    served = {"served_name": model_of(stand.kind)}
    if stand.kind == "fake":
        return {
            "engine": "openai",
            "url": engine.url + "/v1",
            "max_inflight": 4096,
            "probe_continuation": False,
        } | served
    own: dict[str, Any] = {"key": engine.key} if engine.key else {}
    if stand.kind == "llamacpp":
        own["slot_files"] = num_slot_files(stand.slots)
    return {"engine": stand.kind, "url": engine.url, "max_inflight": stand.slots, **own, **served}


class Stable:
    """Starts engines, and stops them when others are wanted. ``core``: where they run; None: anywhere."""

    def __init__(self, core: int | None, vllm: Vllm | None = None) -> None:
        self._core = core
        self._vllm = vllm
        self._stand: Stand | None = None
        self._engines: list[Running] = []
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def engines(self, stand: Stand) -> list[Running]:
        """Return engines as wanted, idle and with nothing in their caches. Raises `Failed`."""
        is_kept = stand.kind == "vllm" and stand == self._stand
        if is_kept and all(engine.process.poll() is None for engine in self._engines):
            await _forget(self._engines)
            return self._engines
        await self._stack.aclose()
        self._stack, self._stand, self._engines = contextlib.AsyncExitStack(), stand, []
        key = secrets.token_hex(16) if stand.kind == "llamacpp" else ""
        for _ in range(stand.workers):
            self._engines.append(await self._stack.enter_async_context(self._started(stand, key)))
        return self._engines

    @contextlib.asynccontextmanager
    async def _started(self, stand: Stand, key: str) -> AsyncIterator[Running]:
        (port,) = free_ports(1)
        command = self._command(stand, port, key)
        with tempfile.TemporaryFile() as log:
            process = self._spawned(command, log)
            running = Running(f"http://127.0.0.1:{port}", process, key, COUNTED[stand.kind])
            try:
                await _until_ready(running, VLLM_START_S if stand.kind == "vllm" else START_S)
                yield running
            except Failed as error:
                log.seek(max(0, os.fstat(log.fileno()).st_size - 2000))
                error.add_note(log.read().decode("utf-8", "replace"))
                raise
            finally:
                _end(process)

    def _command(self, stand: Stand, port: int, key: str) -> Command:
        if stand.kind == "fake":
            argv = [sys.executable, "-m", "engines.fake_server", "--port", str(port)]
            return Command((*argv, "--ttft-ms", f"{1e3 * stand.call_s:g}"))
        if stand.kind == "llamacpp":
            launch = Launch(source=str(weights()), slots=stand.slots, context=CONTEXT, threads=1)
            name = model_of(stand.kind)
            spec = WorkerSpec(id=WorkerId(f"{name}-0"), model=ModelName(name), engine="llamacpp", launch=launch)
            ours = LlamaCppEngine().command(spec, port, key)
            stock = {"engines.drivers.llamacpp_server": "benchmarks.dataflow.stock_llamacpp"} if stand.is_stock else {}
            return Command(tuple(stock.get(word, word) for word in ours.argv), ours.env)
        vllm = self._vllm = self._vllm or Vllm.on_cpu()
        argv = [word.replace("{port}", str(port)) for word in vllm.argv]
        slots = ("--max-num-seqs", str(stand.slots), "--enable-prompt-tokens-details")
        # The caches of one cell are no gift to the next: dev mode has the route that empties them.
        fixed = {"HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1", "VLLM_SERVER_DEV_MODE": "1"}
        return Command((*argv, *slots), {**fixed, **vllm.env})

    def _spawned(self, command: Command, log: IO[bytes]) -> "subprocess.Popen[bytes]":
        def settle() -> None:
            if self._core is not None:
                os.sched_setaffinity(0, {self._core})

        return subprocess.Popen(
            command.argv, cwd=ROOT, env={**os.environ, **command.env}, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True, preexec_fn=settle,  # noqa: PLW1509 - it takes no lock
        )  # fmt: skip


async def _until_ready(engine: Running, limit_s: float) -> None:
    end = time.monotonic() + limit_s
    async with aiohttp.ClientSession(headers=engine.headers) as http:
        while time.monotonic() < end and engine.process.poll() is None:
            with contextlib.suppress(aiohttp.ClientError):
                async with http.get(engine.url + "/health") as answer:
                    if answer.status == 200:
                        return
            await asyncio.sleep(0.1)
    raise Failed(f"the engine is not ready (exit status {engine.process.poll()})")


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


async def _forget(engines: Sequence[Running]) -> None:
    """Wait until the engines are idle, and empty their prefix caches."""
    async with aiohttp.ClientSession() as http:
        for engine in engines:
            end = time.monotonic() + IDLE_WITHIN_S
            while time.monotonic() < end:
                text = await engine.metrics(http)
                if not (gauge(text, "vllm:num_requests_running") or gauge(text, "vllm:num_requests_waiting")):
                    break
                await asyncio.sleep(0.2)
            else:
                raise Failed("vLLM still runs requests whose clients have gone")
            async with http.post(engine.url + "/reset_prefix_cache") as answer:
                if answer.status != 200:
                    raise Failed(f"vLLM's prefix cache cannot be emptied: {answer.status}")


async def computed_by(engines: Sequence[Running]) -> float | None:
    """Return how many prompt tokens the engines have computed since their starts; None if one does not tell."""
    async with aiohttp.ClientSession() as http:
        counts = [await engine.computed(http) for engine in engines]
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None
