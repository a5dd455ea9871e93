"""Requests as raw as the wire, for tests of what goes wrong: every byte, and every close, is the test's own."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import msgspec

from core.records import RequestRecord
from storage.sql.database import FILE_NAME, Database, sqlite_url
from storage.sql.requests import Requests
from tests.fakes.gateway import GatewayProcess

PATIENCE_S = 15.0  # two busy cores; nothing is expected to take so long


class Kind(NamedTuple):
    """A way to ask for an answer."""

    name: str
    path: str
    body: dict[str, Any]

    @property
    def streams(self) -> bool:
        return bool(self.body.get("stream"))


def kinds(text: str = "Say hello.") -> list[Kind]:
    """Return every way to ask for an answer; `text` stands in the prompt."""
    chat = [{"role": "user", "content": text}]
    whole = [
        Kind("chat", "/v1/chat/completions", {"messages": chat}),
        Kind("completion", "/v1/completions", {"prompt": text}),
        Kind("responses", "/v1/responses", {"input": text}),
        Kind("messages", "/v1/messages", {"messages": chat, "max_tokens": 32}),
    ]
    streamed = [Kind(f"{kind.name}_stream", kind.path, {**kind.body, "stream": True}) for kind in whole]
    return [*whole, *streamed, Kind("embeddings", "/v1/embeddings", {"input": text})]


class Answer(NamedTuple):
    """What came back, to the end of the body."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[bytes]:
        """The stream's frames, comments left out."""
        frames = self.body.split(b"\n\n")
        assert frames.pop() == b"", f"the stream ends inside of a frame: {self.body[-200:]!r}"
        return [frame for frame in frames if not frame.startswith(b":")]

    @property
    def errors(self) -> list[Any]:
        """The errors that stand in the stream."""
        return [event for frame in self.events if (event := event_of(frame)) and is_error(event)]


def event_of(frame: bytes) -> Any:
    data = b"\n".join(line[5:].strip() for line in frame.split(b"\n") if line.startswith(b"data:"))
    return None if data == b"[DONE]" or not data else json.loads(data)


def is_error(event: Any) -> bool:
    return isinstance(event, dict) and bool(event.get("error"))


class Client:
    """One connection. `close` is what a browser does when its tab is closed."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, key: str) -> None:
        self.reader = reader
        self.writer = writer
        self._key = key
        self._is_chunked = False
        self._length: int | None = None

    def write(self, data: bytes) -> None:
        self.writer.write(data)

    def ask(self, path: str, body: Any, *, headers: dict[str, str] | None = None, method: str = "POST") -> None:
        """Send a request; `body` is bytes as they are, anything else as JSON."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = {"host": "localhost", "authorization": f"Bearer {self._key}", "content-type": "application/json"}
        lines |= {"content-length": str(len(raw)), **(headers or {})}
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        self.write(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + raw)

    async def head(self) -> tuple[int, dict[str, str]]:
        """Wait for status and headers."""
        async with asyncio.timeout(PATIENCE_S):
            raw = await self.reader.readuntil(b"\r\n\r\n")
        first, *lines = raw.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
        self._is_chunked = headers.get("transfer-encoding") == "chunked"
        self._length = int(headers["content-length"]) if "content-length" in headers else None
        return int(first.split(" ")[1]), headers

    async def piece(self) -> bytes:
        """Wait for the next chunk of a chunked body; nothing at its end."""
        async with asyncio.timeout(PATIENCE_S):
            size = int(await self.reader.readline(), 16)
            data = await self.reader.readexactly(size + 2)
        return data[:-2]

    async def rest(self) -> bytes:
        """Wait for the rest of the body. Raises `asyncio.IncompleteReadError` if it is cut."""
        if not self._is_chunked:
            async with asyncio.timeout(PATIENCE_S):
                return await (self.reader.readexactly(self._length) if self._length is not None else self.reader.read())
        pieces = []
        while piece := await self.piece():
            pieces.append(piece)
        return b"".join(pieces)

    async def answer(self) -> Answer:
        """Wait for the whole answer."""
        status, headers = await self.head()
        return Answer(status, headers, await self.rest())

    async def closed(self) -> None:
        """Wait until the other side has closed; what it still sends is thrown away."""
        async with asyncio.timeout(PATIENCE_S):
            try:
                while await self.reader.read(2**16):
                    pass
            except ConnectionError:
                return

    def close(self) -> None:
        self.writer.close()


@asynccontextmanager
async def connected(gateway: GatewayProcess, key: str | None = None) -> AsyncIterator[Client]:
    """Open a connection to the data port."""
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port, limit=2**24)
    try:
        yield Client(reader, writer, key or gateway.key)
    finally:
        writer.transport.abort()


async def ask(
    gateway: GatewayProcess,
    path: str,
    body: Any,
    *,
    headers: dict[str, str] | None = None,
    method: str = "POST",
    key: str | None = None,
) -> Answer:
    """Ask on a connection of its own and return the whole answer."""
    async with connected(gateway, key) as client:
        client.ask(path, body, headers=headers, method=method)
        return await client.answer()


async def until(is_so: Callable[[], Awaitable[Any]], what: str, patience_s: float = PATIENCE_S) -> float:
    """Wait until it is so and return how long that took, in seconds."""
    began = time.monotonic()
    while not await is_so():
        assert time.monotonic() - began < patience_s, f"not so after {patience_s:g} s: {what}"
        await asyncio.sleep(0.005)
    return time.monotonic() - began


async def logged(gateway: GatewayProcess, request_id: str) -> dict[str, Any]:
    """Wait for the record of a request in the gateway's database."""
    found: list[RequestRecord] = []
    async with Database(sqlite_url(gateway.directory / "state" / FILE_NAME)) as database:

        async def is_written() -> bool:
            record = await Requests(database).request(request_id)
            found[:] = [record] if record is not None else []
            return bool(found)

        await until(is_written, f"{request_id} is in the request log")
    return dict(msgspec.to_builtins(found[0]))


async def metric(gateway: GatewayProcess, name: str) -> float:
    """Return the sum of a metric's samples."""
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.admin_port)
    try:
        client = Client(reader, writer, gateway.admin_key)
        client.ask("/metrics", b"", method="GET")
        text = (await client.answer()).body.decode()
    finally:
        writer.transport.abort()
    rows = (line for line in text.splitlines() if line.partition("{")[0].partition(" ")[0] == name)
    return sum(float(row.rpartition(" ")[2]) for row in rows)
