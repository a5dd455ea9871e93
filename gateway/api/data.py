"""The hot routes of the data port, as one raw ASGI application in front of FastAPI's.

Every request takes this path: key, body, call, scheduler, and the answer as it comes. It is written for speed: no
middleware, no task beside the engine's, one pass over the headers. The routes stand in the OpenAPI document all the
same (``gateway/api/document.py``).
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from functools import partial
from typing import Any

import msgspec
import structlog

from core.chat import Call, Endpoint
from core.clock import Clock
from core.completer import Served
from core.errors import (
    ConnectionLimit,
    Draining,
    ForebayError,
    InternalError,
    InvalidRequest,
    MethodNotAllowed,
    RequestTooLarge,
)
from core.ids import RequestId, TenantId, new_request_id
from core.records import CLIENT_LEFT
from engines.run import Run
from gateway.accounts import record_of
from gateway.admission import Admission, Admitted
from gateway.auth import Principal
from gateway.books import Books
from gateway.chat import ChatService
from gateway.connection import EXTENSION, Connection
from gateway.directory import Directory
from gateway.egress import Egress, may_name_addresses
from gateway.errors import body_of, frame_of, headers_of, status_of
from gateway.live import Live
from gateway.logs import REQUEST
from gateway.metrics import Metrics
from gateway.requests import read_call, request_id_of
from gateway.responses.question import refers_to_others
from gateway.tracing import Trace, Tracing

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]

_log = structlog.get_logger(__name__)

# llama.cpp's and LiteLLM's clients leave the prefix out.
_ROUTES: dict[str, Endpoint] = {
    path: endpoint for endpoint in Endpoint for path in (endpoint.value, endpoint.value.removeprefix("/v1"))
}
_JSON = (b"content-type", b"application/json")
_CACHE = (b"x-forebay-cache", b"disabled")
_HEAD = (
    b"HTTP/1.1 200 OK\r\n"
    b"x-request-id: %b\r\n"
    b"request-id: %b\r\n"  # where Anthropic's client looks
    b"x-forebay-model: %b\r\n"
    b"x-forebay-worker: %b\r\n"
    b"x-forebay-attempts: %d\r\n"
    b"x-forebay-queue-ms: %.2f\r\n"
    b"x-forebay-overhead-ms: %.2f\r\n"
    b"x-forebay-cache: disabled\r\n"
)
_WHOLE_HEAD = b"content-type: application/json\r\n"
_STREAM_HEAD = b"content-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\nx-accel-buffering: no\r\n"


class _Exchange:
    """One request and its answer on one connection."""

    __slots__ = (
        "admitted",
        "call",
        "connection",
        "error",
        "first_byte_at",
        "handed_over",
        "has_body",
        "has_left",
        "headers",
        "id",
        "is_counted",
        "principal",
        "run",
        "send",
        "served",
        "started_at",
        "status",
        "task",
        "trace",
    )

    def __init__(self, scope: Scope, send: Send, now: float) -> None:
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.connection: Connection = scope["extensions"][EXTENSION]
        self.id: RequestId = request_id_of(self.headers) or new_request_id()
        self.send = send
        self.started_at = now
        self.first_byte_at: float | None = None
        self.principal: Principal | None = None
        self.call: Call | None = None
        self.admitted: Admitted | None = None
        self.run: Run | None = None
        self.served: Served | None = None
        self.status = 0
        self.error: ForebayError | None = None
        self.handed_over: bytes | None = None
        self.has_body = False
        self.has_left = False
        self.is_counted = False
        self.task: asyncio.Task[None] | None = None
        self.trace: Trace | None = None

    def leave(self) -> None:
        """The client has closed its connection: give the call up, and do not wait for it."""
        self.has_left = True
        if self.run is not None:
            self.run.close()
        if self.task is not None:
            self.task.cancel()

    def forget_error(self) -> None:
        """Let go of the error. Its traceback holds frames, and they hold the exchange and the parsed body: a cycle that
        only the collector takes away, late and many at once: all stand still meanwhile (`benchmarks/attackers.py`)."""
        if self.error is not None:
            self.error.__traceback__ = None
            self.error = None


class DataPlane:
    """ASGI application of the data port; ``others`` serves what is not a call to a model."""

    def __init__(
        self,
        *,
        live: Live,
        directory: Directory,
        admission: Admission,
        chat: ChatService,
        egress: Egress,
        clock: Clock,
        metrics: Metrics,
        tracing: Tracing | None,
        books: Books,
        others: AsgiApp,
    ) -> None:
        self._live = live
        self._directory = directory
        self._admission = admission
        self._chat = chat
        self._egress = egress
        self._clock = clock
        self._metrics = metrics
        self._tracing = tracing
        self._books = books
        self._others = others
        self._num_open: Counter[TenantId] = Counter()
        self._num_prompt_tokens: Counter[TenantId] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        endpoint = _ROUTES.get(scope["path"]) if scope["type"] == "http" else None
        if endpoint is None:
            await self._others(scope, receive, send)
            return
        exchange = _Exchange(scope, send, self._clock.monotonic())
        if self._tracing is not None:
            exchange.trace = trace = self._tracing.start(exchange.headers.get(b"traceparent"))
            if trace is not None:
                exchange.headers[b"traceparent"] = trace.traceparent  # see `has_leg_spans`
        REQUEST.set((exchange.id, exchange.trace))
        try:
            await self._serve(endpoint, scope, receive, exchange)
        except ForebayError as error:
            await self._refuse(endpoint, exchange, error)
        except asyncio.CancelledError:
            if not exchange.has_left:
                await self._cut(endpoint, exchange)
        except Exception:  # noqa: BLE001 - the border of a request
            _log.exception("request_failed", request_id=exchange.id)
            await self._refuse(endpoint, exchange, InternalError(f"an internal error; its id is {exchange.id}"))
        finally:
            exchange.connection.unwatch()
            if exchange.handed_over is None:
                self._close(endpoint, exchange)
            exchange.forget_error()
        if exchange.handed_over is not None:
            await self._others({**scope, "path": endpoint.value}, _again(exchange.handed_over, receive), send)

    async def _serve(self, endpoint: Endpoint, scope: Scope, receive: Receive, exchange: _Exchange) -> None:
        if scope["method"] != "POST":
            raise MethodNotAllowed(f"{scope['path']} takes POST, not {scope['method']}")
        principal = self._directory.keyring.identify(exchange.headers, self._clock.wall())
        exchange.principal = principal
        principal.check_endpoint(endpoint)
        raw = await self._read_body(receive, exchange)
        exchange.has_body = True
        if endpoint is Endpoint.RESPONSES and _is_background(raw):
            exchange.handed_over = raw  # a run, as those of workflows
            return
        exchange.call = call = read_call(
            endpoint,
            raw,
            exchange.headers,
            request_id=exchange.id,
            principal=principal,
            catalog=self._live.catalog,
            is_traced=exchange.trace is not None,
        )
        if endpoint is Endpoint.RESPONSES and b"resp_" in raw and refers_to_others(call.body):
            raise InvalidRequest(
                "a text refers to another response, which only a background response can wait for: set `background`",
                param="background",
            )
        self._check_room(principal, call)
        self._num_open[principal.tenant] += 1
        self._num_prompt_tokens[principal.tenant] += call.prompt_tokens_estimate
        exchange.is_counted = True
        exchange.admitted = await self._admission.admit(principal, call)
        if may_name_addresses(raw):
            await self._egress.fill(call.body)
        exchange.run = run = self._chat.submit(call, inline=True)
        run.reader = exchange.task = asyncio.current_task()
        if call.stream:
            run.sink = partial(self._deliver, exchange, run)
            exchange.connection.watch(exchange.leave, run.push)
            await run.first_byte()
            run.sink = None
            await self._send_stream(run, exchange)
        else:
            exchange.connection.watch(exchange.leave)
            await run.first_byte()
            await self._send_whole(run, exchange)

    def _check_room(self, principal: Principal, call: Call) -> None:
        """Raise ``ConnectionLimit`` if the tenant has as much in flight as one tenant may have."""
        most_open = self._live.settings.server.max_tenant_streams
        if self._num_open[principal.tenant] >= most_open:
            raise ConnectionLimit(f"{most_open} answers are open for this tenant already", retry_after=1.0)
        most = principal.tenant_spec.ceilings.prompt_tokens
        if self._num_prompt_tokens[principal.tenant] + call.prompt_tokens_estimate > most:
            raise ConnectionLimit(
                f"prompts of {most:,} tokens are in flight for this tenant, with this one: send fewer at a time",
                retry_after=1.0,
            )

    async def _read_body(self, receive: Receive, exchange: _Exchange) -> bytes:
        """Return the whole body, which the connection waits for only so long. Raises ``RequestTooLarge``."""
        assert exchange.principal is not None
        limit = min(self._live.settings.server.max_body, exchange.principal.tenant_spec.ceilings.body)
        declared = exchange.headers.get(b"content-length")
        if declared is not None and declared.isdigit() and int(declared) > limit:
            raise RequestTooLarge(f"the body has {int(declared)} bytes; {limit} are accepted")
        message = await receive()
        if message.get("more_body") or message["type"] == "http.disconnect":
            return await _read_rest(receive, message, limit, exchange)
        body: bytes = message["body"]
        if len(body) > limit:
            raise RequestTooLarge(f"the body has {len(body)} bytes; {limit} are accepted")
        return body

    def _begin(self, run: Run, exchange: _Exchange, rest: bytes, num_bytes: int | None) -> None:
        """Commit to an answer: write its head, of which ``rest`` is what depends on its kind."""
        served = exchange.served = run.served
        assert served is not None
        exchange.status = 200
        exchange.first_byte_at = now = self._clock.monotonic()
        overhead_s = now - exchange.started_at - served.queue_s - served.engine_s
        request_id = exchange.id.encode()
        head = _HEAD % (
            request_id,
            request_id,
            served.model.encode(),
            served.worker.encode(),
            served.attempts,
            served.queue_s * 1000,
            overhead_s * 1000,
        )
        if exchange.admitted is not None:
            rest += exchange.admitted.headers
        exchange.connection.begin(exchange.send, head + rest, num_bytes)

    async def _send_whole(self, run: Run, exchange: _Exchange) -> None:
        body = b"".join(run.journal.frames)
        corked = exchange.connection.corked
        corked.cork()
        self._begin(run, exchange, _WHOLE_HEAD, len(body))
        await exchange.send({"type": "http.response.body", "body": body})
        corked.uncork()

    def _deliver(self, exchange: _Exchange, run: Run, frames: bytes) -> bool:
        """Write the first frames of a stream after its head; False, and nothing, if the client lags."""
        connection = exchange.connection
        if connection.lags:
            return False
        connection.corked.cork()
        self._begin(run, exchange, _STREAM_HEAD, None)
        connection.try_write(frames)
        connection.corked.uncork()
        run.sink = connection.try_write  # from now on without us in between
        return True

    async def _send_stream(self, run: Run, exchange: _Exchange) -> None:
        """Send what the sink could not take, and the end."""
        send = exchange.send
        if not exchange.status:
            self._begin(run, exchange, _STREAM_HEAD, None)
        try:
            async for piece in run.chunks():
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        except ForebayError as error:
            # The status line has been sent: the error goes into the stream, and ends it.
            exchange.error = error
            frame = frame_of(error, run.call.endpoint, exchange.id)
            await send({"type": "http.response.body", "body": frame, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def _refuse(self, endpoint: Endpoint, exchange: _Exchange, error: ForebayError) -> None:
        """Send an error in place of an answer."""
        if exchange.status:  # too late: part of an answer is out
            exchange.connection.abort()
            return
        exchange.error = error
        exchange.status = status_of(error)
        body = msgspec.json.encode(body_of(error, endpoint, exchange.id))
        run = exchange.run
        headers = [
            (b"x-request-id", exchange.id.encode()),
            (b"request-id", exchange.id.encode()),
            (b"x-forebay-attempts", b"%d" % (run.attempts if run is not None else 0)),
            (b"x-forebay-queue-ms", b"%.2f" % (run.queue_s * 1000 if run is not None else 0)),
            _JSON,
            _CACHE,
            (b"content-length", b"%d" % len(body)),
            *headers_of(error),
        ]
        if not exchange.has_body:
            headers.append((b"connection", b"close"))  # what may still come of the body is nobody's request
        await exchange.send({"type": "http.response.start", "status": exchange.status, "headers": headers})
        await exchange.send({"type": "http.response.body", "body": body})

    async def _cut(self, endpoint: Endpoint, exchange: _Exchange) -> None:
        """End an answer whose client takes nothing, or which outlasts the server's drain."""
        exchange.error = exchange.run.error if exchange.run is not None else None
        if exchange.error is not None or not self._chat.is_draining:
            exchange.connection.abort()
            return
        error = Draining("the server is shutting down, and cannot wait for this answer any longer", retry_after=1.0)
        if exchange.status and exchange.call is not None and exchange.call.stream:
            exchange.error = error
            frame = frame_of(error, endpoint, exchange.id)
            await exchange.send({"type": "http.response.body", "body": frame})
            exchange.connection.corked.uncork()
        else:
            await self._refuse(endpoint, exchange, error)

    def _close(self, endpoint: Endpoint, exchange: _Exchange) -> None:
        """Let go of the call and book it."""
        run = exchange.run
        now = self._clock.monotonic()
        served = exchange.served
        call = exchange.call
        principal = exchange.principal
        usage = run.usage if run is not None else None
        cost = self._admission.price(served.model).cost(usage) if served is not None and usage is not None else 0
        if run is not None:
            run.close()
        if exchange.is_counted:
            assert principal is not None
            assert call is not None
            self._num_open[principal.tenant] -= 1
            self._num_prompt_tokens[principal.tenant] -= call.prompt_tokens_estimate
        if exchange.admitted is not None:
            self._admission.settle(exchange.admitted, usage, cost)
        started_at, first_byte_at = exchange.started_at, exchange.first_byte_at
        record = record_of(
            time=self._clock.wall(),
            id=exchange.id,
            endpoint=endpoint,
            status=CLIENT_LEFT if exchange.has_left else exchange.status,
            duration_s=now - started_at,
            first_byte_s=first_byte_at - started_at if first_byte_at is not None else None,
            principal=principal,
            call=call,
            run=run,
            served=served,
            usage=usage,
            cost=cost,
            error=exchange.error,
            client_retry=_client_retry(exchange.headers),
        )
        self._metrics.observe(record, exchange.error)
        if exchange.trace is not None and self._tracing is not None:
            self._tracing.add(record, exchange.trace)
        tells_apart = principal is not None and principal.tenant_spec.tells_end_users_apart
        self._books.add(record, end_user=(record.end_user or "") if tells_apart else "")


