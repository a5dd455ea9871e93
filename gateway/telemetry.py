"""What is told of requests: a record each, written to a log off the hot path."""

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
from prometheus_client import Counter

from core.chat import Usage
from engines.tasks import Tasks
from gateway.settings import LogSettings

_LATENCY = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_OVERHEAD = (0.0001, 0.00025, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5)

_BOOKED_TOGETHER = 64  # half a millisecond


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
        self._tasks = Tasks()
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
        await self._tasks.__aexit__(kind, error, trace)
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
