"""Limits while Redis hangs, dies and comes back, and while several processes share them."""

import asyncio
import contextlib
import json
import os
import random
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from core.clock import SystemClock
from core.errors import LimitsUnavailable
from routing.limits import FallbackLimiter, Granted, Limiter, LocalLimiter, Meter, OpenAnswers
from storage.redis.connection import RedisAwayError, RedisConnection
from storage.redis.limits import RedisLimiter
from tests.fakes.limits import Want, claim
from tests.fakes.redis import RedisServer

ROOT = Path(__file__).resolve().parents[2]
COMMAND_TIMEOUT_S = 0.2
OPEN_S = 0.3

_CLIENT = """
import asyncio, json, sys
from core.clock import SystemClock
from routing.limits import Claim, Granted, Meter
from storage.redis.connection import RedisConnection
from storage.redis.limits import RedisLimiter

async def main():
    clock = SystemClock()
    async with RedisConnection(sys.argv[1], clock, command_timeout=10) as connection:
        async with RedisLimiter(connection, clock) as limiter:
            claim = Claim((Meter(*json.loads(sys.argv[2])),), (1,))
            await limiter.reserve(Claim((), ()), clock.wall())
            print("ready", flush=True)
            await asyncio.to_thread(sys.stdin.readline)
            async def ask():
                verdict = await limiter.reserve(claim, clock.wall())
                await asyncio.sleep(0)
                return isinstance(verdict, Granted)
            granted = 0
            for _ in range(10):
                granted += sum(await asyncio.gather(*(ask() for _ in range(40))))
            print(granted, flush=True)
            await asyncio.to_thread(sys.stdin.readline)

asyncio.run(main())
"""


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with RedisServer() as running:
        yield running


class QuickLimiter(RedisLimiter):
    HEARTBEAT_S = 0.1


@asynccontextmanager
async def shared_limiter(
    server: RedisServer, open_answers: OpenAnswers | None = None
) -> AsyncIterator[tuple[RedisConnection, RedisLimiter]]:
    clock = SystemClock()
    connection = RedisConnection(server.url, clock, command_timeout=COMMAND_TIMEOUT_S, breaker_open=OPEN_S)
    async with connection, QuickLimiter(connection, clock, open_answers) as limiter:
        yield connection, limiter


def window(limit: int = 1_000_000, amount: int = 1) -> Want:
    return Meter("requests", "window", limit), amount


def period(limit: int = 1_000_000, amount: int = 1) -> Want:
    return Meter("budget", "period", limit, ends_at=time.time() + 3600), amount


def parallel(limit: int = 2) -> Want:
    return Meter("parallel", "parallel", limit), 1


async def until_up(connection: RedisConnection) -> None:
    async with asyncio.timeout(10):
        while not connection.is_up:  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.01)


async def until_away(limiter: Limiter, connection: RedisConnection) -> None:
    async with asyncio.timeout(10):
        while connection.is_up:
            with pytest.raises(LimitsUnavailable):
                await limiter.reserve(claim(window()), time.time())


@pytest.mark.parametrize("meter", [["shared", "window", 500], ["shared", "parallel", 500]])
async def test_three_processes_share_a_limit_exactly(server: RedisServer, meter: list[object]) -> None:
    clients = [
        await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            _CLIENT,
            server.url,
            json.dumps(meter),
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        for _ in range(3)
    ]
    granted = []
    for client in clients:
        assert client.stdout is not None
        assert await client.stdout.readline() == b"ready\n"
    for client in clients:
        assert client.stdin is not None
        client.stdin.write(b"go\n")
    for client in clients:
        assert client.stdout is not None
        granted.append(int(await client.stdout.readline()))
    for client in clients:
        await client.communicate(b"")

    assert sum(granted) == 500


async def test_a_frozen_redis_costs_callers_the_command_timeout_and_then_nothing(server: RedisServer) -> None:
    open_answers = OpenAnswers()
    async with shared_limiter(server, open_answers) as (connection, shared):
        limiter = FallbackLimiter(shared, LocalLimiter(0.5, open_answers))
        waits: list[float] = []
        num_local = 0
        is_over = False

        async def ask_for_ever() -> None:
            nonlocal num_local
            while not is_over:
                began_at = time.monotonic()
                verdict = await limiter.reserve(claim(window(), parallel(100)), time.time())
                waits.append(time.monotonic() - began_at)
                assert isinstance(verdict, Granted)
                num_local += verdict.is_local
                await asyncio.sleep(0.005)
                limiter.settle(claim(window(), parallel(100)), (1, 0), verdict)

        with capture_logs() as logs:
            callers = [asyncio.create_task(ask_for_ever()) for _ in range(16)]
            await asyncio.sleep(0.3)
            assert num_local == 0
            server.freeze()
            await asyncio.sleep(1.5)
            assert not connection.is_up
            num_waits = len(waits)
            await asyncio.sleep(0.3)
            assert max(waits[num_waits:]) < COMMAND_TIMEOUT_S * 0.75  # the breaker is open: nobody waits
            server.thaw()
            await until_up(connection)
            num_local = 0
            await asyncio.sleep(0.2)
            is_over = True
            await asyncio.gather(*callers)

        assert num_local == 0
        assert max(waits) < COMMAND_TIMEOUT_S + 0.3
        assert sorted(waits)[int(len(waits) * 0.99)] < COMMAND_TIMEOUT_S + 0.1
        assert [entry["event"] for entry in logs] == ["redis_away", "redis_back"]
        assert connection.num_errors["limits"] >= 3
        assert dict(open_answers.counts) == {}