class _Mode(msgspec.Struct):
    background: Any = None


def _is_background(raw: bytes) -> bool:
    """Whether a body of `/v1/responses` asks for a response in the background. One that cannot be read does not."""
    if b"background" not in raw:
        return False
    try:
        return msgspec.json.decode(raw, type=_Mode).background is True
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return False


def _again(body: bytes, receive: Receive) -> Receive:
    """Return what a request is received by whose body has been read, and then whatever follows it."""
    message: Message | None = {"type": "http.request", "body": body, "more_body": False}

    async def receive_again() -> Message:
        nonlocal message
        first, message = message, None
        return first if first is not None else await receive()

    return receive_again


async def _read_rest(receive: Receive, message: Message, limit: int, exchange: _Exchange) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        if message["type"] == "http.disconnect":
            exchange.has_left = True
            raise InvalidRequest("the client closed its connection before the body was complete")
        part = message.get("body", b"")
        parts.append(part)
        size += len(part)
        if size > limit:
            raise RequestTooLarge(f"the body has more than {limit} bytes")
        if not message.get("more_body"):
            return b"".join(parts)
        message = await receive()


def _client_retry(headers: dict[bytes, bytes]) -> str | None:
    count = headers.get(b"x-stainless-retry-count")
    return count.decode("latin-1")[:8] if count is not None and count != b"0" else None
