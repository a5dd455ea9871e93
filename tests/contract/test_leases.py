"""Leases, on a real Redis and on the fake that the property tests turn: who gets one, for how long, which epoch."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest

from core.clock import SystemClock
from storage.redis.connection import RedisConnection
from storage.redis.lease import Leases
from tests.fakes.leases import LeaseServer
from tests.fakes.redis import RedisServer

TTL_S = 0.2
Open = Callable[[str], Leases]


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture(params=["fake", "redis"])
async def of(request: pytest.FixtureRequest) -> AsyncIterator[Open]:
    """Leases of a named replica; each test has a server, or a part of one, to itself."""
    clock = SystemClock()
    if request.param == "fake":
        fake = LeaseServer(clock)
        yield lambda replica: Leases(fake, clock, replica, ttl=TTL_S, dead_after=TTL_S)
        return
    server: RedisServer = request.getfixturevalue("redis")
    async with RedisConnection(server.url, clock, command_timeout=5.0) as connection:
        await connection._execute("FLUSHALL")
        yield lambda replica: Leases(connection, clock, replica, ttl=TTL_S, dead_after=TTL_S)


async def until_over(look: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(5):
        while not await look():  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.01)


async def test_the_first_to_ask_holds_it_and_the_others_see_who_does(of: Open) -> None:
    ours = (await of("a").hold(["m"])).leases["m"]
    seen = (await of("b").hold(["m"])).leases["m"]
    assert (ours.holder, seen.holder) == ("a", "a")
    assert ours.epoch == seen.epoch > 0


async def test_each_model_has_a_lease_of_its_own(of: Open) -> None:
    await of("a").hold(["m"])
    found = await of("b").hold(["m", "n"])
    assert {name: lease.holder for name, lease in found.leases.items()} == {"m": "a", "n": "b"}


async def test_a_renewed_lease_keeps_its_epoch(of: Open) -> None:
    a = of("a")
    first = (await a.hold(["m"])).leases["m"]
    second = (await a.hold(["m"])).leases["m"]
    assert second.epoch == first.epoch
    assert second.valid_until >= first.valid_until


async def test_a_lease_that_nobody_renews_goes_to_another_with_a_later_epoch(of: Open) -> None:
    found = await of("a").hold(["m"])
    assert found.is_new, "it remembers none"
    first = found.leases["m"]
    b = of("b")

    async def is_ours() -> bool:
        return (await b.hold(["m"])).leases["m"].holder == "b"

    await until_over(is_ours)
    assert SystemClock().monotonic() >= first.valid_until, "the first holder had stopped before"
    found = await b.hold(["m"])
    assert found.leases["m"].epoch > first.epoch
    assert not found.is_new, "it remembers the old one"


async def test_who_only_looks_takes_and_renews_nothing(of: Open) -> None:
    a = of("a")
    assert (await a.look(["m"])).leases == {}
    first = (await a.hold(["m"])).leases["m"]

    async def is_free() -> bool:
        return not (await a.look(["m"])).leases

    await until_over(is_free)
    assert SystemClock().monotonic() >= first.valid_until


async def test_a_lease_that_is_given_up_is_free_at_once(of: Open) -> None:
    a, b = of("a"), of("b")
    epoch = (await a.hold(["m"])).leases["m"].epoch
    await a.leave({"m": epoch})
    found = await b.hold(["m"])
    assert found.leases["m"].holder == "b"
    assert found.leases["m"].epoch > epoch
    assert found.replicas == ("b",)


async def test_nobody_gives_up_a_lease_of_another_epoch_or_holder(of: Open) -> None:
    a, b = of("a"), of("b")
    epoch = (await a.hold(["m"])).leases["m"].epoch
    await b.leave({"m": epoch})
    await a.leave({"m": epoch - 1})
    assert (await b.look(["m"])).leases["m"].holder == "a"


async def test_who_is_heard_lives_and_who_is_not_is_forgotten(of: Open) -> None:
    a, b = of("a"), of("b")
    await a.hold(["m"])
    assert set((await b.hold(["m"])).replicas) == {"a", "b"}

    async def is_alone() -> bool:
        return (await b.look(["m"])).replicas == ("b",)

    await until_over(is_alone)


async def test_a_server_that_has_lost_everything_gives_no_epoch_twice(redis: RedisServer) -> None:
    async with RedisConnection(redis.url, SystemClock(), command_timeout=5.0) as connection:
        a, b = (Leases(connection, SystemClock(), name, ttl=TTL_S) for name in "ab")
        first = (await a.hold(["m"])).leases["m"]
        await asyncio.sleep(0.01)
        await connection._execute("FLUSHALL")
        found = await b.hold(["m"])
        assert found.is_new
        assert found.leases["m"].epoch > first.epoch


async def test_a_lease_is_handed_to_one_that_lives_with_a_later_epoch(of: Open) -> None:
    a, b = of("a"), of("b")
    first = (await a.hold(["m"])).leases["m"]
    await b.hold(["m"])
    assert not await a.hand_over("m", first.epoch, "nobody")
    assert not await a.hand_over("m", first.epoch - 1, "b")
    assert not await b.hand_over("m", first.epoch, "b")
    assert await a.hand_over("m", first.epoch, "b")
    seen = (await a.hold(["m"])).leases["m"]
    assert seen.holder == "b"
    assert seen.epoch > first.epoch
    assert (await b.hold(["m"])).leases["m"].epoch == seen.epoch
