"""Limits by reservation: what a request may use is taken before it runs, and settled to what it really used after.

A request *claims* an amount of each of its *meters*: a window of 60 seconds (requests, tokens), a budget's period
(tokens, money), or answers open at a time. All of it is taken together or nothing is. ``LocalLimiter`` keeps the counts
of one process; ``storage/redis/limits.py`` keeps them for several, and the contract suite holds both to the same
behaviour.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol, assert_never

import msgspec

from core.errors import LimitsUnavailable

WINDOW_S = 60
PARALLEL_RETRY_S = 1.0

Kind = Literal["window", "period", "parallel"]


class Meter(msgspec.Struct, frozen=True):
    """One count that a request needs room in.

    ``key`` names the count, for a period with the period in it; the meters of one request have different keys.
    ``seed``: what a durable ledger says has been used of the period so far; a count that knows less starts from it.
    ``ends_at``: when the period ends (Unix seconds; 0: never).
    """

    key: str
    kind: Kind
    limit: int
    seed: int = 0
    ends_at: float = 0.0


class Claim(msgspec.Struct, frozen=True):
    """How much a request takes of each meter. Requests of one caller share their ``meters``: what does not change is
    drawn up, and told, once for many."""

    meters: tuple[Meter, ...]
    amounts: tuple[int, ...]


class Refused(msgspec.Struct, frozen=True):
    """The first meter without room; nothing was taken. ``retry_after``: seconds until there may be (None: never)."""

    meter: int
    retry_after: float | None


class Granted(msgspec.Struct, frozen=True):
    """All was taken. ``remaining``: what is left in each meter; ``at``: the second that each window has booked it
    under; ``is_local``: counted by this process alone."""

    remaining: tuple[int, ...]
    at: tuple[int, ...]
    is_local: bool = True


Verdict = Granted | Refused


class Limiter(Protocol):
    """Keeps the counts. Times are Unix seconds; processes that share counts have to agree on them to a few seconds."""

    async def reserve(self, claim: Claim, now: float) -> Verdict:
        """Take all of a claim, or nothing. Raises ``LimitsUnavailable`` where the counts cannot be reached."""

    def settle(self, claim: Claim, used: Sequence[int], granted: Granted) -> None:
        """Put what was really used in the place of what was taken; ``parallel`` meters are given back whole.

        Never waits and never fails: what cannot be told now is told later.
        """

    async def forget(self, tenant: str, end_user: str | None) -> None:
        """Forget the counts of one end user of a tenant, or of all of them; a tenant's and its keys' stay.

        Whoever asks again begins anew. An answer that is open counts on until it has ended. Raises
        ``LimitsUnavailable`` where the counts cannot be reached; then some may be gone: do it again.
        """


class OpenAnswers:
    """How many answers this process has open, by ``parallel`` meter. One truth for all limiters of a process: an answer
    that one of them has let in, the others know of."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    @property
    def counts(self) -> Mapping[str, int]:
        """Every meter that has an answer open."""
        return self._counts

    def add(self, key: str, amount: int) -> None:
        """Count answers that were opened, or, with a negative amount, that have ended."""
        count = self._counts.get(key, 0) + amount
        if count > 0:
            self._counts[key] = count
        else:
            self._counts.pop(key, None)


def counts_end_user(key: str, tenant: str, end_user: str | None) -> bool:
    """Return whether a meter's key names this end user, or, for None, any of the tenant's."""
    what, _, name = key.partition("/")
    whose = name.removeprefix(f"end_user/{tenant}/")
    if whose == name:
        return False
    if what == "budget":
        whose = whose.rsplit("/", 3)[0]  # unit, period and its first day follow
    return end_user is None or whose == end_user


def reset_after(meter: Meter, now: float, at: int) -> float:
    """Return in how many seconds a meter will be whole again; ``at``: when its window last booked something."""
    if meter.kind == "window":
        return float(max(0, at + WINDOW_S + 1 - int(now)))
    return max(0.0, meter.ends_at - now)


