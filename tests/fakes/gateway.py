"""The real gateway in a process of its own, for end-to-end tests."""

import asyncio
import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import psutil
import yaml

from gateway.cli import ports

_ROOT = Path(__file__).resolve().parents[2]
_LOG_TAIL = 20_000


class GatewayFailedError(Exception):
    """The gateway did not do what was waited for; the message ends with its log."""


class GatewayProcess:
    """`python -m gateway serve -c FILE` as an async context manager: ready when entered, gone when left.

    `models` is the settings' section of that name; every other section is a keyword, as in
    `GatewayProcess(models, timeouts={"queue": 1}, server={"drain_timeout": 2})`. Without `keys` there is one, `key`,
    for all models. Settings, state and log live in `directory`, by default one that goes with the process.
    Nothing of it belongs to an event loop: any loop, thread or plain test may use it.
    """

    def __init__(
        self,
        models: Mapping[str, Any],
        *,
        keys: Sequence[Mapping[str, Any]] | None = None,
        env: Mapping[str, str] | None = None,
        directory: Path | None = None,
        start_timeout_s: float = 90.0,
        stop_timeout_s: float = 20.0,
        **sections: Any,
    ) -> None:
        self.key = f"fbk_{secrets.token_urlsafe(32)}"
        self.admin_key = f"fba_{secrets.token_urlsafe(32)}"
        self.port, self.admin_port = ports.free(2)
        self._scratch = None if directory else tempfile.TemporaryDirectory(prefix="forebay-e2e-")
        self.directory = directory or Path(self._scratch.name if self._scratch else "")
        self._env = {**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})}
        self._start_timeout_s = start_timeout_s
        self._stop_timeout_s = stop_timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        own_key = {"name": "test", "tenant": "test", "key": self.key}
        self.settings: dict[str, Any] = {
            "version": 1,
            "state_dir": str(self.directory / "state"),
            "keys": [own_key, *(dict(key) for key in keys or ())],
            "admin_key": self.admin_key,
            "models": dict(models),
            **sections,
            "server": {"host": "127.0.0.1", "port": self.port, **sections.get("server", {})},
            "admin": {"host": "127.0.0.1", "port": self.admin_port, **sections.get("admin", {})},
        }

    @property
    def url(self) -> str:
        """The data port, without a slash at the end; OpenAI clients want `url + "/v1"`."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def admin_url(self) -> str:
        """The admin port, without a slash at the end."""
        return f"http://127.0.0.1:{self.admin_port}"

    @property
    def pid(self) -> int:
        return self._running.pid

    @property
    def returncode(self) -> int | None:
        """Exit status, or None while it runs."""
        return self._running.poll()

    @property
    def settings_path(self) -> Path:
        return self.directory / "forebay.yaml"

    @property
    def log(self) -> str:
        """The end of what the gateway wrote to standard output and error, over all its starts."""
        path = self.directory / "gateway.log"
        return path.read_text("utf-8", "replace")[-_LOG_TAIL:] if path.exists() else ""

    @property
    def logs(self) -> str:
        """That and the ends of what its workers wrote."""
        workers = sorted((self.directory / "state" / "logs").glob("*.log"))
        ends = [f"{path.name}:\n{path.read_text('utf-8', 'replace')[-_LOG_TAIL:]}" for path in workers]
        return "\n".join([f"gateway log:\n{self.log}", *ends])

    @property
    def _running(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "enter or start the GatewayProcess first"
        return self._process

    async def __aenter__(self) -> Self:
        try:
            self.launch()
            await self.until_ready()
        except BaseException as error:
            error.add_note(self.logs)
            await self.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            error.add_note(self.logs)
        await self.aclose()

    def launch(self) -> None:
        """Write the settings and start the process, again after it has ended; does not wait."""
        assert self._process is None or self._process.poll() is not None, "it still runs"
        self.settings_path.write_text(yaml.safe_dump(self.settings, sort_keys=False), "utf-8")
        with (self.directory / "gateway.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "gateway", "serve", "-c", str(self.settings_path)],
                cwd=_ROOT,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    async def until_ready(self) -> None:
        """Wait for 200 of /health/readiness; raises `GatewayFailedError` if it exits or takes too long."""
        answer = "nothing"
        async with httpx.AsyncClient(trust_env=False, timeout=2.0) as http:
            for _ in range(int(self._start_timeout_s / 0.05)):
                if self.returncode is not None:
                    raise GatewayFailedError(f"exited with {self.returncode} before it was ready\n{self.log}")
                try:
                    response = await http.get(self.url + "/health/readiness")
                    if response.status_code == 200:
                        return
                    answer = f"{response.status_code} {response.text}"
                except httpx.TransportError as error:
                    answer = repr(error)
                await asyncio.sleep(0.05)
        raise GatewayFailedError(f"not ready after {self._start_timeout_s} s, last answer {answer}\n{self.log}")

    async def admin(self, method: str, path: str, body: Any = None, *, status: int = 200) -> Any:
        """Ask the admin port as its admin and return the answer's JSON, which has to have this status."""
        headers = {"authorization": f"Bearer {self.admin_key}"}
        async with httpx.AsyncClient(trust_env=False, timeout=10.0, headers=headers) as http:
            answer = await http.request(method, self.admin_url + path, json=body)
        assert answer.status_code == status, answer.text
        return answer.json()

    def terminate(self) -> None:
        """SIGTERM: drain and stop."""
        self._running.terminate()

    def kill(self) -> None:
        """SIGKILL the gateway alone, not its workers."""
        self._running.kill()

    async def wait(self, timeout_s: float = 30.0) -> int:
        """Wait for the process's end and return the exit status."""
        for _ in range(int(timeout_s / 0.02)):
            if (status := self.returncode) is not None:
                return status
            await asyncio.sleep(0.02)
        raise GatewayFailedError(f"still runs after {timeout_s} s\n{self.log}")

    def descendants(self) -> list[psutil.Process]:
        """Return the processes below the gateway's: workers and their guards."""
        try:
            return psutil.Process(self.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    async def aclose(self) -> None:
        """Stop it: SIGTERM, and SIGKILL to everything of it that is left. Harmless where it does not run."""
        try:
            if self._process is not None:
                await self._stop(self._process)
        finally:
            if self._scratch is not None:
                self._scratch.cleanup()

    async def _stop(self, process: subprocess.Popen[bytes]) -> None:
        below = self.descendants()
        try:
            if process.poll() is None:
                process.terminate()
                await self.wait(self._stop_timeout_s)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            for left in below:
                with contextlib.suppress(psutil.NoSuchProcess):
                    left.kill()
            process.wait()


def attached(url: str, **more: Any) -> dict[str, Any]:
    """Return a model with one worker that is attached: a `FakeEngine`'s url, without `/v1`."""
    return {"workers": [{"engine": "openai", "url": url + "/v1", "probe_continuation": False, **more}]}


def launched_llamacpp(gguf: Path, *, slots: int = 4, context: int = 1024, **more: Any) -> dict[str, Any]:
    """Return a model with one real llama.cpp worker on one thread."""
    launch = {"source": str(gguf), "threads": 1, "slots": slots, "context": context}
    return {"workers": [{"engine": "llamacpp", "launch": launch, **more}]}
