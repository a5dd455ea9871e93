"""An engine that says what a test tells it to, byte for byte; it lives in the test's own event loop."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from aiohttp import web

Script = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Replay:
    """Serves `/v1/models` (ids `models`), `/health`, and whatever `says` was given; an async context manager.

    `bodies` are the requests' bodies in the order of arrival. `is_silent` makes the probes hang, as a starved
    machine would.
    """

    def __init__(self, *models: str, port: int = 0) -> None:
        self.port = port
        self.bodies: list[Any] = []
        self.is_silent = False
        self._models = models or ("smol",)
        self._scripts: dict[str, Script] = {}
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        app = web.Application(client_max_size=2**27)
        app.router.add_get("/v1/models", self._list)
        app.router.add_get("/health", self._health)
        app.router.add_route("POST", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, handle_signals=False, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()
        self.port = self._runner.addresses[0][1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Close the port and every connection."""
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()

    def says(self, path: str, script: Script) -> None:
        """Answer this path by the script from now on."""
        self._scripts[path] = script

    def says_stream(self, path: str, pieces: Iterable[bytes], *, pause_s: float = 0.0) -> None:
        """Answer this path with these writes, one by one."""
        kept = list(pieces)

        async def script(request: web.Request) -> web.StreamResponse:
            return await stream(request, kept, pause_s=pause_s)

        self.says(path, script)

    def says_json(self, path: str, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        """Answer this path with a JSON body."""

        async def script(request: web.Request) -> web.StreamResponse:
            return web.json_response(value, status=status, headers=headers)

        self.says(path, script)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.bodies.append(json.loads(await request.read()))
        script = self._scripts.get(request.path)
        return await script(request) if script is not None else web.json_response({"error": {}}, status=404)

    async def _list(self, request: web.Request) -> web.StreamResponse:
        await self._probed()
        return web.json_response({"object": "list", "data": [{"id": name} for name in self._models]})

    async def _health(self, request: web.Request) -> web.StreamResponse:
        await self._probed()
        return web.Response()

    async def _probed(self) -> None:
        if self.is_silent:
            await asyncio.get_running_loop().create_future()


async def stream(request: web.Request, pieces: Iterable[bytes], *, pause_s: float = 0.0) -> web.StreamResponse:
    """Send an event stream, one write for each piece."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
    await response.prepare(request)
    for piece in pieces:
        await response.write(piece)
        await asyncio.sleep(pause_s)
    return response


def recording(path: Path) -> tuple[str, dict[str, Any], bytes]:
    """Return path, request and stream of a recording: `NAME.sse`, with `NAME.json` beside it."""
    told = json.loads(path.with_suffix(".json").read_text("utf-8"))
    return told["path"], told["request"], path.read_bytes()
