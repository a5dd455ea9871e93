"""Three gateways on one Redis and one PostgreSQL act as one: limits, budgets, keys and ledger (R11, S1)."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from typing import Any, NamedTuple

import pytest
import pytest_asyncio

from tests.e2e.asking import Answer, ask, until
from tests.e2e.loading import CHAT, Load, chat, until_booked
from tests.fakes.engine import FakeEngine
from tests.fakes.gateway import GatewayProcess, attached
from tests.fakes.postgres import Postgres
from tests.fakes.redis import RedisServer

pytestmark = pytest.mark.asyncio(loop_scope="module")

SLOW = "take your time"
SLOW_MS = 2000  # long enough for all of a burst to have asked before the first of them ends
RPM, PARALLEL, TPM, BUDGET = 40, 7, 1000, 1500
KNOWN_WITHIN_S = 1.0
MARGIN_S = 0.5  # for a machine that is busy with other things


def key_of(name: str) -> str:
    return f"fbk_one-and-the-same-for-all-replicas-{name}"


KEYS: list[dict[str, Any]] = [
    {"name": "rpm", "limits": {"rpm": RPM}},
    {"name": "parallel", "limits": {"parallel": PARALLEL}},
    {"name": "tpm", "limits": {"tpm": TPM}},
    {"name": "budget", "budgets": [{"tokens": BUDGET, "per": "month"}]},
    {"name": "ledger"},
]


class Cluster(NamedTuple):
    """Gateways that share everything, the engine behind them, and their database's address."""

    gateways: tuple[GatewayProcess, ...]
    engine: FakeEngine
    url: str


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(postgres: Postgres) -> AsyncIterator[Cluster]:
    url = postgres.new_database()
    keys = [{"tenant": "shared", "key": key_of(key["name"]), **key} for key in KEYS]
    async with AsyncExitStack() as stack:
        redis = stack.enter_context(RedisServer())
        engine = await stack.enter_async_context(FakeEngine(model="fake"))
        sections: dict[str, Any] = {
            "redis": {"url": redis.url, "command_timeout": 5, "replicas": 3},
            "database": {"url": url},
            "tenants": {"shared": {}, "test": {}},
        }
        gateways = [GatewayProcess({"fake": attached(engine.url)}, keys=keys, **sections) for _ in range(3)]
        for gateway in gateways:  # all at once: three migrations of one database, too
            stack.push_async_callback(gateway.aclose)
            gateway.launch()
        await asyncio.gather(*(gateway.until_ready() for gateway in gateways))
        yield Cluster(tuple(gateways), engine, url)


async def burst(cluster: Cluster, name: str, count: int, body: Any) -> Sequence[Answer]:
    """Ask everywhere at once."""
    gateways = cluster.gateways
    asking = (ask(gateways[number % len(gateways)], CHAT, body, key=key_of(name)) for number in range(count))
    return await asyncio.gather(*asking)


def granted(answers: Sequence[Answer]) -> list[Answer]:
    """Return the good ones; all others have to be refusals by a limit."""
    assert {answer.status for answer in answers} <= {200, 429}, [answer.body for answer in answers]
    return [answer for answer in answers if answer.status == 200]


def slow(**more: Any) -> dict[str, Any]:
    return chat(messages=[{"role": "user", "content": SLOW}], **more)


@pytest_asyncio.fixture(loop_scope="module")
async def patient(cluster: Cluster) -> AsyncIterator[Cluster]:
    """An engine that answers slow requests only when a burst is over."""
    await cluster.engine.faults(contains=SLOW, trickle_ms=SLOW_MS)
    yield cluster
    await cluster.engine.faults()


async def test_requests_a_minute_are_counted_together(cluster: Cluster) -> None:
    answers = await burst(cluster, "rpm", 3 * RPM, chat())
    assert len(granted(answers)) == RPM
    refused = next(answer for answer in answers if answer.status == 429)
    assert refused.headers["x-ratelimit-limit-requests"] == str(RPM)
    assert 0 < int(refused.headers["retry-after"]) <= 61


async def test_open_answers_are_counted_together_and_given_back(patient: Cluster) -> None:
    for _ in range(2):
        assert len(granted(await burst(patient, "parallel", 30, slow()))) == PARALLEL


async def test_fifty_calls_at_once_do_not_pass_a_limit_on_tokens(patient: Cluster) -> None:
    answers = granted(await burst(patient, "tpm", 50, slow(max_tokens=100)))
    estimate = TPM - max(int(answer.headers["x-ratelimit-remaining-tokens"]) for answer in answers)
    assert len(answers) == TPM // estimate
    assert sum(answer.json["usage"]["total_tokens"] for answer in answers) <= TPM


async def test_a_budget_is_spent_once_by_all_of_them(cluster: Cluster) -> None:
    used = asked = 0
    for _ in range(40):
        asked += 24
        answers = await burst(cluster, "budget", 24, chat(max_tokens=32))
        used += sum(answer.json["usage"]["total_tokens"] for answer in granted(answers))
        if all(answer.status == 429 for answer in answers):
            break
    assert {answer.json["error"]["code"] for answer in answers} == {"insufficient_quota"}
    assert BUDGET - 2 * 64 < used <= BUDGET
    booked = await until_booked(cluster.url, asked, key="file:budget")
    assert (booked.requests, booked.input_tokens + booked.output_tokens) == (asked, used)


async def test_a_key_made_or_revoked_in_one_is_known_in_all_within_a_second(cluster: Cluster) -> None:
    one = cluster.gateways[0]

    async def everywhere(secret: str, status: int) -> float:
        """Wait until every gateway answers the key so, and return how long that took."""

        async def is_so() -> bool:
            asking = (ask(gateway, CHAT, chat(), key=secret) for gateway in cluster.gateways)
            return {answer.status for answer in await asyncio.gather(*asking)} == {status}

        return await until(is_so, f"the key is answered {status}")

    async with Load(cluster.gateways) as load:
        made = await one.admin("POST", "/admin/v1/keys", {"name": "late", "tenant": "test"}, status=201)
        assert await everywhere(made["secret"], 200) < KNOWN_WITHIN_S + MARGIN_S
        overlap_s = 2.0
        path = f"/admin/v1/keys/{made['key']['id']}"
        rotated = await one.admin("POST", f"{path}:rotate", {"overlap_s": overlap_s}, status=201)
        assert await everywhere(rotated["secret"], 200) < KNOWN_WITHIN_S + MARGIN_S
        assert {(await ask(gateway, CHAT, chat(), key=made["secret"])).status for gateway in cluster.gateways} == {200}
        assert await everywhere(made["secret"], 401) < overlap_s + MARGIN_S
        await one.admin("POST", f"/admin/v1/keys/{rotated['key']['id']}:revoke")
        assert await everywhere(rotated["secret"], 401) < KNOWN_WITHIN_S + MARGIN_S
        answer = await ask(cluster.gateways[2], CHAT, chat(), key=rotated["secret"])
        assert answer.json["error"]["code"] == "key_revoked"
    assert load.statuses == {200: load.asked}


async def test_what_all_of_them_served_is_in_one_ledger(cluster: Cluster) -> None:
    async with Load(cluster.gateways, [key_of("ledger")], pause_s=0, requests=300) as load:
        await load.done()
    used = await until_booked(cluster.url, load.asked, key="file:ledger")
    assert load.statuses == {200: load.asked}
    assert (used.requests, used.input_tokens + used.output_tokens) == (load.asked, load.tokens)
