"""What tenants, keys, limits, budgets and prices do to requests, end to end; every way to ask costs the same."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from tests.e2e.asking import Answer, Kind, ask, connected, kinds, logged
from tests.e2e.loading import CHAT, booked, chat, ledger_url, until_booked
from tests.fakes.engine import FakeEngine
from tests.fakes.gateway import GatewayProcess, attached

pytestmark = pytest.mark.asyncio(loop_scope="module")

PICO_IN, PICO_OUT = 3_000_000, 15_000_000  # per token, at 3 and 15 USD per million
PRICE = {"input": 3, "output": 15}
LONG = "go on and on"
SLOW = "take your time"
WAYS = [kind for kind in kinds() if kind.name != "embeddings" and not kind.streams]
PAST = "2020-01-01T00:00:00Z"


def key_of(name: str) -> str:
    return f"fbk_a-key-for-one-test-alone-{name}"


KEYS: list[dict[str, Any]] = [
    {"name": "rate", "limits": {"rpm": 2, "tpm": 5000}},
    {"name": "tokens", "budgets": [{"tokens": 100, "per": "day"}]},
    {"name": "money", "budgets": [{"usd": 0.001, "per": "month"}]},
    {"name": "users", "tenant": "many"},
    {"name": "pick", "models": ["fake"], "endpoints": ["chat", "embeddings"]},
    {"name": "old", "expires_at": PAST},
    {"name": "bad", "tenant": "suspended"},
    {"name": "urgent"},
    {"name": "capped", "max_class": "batch"},
]
TENANTS: dict[str, Any] = {
    "many": {"end_users": {"limits": {"rpm": 1}, "budgets": [{"tokens": 10_000, "per": "day"}]}},
    "suspended": {"suspended": True},
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[FakeEngine]:
    async with FakeEngine(model="fake") as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(engine: FakeEngine) -> AsyncIterator[GatewayProcess]:
    models = {
        "fake": {**attached(engine.url), "price": PRICE},
        "narrow": attached(engine.url, max_inflight=1, served_name="fake"),
    }
    keys = [{"tenant": "acme", "key": key_of(key["name"]), **key} for key in KEYS]
    async with GatewayProcess(models, keys=keys, tenants=TENANTS) as running:
        yield running


def by_name(kind: Kind) -> str:
    return kind.name


def cost_of(usage: dict[str, int]) -> int:
    return usage["prompt_tokens"] * PICO_IN + usage["completion_tokens"] * PICO_OUT


def code_of(answer: Answer) -> tuple[int, str]:
    return answer.status, answer.json["error"]["code"]


@pytest.mark.parametrize("way", WAYS, ids=by_name)
async def test_an_answer_costs_the_same_whole_streamed_and_as_far_as_a_client_stayed_for_it(
    gateway: GatewayProcess, engine: FakeEngine, way: Kind
) -> None:
    limit = "max_output_tokens" if way.name == "responses" else "max_tokens"
    body = {**way.body, "model": "fake", limit: 12}
    before = {row.model: row for row in await booked(ledger_url(gateway), "model")}.get("fake")
    costs = []
    for stream in (False, True):
        request_id = f"cost-{way.name}-{stream}"
        answer = await ask(gateway, way.path, {**body, "stream": stream}, headers={"x-request-id": request_id})
        assert answer.status == 200
        record = await logged(gateway, request_id)
        assert record["usage"]["completion_tokens"] == 12
        assert record["cost"] == cost_of(record["usage"])
        costs.append(record["cost"])
    assert costs[0] == costs[1] > 0

    await engine.faults(trickle_ms=20)
    async with connected(gateway) as client:
        headers = {"x-request-id": f"left-{way.name}"}
        client.ask(way.path, {**body, limit: 400, "stream": True}, headers=headers)
        assert (await client.head())[0] == 200
        for _ in range(8):
            await client.piece()
    record = await logged(gateway, f"left-{way.name}")
    await engine.faults()
    assert record["status"] == 499
    assert 0 < record["usage"]["completion_tokens"] < 200
    assert record["cost"] == cost_of(record["usage"])

    asked = 3 + (before.requests if before else 0)
    used = await until_booked(ledger_url(gateway), asked, model="fake")
    assert used.requests == asked
    assert used.cost == sum(costs) + record["cost"] + (before.cost if before else 0)


async def test_limits_are_told_on_every_answer_and_refuse_with_when_to_come_again(gateway: GatewayProcess) -> None:
    for remaining, stream in ((1, False), (0, True)):
        answer = await ask(gateway, CHAT, chat(stream=stream), key=key_of("rate"))
        assert answer.status == 200
        assert answer.headers["x-ratelimit-limit-requests"] == "2"
        assert answer.headers["x-ratelimit-remaining-requests"] == str(remaining)
        assert answer.headers["x-ratelimit-reset-requests"] in {"1m0s", "1m1s"}
        assert answer.headers["x-ratelimit-limit-tokens"] == "5000"
        assert 4900 < int(answer.headers["x-ratelimit-remaining-tokens"]) < 5000
    answer = await ask(gateway, CHAT, chat(), key=key_of("rate"))
    assert code_of(answer) == (429, "rate_limit_exceeded")
    assert answer.headers["x-should-retry"] == "true"
    assert 0 < int(answer.headers["retry-after"]) <= 61


@pytest.mark.parametrize("name", ["tokens", "money"])
async def test_a_budget_that_is_used_up_refuses_for_good(gateway: GatewayProcess, name: str) -> None:
    answers = [await ask(gateway, CHAT, chat(max_tokens=40), key=key_of(name)) for _ in range(3)]
    assert [answer.status for answer in answers] == [200, 429, 429]
    assert code_of(answers[-1]) == (429, "insufficient_quota")
    assert answers[-1].headers["x-should-retry"] == "false"
    (budget,) = [
        entry for entry in (await gateway.admin("GET", "/admin/v1/budgets"))["data"] if entry["id"] == f"file:{name}"
    ]
    assert budget["limit"]["tokens"] == (100 if name == "tokens" else None)


async def test_end_users_have_limits_of_their_own(gateway: GatewayProcess) -> None:
    names: list[dict[str, Any]] = [{"user": "ann"}, {"safety_identifier": "ann"}, {"user": "bob"}, {}, {}]
    statuses = [(await ask(gateway, CHAT, chat(**name), key=key_of("users"))).status for name in names]
    assert statuses == [200, 429, 200, 200, 200]
    used = await until_booked(ledger_url(gateway), 2, end_user="ann")
    assert (used.requests, used.errors) == (2, 1)


async def test_a_key_opens_what_it_is_for_while_it_holds(gateway: GatewayProcess) -> None:
    async def tried(name: str, path: str = CHAT, **body: Any) -> tuple[int, str]:
        answer = await ask(gateway, path, chat(**body), key=key_of(name))
        return (answer.status, "") if answer.status == 200 else code_of(answer)

    assert await tried("pick") == (200, "")
    assert await tried("pick", model="narrow") == (403, "model_not_allowed")
    assert await tried("pick", "/v1/completions", prompt="x") == (403, "endpoint_not_allowed")
    assert await tried("old") == (401, "key_expired")
    assert await tried("bad") == (403, "tenant_suspended")


async def test_a_key_is_no_more_urgent_than_its_cap(gateway: GatewayProcess, engine: FakeEngine) -> None:
    """One slot: the capped key's requests came first, and wait for those of a key without a cap all the same."""
    await engine.faults(contains=SLOW, trickle_ms=500)
    order: list[str] = []

    async def ask_as(name: str, text: str) -> None:
        body = chat(model="narrow", messages=[{"role": "user", "content": text}], service_tier="priority")
        answer = await ask(gateway, CHAT, body, key=key_of(name))
        assert answer.status == 200
        order.append(name)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(ask_as("urgent", SLOW))
        await engine.until(in_flight=1)
        for name in ("capped", "capped", "urgent", "urgent"):
            tasks.create_task(ask_as(name, "Hi."))
            await asyncio.sleep(0.05)
    await engine.faults()
    assert order == ["urgent", "urgent", "urgent", "capped", "capped"]
