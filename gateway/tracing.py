"""Traces of requests: ids when one begins, a span tree when it has ended, sent in batches off the hot path.

A request that is traced costs an object and two headers' worth of text while it runs. Its spans are made from its
``RequestRecord`` afterwards, in a thread (``gateway/otlp.py``); they hold what the record holds, and so no content. Of
runs of workflows the spans come as they are (``gateway/runs/spans.py``).
"""

import asyncio
import random
import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from types import TracebackType
from typing import NamedTuple, Self

import msgspec
import structlog

from core.records import RequestRecord
from gateway.looping import LoopingCall

_log = structlog.get_logger(__name__)

_TRACEPARENT = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_IS_SAMPLED = 1


UNTRACED = b"00-%032x-%016x-00" % (1, 1)
"""A ``traceparent`` under which nothing is traced."""

SUBMITTER: ContextVar[bytes | None] = ContextVar("forebay_submitter", default=None)
"""The ``traceparent`` of whoever submits a run, while this task serves that."""


class Trace(NamedTuple):
    """The span of one request or run. ``parent_id`` None: it is the root. ``traceparent`` tells others of it."""

    trace_id: int
    span_id: int
    parent_id: int | None
    traceparent: bytes

    @property
    def hex_id(self) -> str:
        """The trace's id as people look for it."""
        return f"{self.trace_id:032x}"


class Span(msgspec.Struct, frozen=True):
    """A span that is complete: of a run, or of one of its calls. Times are Unix seconds."""

    name: str
    began_at: float
    ended_at: float
    attributes: Mapping[str, str | int | float | bool]
    error: str | None = None


Finished = tuple[RequestRecord | Span, Trace]


class Tracing:
    """Decides what is traced, and hands what has finished to ``export``, which is called in a thread and returns
    whether the collector took them. ``sample`` returns the part of requests that is traced where no client decides.

    An async context manager: leaving it exports what is left, for two seconds at most. A collector that is away costs
    the traces, which are counted, and one log line.
    """

    MAX_QUEUE = 10_000
    BATCH = 512
    INTERVAL_S = 1.0
    LAST_FLUSH_S = 2.0

    def __init__(
        self,
        export: Callable[[Sequence[Finished]], bool],
        sample: Callable[[], float],
        *,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._export = export
        self._sample = sample
        self._draw = draw
        self._queue: deque[Finished] = deque()
        self._is_away = False
        self._loop = LoopingCall("trace_export", self.flush, self.INTERVAL_S)
        self.num_exported = 0
        self.num_dropped = 0

    def start(self, traceparent: bytes | None) -> Trace | None:
        """Begin the span of a request that came with this header; None if it is not to be traced.

        The client's header decides where there is one. What is no ``traceparent`` counts as none.
        """
        parent = _parse(traceparent) if traceparent is not None else None
        if parent is None:
            if self._draw() >= self._sample():
                return None
            trace_id, parent_id = random.getrandbits(128) or 1, None
        else:
            trace_id, parent_id, is_sampled = parent
            if not is_sampled:
                return None
        return trace_of(trace_id, random.getrandbits(64) or 1, parent_id)

    def add(self, finished: RequestRecord | Span, trace: Trace) -> None:
        """Queue a finished request, or a span; never waits."""
        if len(self._queue) >= self.MAX_QUEUE:
            self.num_dropped += 1
        else:
            self._queue.append((finished, trace))

    async def __aenter__(self) -> Self:
        self._loop.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._loop.stop()
        try:
            async with asyncio.timeout(self.LAST_FLUSH_S):
                await self.flush()
        except TimeoutError:
            pass
        self.num_dropped += len(self._queue)
        self._queue.clear()

    async def flush(self) -> None:
        """Export what is queued, in batches; the first that fails is dropped and ends it."""
        while self._queue:
            batch = [self._queue.popleft() for _ in range(min(self.BATCH, len(self._queue)))]
            is_taken = False
            try:
                is_taken = await asyncio.to_thread(self._export, batch)
            finally:
                if is_taken:
                    self.num_exported += len(batch)
                else:
                    self.num_dropped += len(batch)
            self._note(is_away=not is_taken)
            if not is_taken:
                return

    def _note(self, *, is_away: bool) -> None:
        if is_away and not self._is_away:
            _log.warning("trace_collector_away", traces="dropped until it is back")
        elif self._is_away and not is_away:
            _log.info("trace_collector_back", num_dropped=self.num_dropped)
        self._is_away = is_away


def trace_of(trace_id: int, span_id: int, parent_id: int | None) -> Trace:
    """Return the trace of a span of these ids."""
    return Trace(trace_id, span_id, parent_id, b"00-%032x-%016x-01" % (trace_id, span_id))


def _parse(header: bytes) -> tuple[int, int, bool] | None:
    """Return trace, span and whether it is sampled; None for what is malformed."""
    match = _TRACEPARENT.fullmatch(header)
    if match is None:
        return None
    version, trace, span, flags, rest = match.groups()
    trace_id, span_id = int(trace, 16), int(span, 16)
    if version == b"ff" or (version == b"00" and rest) or not trace_id or not span_id:
        return None  # later versions may say more; the first may not
    return trace_id, span_id, bool(int(flags, 16) & _IS_SAMPLED)
