"""Listens in an engine's place, passes everything on to the engine that it starts, and writes down what was said.

``program`` makes a file that can be given as a worker's program. For each chat and completion, however it ended, one
JSON line is added to the record: when it came, its path, what the engine was told (its prompt as text, where that is
one), and the text that it answered. What is under way when the process is killed is lost, as anything would be.
"""

import asyncio
import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

_ROOT = Path(__file__).resolve().parents[2]
_RECORDED = ("/v1/chat/completions", "/v1/completions")
_DROPPED = {"host", "transfer-encoding", "connection", "content-length"}


def program(directory: Path, engine: str = sys.executable) -> tuple[Path, Path]:
    """Write the program, which starts ``engine`` with the arguments it is given; return it and the record's path."""
    script, record = directory / "engine", directory / "record.jsonl"
    recorder = [sys.executable, "-m", "tests.fakes.recorder", str(record), engine]
    script.write_text(f'#!/bin/sh\nexport PYTHONPATH={shlex.quote(str(_ROOT))}\nexec {shlex.join(recorder)} "$@"\n')
    script.chmod(0o700)
    record.touch()
    return script, record


class Recorder:
    """Everything between a client and the engine on ``inner``."""

    def __init__(self, inner: int, record: Path) -> None:
        self._url = f"http://127.0.0.1:{inner}"
        self._record = record
        self._session: aiohttp.ClientSession | None = None

    async def answer(self, request: web.Request) -> web.StreamResponse:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, force_close=True), timeout=aiohttp.ClientTimeout(total=None)
            )
        raw = await request.read()
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _DROPPED}
        told: dict[str, Any] | None = None
        if request.path in _RECORDED:
            body = json.loads(raw)
            prompt = await self._text_of(body.get("prompt"), headers)
            told = {"at": time.time(), "path": request.path, "prompt": prompt, "messages": body.get("messages")}
        said = bytearray()
        try:
            async with self._session.request(
                request.method, self._url + request.path_qs, data=raw, headers=headers
            ) as upstream:
                kept = {name: value for name, value in upstream.headers.items() if name.lower() not in _DROPPED}
                response = web.StreamResponse(status=upstream.status, headers=kept)
                await response.prepare(request)
                async for piece in upstream.content.iter_any():
                    said += piece
                    await response.write(piece)
                await response.write_eof()
                return response
        except aiohttp.ClientConnectorError:
            return web.Response(status=503)
        finally:
            if told is not None:
                self._write({**told, "said": said.decode("utf-8", "replace")})

    async def _text_of(self, prompt: Any, headers: dict[str, str]) -> Any:
        if not (isinstance(prompt, list) and prompt and isinstance(prompt[0], int)):
            return prompt
        assert self._session is not None
        async with self._session.post(f"{self._url}/detokenize", json={"tokens": prompt}, headers=headers) as answer:
            found = await answer.json()
        return found.get("content", found.get("prompt"))

    def _write(self, line: dict[str, Any]) -> None:
        with self._record.open("a") as record:
            record.write(json.dumps(line) + "\n")


async def serve(record: Path, argv: list[str]) -> int:
    """Start the engine on a free port in place of its own, and listen there until it ends."""
    at = argv.index("--port") + 1
    port = int(argv[at])
    holder = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    inner = int(holder.sockets[0].getsockname()[1])
    holder.close()
    await holder.wait_closed()
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = await asyncio.create_subprocess_exec(*argv[:at], str(inner), *argv[at + 1 :], env=env)
    app = web.Application(client_max_size=2**27)
    app.router.add_route("*", "/{path:.*}", Recorder(inner, record).answer)
    runner = web.AppRunner(app, access_log=None, handle_signals=False, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    return await process.wait()


if __name__ == "__main__":
    os.chdir(_ROOT)
    sys.exit(asyncio.run(serve(Path(sys.argv[1]), sys.argv[2:])))
