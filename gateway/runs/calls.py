"""Calls that the gateway makes itself, on behalf of a tenant: the same path as a client's, without HTTP.

They are read, limited, scheduled, metered, traced and booked as if the tenant's client had sent them. A limit that will
have room again is waited for, and so is a worker: a run of a thousand calls is not to fail because it is of a thousand
calls.
"""

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import msgspec

from core.chat import Call, Endpoint, Usage
from core.clock import Clock
from core.errors import BudgetExceeded, ForebayError, QueueTimeout, RateLimited, Unavailable, UpstreamBroken
from core.ids import TenantId, new_request_id
from core.records import CLIENT_LEFT
from engines.drivers.sse import data_of, split
from engines.run import Run
from gateway.accounts import record_of
from gateway.admission import Admission, Admitted
from gateway.auth import Principal
from gateway.books import Books
from gateway.chat import ChatService
from gateway.egress import Egress, may_name_addresses
from gateway.errors import status_of
from gateway.live import Live
from gateway.metrics import Metrics
from gateway.requests import read_call
from gateway.runs.underway import UNDERWAY
from gateway.tracing import Tracing

_LONGEST_WAIT_S = 30.0
_USUAL_WAIT_S = 0.5


OnText = Callable[[str], None]
OnSpent = Callable[[Usage, int], None]


class Reply(msgspec.Struct, frozen=True):
    """What a call came to: its text, or of embeddings the vectors."""

    text: str = ""
    vectors: tuple[tuple[float, ...], ...] = ()


class Caller:
    """Makes calls. All parts are those that clients' requests go through."""

    def __init__(
        self,
        *,
        live: Live,
        admission: Admission,
        chat: ChatService,
        egress: Egress,
        clock: Clock,
        metrics: Metrics,
        tracing: Tracing | None,
        books: Books,
    ) -> None:
        self._live = live
        self._admission = admission
        self._chat = chat
        self._egress = egress
        self._clock = clock
        self._metrics = metrics
        self._tracing = tracing
        self._books = books
        self._rooms: dict[TenantId, asyncio.Semaphore] = {}

    def read(self, principal: Principal, endpoint: Endpoint, body: Mapping[str, Any]) -> Call:
        """Return the call that a body means. Raises what ``read_call`` raises."""
        streams = {} if endpoint is Endpoint.EMBEDDINGS else {"stream": True, "stream_options": {"include_usage": True}}
        raw = msgspec.json.encode({**body, **streams})
        return read_call(
            endpoint, raw, {}, request_id=new_request_id(), principal=principal, catalog=self._live.catalog
        )

    async def make(self, principal: Principal, call: Call, *, on_text: OnText, on_spent: OnSpent) -> Reply:
        """Make the call and return its answer whole; ``on_text`` is given the pieces as they come, and ``on_spent``
        what was used, with its cost in picodollars, also where the call failed or was cancelled.

        A tenant's calls have as many places as its clients have streams; who comes later waits. Waits while a limit or
        a queue has no room, and longer for a worker than ``timeouts.queue`` unless the call says that itself. Raises
        ``ForebayError``; when it is cancelled, the engine is told to stop at once.
        """
        began = self._clock.monotonic()
        first = call
        most = self._live.settings.server.max_tenant_streams
        room = self._rooms.setdefault(principal.tenant, asyncio.Semaphore(most))
        while True:
            try:
                with self._waiting():
                    await room.acquire()
                try:
                    return await self._make(principal, call, on_text, on_spent)
                finally:
                    room.release()
            except BudgetExceeded:
                raise
            except (RateLimited, Unavailable) as error:
                if not error.retryable or error.specific_code == "request_exceeds_limit":
                    raise
                wait_s = min(error.retry_after or _USUAL_WAIT_S, _LONGEST_WAIT_S)
            except QueueTimeout:
                if call.has_own_timeouts:
                    raise
                wait_s = 0.0  # it has waited, and goes on with that
            with self._waiting():
                await asyncio.sleep(wait_s)
            call = _later(first, self._clock.monotonic() - began)

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """Count the time that passes inside as a wait of the call of a run, if this is for one."""
        began = self._clock.monotonic()
        try:
            yield
        finally:
            if (underway := UNDERWAY.get()) is not None:
                underway.waited(self._clock.monotonic() - began)

    async def _make(self, principal: Principal, call: Call, on_text: OnText, on_spent: OnSpent) -> Reply:
        began = self._clock.monotonic()
        underway = UNDERWAY.get()
        parent = underway.parent if underway is not None else None
        trace = self._tracing.start(parent) if self._tracing is not None else None
        if trace is not None:
            call = msgspec.structs.replace(call, traceparent=trace.traceparent.decode(), has_leg_spans=True)
        admitted: Admitted | None = None
        run: Run | None = None
        error: ForebayError | None = None
        first_byte_s: float | None = None
        status, cost = CLIENT_LEFT, 0
        try:
            with self._waiting():
                admitted = await self._admission.admit(principal, call)
            if may_name_addresses(msgspec.json.encode(call.body)):
                await self._egress.fill(call.body)
            run = self._chat.submit(call)
            await run.first_byte()
            first_byte_s = self._clock.monotonic() - began
            reply = await _read(run, call.endpoint, on_text)
            status = 200
        except ForebayError as raised:
            error, status = raised.with_traceback(None), status_of(raised)
            raise
        finally:
            usage = run.usage if run is not None else None
            served = run.served if run is not None else None
            if usage is not None and served is not None:
                cost = self._admission.price(served.model).cost(usage)
            if run is not None:
                run.close()
                if underway is not None:
                    underway.waited(run.queue_s if run.legs else self._clock.monotonic() - run.queued_at)
                    underway.worked(run.usage, sum(leg.duration_s for leg in run.legs))
            if usage is not None:
                on_spent(usage, cost)
            if admitted is not None:
                self._admission.settle(admitted, usage, cost)
            record = record_of(
                time=self._clock.wall(), id=call.id, endpoint=call.endpoint, status=status,
                duration_s=self._clock.monotonic() - began, first_byte_s=first_byte_s,
                principal=principal, call=call, run=run, served=served, usage=usage, cost=cost, error=error,
            )  # fmt: skip
            self._metrics.observe(record, error)
            if trace is not None and self._tracing is not None:
                self._tracing.add(record, trace)
            tells_apart = principal.tenant_spec.tells_end_users_apart
            self._books.add(record, end_user=(record.end_user or "") if tells_apart else "")
        return reply


