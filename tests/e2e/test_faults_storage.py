"""Redis and PostgreSQL that hang, die and come back under load: known keys notice nothing (R9, R10)."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from core.records import RequestRecord
from gateway.books import Books
from tests.e2e.asking import ask, metric, until
from tests.e2e.loading import CHAT, Load, booked, chat, ledger_url, until_booked
from tests.fakes.admin import opened
from tests.fakes.engine import FakeEngine
from tests.fakes.gateway import GatewayProcess, attached
from tests.fakes.postgres import Postgres
from tests.fakes.redis import RedisServer

pytestmark = pytest.mark.asyncio(loop_scope="module")

COMMAND_TIMEOUT_S = 0.2
DATABASE_TIMEOUT_S = 1.0
PATIENT_S = 20.0
MARGIN_S = 0.3  # for a machine that is busy with other things
UNKNOWN_KEY = "fbk_nobody-has-ever-heard-of-this-one"
AMPLE: dict[str, Any] = {
    "limits": {"rpm": 10**6, "tpm": 10**9, "parallel": 1000},
    "budgets": [{"usd": 1000, "per": "day"}, {"tokens": 10**9, "per": "month"}],
}
TENANTS = {"test": AMPLE}
LEAST_SPOOLED_S = 0.75  # twice a second, a tenth until the spool is written, and what a busy machine adds


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[FakeEngine]:
    async with FakeEngine(model="fake") as running:
        yield running


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    """A PostgreSQL of our own, to be tormented."""
    with Postgres() as running:
        yield running


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    with RedisServer() as running:
        yield running


def gateway_of(engine: FakeEngine, **more: Any) -> GatewayProcess:
    priced = {**attached(engine.url), "price": {"input": 1, "output": 2}}
    return GatewayProcess({"fake": priced}, tenants=TENANTS, **more)


def redis_settings(redis: RedisServer, **more: Any) -> dict[str, Any]:
    return {"url": redis.url, "command_timeout": COMMAND_TIMEOUT_S, "breaker_open": 0.3, **more}


def database_settings(url: str) -> dict[str, Any]:
    return {"url": url, "timeout": DATABASE_TIMEOUT_S}


async def until_metric(gateway: GatewayProcess, name: str, wanted: float) -> None:
    async def is_so() -> bool:
        return await metric(gateway, name) == wanted

    await until(is_so, f"{name} is {wanted:g}")


async def test_a_redis_that_hangs_and_dies_costs_nobody_an_answer(engine: FakeEngine, redis: RedisServer) -> None:
    async with gateway_of(engine, redis=redis_settings(redis)) as gateway:
        async with Load(gateway) as load:
            await asyncio.sleep(0.5)
            for begin, end in ((redis.freeze, redis.thaw), (redis.kill, redis.start)):
                begin()
                await until_metric(gateway, "forebay_redis_up", 0)
                await asyncio.sleep(1)
                end()
                await until_metric(gateway, "forebay_redis_up", 1)
                await asyncio.sleep(0.3)

        assert load.statuses == {200: load.asked}
        assert load.p99_s < COMMAND_TIMEOUT_S + MARGIN_S
        used = await until_booked(ledger_url(gateway), load.asked)
        assert (used.requests, used.errors) == (load.asked, 0)
        assert used.input_tokens + used.output_tokens == load.tokens
        assert gateway.log.count("redis_away") == gateway.log.count("redis_back") == 2


async def test_where_limits_must_hold_a_redis_that_is_gone_stops_requests(
    engine: FakeEngine, redis: RedisServer
) -> None:
    async with gateway_of(engine, redis=redis_settings(redis, on_failure="deny")) as gateway:
        assert (await ask(gateway, CHAT, chat())).status == 200
        redis.kill()
        answer = await ask(gateway, CHAT, chat())
        assert (answer.status, answer.json["error"]["code"]) == (503, "limits_unavailable")
        assert (answer.headers["x-should-retry"], answer.headers["retry-after"]) == ("true", "1")
        redis.start()

        async def is_served() -> bool:
            return (await ask(gateway, CHAT, chat())).status == 200

        await until(is_served, "requests are let in again")


async def test_a_postgres_that_hangs_and_dies_costs_nobody_an_answer_and_the_ledger_nothing(
    engine: FakeEngine, server: Postgres
) -> None:
    url = server.new_database()
    async with gateway_of(engine, database=database_settings(url)) as gateway:
        made = await gateway.admin("POST", "/admin/v1/keys", {"name": "stored", "tenant": "test"}, status=201)
        keys = [gateway.key, made["secret"]]
        async with Load(gateway, keys) as load:
            await asyncio.sleep(0.5)
            for begin, end in ((server.pause, server.resume), (server.kill, server.start)):
                begin()
                await until_metric(gateway, "forebay_database_up", 0)
                before = await metric(gateway, "forebay_records_waiting")
                await asyncio.sleep(1)
                assert await metric(gateway, "forebay_records_waiting") > before
                answer = await ask(gateway, CHAT, chat(), key=UNKNOWN_KEY)
                assert (answer.status, answer.json["error"]["code"]) == (503, "keys_unavailable")
                await asyncio.to_thread(end)
                await until_metric(gateway, "forebay_database_up", 1)
                await asyncio.sleep(0.3)

        assert load.statuses == {200: load.asked}
        assert load.p99_s < MARGIN_S
        await until_metric(gateway, "forebay_records_waiting", 0)
        (used,) = await booked(url)
        assert (used.requests, used.errors) == (load.asked, 0)
        assert used.input_tokens + used.output_tokens == load.tokens
        assert {row.key for row in await booked(url, "key")} == {"file:test", made["key"]["id"]}
        assert (await ask(gateway, CHAT, chat(), key=UNKNOWN_KEY)).status == 401
        for event in ("database_away", "database_back", "directory_away", "directory_back"):
            assert gateway.log.count(event) == 2, event
        assert await metric(gateway, "forebay_records_dropped_total") == 0


async def test_a_gateway_killed_while_the_database_hangs_has_booked_all_but_the_last_moment(
    engine: FakeEngine, server: Postgres
) -> None:
    url = server.new_database()
    gateway = gateway_of(engine, database={"url": url, "timeout": PATIENT_S})
    async with gateway:
        async with Load(gateway) as load:
            await asyncio.sleep(0.7)
            server.pause()
            await asyncio.sleep(2 * LEAST_SPOOLED_S)  # the first batch is still being tried
            gateway.kill()
            killed_at = time.monotonic()
            await gateway.wait()
        server.resume()
        gateway.launch()
        await gateway.until_ready()

        answered = [outcome for outcome in load.seen if outcome.status == 200]
        sure = [outcome for outcome in answered if outcome.ended_at < killed_at - LEAST_SPOOLED_S]
        used = await until_booked(url, len(sure))
        assert used.requests <= load.asked
        gateway.terminate()
        await gateway.wait()
        gateway.launch()
        await gateway.until_ready()
        assert await booked(url) == (used,)  # nothing is taken from the spool twice


async def test_a_gateway_starts_without_its_database_and_takes_it_up_when_it_comes(
    engine: FakeEngine, server: Postgres
) -> None:
    url = server.new_database()
    server.kill()
    async with gateway_of(engine, database=database_settings(url)) as gateway:
        assert (await ask(gateway, CHAT, chat())).status == 200
        assert (await ask(gateway, CHAT, chat(), key=UNKNOWN_KEY)).json["error"]["code"] == "keys_unavailable"
        await asyncio.to_thread(server.start)
        await until_metric(gateway, "forebay_database_up", 1)
        assert (await until_booked(url, 1)).requests == 1
        assert (await ask(gateway, CHAT, chat(), key=UNKNOWN_KEY)).status == 401
        assert gateway.log.count("database_upgraded") == 1


async def test_records_that_find_no_room_are_counted_as_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Books, "MAX_RECORDS", 3)
    async with opened(tmp_path, database={"url": "postgresql://nobody@127.0.0.1:9/none"}) as (_, services):
        for number in range(5):
            services.books.add(
                RequestRecord(time=time.time(), id=f"req_{number}", endpoint=CHAT, status=200, duration_s=0.1)
            )
        assert services.metrics.registry.get_sample_value("forebay_records_dropped_total") == 2
        assert services.metrics.registry.get_sample_value("forebay_records_waiting") == 3
