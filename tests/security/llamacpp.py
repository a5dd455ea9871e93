"""A real llama.cpp for the security tests, spoken to in its own words."""

import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from core.ids import ModelName, WorkerId
from engines.drivers.llamacpp import LlamaCppEngine
from engines.models import fetch
from engines.spec import Launch, WorkerSpec

KEY = "worker-key"
_ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    """Return a loopback port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def worker_spec(*args: str) -> WorkerSpec:
    """Return a worker with the small model on four slots."""
    path = fetch("smollm2", Path.home() / ".cache/forebay/models")
    launch = Launch(source=str(path), slots=4, context=1024, threads=1, args=args)
    return WorkerSpec(id=WorkerId("m-0"), model=ModelName("m"), engine="llamacpp", launch=launch)


class LlamaServer:
    """Runs llama.cpp as a worker is run, with more arguments, while it is entered."""

    def __init__(self, *args: str, cwd: Path = _ROOT) -> None:
        self.port = free_port()
        command = LlamaCppEngine().command(worker_spec(*args), self.port, KEY)
        self.process = subprocess.Popen(
            command.argv,
            cwd=cwd,
            env={**os.environ, **command.env, "PYTHONPATH": str(_ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()

    def is_ready(self) -> bool:
        """Wait until it serves, or has given up."""
        deadline = time.monotonic() + 60
        while self.process.poll() is None and time.monotonic() < deadline:
            try:
                if self.ask("/health")[0] == 200:
                    return True
            except OSError:
                pass
            time.sleep(0.05)
        return False

    def ask(self, path: str, body: object = None, *, key: str | None = KEY) -> tuple[int, bytes]:
        """Return status and body of a GET, or of a POST with a body."""
        headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
        data = None if body is None else msgspec.json.encode(body)
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()