async def _read(run: Run, endpoint: Endpoint, on_text: OnText) -> Reply:
    if endpoint is Endpoint.EMBEDDINGS:
        whole = msgspec.json.decode(b"".join([piece async for piece in run.chunks()]), type=_Embeddings)
        return Reply(vectors=tuple(one.embedding for one in sorted(whole.data, key=lambda one: one.index)))
    texts: list[str] = []
    async for piece in run.chunks():
        for frame in split(piece):
            if text := _text_of(frame):
                texts.append(text)
                on_text(text)
    return Reply("".join(texts))


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    index: int = 0
    text: str | None = None
    delta: _Delta = msgspec.field(default_factory=_Delta)


class _Event(msgspec.Struct):
    choices: list[_Choice] = msgspec.field(default_factory=list)


class _Embedding(msgspec.Struct):
    embedding: tuple[float, ...]
    index: int = 0


class _Embeddings(msgspec.Struct):
    data: list[_Embedding]


_EVENT = msgspec.json.Decoder(_Event)


def _text_of(frame: bytes) -> str:
    payload = data_of(frame)
    if not payload or payload.startswith(b"[DONE]"):
        return ""
    try:
        choices = _EVENT.decode(payload).choices
    except msgspec.MsgspecError as error:
        raise UpstreamBroken(f"the engine sent what is no event: {error}", status=502) from None
    return "".join(choice.text or choice.delta.content or "" for choice in choices if choice.index == 0)


def _later(call: Call, passed: float) -> Call:
    """Return the call as another request, so many seconds later: its run is older, and its deadline nearer."""
    context = call.context
    role, deadline_s = context.role, context.deadline_s
    if role is not None:
        role = msgspec.structs.replace(role, age_s=role.age_s + passed)
    if deadline_s is not None:
        deadline_s = max(0.0, deadline_s - passed)
    context = msgspec.structs.replace(context, role=role, deadline_s=deadline_s)
    return msgspec.structs.replace(call, id=new_request_id(), context=context)
