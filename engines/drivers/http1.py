"""HTTP/1.1 over plain TCP, as much of it as engines need, on uvloop's transports and the C parser that uvicorn uses.

It stands in aiohttp's place because that takes a third of the CPU time of a request (``docs/adr/0005``). What it leaves
out is what an engine never asks of us, or what ``http_remote.py`` has: TLS, proxies, redirects, cookies, compression.
"""

import asyncio
import re
from collections.abc import Mapping

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser
from yarl import URL

from core.errors import ConnectTimeout, WorkerLost, WorkerUnreachable
from engines.drivers.http import Response

_READ_AHEAD_BYTES = 2**19  # of a stream that nobody reads; then the engine has to wait
_MAX_HEAD_BYTES = 2**16
_FINAL = 200  # statuses below are of interim answers: 100 Continue, 103 Early Hints
_INTERIM = re.compile(rb"HTTP/1\.\d 1")
_LENGTH = re.compile(rb"\r\n(?:content-length|transfer-encoding):", re.IGNORECASE)


class Http1:
    """See ``Http``. ``headers`` go with every request. For one event loop."""

    KEEPALIVE_S = 4.0  # less than the 5 s after which uvicorn, and so vLLM, closes an idle connection

    def __init__(self, base: URL, headers: Mapping[str, str], *, reuses_connections: bool) -> None:
        self._base = base
        self._address = (base.host or "", base.port or 80)
        self.reuses_connections = reuses_connections
        own = {"host": base.authority} if reuses_connections else {"host": base.authority, "connection": "close"}
        self._headers = _lines({**own, **headers})
        self._heads: dict[tuple[str, str], bytes] = {}  # paths are few
        self._idle: dict[_Connection, None] = {}  # the longest idle first
        self._open: set[_Connection] = set()
        self._sweeper: asyncio.TimerHandle | None = None
        self._is_closed = False

    async def send(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes | None, *, connect_timeout: float
    ) -> Response:
        """See ``Http``."""
        head = self._heads.get((method, path))
        if head is None:
            target = URL(str(self._base) + path).raw_path_qs
            head = self._heads[method, path] = f"{method} {target} HTTP/1.1\r\n".encode("ascii") + self._headers
        length = b"" if body is None else b"content-length: %d\r\n" % len(body)
        request = b"%b%b%b\r\n%b" % (head, _lines(headers), length, body or b"")
        connection = self._kept() or await self._connected(connect_timeout)
        connection.begin(request)
        return connection

    async def close(self) -> None:
        """See ``Http``."""
        self._is_closed = True
        for connection in tuple(self._open):
            connection.abort()
        if self._sweeper is not None:
            self._sweeper.cancel()

    async def _connected(self, timeout_s: float) -> "_Connection":
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout_s):
                _, connection = await loop.create_connection(lambda: _Connection(self, loop), *self._address)
        except TimeoutError as error:
            raise ConnectTimeout(f"the worker at {self._base} did not accept a connection in time") from error
        except OSError as error:
            raise WorkerUnreachable(f"the worker at {self._base} cannot be reached") from error
        if self._is_closed:  # meanwhile, or before
            connection.abort()
            raise WorkerUnreachable(f"the worker at {self._base} is not in use any more")
        return connection

    def lost(self) -> WorkerLost:
        """Return the error of who waits on a connection that has broken."""
        return WorkerLost(f"the worker at {self._base} broke the connection")

    # Connections, and those that wait for the next request: the one that was used last is used next

    def add(self, connection: "_Connection") -> None:
        """Know of a connection that is open."""
        self._open.add(connection)

    def discard(self, connection: "_Connection") -> None:
        """Forget a connection that is closed."""
        self._open.discard(connection)
        self._idle.pop(connection, None)

    def keep(self, connection: "_Connection") -> None:
        """Keep a connection for the next request."""
        self._idle[connection] = None
        if self._sweeper is None:
            self._sweeper = asyncio.get_running_loop().call_later(self.KEEPALIVE_S, self._sweep)

    def _kept(self) -> "_Connection | None":
        while self._idle:
            connection, _ = self._idle.popitem()
            if connection.is_fresh():
                return connection
            connection.abort()
        return None

    def _sweep(self) -> None:
        """Close what has not been used for long."""
        self._sweeper = None
        while self._idle and not (oldest := next(iter(self._idle))).is_fresh():
            del self._idle[oldest]
            oldest.abort()
        if self._idle:
            self._sweeper = asyncio.get_running_loop().call_later(self.KEEPALIVE_S, self._sweep)


