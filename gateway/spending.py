"""What the ledger knows, read once a second, for budgets to start from."""

from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Self

from core.clock import Clock
from core.records import Sum
from core.tenancy import Period
from gateway.looping import LoopingCall
from routing.budgets import PERIODS, Spent, day_of, first_day

SumsOf = Callable[[int, int], Awaitable[Sequence[Sum]]]


class Spending:
    """Holds the ``Spent`` of this moment. An async context manager: inside it, the ledger is read again and again.

    ``sums`` returns what was used from one day to another, both included, and raises ``OSError`` while the ledger is
    away: what was known then holds. ``is_wanted``: whether anybody has a budget at all. Today is summed up once a
    second, days that are over every ten minutes: what was booked late, or erased by another gateway, changes them.
    """

    INTERVAL_S = 1.0
    PAST_EVERY_S = 600.0

    def __init__(self, sums: SumsOf, clock: Clock, is_wanted: Callable[[], bool]) -> None:
        self._sums = sums
        self._clock = clock
        self._is_wanted = is_wanted
        self._past_day: int | None = None
        self._past_read_at = 0.0
        self._past: dict[Period, Sequence[Sum]] = {}
        self._loop = LoopingCall("spending_refresh", self.refresh, self.INTERVAL_S)
        self.spent = Spent()

    async def __aenter__(self) -> Self:
        await self.refresh()
        self._loop.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._loop.stop()

    async def reread(self) -> None:
        """Read all of it anew: the ledger has changed in the past."""
        self._past_day = None
        await self.refresh()

    async def refresh(self) -> None:
        """Read what has changed, if anybody has a budget."""
        if not self._is_wanted():
            self._past_day, self._past, self.spent = None, {}, Spent()
            return
        now, day = self._clock.monotonic(), day_of(self._clock.wall())
        try:
            if self._past_day != day or now - self._past_read_at >= self.PAST_EVERY_S:
                self._past = {period: await self._sums(first_day(period, day), day - 1) for period in PERIODS}
                self._past_day, self._past_read_at = day, now
            today = await self._sums(day, day)
        except OSError:
            return  # who watches the database has told it
        self.spent = Spent(day, {period: (*self._past[period], *today) for period in PERIODS})
