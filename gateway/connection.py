"""A client's connection: uvicorn's protocol, which here also tells when the client has gone and bounds its headers."""

import asyncio
import re
from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from core.chat import Endpoint
from core.ids import new_request_id

EXTENSION = "forebay.connection"
MAX_HEADER_BYTES = 64 * 1024
MAX_RAW_HEADER_BYTES = MAX_HEADER_BYTES + 2**18  # the end of an earlier request may have come with the head
_LINGER_S = 5.0
_UPGRADE = re.compile(rb"(?<=\r\n)(?i:upgrade):[^\r\n]*\r\n")

if TYPE_CHECKING:
    from uvicorn.config import Config
    from uvicorn.server import ServerState


def _never() -> bool:
    return False


class Corked:
    """A transport that can hold writes back for a moment, so that what belongs together leaves in one system call."""

    __slots__ = ("_held", "_lingers", "_transport", "is_lingering")

    def __init__(self, transport: asyncio.Transport, lingers: Callable[[], bool]) -> None:
        self._transport = transport
        self._lingers = lingers
        self._held: list[bytes] | None = None
        self.is_lingering = False

    def cork(self) -> None:
        """Hold what is written until ``uncork``."""
        self._held = []

    def uncork(self) -> None:
        """Write what was held."""
        held, self._held = self._held, None
        if held:
            self._transport.write(b"".join(held))

    def write(self, data: bytes) -> None:
        """Write, or hold."""
        if self._held is None:
            self._transport.write(data)
        else:
            self._held.append(data)

    def close(self) -> None:
        """Write what is held, then close.

        While the client still sends, only our half: closing the other would throw away an answer it has not read yet.
        """
        self.uncork()
        if not self._transport.is_closing() and not self.is_lingering and self._lingers():
            self.is_lingering = True
            self._transport.write_eof()
        else:
            self._transport.close()

    def release(self) -> None:
        """The connection is gone: forget whose it was."""
        self._lingers = _never

    def abort(self) -> None:
        """Close at once and throw away what has not been sent."""
        self._transport.abort()

    def is_closing(self) -> bool:
        """Whether it is closed or about to be."""
        return self.is_lingering or self._transport.is_closing()

    def pause_reading(self) -> None:
        """See ``asyncio.Transport``."""
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        """See ``asyncio.Transport``."""
        self._transport.resume_reading()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """See ``asyncio.Transport``."""
        return self._transport.get_extra_info(name, default)


