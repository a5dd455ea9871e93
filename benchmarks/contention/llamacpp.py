"""llama.cpp by itself, started exactly as Forebay starts it, without Forebay."""

import asyncio
import contextlib
import os
import secrets
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from benchmarks.loopback.cache import ROOT
from benchmarks.loopback.processes import Failed
from core.ids import ModelName, WorkerId
from engines.drivers.llamacpp import LlamaCppEngine
from engines.engine import Command
from engines.models import fetch
from engines.spec import Launch, WorkerSpec
from gateway.cli import ports

MODEL = "smollm2"
READY_S = 60.0


def weights() -> Path:
    """Return the GGUF of SmolLM2-135M, fetched if it is not in the cache."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return fetch(MODEL, Path(base, "forebay", "models"))


@dataclass(frozen=True)
class LlamaCpp:
    """A running engine, and how to ask it."""

    url: str
    key: str
    pid: int

    async def ask(self, http: aiohttp.ClientSession, path: str, body: object = None) -> Any:
        """Ask for JSON; raises `Failed` with what the engine says against it."""
        method = "GET" if body is None else "POST"
        headers = {"authorization": f"Bearer {self.key}"}
        async with http.request(method, self.url + path, json=body, headers=headers) as answer:
            if answer.status != 200:
                raise Failed(f"{path}: {answer.status} {(await answer.text())[:300]}")
            return await answer.json()


@contextlib.asynccontextmanager
async def llamacpp(*, slots: int, context: int, args: Sequence[str] = ()) -> AsyncIterator[LlamaCpp]:
    """Start the engine on one thread and yield it when it is ready; it is gone when the block ends."""
    launch = Launch(source=str(weights()), slots=slots, context=context, threads=1, args=tuple(args))
    spec = WorkerSpec(id=WorkerId(f"{MODEL}-0"), model=ModelName(MODEL), engine="llamacpp", launch=launch)
    (port,), key = ports.free(1), secrets.token_hex(16)
    command = LlamaCppEngine().command(spec, port, key)
    process = _started(command)
    engine = LlamaCpp(f"http://127.0.0.1:{port}", key, process.pid)
    try:
        async with aiohttp.ClientSession() as http:
            await _until_ready(http, engine, process)
        yield engine
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _started(command: Command) -> subprocess.Popen[bytes]:
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command.argv, cwd=ROOT, env={**os.environ, **command.env}, stdout=quiet, stderr=quiet)


async def _until_ready(http: aiohttp.ClientSession, engine: LlamaCpp, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + READY_S
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(aiohttp.ClientError, Failed):
            await engine.ask(http, "/health")
            return
        await asyncio.sleep(0.05)
    raise Failed(f"llama.cpp is not ready (exit status {process.poll()})")


def pin(pids: Sequence[int], core: int) -> None:
    """Bind every thread of the processes to one core: the engine's speed must not be the clients' doing."""
    for pid in pids:
        with contextlib.suppress(psutil.Error, OSError):
            for thread in psutil.Process(pid).threads():
                os.sched_setaffinity(thread.id, {core})
