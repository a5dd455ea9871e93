"""A fake engine in a process of its own, for tests of whatever stands in front of it."""

import asyncio
import contextlib
import json
import os
import signal
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp

_ROOT = Path(__file__).resolve().parents[2]
_START_S = 20.0


class EngineExitedError(Exception):
    """The engine ended before it was ready; `args` hold its exit status."""


class FakeEngine:
    """`python -m engines.fake_server` as an async context manager.

    Options are the command line's flags with underscores: `FakeEngine(tokens=8, itl_ms=5, spawn_child=True)`;
    True is a bare flag, None and False leave it out, a list repeats it. On leaving, the whole process group is
    killed; so is the engine if the test process dies.
    """

    def __init__(self, *, env: dict[str, str] | None = None, **options: Any) -> None:
        self._flags = list(_flags(options))
        self._env = {**os.environ, **(env or {})}
        self._process: asyncio.subprocess.Process | None = None
        self._session: aiohttp.ClientSession | None = None
        self.port = 0

    @property
    def url(self) -> str:
        """`http://127.0.0.1:PORT`, without a slash at the end; routes are below it, as in `url + "/v1/models"`."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        return self._running.pid

    @property
    def returncode(self) -> int | None:
        """Exit status, or None while it runs."""
        return self._running.returncode

    @property
    def session(self) -> aiohttp.ClientSession:
        """A client that lives as long as the engine."""
        assert self._session is not None, "enter the FakeEngine first"
        return self._session

    @property
    def _running(self) -> asyncio.subprocess.Process:
        assert self._process is not None, "enter the FakeEngine first"
        return self._process

    async def __aenter__(self) -> Self:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "engines.fake_server",
            "--exit-on-stdin-eof",
            *self._flags,
            cwd=_ROOT,
            env=self._env,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        try:
            assert self._process.stdout is not None
            line = await asyncio.wait_for(self._process.stdout.readline(), _START_S)
            if not line:
                raise EngineExitedError(await self._process.wait())
            self.port = json.loads(line)["port"]
            self._session = aiohttp.ClientSession()
        except BaseException:
            await self._end()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._end()

    async def _end(self) -> None:
        if self._session is not None:
            await self._session.close()
        process = self._running
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
        if process.stdin is not None:
            process.stdin.close()
            with contextlib.suppress(ConnectionError):
                await process.stdin.wait_closed()

    async def stats(self) -> dict[str, Any]:
        """Return /fake/stats."""
        async with self.session.get(self.url + "/fake/stats") as response:
            stats: dict[str, Any] = await response.json()
            return stats

    async def until(self, **wanted: Any) -> dict[str, Any]:
        """Wait until the stats have these values, and return them; fails after five seconds."""
        stats: dict[str, Any] = {}
        for _ in range(500):
            stats = await self.stats()
            if all(stats[name] == value for name, value in wanted.items()):
                return stats
            await asyncio.sleep(0.01)
        raise AssertionError(f"wanted {wanted}, have { {name: stats[name] for name in wanted} }")

    async def faults(self, **faults: Any) -> None:
        """Replace the faults in force; none given means none in force."""
        async with self.session.post(self.url + "/fake/faults", json=faults) as response:
            assert response.status == 200, await response.text()

    async def reset(self) -> None:
        """Drop faults, counters, recorded requests and the prefix cache."""
        async with self.session.post(self.url + "/fake/reset") as response:
            assert response.status == 200

    def kill(self) -> None:
        """SIGKILL the engine, not its child."""
        self._running.kill()

    def terminate(self) -> None:
        """SIGTERM the engine, not its child."""
        self._running.terminate()

    async def wait(self) -> int:
        """Wait for its end and return the exit status."""
        return await self._running.wait()


def _flags(options: dict[str, Any]) -> list[str]:
    flags = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        for one in value if isinstance(value, list | tuple) else [value]:
            if one is True:
                flags.append(flag)
            elif one is not None and one is not False:
                flags.append(f"{flag}={one}")
    return flags