def retry_after(meter: Meter, amount: int, now: float, window_wait: float | None) -> float | None:
    """Return in how many seconds a meter without room for ``amount`` may have it, None if never. ``window_wait``: what
    the window says, if it is one."""
    if amount > meter.limit:
        return None
    match meter.kind:
        case "window":
            return window_wait
        case "period":
            return max(1.0, meter.ends_at - now) if meter.ends_at else None
        case "parallel":
            return PARALLEL_RETRY_S
        case _:
            assert_never(meter.kind)


class _Window:
    """What was taken in the last 60 seconds, by the second. Counts stay until their whole second has left it."""

    __slots__ = ("seconds", "used")

    def __init__(self) -> None:
        self.seconds: deque[list[int]] = deque()  # [second, amount], oldest first
        self.used = 0

    def expire(self, second: int) -> None:
        """Drop what has left the window; also what lies more than a window ahead: the clock was set back."""
        while self.seconds and self.seconds[-1][0] > second + WINDOW_S:
            self.used -= self.seconds.pop()[1]
        while self.seconds and self.seconds[0][0] < second - WINDOW_S:
            self.used -= self.seconds.popleft()[1]

    def take(self, second: int, amount: int) -> int:
        """Book an amount; return the second it is booked under: the last one, for a clock that was set back."""
        if self.seconds and self.seconds[-1][0] >= second:
            self.seconds[-1][1] += amount
        else:
            self.seconds.append([second, amount])
        self.used += amount
        return self.seconds[-1][0]

    def correct(self, second: int, amount: int) -> None:
        """Change what was booked under a second, unless it has left the window."""
        for entry in reversed(self.seconds):
            if entry[0] == second:
                entry[1] += amount
                self.used += amount
                return

    def wait_for(self, amount: int, limit: int, second: int) -> float:
        """Return in how many seconds ``amount`` more, which is not more than ``limit``, will fit."""
        excess = self.used + amount - limit
        frees_at = second
        for booked_at, booked in self.seconds:
            if excess <= 0:
                break
            excess -= booked
            frees_at = booked_at + WINDOW_S + 1
        return float(max(1, frees_at - second))


class _Period:
    """What has been used of a budget, and how much of that the ledger said when the count was last raised to it."""

    __slots__ = ("base", "ends_at", "used")

    def __init__(self, ends_at: float) -> None:
        self.base = self.used = 0
        self.ends_at = ends_at

    def raise_to(self, seed: int) -> None:
        """Use the ledger's figure if it is higher."""
        if seed > self.used:
            self.base = self.used = seed

    def take(self, second: int, amount: int) -> int:
        """Book an amount; no second matters to a period."""
        self.used += amount
        return 0

    def correct(self, second: int, amount: int) -> None:
        """Change what was booked."""
        self.used += amount


