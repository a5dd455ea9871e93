"""An engine kind whose workers are ``engines.fake_server`` processes, and a driver that only asks for their health."""

import sys
from collections.abc import AsyncIterator, Callable

import aiohttp

from core.chat import Call
from engines.driver import Capabilities, Chunk, Driver, Health, Load
from engines.engine import Command
from engines.spec import WorkerSpec


class FakeServerEngine:
    """Starts ``python -m engines.fake_server`` with ``launch.args`` as its flags. Remembers ports and keys."""

    def __init__(self) -> None:
        self.starts: list[tuple[int, str]] = []

    def command(self, spec: WorkerSpec, port: int, key: str) -> Command:
        assert spec.launch is not None
        self.starts.append((port, key))
        argv = (sys.executable, "-m", "engines.fake_server", "--port", str(port), *spec.launch.args)
        return Command(argv=argv, env={"FAKE_API_KEY": key})

    def driver(self, spec: WorkerSpec, base_url: str, key: str | None) -> Driver:
        return HealthDriver(base_url)


class HealthDriver:
    """Knows ``GET /health`` and nothing else."""

    def __init__(self, base_url: str) -> None:
        self._url = base_url + "/health"
        self._session: aiohttp.ClientSession | None = None

    async def health(self) -> Health:
        self._session = self._session or aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2.0))
        try:
            async with self._session.get(self._url) as response:
                if response.status == 200:
                    return "ok"
                return "loading" if response.status == 503 else "unhealthy"
        except (aiohttp.ClientError, TimeoutError):
            return "unreachable"

    async def load(self) -> Load | None:
        return Load(running=1)

    async def capabilities(self) -> Capabilities:
        return Capabilities(endpoints=("/health",), context_tokens=4096)

    async def settle(self, num_expected: Callable[[], int]) -> None:
        return

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    def run(self, call: Call) -> AsyncIterator[Chunk]:
        raise NotImplementedError

    def reports_progress(self, call: Call) -> bool:
        raise NotImplementedError

    async def tokenize(self, body: dict[str, object]) -> dict[str, object]:
        raise NotImplementedError

    async def detokenize(self, body: dict[str, object]) -> dict[str, object]:
        raise NotImplementedError

    async def count_tokens(self, body: dict[str, object]) -> dict[str, object]:
        raise NotImplementedError