class Connection(HttpToolsProtocol):
    """One connection of the data or admin port; found in ``scope["extensions"]`` under ``EXTENSION``.

    Why not ASGI's ``http.disconnect``: hearing it takes a task per request, and none may be lost to middleware.
    """

    def __init__(
        self,
        config: "Config",
        server_state: "ServerState",
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._on_gone: Callable[[], None] | None = None
        self._on_room: Callable[[], None] | None = None
        self._num_header_bytes = 0
        self._num_raw_bytes = 0
        self._lingers_since = 0.0
        self._head_since: float | None = self.loop.time()
        self._body_since: float | None = None
        self._has_begun = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin, with a transport that can be corked."""
        self.corked = Corked(transport, self._expects_more)
        super().connection_made(self.corked)  # type: ignore[arg-type] # all of a transport that uvicorn uses

    def data_received(self, data: bytes) -> None:
        """Parse what comes, unless all has been said already, or the head does not end."""
        if self.corked.is_lingering:
            return
        if self._body_since is None and b"pgrade:" in data:
            head, end, rest = data.partition(b"\r\n\r\n")
            data = _UPGRADE.sub(b"", head + end) + rest  # we offer none, and the parser would throw the body away
        super().data_received(data)
        if self._head_since is not None and self._has_begun:
            self._num_raw_bytes += len(data)
            if self._num_raw_bytes > MAX_RAW_HEADER_BYTES and not self.transport.is_closing():
                self._refuse(431, "headers_too_large", f"the headers have more than {MAX_HEADER_BYTES} bytes")

    def _expects_more(self) -> bool:
        """Whether the client is in the middle of a request, and may not read before it has sent it."""
        if self._body_since is None and (self._head_since is None or not self._has_begun):
            return False
        self._lingers_since = self.loop.time()
        self.flow.resume_reading()
        return True

    @property
    def lags(self) -> bool:
        """Whether the client has not taken what was written before, or has gone."""
        return self.flow.write_paused or self.corked.is_closing()

    def begin(self, send: Callable[[Any], Any], head: bytes, num_bytes: int | None) -> None:
        """Write the head of the answer that ``send`` is for; its body, ``num_bytes`` or chunked, goes through ``send``.

        ``head`` is the status line and headers, ready for the wire. Uvicorn would search each of them by two regular
        expressions; ours hold nothing but settings, numbers and ids that were checked when they came.
        """
        # Not self.cycle: a client that does not wait has asked again by now.
        cycle: RequestResponseCycle = send.__self__  # type: ignore[attr-defined] # a bound method of it
        cycle.response_started = True
        cycle.waiting_for_100_continue = False
        cycle.chunked_encoding = num_bytes is None
        cycle.expected_content_length = num_bytes or 0
        self.corked.write(
            head
            + (b"" if cycle.keep_alive else b"connection: close\r\n")
            + (
                b"transfer-encoding: chunked\r\n\r\n"
                if num_bytes is None
                else b"content-length: %d\r\n\r\n" % num_bytes
            )
        )

    def try_write(self, frames: bytes) -> bool:
        """Write a piece of a streamed answer that has begun; False, and nothing written, if the client lags."""
        if self.flow.write_paused or self.corked.is_closing():
            return False
        self.corked.write(b"%x\r\n%b\r\n" % (len(frames), frames))
        return True

    def watch(self, on_gone: Callable[[], None], on_room: Callable[[], None] | None = None) -> None:
        """From now on call ``on_gone`` once if the client closes its connection, ``on_room`` when it has caught up."""
        self._on_gone = on_gone
        self._on_room = on_room
        self.flow.resume_reading()  # a big body may have paused it; without reading, a close goes unnoticed
        if self.transport.is_closing():
            self.loop.call_soon(self._tell)

    def unwatch(self) -> None:
        """The request is over: the connection's end is of no interest to it."""
        self._on_gone = self._on_room = None

    def resume_writing(self) -> None:
        """Tell who waits that the client has taken what was written."""
        super().resume_writing()
        if self._on_room is not None:
            self._on_room()

    def abort(self) -> None:
        """Close at once and throw away what has not been sent."""
        if self.cycle is not None:
            self.cycle.disconnected = True  # else uvicorn complains that the answer is not complete
        self.transport.abort()

    def close_if_late(self, now: float, header_timeout: float, body_timeout: float) -> None:
        """Close a connection whose request does not get complete; one that has begun a request is told why."""
        if self.corked.is_lingering:
            if now - self._lingers_since > _LINGER_S:
                self.corked.abort()
        elif self._head_since is not None and now - self._head_since > header_timeout:
            if self._has_begun:
                self._refuse(408, "request_timeout", f"the headers were not complete within {header_timeout:g} s")
            else:
                self.transport.close()
        elif self._body_since is not None and now - self._body_since > body_timeout:
            self._refuse(408, "request_timeout", f"the body was not complete within {body_timeout:g} s")

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell whoever watches, then do what uvicorn does, and let go of all that leads back here.

        A cycle stays until the garbage collector comes by; a client that leaves would leave its request and answer.
        """
        super().connection_lost(exc)
        self._unset_keepalive_if_required()  # uvicorn forgets it after a reset: the timer would hold all of this
        self._tell()
        self.cycle = self.scope = None  # type: ignore[assignment] # as uvicorn has it before the first request
        self.corked.release()

    def on_message_begin(self) -> None:
        """Start the clock for the headers."""
        super().on_message_begin()
        self._has_begun = True
        self._num_header_bytes = self._num_raw_bytes = 0
        self._head_since = self.loop.time()

    def on_headers_complete(self) -> None:
        """Put the connection where handlers find it, unless there are too many bytes of headers."""
        self._num_header_bytes = sum([len(name) + len(value) for name, value in self.headers])
        if self._num_header_bytes > MAX_HEADER_BYTES:
            raise ValueError("headers too large")
        self._head_since = None
        self._body_since = self.loop.time()
        self.scope["extensions"] = {EXTENSION: self}  # type: ignore[dict-item]
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Stop the clock: the request is whole."""
        self._body_since = None
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP, or too much of it, in the envelope that clients read."""
        if self._num_header_bytes > MAX_HEADER_BYTES:
            self._refuse(431, "headers_too_large", f"the headers have more than {MAX_HEADER_BYTES} bytes")
        else:
            self._refuse(400, "invalid_http", msg)

    def _refuse(self, status: int, code: str, message: str) -> None:
        """Answer for the application, which has not seen the request whole, and close."""
        if self.pipeline or (
            self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete
        ):
            self.transport.abort()  # an answer is under way: nothing may stand in its middle
            return
        request_id = new_request_id()
        error = {"message": message, "type": "invalid_request_error", "code": code}
        is_anthropic = self.scope is not None and self.scope.get("path", "").startswith(Endpoint.MESSAGES)
        body = msgspec.json.encode(
            {"type": "error", "error": error, "request_id": request_id}
            if is_anthropic
            else {"error": {**error, "param": None}}
        )
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
            f"x-request-id: {request_id}\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        self.transport.write(head.encode("ascii") + body)
        self.transport.close()

    def _tell(self) -> None:
        on_gone, self._on_gone = self._on_gone, None
        if on_gone is not None:
            on_gone()


def close_late(connections: Iterable[Any], now: float, *, header_timeout: float, body_timeout: float) -> None:
    """Close every connection whose client does not get on with its request. ``now`` is the loop's time."""
    for connection in tuple(connections):
        if isinstance(connection, Connection):
            connection.close_if_late(now, header_timeout, body_timeout)
