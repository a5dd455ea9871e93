"""Budgets: which period a moment belongs to, and what the ledger says has been used of it."""

import datetime
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import lru_cache

from core.records import Sum
from core.tenancy import Budget, Period, Unit
from routing.limits import Meter

DAY_S = 86_400
PERIODS: tuple[Period, ...] = ("day", "week", "month", "total")

Subject = tuple[str, ...]
"""Whose budget it is: ``("tenant", id)``, ``("key", id)`` or ``("end_user", tenant, end user)``."""


def day_of(now: float) -> int:
    """Return the day (UTC) of a Unix time, counted from the epoch."""
    return int(now // DAY_S)


@lru_cache(maxsize=64)
def first_day(period: Period, day: int) -> int:
    """Return the day on which the period that holds ``day`` began; 0 for one that never starts anew."""
    date = datetime.date.fromordinal(datetime.date(1970, 1, 1).toordinal() + day)
    match period:
        case "day":
            return day
        case "week":
            return day - date.weekday()
        case "month":
            return day - date.day + 1
        case _:
            return 0


@lru_cache(maxsize=64)
def ends_at(period: Period, day: int) -> float:
    """Return the Unix time at which the period that holds ``day`` ends; 0 for one that never does."""
    match period:
        case "day":
            return float((day + 1) * DAY_S)
        case "week":
            return float((first_day("week", day) + 7) * DAY_S)
        case "month":
            return float(first_day("month", first_day("month", day) + 31) * DAY_S)
        case _:
            return 0.0


class Spent:
    """What has been used, by subject and period, as the ledger knew when it was last read. Immutable."""

    def __init__(self, day: int = 0, sums: Mapping[Period, Iterable[Sum]] | None = None) -> None:
        self.day = day
        self._used: defaultdict[tuple[Subject, Period, Unit], int] = defaultdict(int)
        for period, entries in (sums or {}).items():
            for entry in entries:
                for subject in _subjects(entry):
                    self._used[subject, period, "tokens"] += entry.tokens
                    self._used[subject, period, "usd"] += entry.cost

    def used(self, subject: Subject, budget: Budget, now: float) -> int:
        """Return what the subject has used of its budget in the period of this moment (Unix time)."""
        if first_day(budget.period, self.day) != first_day(budget.period, day_of(now)):
            return 0  # the ledger has not been read since the period began
        return self._used.get((subject, budget.period, budget.unit), 0)

    def meter(self, subject: Subject, budget: Budget, now: float) -> Meter:
        """Return the meter that the subject's requests need room in."""
        day = day_of(now)
        start = first_day(budget.period, day)
        return Meter(
            key=f"budget/{'/'.join(subject)}/{budget.unit}/{budget.period}/{start}",
            kind="period",
            limit=budget.amount,
            seed=self.used(subject, budget, now),
            ends_at=ends_at(budget.period, day),
        )


def _subjects(entry: Sum) -> Iterable[Subject]:
    yield ("tenant", entry.tenant)
    yield ("key", entry.key)
    if entry.end_user:
        yield ("end_user", entry.tenant, entry.end_user)
