"""What is told of requests: Prometheus metrics with bounded labels, and a log line each, written off the hot path."""

import asyncio
import logging
import os
import stat
import sys
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

import msgspec
import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from core.chat import Usage
from gateway.settings import LogSettings

_LATENCY = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_OVERHEAD = (0.0001, 0.00025, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5)


class RequestRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """One request as the log keeps it. No content, no key; ``status`` 499: the client left."""

    time: float
    id: str
    endpoint: str
    status: int
    duration_s: float
    tenant: str | None = None
    key: str | None = None
    model: str | None = None
    worker: str | None = None
    stream: bool = False
    attempts: int = 0
    queue_s: float = 0.0
    first_byte_s: float | None = None
    overhead_s: float | None = None
    usage: Usage | None = None
    error: str | None = None
    end_user: str | None = None
    session: str | None = None
    program: str | None = None
    run: str | None = None
    stage: str | None = None
    client_retry: str | None = None


class Metrics:
    """The counters behind ``/metrics``. Labels take their values from the settings, never from a request."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        by_request = ("model", "endpoint", "code")
        by_model = ("model", "endpoint")
        self._requests = Counter("forebay_requests", "Requests answered.", by_request, registry=registry)
        self._duration = Histogram(
            "forebay_request_duration_seconds", "Arrival to last byte.", by_model, registry=registry, buckets=_LATENCY
        )
        self._first_byte = Histogram(
            "forebay_time_to_first_token_seconds",
            "Arrival to first byte.",
            by_model,
            registry=registry,
            buckets=_LATENCY,
        )
        self._queue = Histogram(
            "forebay_queue_wait_seconds", "Wait for a worker.", by_model, registry=registry, buckets=_LATENCY
        )
        self._overhead = Histogram(
            "forebay_overhead_seconds", "Time spent in Forebay itself.", by_model, registry=registry, buckets=_OVERHEAD
        )
        self._tokens = Counter("forebay_tokens", "Tokens metered.", ("model", "type"), registry=registry)
        self._retries = Counter("forebay_retries", "Legs after a request's first.", ("model",), registry=registry)
        self._disconnects = Counter(
            "forebay_client_disconnects", "Clients that left early.", ("model",), registry=registry
        )
        self.log_dropped = Counter("forebay_log_dropped", "Request log lines dropped, queue full.", registry=registry)
        self.worker_state = Gauge(
            "forebay_worker_state", "1 for the worker's present state.", ("worker", "state"), registry=registry
        )
        self.worker_running = Gauge("forebay_worker_inflight_requests", "Slots taken.", ("worker",), registry=registry)
        self.queue_depth = Gauge("forebay_queue_depth", "Requests that wait.", ("model",), registry=registry)
        self.worker_restarts = Gauge("forebay_worker_restarts", "Starts after a crash.", ("worker",), registry=registry)
        self._children: dict[tuple[str, str], _Children] = {}
        self._codes: dict[tuple[str, str, int], Counter] = {}

    def observe(self, record: RequestRecord) -> None:
        """Count one finished request."""
        model = record.model or "other"
        code_key = (model, record.endpoint, record.status)
        counter = self._codes.get(code_key)
        if counter is None:
            counter = self._codes[code_key] = self._requests.labels(model, record.endpoint, str(record.status))
        counter.inc()
        if record.model is None:
            return
        children = self._children.get((model, record.endpoint))
        if children is None:
            children = self._children[(model, record.endpoint)] = _Children(self, model, record.endpoint)
        children.observe(record)


class _Children:
    """The label sets of one model and endpoint, looked up once."""

    def __init__(self, metrics: Metrics, model: str, endpoint: str) -> None:
        self._duration = metrics._duration.labels(model, endpoint)
        self._first_byte = metrics._first_byte.labels(model, endpoint)
        self._queue = metrics._queue.labels(model, endpoint)
        self._overhead = metrics._overhead.labels(model, endpoint)
        self._input = metrics._tokens.labels(model, "input")
        self._output = metrics._tokens.labels(model, "output")
        self._cached = metrics._tokens.labels(model, "cached")
        self._retries = metrics._retries.labels(model)
        self._disconnects = metrics._disconnects.labels(model)

    def observe(self, record: RequestRecord) -> None:
        self._duration.observe(record.duration_s)
        if record.first_byte_s is not None:
            self._first_byte.observe(record.first_byte_s)
            self._queue.observe(record.queue_s)
        if record.overhead_s is not None:
            self._overhead.observe(record.overhead_s)
        if record.usage is not None:
            self._input.inc(record.usage.prompt_tokens)
            self._output.inc(record.usage.completion_tokens)
            if record.usage.cached_tokens:
                self._cached.inc(record.usage.cached_tokens)
        if record.attempts > 1:
            self._retries.inc(record.attempts - 1)
        if record.status == 499:
            self._disconnects.inc()


class RequestLog:
    """Writes records to a file as JSON lines, twice a second, from a bounded queue; what does not fit is counted.

    An async context manager; leaving it writes what is left. The file is 0600 and starts anew at ``max_bytes``, its
    predecessor being kept as ``.1``.
    """

    MAX_QUEUE = 50_000
    FLUSH_INTERVAL_S = 0.5

    def __init__(self, path: Path, max_bytes: int, dropped: Counter) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._dropped = dropped
        self._queue: deque[RequestRecord] = deque()
        self._tasks = asyncio.TaskGroup()
        self._flusher: asyncio.Task[None] | None = None

    def add(self, record: RequestRecord) -> None:
        """Queue a record; never waits."""
        if len(self._queue) >= self.MAX_QUEUE:
            self._dropped.inc()
        else:
            self._queue.append(record)

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        self._flusher = self._tasks.create_task(self._flush_for_ever())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._flusher is not None:
            self._flusher.cancel()
        # The body's own error passes by the group, which would wrap it; only a cancellation is the group's to know.
        was_cancelled = isinstance(error, asyncio.CancelledError)
        await self._tasks.__aexit__(*((kind, error, trace) if was_cancelled else (None, None, None)))
        await self.flush()

    async def flush(self) -> None:
        """Write what is queued. A disk that refuses costs the lines, never a request."""
        if not self._queue:
            return
        batch, self._queue = self._queue, deque()
        try:
            await asyncio.to_thread(self._write, batch)
        except OSError as error:
            self._dropped.inc(len(batch))
            structlog.get_logger(__name__).warning("request_log_failed", path=str(self._path), error=str(error))

    async def _flush_for_ever(self) -> None:
        while True:
            await asyncio.sleep(self.FLUSH_INTERVAL_S)
            await self.flush()

    def _write(self, batch: deque[RequestRecord]) -> None:
        if self._path.exists() and self._path.stat().st_size > self._max_bytes:
            self._path.replace(self._path.with_suffix(self._path.suffix + ".1"))
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, stat.S_IRUSR | stat.S_IWUSR)
        with os.fdopen(descriptor, "ab") as file:
            file.write(msgspec.json.Encoder().encode_lines(batch))


def set_up_logging(settings: LogSettings, stream: TextIO = sys.stderr) -> None:
    """Send the server's log to the stream, as text for people or JSON for machines. Never holds content."""
    structlog.reset_defaults()
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if settings.format == "json"
        else structlog.dev.ConsoleRenderer(colors=stream.isatty(), pad_event_to=0)
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, settings.level.upper())),
        logger_factory=structlog.PrintLoggerFactory(stream),
    )
    logging.basicConfig(stream=stream, level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
