"""What the ledger knows, read once a second, for budgets to start from."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Self

import structlog

from core.clock import Clock
from core.records import Sum
from core.tenancy import Period
from engines.tasks import Tasks
from routing.budgets import PERIODS, Spent, day_of, first_day

_log = structlog.get_logger(__name__)

SumsOf = Callable[[int, int], Awaitable[Sequence[Sum]]]


class Spending:
    """Holds the ``Spent`` of this moment. An async context manager: inside it, the ledger is read again and again.

    ``sums`` returns what was used from one day to another, both included, and raises ``OSError`` while the ledger is
    away: what was known then holds. ``is_wanted``: whether anybody has a budget at all. Days that are over are summed
    up once a day, today once a second.
    """

    INTERVAL_S = 1.0

    def __init__(self, sums: SumsOf, clock: Clock, is_wanted: Callable[[], bool]) -> None:
        self._sums = sums
        self._clock = clock
        self._is_wanted = is_wanted
        self._past_day: int | None = None
        self._past: dict[Period, Sequence[Sum]] = {}
        self._tasks = Tasks()
        self._reader: asyncio.Task[None] | None = None
        self.spent = Spent()

    async def __aenter__(self) -> Self:
        await self.refresh()
        await self._tasks.__aenter__()
        self._reader = self._tasks.create_task(self._read_for_ever())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._reader is not None:
            self._reader.cancel()
        await self._tasks.__aexit__(kind, error, trace)

    async def refresh(self) -> None:
        """Read what has changed, if anybody has a budget."""
        if not self._is_wanted():
            return
        day = day_of(self._clock.wall())
        try:
            if self._past_day != day:
                self._past = {period: await self._sums(first_day(period, day), day - 1) for period in PERIODS}
                self._past_day = day
            today = await self._sums(day, day)
        except OSError:
            return  # who watches the database has told it
        self.spent = Spent(day, {period: (*self._past[period], *today) for period in PERIODS})

    async def _read_for_ever(self) -> None:
        while True:
            await asyncio.sleep(self.INTERVAL_S)
            try:
                await self.refresh()
            except Exception:  # noqa: BLE001 - what was known holds
                _log.exception("spending_refresh_failed")
