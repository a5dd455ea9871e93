"""Gateways on a real Redis that comes late, hangs, lies and dies: who decides, and since when."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Self

import pytest
from redis.asyncio import Redis

from core.clock import SystemClock
from core.ids import ModelName, RequestId, TenantId, WorkerId
from gateway.replicas import Replicas, is_shared, replicas_of
from gateway.settings import RedisSettings, Settings
from routing.replicas.messages import Envelope, ReplicaId, Summons, pack
from routing.replicas.spreading import SETTLED_S, best_of
from routing.scheduler import Effect, LegEnded, Limits, Scheduler, Start, Submit, Worker, WorkerView
from tests.fakes.redis import RedisServer

MODEL = ModelName("m")
TAKE_OVER_S = 3.0
MARGIN_S = 1.0


class Gateway:
    """A gateway without HTTP and engines: what is started runs until the test ends it."""

    def __init__(self, server: RedisServer, num_expected: int = 2) -> None:
        self.clock = SystemClock()
        self.started: list[Start] = []
        settings = RedisSettings.model_validate({"url": server.url, "scheduling": "shared", "replicas": num_expected})
        replicas = replicas_of(
            settings,
            self.clock,
            self.scheduler(),
            self.scheduler,
            is_shared=lambda _: True,
            carry_out=self.carry_out,
        )
        assert replicas is not None
        self.replicas: Replicas = replicas

    @staticmethod
    def scheduler() -> Scheduler:
        return Scheduler(Limits())

    async def __aenter__(self) -> Self:
        await self.replicas.__aenter__()
        view = WorkerView(WorkerId("w"), MODEL, is_ready=True, is_healthy=True, may_return=True, max_inflight=2)
        self.carry_out(self.replicas.on(Worker(view, self.clock.monotonic())))
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.replicas.__aexit__(None, None, None)

    def carry_out(self, effects: Sequence[Effect]) -> None:
        self.started += [effect for effect in effects if isinstance(effect, Start)]

    def submit(self, name: str) -> None:
        submit = Submit(RequestId(name), TenantId("t"), (MODEL,), 10, 30.0, self.clock.monotonic())
        self.carry_out(self.replicas.on(submit))

    def end(self) -> None:
        leg = self.started.pop(0).leg
        self.carry_out(self.replicas.on(LegEnded(leg=leg, cause="done", now=self.clock.monotonic())))

    @property
    def role(self) -> str:
        return self.replicas.statuses[0].role if self.replicas.statuses else ""


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with RedisServer() as running:
        yield running


@asynccontextmanager
async def gateways(server: RedisServer, num: int = 2) -> AsyncIterator[list[Gateway]]:
    async with AsyncExitStack() as stack:
        found = [await stack.enter_async_context(Gateway(server, num)) for _ in range(num)]
        await until(lambda: sorted(one.role for one in found) == [*["following"] * (num - 1), "leading"])
        await until(lambda: all(one.replicas.num_replicas == num for one in found))
        yield found


def led(found: list[Gateway]) -> tuple[Gateway, Gateway]:
    """Return who leads and one who follows."""
    holder = next(one for one in found if one.role == "leading")
    return holder, next(one for one in found if one is not holder)


async def until(is_so: Callable[[], bool]) -> float:
    began = time.monotonic()
    async with asyncio.timeout(10):
        while not is_so():  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.01)
    return time.monotonic() - began


async def test_slots_are_given_to_requests_of_both(server: RedisServer) -> None:
    async with gateways(server) as found:
        holder, other = led(found)
        other.submit("a")
        other.submit("b")
        await until(lambda: len(other.started) == 2)
        holder.submit("c")
        assert not holder.started
        assert holder.replicas.num_running(WorkerId("w")) == 2
        other.end()
        await until(lambda: len(holder.started) == 1)


async def test_a_start_takes_milliseconds_over_redis(server: RedisServer) -> None:
    async with gateways(server) as found:
        _, other = led(found)
        times = []
        for number in range(50):
            other.submit(f"r{number}")
            times.append(await until(lambda: bool(other.started)))
            other.end()
        assert sorted(times)[25] < 0.03


async def test_who_leaves_gives_the_lease_to_others_at_once(server: RedisServer) -> None:
    async with AsyncExitStack() as stack:
        leaves = await stack.enter_async_context(Gateway(server))
        await until(lambda: leaves.role == "leading")
        async with Gateway(server) as stays:
            await until(lambda: stays.role == "following")
            await stack.aclose()
            assert await until(lambda: stays.role == "leading") < Replicas.BEAT_S + MARGIN_S
            await until(lambda: stays.replicas.num_replicas == 1)


async def test_a_lease_is_handed_to_the_gateway_that_should_have_it_and_it_knows_what_was_learned(
    server: RedisServer,
) -> None:
    async with Gateway(server) as first:
        await until(lambda: first.role == "leading")
        better = Gateway(server)
        while best_of(MODEL, (first.replicas.id, better.replicas.id)) == first.replicas.id:
            better = Gateway(server)
        async with better:
            await until(lambda: better.role == "following")
            better.submit("a")
            await until(lambda: bool(better.started))
            assert await until(lambda: better.role == "leading") < SETTLED_S + 2 * Replicas.BEAT_S + MARGIN_S
            await until(lambda: first.role == "following")
            (share,) = better.replicas.fairness_view(MODEL).tenants
            assert (share.tenant, share.running, share.attained) == ("t", 1, 1.0)
            better.submit("b")
            first.submit("c")
            first.submit("d")
            await until(lambda: len(better.started) + len(first.started) == 2)
            assert not first.replicas.num_refused


@pytest.mark.parametrize("trouble", ["kill", "freeze"])
async def test_redis_that_is_away_leaves_each_its_share_and_comes_back(server: RedisServer, trouble: str) -> None:
    async with gateways(server) as found:
        getattr(server, trouble)()
        for gateway in found:
            for number in range(2):
                gateway.submit(f"r{number}")
        assert await until(lambda: [one.role for one in found] == ["alone", "alone"]) < TAKE_OVER_S + MARGIN_S
        assert all(gateway.started for gateway in found)
        assert {status.share for one in found for status in one.replicas.statuses} == {0.5}
        server.start() if trouble == "kill" else server.thaw()
        await until(lambda: sorted(one.role for one in found) == ["following", "leading"])
        for _ in range(4):
            await until(lambda: any(gateway.started for gateway in found))
            next(gateway for gateway in found if gateway.started).end()
        assert not any(gateway.replicas.num_waiting(MODEL) for gateway in found)


async def test_redis_that_restarts_empty_gives_no_slot_away_twice(server: RedisServer) -> None:
    async with gateways(server, 3) as found:
        for gateway in found:
            for number in range(3):
                gateway.submit(f"r{number}")
        await until(lambda: sum(len(gateway.started) for gateway in found) == 2)
        epoch = led(found)[0].replicas.statuses[0].epoch
        server.kill()
        server.start()
        until_over = time.monotonic() + 3.0
        while time.monotonic() < until_over:
            assert sum(len(gateway.started) for gateway in found) == 2
            await asyncio.sleep(0.01)
        assert sorted(gateway.role for gateway in found) == ["following", "following", "leading"]
        assert led(found)[0].replicas.statuses[0].epoch > epoch
        for _ in range(9):
            await until(lambda: any(gateway.started for gateway in found))
            next(gateway for gateway in found if gateway.started).end()


async def test_without_redis_a_gateway_starts_and_decides_alone(server: RedisServer) -> None:
    server.kill()
    async with Gateway(server, num_expected=2) as gateway:
        gateway.submit("a")
        gateway.submit("b")
        await until(lambda: gateway.role == "alone")
        assert len(gateway.started) == 1
        server.start()
        await until(lambda: gateway.role == "leading")
        assert len(gateway.started) == 2


async def test_who_has_no_password_of_redis_is_none_of_us(server: RedisServer) -> None:
    async with Redis.from_url(server.url) as redis:
        await redis.config_set("requirepass", "a password")
    async with Gateway(server, num_expected=2) as stranger:
        await until(lambda: stranger.role == "alone")
        assert stranger.replicas.statuses[0].share == 0.5


async def test_what_is_no_message_of_ours_is_refused(server: RedisServer) -> None:
    async with gateways(server) as found, Redis.from_url(server.url) as redis:
        holder, other = led(found)
        epoch = holder.replicas.statuses[0].epoch
        stale = pack(Envelope(ReplicaId("stranger"), (Summons(MODEL, epoch - 1),)))
        for packed in (b"", b"\x00", b"{}", b"\xff" * 100, stale):
            for gateway in found:
                await redis.publish("{forebay}:replica:" + gateway.replicas.id, packed)
        other.submit("a")
        await until(lambda: len(other.started) == 1)
        assert led(found) == (holder, other)


def test_models_with_an_engine_that_a_gateway_starts_are_not_shared() -> None:
    launched = {"engine": "llamacpp", "launch": {"source": "m.gguf"}}
    attached = {"engine": "vllm", "url": "http://gpu:8000/v1"}
    models = {"both": [launched, attached], "shared": [attached, attached]}
    settings = Settings.model_validate({"models": {name: {"workers": workers} for name, workers in models.items()}})
    assert not is_shared(settings, ModelName("both"))
    assert is_shared(settings, ModelName("shared"))
    assert not is_shared(settings, ModelName("unknown"))


def test_without_being_asked_to_a_gateway_schedules_for_itself() -> None:
    for settings in ({}, {"url": "redis://127.0.0.1:1/0"}, {"scheduling": "shared"}):
        found = replicas_of(
            RedisSettings.model_validate(settings),
            SystemClock(),
            Gateway.scheduler(),
            Gateway.scheduler,
            is_shared=lambda _: True,
            carry_out=lambda _: None,
        )
        assert found is None
