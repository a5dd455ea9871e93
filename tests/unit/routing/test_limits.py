"""What only a limiter of one process does: its share of limits, and standing in for shared counts."""

from collections.abc import Sequence

import pytest

from core.errors import LimitsUnavailable
from routing.limits import Claim, FallbackLimiter, Granted, LocalLimiter, Meter, OpenAnswers, Refused, Verdict
from tests.fakes.limits import Want, claim

NOW = 1_000_000.0


def window(limit: int, amount: int = 1, key: str = "window") -> Want:
    return Meter(key, "window", limit), amount


def period(limit: int, amount: int = 1, seed: int = 0) -> Want:
    return Meter("period", "period", limit, seed, NOW + 1000), amount


def parallel(limit: int) -> Want:
    return Meter("parallel", "parallel", limit), 1


async def num_granted(limiter: LocalLimiter, want: Want, now: float = NOW) -> int:
    verdicts = [await limiter.reserve(claim(want), now) for _ in range(50)]
    return sum(isinstance(verdict, Granted) for verdict in verdicts)


async def test_a_share_is_a_part_of_every_limit() -> None:
    limiter = LocalLimiter(share=1 / 3)

    assert await num_granted(limiter, window(30)) == 10
    assert await num_granted(limiter, period(30)) == 10
    assert await num_granted(limiter, parallel(30)) == 10


async def test_a_share_of_a_budget_is_a_part_of_what_the_ledger_says_is_left() -> None:
    limiter = LocalLimiter(share=0.5)

    assert await num_granted(limiter, period(100, seed=80)) == 10
    assert await num_granted(limiter, period(100, seed=88)) == 0  # the ledger does not know of all that was taken here
    assert await num_granted(limiter, period(100, seed=96)) == 2
    assert await num_granted(limiter, period(100, seed=100)) == 0
    assert await num_granted(limiter, period(100, seed=140)) == 0


async def test_a_request_that_fits_the_limit_and_not_the_share_is_let_in_by_itself() -> None:
    limiter = LocalLimiter(share=0.1)

    assert isinstance(await limiter.reserve(claim(window(100, 90)), NOW), Granted)
    assert await limiter.reserve(claim(window(100, 90)), NOW) == Refused(0, 61)
    assert await limiter.reserve(claim(window(100, 101)), NOW) == Refused(0, None)


async def test_counts_that_ran_out_are_forgotten() -> None:
    limiter = LocalLimiter()
    for number in range(100):
        await limiter.reserve(claim(window(10, key=f"window-{number}"), period(10)), NOW)

    await limiter.reserve(claim(window(10)), NOW + 1001)

    assert list(limiter._windows) == ["window"]
    assert limiter._periods == {}


async def test_settling_what_was_forgotten_changes_nothing() -> None:
    limiter = LocalLimiter()
    wanted = claim(window(10, 5), period(10, 5))
    granted = await limiter.reserve(wanted, NOW)
    assert isinstance(granted, Granted)
    await limiter.reserve(claim(parallel(1)), NOW + 1001)

    limiter.settle(wanted, (9, 9), granted)

    verdict = await limiter.reserve(claim(window(10), period(10)), NOW + 1001)
    assert isinstance(verdict, Granted)
    assert verdict.remaining == (9, 9)


class SharedCounts:
    """A limiter that grants everything while it is there, and keeps what it was told."""

    def __init__(self, open_answers: OpenAnswers) -> None:
        self.is_away = False
        self.settled: list[tuple[int, ...]] = []
        self._open = open_answers

    async def reserve(self, claim: Claim, now: float) -> Verdict:
        if self.is_away:
            raise LimitsUnavailable("away")
        for meter, amount in zip(claim.meters, claim.amounts, strict=True):
            self._open.add(meter.key, amount)
        return Granted((0,), (0,), is_local=False)

    def settle(self, claim: Claim, used: Sequence[int], granted: Granted) -> None:
        self.settled.append(tuple(used))
        for meter, amount in zip(claim.meters, claim.amounts, strict=True):
            self._open.add(meter.key, -amount)

    async def forget(self, tenant: str, end_user: str | None) -> None:
        raise LimitsUnavailable("away")


async def test_counts_are_forgotten_here_though_the_shared_ones_cannot_be_reached() -> None:
    local, count = LocalLimiter(), (Meter("requests/end_user/acme/ann", "window", 5), 2)
    await local.reserve(claim(count), NOW)
    with pytest.raises(LimitsUnavailable):
        await FallbackLimiter(SharedCounts(OpenAnswers()), local).forget("acme", "ann")

    verdict = await local.reserve(claim(count), NOW)
    assert isinstance(verdict, Granted)
    assert verdict.remaining == (3,)


async def test_whoever_granted_is_told_and_both_know_what_is_open() -> None:
    open_answers = OpenAnswers()
    shared = SharedCounts(open_answers)
    limiter = FallbackLimiter(shared, LocalLimiter(0.5, open_answers))
    wanted = claim(parallel(4))
    before = await limiter.reserve(wanted, NOW)
    shared.is_away = True
    during = await limiter.reserve(wanted, NOW)

    assert isinstance(before, Granted)
    assert isinstance(during, Granted)
    assert await limiter.reserve(wanted, NOW) == Refused(0, 1)

    limiter.settle(wanted, (0,), during)
    assert (shared.settled, dict(open_answers.counts)) == ([], {"parallel": 1})
    limiter.settle(wanted, (0,), before)
    assert (shared.settled, dict(open_answers.counts)) == ([(0,)], {})
