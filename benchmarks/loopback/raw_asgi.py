"""The floor for a gateway in Python: an ASGI callable and aiohttp, bytes through, nothing looked at."""

import os
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp

TARGET = os.environ.get("UPSTREAM", "") + "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
clients: list[aiohttp.ClientSession] = []


async def app(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    """Passes a completion to the engine and its answer back; any GET is the health check."""
    if scope["type"] == "lifespan":
        return await lifespan(receive, send)
    if scope["method"] == "GET":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        return await send({"type": "http.response.body"})
    message = await receive()
    body: bytes = message["body"]
    while message["more_body"]:
        message = await receive()
        body += message["body"]
    async with clients[0].post(TARGET, data=body, headers=JSON) as answer:
        kind = answer.headers["Content-Type"].encode()
        start: dict[str, Any] = {"type": "http.response.start", "status": answer.status}
        if kind.startswith(b"text/event-stream"):
            await send({**start, "headers": [(b"content-type", kind)]})
            async for part in answer.content.iter_any():
                await send({"type": "http.response.body", "body": part, "more_body": True})
            return await send({"type": "http.response.body"})
        whole = await answer.read()
        size = str(len(whole)).encode()
        await send({**start, "headers": [(b"content-type", kind), (b"content-length", size)]})
        return await send({"type": "http.response.body", "body": whole})


async def lifespan(receive: Receive, send: Send) -> None:
    """Holds one client session with no limit of connections from startup to shutdown."""
    await receive()
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, auto_decompress=False) as client:
        clients.append(client)
        await send({"type": "lifespan.startup.complete"})
        await receive()
    await send({"type": "lifespan.shutdown.complete"})