async def test_what_a_frozen_redis_was_asked_is_taken_once_or_not_at_all(server: RedisServer) -> None:
    wanted = claim(window(10, 3), period(10, 3), parallel())
    async with shared_limiter(server) as (connection, limiter):
        first = await limiter.reserve(wanted, time.time())
        assert isinstance(first, Granted)
        server.freeze()
        with pytest.raises(LimitsUnavailable):
            await limiter.reserve(wanted, time.time())  # Redis will find it in its socket, and nobody waits for it
        limiter.settle(wanted, (1, 1, 0), first)
        await until_away(limiter, connection)
        server.thaw()
        await until_up(connection)
        await limiter.reserve(claim(), time.time())

        after = await limiter.reserve(claim(window(10, 0), period(10, 0), parallel()), time.time())

        assert isinstance(after, Granted)
        assert after.remaining == (9, 9, 1)


async def test_no_count_is_wrong_after_many_lost_answers_and_cancelled_callers(server: RedisServer) -> None:
    wanted = claim(period(10**9, 7), parallel(10**6))
    draw = random.Random(7)
    num_lost = num_used = 0
    async with shared_limiter(server) as (connection, limiter):

        async def call() -> None:
            nonlocal num_used
            granted = await limiter.reserve(wanted, time.time())
            assert isinstance(granted, Granted)
            num_used += (used := draw.randrange(12))
            limiter.settle(wanted, (used, 0), granted)

        async def ask_until(end: float) -> None:
            nonlocal num_lost
            while time.monotonic() < end:
                caller = asyncio.create_task(call())
                await asyncio.sleep(draw.random() * 0.005)
                if draw.random() < 0.3:
                    caller.cancel()
                (outcome,) = await asyncio.gather(caller, return_exceptions=True)
                num_lost += isinstance(outcome, LimitsUnavailable)

        end = time.monotonic() + 1.5
        callers = [asyncio.create_task(ask_until(end)) for _ in range(16)]
        async with Redis.from_url(server.url) as operator:
            while time.monotonic() < end:
                await operator.client_kill_filter(_type="normal", skipme=True)
                await asyncio.sleep(draw.random() * 0.02)
        await asyncio.gather(*callers)
        await until_up(connection)
        await asyncio.sleep(0.2)  # a heartbeat

        after = await limiter.reserve(wanted, time.time())
        assert isinstance(after, Granted)
        assert num_lost > 0
        assert num_used > 0
        assert after.remaining == (10**9 - num_used - 7, 10**6 - 1)


async def test_a_redis_that_lost_everything_learns_what_is_open(server: RedisServer) -> None:
    async with shared_limiter(server) as (connection, one), shared_limiter(server) as (_, two):
        held = await one.reserve(claim(parallel(1)), time.time())
        assert isinstance(held, Granted)
        server.kill()
        await until_away(one, connection)
        server.start()
        await until_up(connection)
        await asyncio.sleep(0.3)  # a heartbeat, and the other's breaker

        assert not isinstance(await two.reserve(claim(parallel(1)), time.time()), Granted)
        one.settle(claim(parallel(1)), (0,), held)
        await one.reserve(claim(), time.time())
        assert isinstance(await two.reserve(claim(parallel(1)), time.time()), Granted)


async def test_answers_opened_before_and_during_an_outage_all_count(server: RedisServer) -> None:
    open_answers = OpenAnswers()
    wanted = claim(parallel(4))
    async with shared_limiter(server, open_answers) as (connection, shared):
        limiter = FallbackLimiter(shared, LocalLimiter(0.5, open_answers))
        before = await limiter.reserve(wanted, time.time())
        server.freeze()
        await until_away(shared, connection)
        during = await limiter.reserve(wanted, time.time())
        assert isinstance(before, Granted)
        assert isinstance(during, Granted)
        assert (before.is_local, during.is_local) == (False, True)
        assert not isinstance(await limiter.reserve(wanted, time.time()), Granted)  # its share is two
        server.thaw()
        await until_up(connection)
        await asyncio.sleep(0.2)  # a heartbeat

        verdict = await shared.reserve(wanted, time.time())
        assert isinstance(verdict, Granted)
        assert verdict.remaining == (1,)
        for granted in (before, during, verdict):
            limiter.settle(wanted, (0,), granted)
        await asyncio.sleep(0.2)
        last = await shared.reserve(wanted, time.time())
        assert isinstance(last, Granted)
        assert last.remaining == (3,)


async def test_a_redis_that_is_not_there_at_the_start_is_found_when_it_comes(server: RedisServer) -> None:
    server.stop()
    async with shared_limiter(server) as (connection, limiter):
        await until_away(limiter, connection)
        server.start()
        await until_up(connection)

        assert isinstance(await limiter.reserve(claim(window()), time.time()), Granted)


async def test_a_redis_that_forgot_its_scripts_is_told_them_again(server: RedisServer) -> None:
    async with shared_limiter(server) as (connection, limiter):
        await limiter.reserve(claim(window()), time.time())
        server.stop()
        server.start()
        async with asyncio.timeout(10):
            while True:
                try:
                    verdict = await limiter.reserve(claim(window()), time.time())
                    break
                except LimitsUnavailable:
                    await asyncio.sleep(0.01)

        assert isinstance(verdict, Granted)
        assert connection.is_up


class LosesCancellation(RedisConnection):
    """Takes a cancellation for a connection that was given up, as a client may that was just giving one up."""

    called: asyncio.Event

    async def run_script(self, *_: Any) -> Any:
        if not self.called.is_set():
            self.called.set()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
        raise RedisAwayError("the connection was given up")


async def test_leaving_comes_to_an_end_though_a_cancellation_is_lost_in_the_client() -> None:
    connection = LosesCancellation("redis://127.0.0.1:1", SystemClock())
    connection.called = asyncio.Event()
    async with asyncio.timeout(10), connection, RedisLimiter(connection, SystemClock()):
        await connection.called.wait()
