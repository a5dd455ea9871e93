"""Workflows at two gateways that share a database: each answers for the runs of both, also when one is killed."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from storage.sql.database import sqlite_url
from tests.e2e.test_workflows import Client, llm
from tests.fakes.engine import FakeEngine
from tests.fakes.gateway import GatewayProcess, attached
from tests.fakes.postgres import Postgres

KEY = "fbk_one-and-the-same-at-both-gateways"
KEYS = [{"name": "both", "tenant": "both", "key": KEY}]
LEASE_S = 30.0
TAKEN_OVER_WITHIN_S = LEASE_S + 20.0


@asynccontextmanager
async def two(engine: FakeEngine, url: str) -> AsyncIterator[tuple[GatewayProcess, Client, Client]]:
    """Two gateways on one database: the process of the first, and a client of each."""
    sections: dict[str, Any] = {"database": {"url": url, "timeout": 10}, "keys": KEYS}
    models = {"fake": attached(engine.url)}
    async with GatewayProcess(models, **sections) as one, GatewayProcess(models, **sections) as other:
        clients = Client(one, KEY), Client(other, KEY)
        yield one, *clients
        for client in clients:
            await client.http.aclose()


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of an empty database, of each kind in turn."""
    if request.param == "sqlite":
        return sqlite_url(tmp_path / "shared" / "forebay.db")
    server: Postgres = request.getfixturevalue("postgres")
    return server.new_database()


async def test_a_run_is_set_and_added_to_and_followed_at_a_gateway_that_does_not_have_it(
    engine: FakeEngine, url: str
) -> None:
    async with two(engine, url) as (_, one, other):
        variables = {"v": {"open": True}, "w": {"open": True}}
        run = (await one.submit(llm("a", "{{v}}"), llm("last", "{{w}}"), variables=variables))["id"]
        events = [
            asyncio.create_task(client.events(f"/v1/workflows/{run}/events")) for client in (one, other) for _ in "12"
        ]
        told = await other.ask("PUT", f"/v1/variables/{run}.v", {"value": "Say one."})
        assert (told["state"], told["value"]) == ("done", "Say one.")
        twice = await other.ask("PUT", f"/v1/variables/{run}.v", {"value": "no"}, status=409)
        assert "'v' is not open" in twice["error"]["message"]
        more = {"calls": [llm("b", "After {{a}}")]}
        for client in (other, one, other):
            path = f"/v1/workflows/{run}/calls"
            seen = await client.ask("POST", path, more, status=202, **{"idempotency-key": "once"})
            assert {"a", "b"} <= seen["variables"].keys()
        wrong = {"calls": [llm("c", "After {{nothing}}")]}
        refused = await other.ask("POST", f"/v1/workflows/{run}/calls", wrong, status=400)
        assert "'nothing'" in refused["error"]["message"]
        assert await other.value(run, "b") == await one.value(run, "b")
        await other.ask("PUT", f"/v1/variables/{run}.w", {"value": 1})
        assert await other.value(run, "last")
        kept = [[(number, name) for number, name, _ in await task if number is not None] for task in events]
        assert [number for number, _ in kept[0]] == list(range(1, len(kept[0]) + 1))
        assert kept == [kept[0]] * 4


async def test_a_run_of_a_killed_gateway_is_asked_at_the_other_once_its_lease_is_over(
    engine: FakeEngine, postgres: Postgres
) -> None:
    async with two(engine, postgres.new_database()) as (process, one, other):
        run = (await one.submit(llm("a", "Say one."), llm("b", "{{a}} {{v}}"), variables={"v": {"open": True}}))["id"]
        first = await one.value(run, "a")
        process.kill()
        await process.wait()
        silent = await other.ask("PUT", f"/v1/variables/{run}.v", {"value": "early"}, status=503)
        assert "nothing was done" in silent["error"]["message"]
        for _ in range(int(TAKEN_OVER_WITHIN_S)):
            told = await other.http.put(f"/v1/variables/{run}.v", json={"value": "late"})
            if told.status_code == 200:
                break
            assert told.status_code == 503, told.text
            await asyncio.sleep(1.0)
        assert told.json()["value"] == "late", "what was given up is not done later"
        assert await other.value(run, "b")
        assert await other.value(run, "a") == first
        events = await other.events(f"/v1/workflows/{run}/events")
        settled = [data["variable"] for _, name, data in events if name == "variable.done"]
        assert settled == ["a", "v", "b"]


async def test_who_comes_in_the_middle_of_an_answer_gets_all_of_it(engine: FakeEngine) -> None:
    async with GatewayProcess({"fake": attached(engine.url)}) as gateway:
        client = Client(gateway)
        await engine.faults(trickle_ms=50, contains="Say much.")
        call = llm("a", "Say much. " * 9)
        call["request"]["max_tokens"] = 40
        run = (await client.submit(call))["id"]
        num_pieces = 0
        async with client.http.stream("GET", f"/v1/variables/{run}.a/stream") as stream:
            async for line in stream.aiter_lines():
                num_pieces += line == "event: variable.delta"
                if num_pieces == 4:
                    break
        paths = f"/v1/workflows/{run}/events", f"/v1/variables/{run}.a/stream"
        late = [asyncio.create_task(client.events(path)) for path in paths]
        whole = await client.value(run, "a")
        for task in late:
            pieces = [data["text"] for _, name, data in await task if name == "variable.delta"]
            assert len(pieces) > 1
            assert "".join(pieces) == whole
        await engine.faults()
        await client.http.aclose()


async def test_a_run_is_wanted_and_given_up_at_a_gateway_that_does_not_have_it(engine: FakeEngine, url: str) -> None:
    async with two(engine, url) as (_, one, other):
        call = llm("b", "{{v}}")
        run = (await one.submit(llm("a", "Say one."), call, variables={"v": {"open": True}}, outputs=["b"]))["id"]
        assert await other.value(run, "a"), "which nobody had wanted"
        seen = await other.ask("POST", f"/v1/workflows/{run}/cancel", {})
        assert seen["state"] == "cancelled"
        assert (await one.ask("GET", f"/v1/workflows/{run}"))["state"] == "cancelled"
        assert (await other.ask("POST", f"/v1/workflows/{run}/cancel", {}))["state"] == "cancelled"
