"""A server that says what a test wants, byte for byte, to an HTTP client."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

from yarl import URL

from engines.drivers.http import Http, Response
from engines.drivers.http1 import Http1
from engines.drivers.http_remote import RemoteHttp

WHOLE = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello"

Kind = type[Http1 | RemoteHttp]
Peer = Callable[["Talk"], Awaitable[None]]


class Talk:
    """One connection, as its server sees it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.heads: list[bytes] = []
        self.bodies: list[bytes] = []

    async def heard(self) -> None:
        """Take one request."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        self.heads.append(head)
        lines = [line.lower().split(b": ") for line in head.splitlines()]
        length = next((int(line[1]) for line in lines if line[0] == b"content-length"), 0)
        self.bodies.append(await self.reader.readexactly(length))


@asynccontextmanager
async def serving(peer: Peer, kind: Kind, *, reuses_connections: bool = True) -> AsyncIterator[tuple[Http, list[Talk]]]:
    talks: list[Talk] = []
    tasks: list[asyncio.Task[None] | None] = []

    async def on_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.append(asyncio.current_task())
        talks.append(Talk(reader, writer))
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            await peer(talks[-1])
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()

    server = await asyncio.start_server(on_connection, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    http = kind(URL(f"http://127.0.0.1:{port}/base"), {"accept": "*/*"}, reuses_connections=reuses_connections)
    try:
        async with asyncio.timeout(30):
            yield http, talks
    finally:
        await http.close()
        for _ in range(10):  # what is being accepted gets a task, too
            await asyncio.sleep(0)
        server.close()
        await asyncio.gather(*[task for task in tasks if task is not None])


def saying(*parts: bytes, then: Peer | None = None) -> Peer:
    """Answer every request with these bytes, part by part."""

    async def peer(talk: Talk) -> None:
        while True:
            await talk.heard()
            for part in parts:
                talk.writer.write(part)
                await talk.writer.drain()
                await asyncio.sleep(0)
            if then is not None:
                await then(talk)

    return peer


async def hang_up(talk: Talk) -> None:
    raise ConnectionError


async def hold(talk: Talk) -> None:
    await talk.reader.read()
    raise ConnectionError


class Farewell:
    """A peer that tells when its client has closed the connection."""

    def __init__(self) -> None:
        self.has_come = asyncio.Event()

    async def __call__(self, talk: Talk) -> None:
        with suppress(ConnectionError):
            await talk.reader.read()
        self.has_come.set()
        raise ConnectionError


async def post(http: Http, body: bytes = b"{}") -> Response:
    return await http.send("POST", "/v1/x", {"x-request-id": "r"}, body, connect_timeout=5)


async def asked(http: Http, body: bytes = b"{}") -> tuple[int, bytes]:
    response = await post(http, body)
    try:
        answer = await response.read()
        return response.status, answer
    finally:
        response.release()
