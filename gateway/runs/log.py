"""The log of all runs: what happens is written in batches, a few milliseconds after it happened, and told then.

A batch is one transaction of whatever has happened meanwhile to all runs: the busier they are, the more share one.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Protocol, Self

import structlog

from core.clock import Clock
from core.workflows import RunEvent
from storage.sql.database import Conflict, StorageUnavailable
from storage.sql.workflows import Change

_log = structlog.get_logger(__name__)

RETRY_S = 0.5


class Written(Protocol):
    """A run, as the log sees it."""

    @property
    def id(self) -> str:
        """The run's id."""

    def take_change(self, at: float) -> Change:
        """Return what is to be written, and forget it."""

    def written(self, events: Sequence[RunEvent]) -> None:
        """Note that these are durable."""

    def lost(self) -> None:
        """Note that the run is not ours any more as it is: a gateway goes on with it from what is durable."""


class RunLog:
    """Writes what runs have to tell. An async context manager: leaving it writes what is left.

    Events that come while a batch is written are the next batch. While the database is away everything waits: nothing
    is told that could still be lost.
    """

    def __init__(self, write: Callable[[Sequence[Change]], Awaitable[None]], clock: Clock) -> None:
        self._write = write
        self._clock = clock
        self._dirty: dict[str, Written] = {}
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._is_closing = False
        self.is_away = False

    def touch(self, run: Written) -> None:
        """Note that a run has events to be written."""
        self._dirty[run.id] = run
        self._wake.set()

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name="run_log")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_closing = True
        self._wake.set()
        assert self._task is not None
        await asyncio.wait((self._task,))

    async def _run(self) -> None:
        while self._dirty or not self._is_closing:
            await self._wake.wait()
            self._wake.clear()
            runs, self._dirty = list(self._dirty.values()), {}
            if runs:
                at = self._clock.wall()
                await self._keep([(run, run.take_change(at)) for run in runs])

    async def _keep(self, batch: Sequence[tuple[Written, Change]]) -> None:
        while True:
            try:
                await self._write([change for _, change in batch])
            except Conflict:
                await self._keep_apart(batch)
                return
            except StorageUnavailable as error:
                if not self.is_away:
                    _log.warning("run_log_away", error=str(error))
                self.is_away = True
                if self._is_closing:
                    return  # what was not written happens again at the next start
                await asyncio.sleep(RETRY_S)
            else:
                break
        if self.is_away:
            _log.info("run_log_back")
        self.is_away = False
        for run, change in batch:
            run.written(change.events)

    async def _keep_apart(self, batch: Sequence[tuple[Written, Change]]) -> None:
        """One run of the batch is not ours any more: write each by itself, to know which."""
        if len(batch) == 1:
            run = batch[0][0]
            _log.warning("run_lost", run=run.id, meaning="a gateway goes on with it from what is durable")
            run.lost()
            return
        for one in batch:
            await self._keep([one])