class _Connection(asyncio.Protocol):
    """One connection, and the answer to the request that it carries now: a ``Response``.

    The head is kept as it came, for the few times that a header is asked for; none is looked at otherwise.
    """

    _transport: asyncio.Transport

    def __init__(self, origin: Http1, loop: asyncio.AbstractEventLoop) -> None:
        self._origin = origin
        self._loop = loop
        self._parser = HttpResponseParser(self)
        self._waiter: asyncio.Future[None] | None = None
        self._body: list[bytes] = []
        self._num_bytes = 0
        self._head = b""
        self._is_lost = False
        self._wants_all = False
        self._keeps_alive = False
        self._idle_since = 0.0
        self.is_complete = True  # nothing is awaited
        self.status = 0

    def begin(self, request: bytes) -> None:
        """Send a request, all at once, and expect its answer."""
        self._head = b""
        self._wants_all = self._keeps_alive = self.is_complete = False
        self.status = 0
        self._transport.write(request)

    def is_fresh(self) -> bool:
        """Whether a request may be sent on it: its server has not closed it, and is not about to."""
        return not self._transport.is_closing() and self._loop.time() - self._idle_since < self._origin.KEEPALIVE_S

    def abort(self) -> None:
        """Close it at once."""
        self._transport.abort()

    def release(self) -> None:
        """Keep the connection for the next request if nothing is left of this one; close it otherwise."""
        is_clean = self.is_complete and not self._body and not self._transport.get_write_buffer_size()
        self._body = []
        self._num_bytes = 0
        if is_clean and self._keeps_alive and not self._transport.is_closing():
            self._idle_since = self._loop.time()
            self._origin.keep(self)
        else:
            self._transport.abort()

    async def readany(self) -> bytes:
        """See ``Response``."""
        while not self._body:
            if self.is_complete:
                return b""
            await self._news()
        return self._take()

    async def read(self) -> bytes:
        """See ``Response``."""
        self._wants_all = True
        self._listen()
        while not self.is_complete:
            await self._news()
        return self._take()

    def header(self, name: str) -> str | None:
        """See ``Response``."""
        found = re.search(rb"\r\n%b:([^\r]*)" % re.escape(name.encode()), self._last_head(), re.IGNORECASE)
        return found[1].decode("latin-1").strip() if found is not None else None

    def _last_head(self) -> bytes:
        """Return the head of the answer without those of interim answers before it."""
        head, _, rest = self._head.partition(b"\r\n\r\n")
        while _INTERIM.match(head):
            head, _, rest = rest.partition(b"\r\n\r\n")
        return head

    def _take(self) -> bytes:
        body, self._body = self._body, []
        self._listen()
        self._num_bytes = 0
        return body[0] if len(body) == 1 else b"".join(body)

    def _listen(self) -> None:
        """Let the engine go on if it was made to wait."""
        if self._num_bytes > _READ_AHEAD_BYTES and not self._transport.is_closing():
            self._transport.resume_reading()

    async def _news(self) -> None:
        if self._is_lost:
            raise self._origin.lost()
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # What the event loop tells

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._transport = transport  # type: ignore[assignment] # a stream's
        self._origin.add(self)

    def data_received(self, data: bytes) -> None:
        """Take what has come; of an answer that is wanted in one piece, wake its reader at the end only."""
        if self.is_complete:
            self._transport.abort()  # nobody has asked for this
            return
        if not self.status:
            self._head += data
        try:
            self._parser.feed_data(data)
        except (HttpParserError, HttpParserUpgrade):
            self._keeps_alive = False
            if not self.is_complete:
                self._transport.abort()
                return
        if self._num_bytes > _READ_AHEAD_BYTES and not self._wants_all:
            self._transport.pause_reading()
        if not self.status and len(self._head) > _MAX_HEAD_BYTES:
            self._transport.abort()
        elif self.is_complete or (self._body and not self._wants_all):
            self._wake()

    def eof_received(self) -> None:
        """Note an answer that ends with its connection: one that does not say its length."""
        if self.status and not _LENGTH.search(self._last_head()):
            self.is_complete = True

    def connection_lost(self, error: Exception | None) -> None:
        """Note the end."""
        self._is_lost = True
        self._origin.discard(self)
        self._wake()

    # What the parser tells

    def on_headers_complete(self) -> None:
        """Note the status, unless it is an interim answer's; a second answer to one request spoils the connection."""
        if self.is_complete:
            self._keeps_alive = False
        elif (status := self._parser.get_status_code()) >= _FINAL:
            self.status = status

    def on_body(self, body: bytes) -> None:
        """Keep a piece for who reads."""
        if not self.is_complete:
            self._body.append(body)
            self._num_bytes += len(body)

    def on_message_complete(self) -> None:
        """The answer is whole."""
        if self.status and not self.is_complete:
            self.is_complete = True
            self._keeps_alive = self._origin.reuses_connections and self._parser.should_keep_alive()


def _lines(headers: Mapping[str, str]) -> bytes:
    """Return the headers for the wire. Raises ``ValueError`` where one would be two."""
    lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
    if lines.count("\r") != len(headers) or lines.count("\n") != len(headers):
        raise ValueError("a header has a line break in it")
    return lines.encode("latin-1")