class LocalLimiter:
    """The counts of one process. Costs microseconds; forgets what has left its window or period.

    ``share``: the part of every limit, and of what is left of every budget, that is this process's own while it stands
    in for counts that several processes share. A request that fits the limit but not the share is let in by itself.
    ``open_answers``: given where another limiter of this process counts too.
    """

    _SWEEP_EVERY_S = 60.0

    def __init__(self, share: float = 1.0, open_answers: OpenAnswers | None = None) -> None:
        self._share = share
        self._open = OpenAnswers() if open_answers is None else open_answers
        self._windows: dict[str, _Window] = {}
        self._periods: dict[str, _Period] = {}
        self._swept_at = 0.0

    async def reserve(self, claim: Claim, now: float) -> Verdict:
        """Take all of a claim, or nothing; see ``Limiter``. Never waits."""
        second = int(now)
        if abs(now - self._swept_at) > self._SWEEP_EVERY_S:
            self._sweep(now)
        meters, amounts, is_whole = claim.meters, claim.amounts, self._share == 1.0
        remaining: list[int] = []
        counts: list[_Window | _Period | None] = []
        for index, (meter, amount) in enumerate(zip(meters, amounts, strict=True)):
            count = self._count(meter, second)  # before the limit, which may ask what it notes
            used = self._open.counts.get(meter.key, 0) if count is None else count.used
            limit = meter.limit if is_whole else self._limit(meter, amount)
            if used + amount > limit:
                wait = count.wait_for(amount, limit, second) if isinstance(count, _Window) else None
                return Refused(index, retry_after(meter, amount, now, wait))
            remaining.append(limit - used - amount)
            counts.append(count)
        at: list[int] = []
        for meter, amount, count in zip(meters, amounts, counts, strict=True):
            if count is None:
                self._open.add(meter.key, amount)
                at.append(0)
            else:
                at.append(count.take(second, amount))
        return Granted(tuple(remaining), tuple(at))

    def settle(self, claim: Claim, used: Sequence[int], granted: Granted) -> None:
        """Put what was really used in the place of what was taken; see ``Limiter``."""
        for meter, amount, really, at in zip(claim.meters, claim.amounts, used, granted.at, strict=True):
            if meter.kind == "parallel":
                self._open.add(meter.key, -amount)
            elif really != amount:
                counts: Mapping[str, _Window | _Period] = self._windows if meter.kind == "window" else self._periods
                if (count := counts.get(meter.key)) is not None:
                    count.correct(at, really - amount)

    async def forget(self, tenant: str, end_user: str | None) -> None:
        """Forget the counts of an end user, or of all of a tenant's; see ``Limiter``. Never waits."""
        for counts in (self._windows, self._periods):
            for key in [key for key in counts if counts_end_user(key, tenant, end_user)]:
                del counts[key]

    def _limit(self, meter: Meter, amount: int) -> int:
        """Return the share of a meter's limit, once its count is there."""
        base = self._periods[meter.key].base if meter.kind == "period" else 0
        left = meter.limit - base
        return base + max(int(left * self._share), min(amount, left))

    def _count(self, meter: Meter, second: int) -> "_Window | _Period | None":
        """Return a meter's count as it is now; None for answers that are open."""
        if meter.kind == "window":
            window = self._windows.get(meter.key)
            if window is None:
                window = self._windows[meter.key] = _Window()
            window.expire(second)
            return window
        if meter.kind == "period":
            period = self._periods.get(meter.key)
            if period is None:
                period = self._periods[meter.key] = _Period(meter.ends_at)
            period.raise_to(meter.seed)
            return period
        return None

    def _sweep(self, now: float) -> None:
        """Forget counts that nobody has asked for since they ran out."""
        self._swept_at = now
        for window in self._windows.values():
            window.expire(int(now))
        self._windows = {key: window for key, window in self._windows.items() if window.seconds}
        self._periods = {key: period for key, period in self._periods.items() if not 0 < period.ends_at <= now}


class FallbackLimiter:
    """The shared counts while they can be reached, this process's own share of each limit while they cannot.

    ``shared`` and ``local`` are given the same ``OpenAnswers``. The two do not know each other's windows: a change from
    one to the other may let in as much again within 60 seconds as the one that takes over allows. What was spent of
    budgets meanwhile, the shared counts learn from the ledger.
    """

    def __init__(self, shared: Limiter, local: LocalLimiter) -> None:
        self._shared = shared
        self._local = local

    async def reserve(self, claim: Claim, now: float) -> Verdict:
        """Take all of a claim, or nothing; see ``Limiter``. Raises nothing."""
        try:
            return await self._shared.reserve(claim, now)
        except LimitsUnavailable:
            return await self._local.reserve(claim, now)

    def settle(self, claim: Claim, used: Sequence[int], granted: Granted) -> None:
        """Tell whoever has granted it; see ``Limiter``."""
        (self._local if granted.is_local else self._shared).settle(claim, used, granted)

    async def forget(self, tenant: str, end_user: str | None) -> None:
        """Forget them in both; see ``Limiter``. Raises ``LimitsUnavailable``: shared counts outlive this process."""
        await self._local.forget(tenant, end_user)
        await self._shared.forget(tenant, end_user)
