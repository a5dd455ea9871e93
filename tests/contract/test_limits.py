"""What a limiter does, held on the one that counts alone and on the one that counts in Redis."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from routing.limits import WINDOW_S, Claim, Granted, Limiter, LocalLimiter, Meter, Refused, Verdict, reset_after
from storage.redis.connection import RedisConnection
from storage.redis.limits import RedisLimiter
from tests.fakes.clock import ManualClock
from tests.fakes.limits import Want, claim
from tests.fakes.redis import RedisServer

NOW = 1_000_000.0


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer() as running:
        yield running


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(NOW)


_next_name = iter(range(10**9))


@pytest.fixture
def name() -> str:
    """A count that no other test knows."""
    return f"count-{next(_next_name)}"


@pytest.fixture(params=["local", "redis"])
async def limiter(request: pytest.FixtureRequest, clock: ManualClock) -> AsyncIterator[Limiter]:
    if request.param == "local":
        yield LocalLimiter()
    else:
        async with redis_limiter(request.getfixturevalue("server"), clock) as shared:
            yield shared


@asynccontextmanager
async def redis_limiter(server: RedisServer, clock: ManualClock) -> AsyncIterator[RedisLimiter]:
    """A limiter of one process; several of them in one process count as several replicas."""
    connection = RedisConnection(server.url, clock, command_timeout=5.0)
    async with connection, RedisLimiter(connection, clock) as limiter:
        yield limiter


def window(name: str, limit: int = 10, amount: int = 1) -> Want:
    return Meter(f"window/{name}", "window", limit), amount


def period(name: str, limit: int = 100, amount: int = 10, seed: int = 0, ends_at: float = NOW + 500) -> Want:
    return Meter(f"period/{name}", "period", limit, seed, ends_at), amount


def parallel(name: str, limit: int = 2) -> Want:
    return Meter(f"parallel/{name}", "parallel", limit), 1


async def granted(limiter: Limiter, *wants: Want, now: float = NOW) -> Granted:
    verdict = await limiter.reserve(claim(*wants), now)
    assert isinstance(verdict, Granted), verdict
    return verdict


def resets(wants: Sequence[Want], verdict: Granted, now: float) -> list[float]:
    return [reset_after(meter, now, at) for (meter, _), at in zip(wants, verdict.at, strict=True)]


async def refused(limiter: Limiter, *wants: Want, now: float = NOW) -> Refused:
    verdict = await limiter.reserve(claim(*wants), now)
    assert isinstance(verdict, Refused), verdict
    return verdict


async def test_a_window_grants_its_limit_and_no_more(limiter: Limiter, name: str) -> None:
    left = [(await granted(limiter, window(name, limit=3))).remaining for _ in range(3)]

    assert left == [(2,), (1,), (0,)]
    assert await refused(limiter, window(name, limit=3)) == Refused(0, WINDOW_S + 1)


async def test_what_was_taken_counts_until_its_whole_second_has_left_the_window(limiter: Limiter, name: str) -> None:
    await granted(limiter, window(name, limit=1), now=NOW + 0.999)

    assert (await refused(limiter, window(name, limit=1), now=NOW + 60.999)).retry_after == 1
    assert (await refused(limiter, window(name, limit=1), now=NOW + 30)).retry_after == 31
    await granted(limiter, window(name, limit=1), now=NOW + 61)


async def test_a_refusal_says_when_enough_will_have_left(limiter: Limiter, name: str) -> None:
    await granted(limiter, window(name, amount=3), now=NOW)
    await granted(limiter, window(name, amount=3), now=NOW + 10)
    await granted(limiter, window(name, amount=4), now=NOW + 20)

    async def wait_for(amount: int) -> float | None:
        return (await refused(limiter, window(name, amount=amount), now=NOW + 30)).retry_after

    assert [await wait_for(amount) for amount in (1, 3, 4, 6, 7, 10)] == [31, 31, 41, 41, 51, 51]


@pytest.mark.parametrize("end_user", ["ann", "a/b", "ann/tokens/day/1", "\udc80*?[a]\\"])
async def test_the_counts_of_an_end_user_are_forgotten_and_no_others(
    limiter: Limiter, name: str, end_user: str
) -> None:
    def counts(whose: str) -> tuple[Want, ...]:
        return (
            (Meter(f"requests/{whose}", "window", 10), 1),
            (Meter(f"tokens/{whose}", "window", 10), 1),
            (Meter(f"budget/{whose}/usd/total/0", "period", 10), 1),
            (Meter(f"budget/{whose}/tokens/day/19000", "period", 10, ends_at=NOW + 500), 1),
        )

    theirs = f"end_user/{name}/{end_user}"
    others = (f"tenant/{name}", f"key/{name}", f"end_user/{name}-2/{end_user}", f"end_user/{name}/{end_user}s")
    for whose in (theirs, *others):
        await granted(limiter, *counts(whose))

    await limiter.forget(name, end_user)
    assert (await granted(limiter, *counts(theirs))).remaining == (9,) * 4
    for whose in others:
        assert (await granted(limiter, *counts(whose))).remaining == (8,) * 4

    await limiter.forget(name, None)
    for whose in (theirs, others[-1]):
        assert (await granted(limiter, *counts(whose))).remaining == (9,) * 4
    for whose in others[:-1]:
        assert (await granted(limiter, *counts(whose))).remaining == (7,) * 4


async def test_what_is_settled_after_it_was_forgotten_brings_nothing_back(limiter: Limiter, name: str) -> None:
    whose = f"end_user/{name}/ann"
    wants = ((Meter(f"tokens/{whose}", "window", 10), 3), (Meter(f"budget/{whose}/usd/total/0", "period", 10), 3))
    verdict = await granted(limiter, *wants)
    await limiter.forget(name, "ann")
    limiter.settle(claim(*wants), (5, 5), verdict)

    assert (await granted(limiter, *wants)).remaining == (7, 7)


async def test_what_is_larger_than_the_limit_will_never_fit(limiter: Limiter, name: str) -> None:
    assert await refused(limiter, window(name, limit=5, amount=6)) == Refused(0, None)
    assert await refused(limiter, period(name, limit=5, amount=6)) == Refused(0, None)
    assert await refused(limiter, parallel(name, limit=0)) == Refused(0, None)


async def test_all_meters_are_taken_or_none_is(limiter: Limiter, name: str) -> None:
    full, free = window(f"{name}-full", limit=1), window(f"{name}-free", limit=10)
    await granted(limiter, full)

    verdict = await refused(limiter, parallel(name), free, period(name), full)

    assert verdict.meter == 3
    after = await granted(limiter, parallel(name), free, period(name))
    assert after.remaining == (1, 9, 90)


async def test_the_first_meter_without_room_is_named(limiter: Limiter, name: str) -> None:
    wants = (window(name), period(name, limit=5), parallel(name, limit=0))

    assert await refused(limiter, *wants) == Refused(1, None)


async def test_a_grant_says_when_each_meter_is_whole_again(limiter: Limiter, name: str) -> None:
    wants = (window(name), period(name, ends_at=NOW + 500), parallel(name))
    verdict = await granted(limiter, *wants)

    assert resets(wants, verdict, NOW) == [61, 500, 0]


@pytest.mark.parametrize(("used", "left"), [(2, 8), (5, 5), (9, 1), (12, 0)])
async def test_a_settled_window_holds_what_was_used(limiter: Limiter, name: str, used: int, left: int) -> None:
    wants = (window(name, amount=5),)
    limiter.settle(claim(*wants), (used,), await granted(limiter, *wants))

    assert (await granted(limiter, window(name, amount=0, limit=max(10, used)))).remaining == (left,)


async def test_what_is_settled_after_it_left_the_window_changes_nothing(limiter: Limiter, name: str) -> None:
    wants = (window(name, amount=5),)
    verdict = await granted(limiter, *wants)
    await granted(limiter, *wants, now=NOW + 61)
    limiter.settle(claim(*wants), (0,), verdict)

    assert (await granted(limiter, window(name, amount=0), now=NOW + 61)).remaining == (5,)


async def test_a_clock_that_was_set_back_books_where_settling_finds_it(limiter: Limiter, name: str) -> None:
    wants = (window(name, amount=5),)
    await granted(limiter, *wants)
    verdict = await granted(limiter, *wants, now=NOW - 7)
    limiter.settle(claim(*wants), (1,), verdict)

    assert verdict.at == (int(NOW),)
    assert (await granted(limiter, window(name, amount=0))).remaining == (4,)


async def test_a_clock_that_was_set_back_by_more_than_the_window_begins_anew(limiter: Limiter, name: str) -> None:
    await granted(limiter, window(name, limit=1))

    await granted(limiter, window(name, limit=1), now=NOW - 3600)


async def test_a_period_grants_its_limit_until_it_ends(limiter: Limiter, name: str) -> None:
    for _ in range(10):
        await granted(limiter, period(name))

    assert await refused(limiter, period(name), now=NOW + 100) == Refused(0, 400)


async def test_a_period_without_end_is_never_whole_again(limiter: Limiter, name: str) -> None:
    whole = period(name, amount=100, ends_at=0)
    verdict = await granted(limiter, whole)

    assert resets([whole], verdict, NOW) == [0.0]
    assert await refused(limiter, period(name, ends_at=0)) == Refused(0, None)


async def test_a_settled_period_holds_what_was_used(limiter: Limiter, name: str) -> None:
    wants = (period(name, amount=60),)
    first, second = await granted(limiter, *wants), await granted(limiter, period(name, amount=40))
    limiter.settle(claim(*wants), (5,), first)
    limiter.settle(claim(period(name, amount=40)), (45,), second)

    assert (await granted(limiter, period(name, amount=0))).remaining == (50,)


async def test_a_period_starts_from_what_the_ledger_says(limiter: Limiter, name: str) -> None:
    assert (await granted(limiter, period(name, seed=70))).remaining == (20,)
    assert (await granted(limiter, period(name, seed=75))).remaining == (10,)  # the ledger lags: it is not added
    await refused(limiter, period(name, seed=95))


async def test_money_in_picodollars_is_not_rounded_away(limiter: Limiter, name: str) -> None:
    a_million = 10**18

    left = [
        (await granted(limiter, period(name, limit=a_million, amount=amount))).remaining[0]
        for amount in (a_million - 4096, 2048)
    ]

    assert left == [4096, 2048]


async def test_whatever_a_caller_asks_for_and_is_called_is_only_refused(limiter: Limiter, name: str) -> None:
    wants = (window(f"{name}-\ud800{{}}\0", amount=10**30), period(name, amount=10**30))

    assert await refused(limiter, *wants) == Refused(0, None)
    assert await refused(limiter, period(name, limit=10**9, seed=10**30)) == Refused(0, 500)
    await granted(limiter, window(f"{name}-\ud800{{}}\0"), period(f"{name}-rich", limit=10**30))


async def test_an_answer_that_ends_makes_room_for_another(limiter: Limiter, name: str) -> None:
    first = await granted(limiter, parallel(name))
    await granted(limiter, parallel(name))
    assert await refused(limiter, parallel(name)) == Refused(0, 1)

    limiter.settle(claim(parallel(name)), (0,), first)

    assert (await granted(limiter, parallel(name))).remaining == (0,)


async def test_reservations_of_one_moment_share_a_limit_exactly(limiter: Limiter, name: str) -> None:
    wanted = claim(window(name, limit=300), parallel(name, limit=250))

    verdicts = await asyncio.gather(*(limiter.reserve(wanted, NOW) for _ in range(400)))

    assert sum(isinstance(verdict, Granted) for verdict in verdicts) == 250


async def test_each_of_many_callers_of_one_moment_is_told_of_its_own_meters(limiter: Limiter, name: str) -> None:
    shared = window(f"{name}-both", limit=10, amount=1)
    one, two = claim(shared, window(f"{name}-one", limit=8, amount=2)), claim(period(f"{name}-two", limit=25), shared)
    more = Claim(one.meters, (2, 1))

    verdicts = await asyncio.gather(*(limiter.reserve(wanted, NOW) for wanted in (one, two, two, more, two, one)))

    assert verdicts[4] == Refused(0, 500)
    left = [verdict.remaining for verdict in verdicts if isinstance(verdict, Granted)]
    assert left == [(9, 6), (15, 8), (5, 7), (5, 5), (4, 3)]


Step = tuple[float, int, int | None]
"""Seconds since the last step, how much is wanted, and how much is really used (None: not settled yet)."""


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    steps=st.lists(
        st.tuples(
            st.floats(0, 70, allow_nan=False) | st.floats(0, 2),
            st.integers(1, 8),
            st.none() | st.integers(0, 8),
        ),
        max_size=40,
    )
)
def test_no_window_of_60_seconds_ever_holds_more_than_the_limit(server: RedisServer, steps: list[Step]) -> None:
    """Requests use at most what they took; both limiters decide alike, and neither refuses what has room."""

    async def play() -> None:
        limit, name, now = 10, f"count-{next(_next_name)}", NOW
        held: list[list[float]] = []
        local = LocalLimiter()
        clock = ManualClock(NOW)
        async with redis_limiter(server, clock) as shared:
            for pause, amount, used in steps:
                now += pause
                wants = (window(name, limit, amount),)
                verdicts: list[Verdict] = [await limiter.reserve(claim(*wants), now) for limiter in (local, shared)]
                counted = sum(entry[1] for entry in held if int(entry[0]) >= int(now) - WINDOW_S)
                assert isinstance(verdicts[0], Granted) == (counted + amount <= limit)
                if isinstance(verdicts[0], Granted) and isinstance(verdicts[1], Granted):
                    assert verdicts[0].remaining == verdicts[1].remaining
                    assert resets(wants, verdicts[0], now) == resets(wants, verdicts[1], now)
                    held.append([now, amount])
                    if used is not None and used <= amount:
                        local.settle(claim(*wants), (used,), verdicts[0])
                        shared.settle(claim(*wants), (used,), verdicts[1])
                        held[-1][1] = used
                else:
                    assert verdicts[0] == verdicts[1]
                assert sum(entry[1] for entry in held if now - entry[0] <= WINDOW_S) <= limit

    asyncio.run(play())


async def test_replicas_share_what_is_open(server: RedisServer, clock: ManualClock, name: str) -> None:
    async with redis_limiter(server, clock) as one, redis_limiter(server, clock) as two:
        first = await granted(one, parallel(name))
        await granted(two, parallel(name))
        await refused(one, parallel(name))
        await refused(two, parallel(name))

        one.settle(claim(parallel(name)), (0,), first)
        await one.reserve(claim(), NOW)  # whatever comes next takes it along

        await granted(two, parallel(name))


async def test_a_replica_that_leaves_takes_its_open_answers_along(
    server: RedisServer, clock: ManualClock, name: str
) -> None:
    async with redis_limiter(server, clock) as one:
        async with redis_limiter(server, clock) as two:
            await granted(two, parallel(name, limit=1))
            await refused(one, parallel(name, limit=1))

        await granted(one, parallel(name, limit=1))


async def test_answers_of_a_replica_that_was_not_heard_for_10_seconds_do_not_count(
    server: RedisServer, name: str
) -> None:
    lost, alive = ManualClock(NOW), ManualClock(NOW)
    async with redis_limiter(server, lost) as one, redis_limiter(server, alive) as two:
        await granted(one, parallel(name, limit=1))
        alive.advance(9.9)
        await refused(two, parallel(name, limit=1))
        alive.advance(0.2)
        await granted(two, parallel(name, limit=1), now=alive.wall())


async def test_what_a_cancelled_caller_took_is_given_back(server: RedisServer, clock: ManualClock, name: str) -> None:
    wants = (window(name, limit=1), period(name, limit=10), parallel(name, limit=1))
    async with redis_limiter(server, clock) as limiter:
        for num_turns in range(6):
            caller = asyncio.create_task(limiter.reserve(claim(*wants), NOW))
            for _ in range(num_turns):  # the call has not left, is under way, or is answered
                await asyncio.sleep(0)
            caller.cancel()
            await asyncio.gather(caller, return_exceptions=True)
            await limiter.reserve(claim(), NOW)

        assert (await granted(limiter, *wants)).remaining == (0, 0, 0)
