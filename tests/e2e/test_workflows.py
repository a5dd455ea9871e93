"""Workflows over real HTTP, through a real gateway to the fake engine: submitted, followed, set, cancelled, and gone on
with after the gateway was killed."""

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
import pytest_asyncio

from tests.fakes.engine import FakeEngine
from tests.fakes.gateway import GatewayProcess, attached
from tests.fakes.postgres import Postgres

OTHER_KEY = "fbk_of-another-tenant-altogether"
EMBEDDINGS_KEY = "fbk_for-embeddings-and-nothing-else"
KEYS: list[dict[str, Any]] = [
    {"name": "other", "tenant": "other", "key": OTHER_KEY},
    {"name": "narrow", "tenant": "other", "key": EMBEDDINGS_KEY, "endpoints": ["embeddings"]},
]


def llm(name: str, text: str, **rest: Any) -> dict[str, Any]:
    request = {"model": "fake", "messages": [{"role": "user", "content": text}], "max_tokens": 6}
    return {"kind": "llm", "id": name, "request": request, **rest}


class Client:
    """A tenant of a gateway."""

    def __init__(self, gateway: GatewayProcess, key: str | None = None) -> None:
        headers = {"authorization": f"Bearer {key or gateway.key}"}
        self.http = httpx.AsyncClient(base_url=gateway.url, headers=headers, trust_env=False, timeout=30.0)

    async def ask(self, method: str, path: str, body: Any = None, *, status: int = 200, **headers: str) -> Any:
        """Return the answer's JSON, which has to have this status."""
        answer = await self.http.request(method, path, json=body, headers=headers)
        assert answer.status_code == status, answer.text
        return answer.json()

    async def submit(self, *calls: Any, status: int = 202, **rest: Any) -> Any:
        """Submit a workflow."""
        return await self.ask("POST", "/v1/workflows", {"calls": calls, **rest}, status=status)

    async def value(self, run: str, name: str) -> Any:
        """Wait for a variable, which has to get a value."""
        told = await self.ask("GET", f"/v1/variables/{run}.{name}?wait=30")
        assert told["state"] == "done", told
        return told["value"]

    async def events(self, path: str, after: int = 0) -> list[tuple[int | None, str, Any]]:
        """Return all events of a stream until it ends: id, name and data."""
        events = []
        async with self.http.stream("GET", path, headers={"last-event-id": str(after)}) as answer:
            assert answer.status_code == 200
            number, name = None, ""
            async for line in answer.aiter_lines():
                field, _, value = line.partition(": ")
                if field == "id":
                    number = int(value)
                elif field == "event":
                    name = value
                elif field == "data":
                    events.append((number, name, json.loads(value)))
                    number = None
        return events


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def front(engine: FakeEngine) -> AsyncIterator[GatewayProcess]:
    async with GatewayProcess({"fake": attached(engine.url)}, keys=KEYS) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def client(front: GatewayProcess) -> AsyncIterator[Client]:
    made = Client(front)
    yield made
    await made.http.aclose()


async def test_a_chain_is_one_request_and_its_end_is_another(client: Client) -> None:
    run = await client.submit(llm("a", "Say one."), llm("b", "After {{a}}"), llm("c", "After {{b}}"))
    assert run["state"] == "running"
    value = await client.value(run["id"], "c")
    assert value
    plain = await client.ask(
        "POST", "/v1/chat/completions", llm("", f"After {await client.value(run['id'], 'b')}")["request"]
    )
    assert value == plain["choices"][0]["message"]["content"], "as a client would have got it"
    seen = await client.ask("GET", f"/v1/workflows/{run['id']}")
    assert seen["state"] == "done"
    assert seen["usage"]["tokens"] > 18


async def test_a_prompt_that_cannot_be_shared_is_told_of(client: Client) -> None:
    run = await client.submit(llm("a", "Say one."), llm("b", "{{a}}" + " and so on" * 200))
    (told,) = run["lint"]
    assert told.startswith("call 'b': {{a}} stands before 2000 characters")


async def test_a_map_and_what_comes_of_it(client: Client) -> None:
    run = await client.submit(
        llm("m", "{{index}}: {{item}}", foreach="{{chunks}}", max_parallel=3),
        {"kind": "transform", "id": "n", "value": {"count": "{{m | length}}"}},
        variables={"chunks": {"value": [f"chunk {number}" for number in range(20)]}},
        outputs=["n", "m"],
    )
    assert await client.value(run["id"], "n") == {"count": 20}
    assert len(await client.value(run["id"], "m")) == 20


async def test_calls_of_a_run_wait_for_a_worker_longer_than_a_clients_unless_they_say_how_long() -> None:
    async with FakeEngine(model="fake", ttft_ms=300) as slow:
        worker = attached(slow.url, max_inflight=1)
        async with GatewayProcess({"fake": worker}, timeouts={"queue": 0.2}) as gateway:
            client = Client(gateway)
            chunks = {"chunks": {"value": ["a", "b", "c", "d"]}}
            run = await client.submit(llm("m", "{{item}}", foreach="{{chunks}}"), variables=chunks)
            assert len(await client.value(run["id"], "m")) == 4

            hurried = llm("m", "{{item}}", foreach="{{chunks}}")
            hurried["request"]["forebay"] = {"timeouts": {"queue": 0.1}}
            run = await client.submit(hurried, variables=chunks)
            told = await client.ask("GET", f"/v1/variables/{run['id']}.m?wait=30")
            assert told["error"]["code"] == "queue_timeout", told
            await client.http.aclose()


async def test_a_run_is_followed_from_its_beginning_and_from_any_event_on(client: Client) -> None:
    run = await client.submit(llm("a", "Say one."), llm("b", "After {{a}}"))
    events = await client.events(f"/v1/workflows/{run['id']}/events")
    kept = [(number, name) for number, name, _ in events if number is not None]
    assert kept == [(1, "run.started"), (2, "variable.done"), (3, "variable.done"), (4, "run.done")]
    again = await client.events(f"/v1/workflows/{run['id']}/events", after=2)
    assert [number for number, _, _ in again] == [3, 4]
    said = [data for _, name, data in events if name == "variable.delta" and data["variable"] == "b"]
    whole = next(data["value"] for _, name, data in events if name == "variable.done" and data["variable"] == "b")
    assert "".join(one["text"] for one in said) in whole


async def test_an_open_variable_holds_a_run_up_until_it_is_set(client: Client) -> None:
    run = await client.submit(llm("a", "{{approval}}"), variables={"approval": {"open": True}})
    pending = await client.ask("GET", f"/v1/variables/{run['id']}.a?wait=0.05&deadline_ms=60000", status=202)
    assert pending["state"] == "pending"
    await client.ask("PUT", f"/v1/variables/{run['id']}.approval", {"value": "yes"})
    assert await client.value(run["id"], "a")
    twice = await client.ask("PUT", f"/v1/variables/{run['id']}.approval", {"value": "no"}, status=409)
    assert "approval" in twice["error"]["message"]


async def test_a_variable_that_is_there_is_streamed_whole_to_who_comes_late(client: Client) -> None:
    run = await client.submit(llm("a", "{{ok}}{{given}}"), variables={"ok": {"open": True}, "given": {"value": "x"}})
    path = f"/v1/variables/{run['id']}"
    assert await client.events(f"{path}.given/stream") == [(None, "variable.done", {"variable": "given", "value": "x"})]
    await client.ask("PUT", f"{path}.ok", {"error": "nobody is there"})
    for after in (0, 4):
        ((_, name, data),) = await client.events(f"{path}.ok/stream", after=after)
        assert (name, data["error"]["message"]) == ("variable.failed", "nobody is there")


async def test_a_drawing_tells_what_runs_and_what_waits_for_the_client(client: Client, engine: FakeEngine) -> None:
    tool = {"kind": "tool", "id": "t", "server": {"type": "client", "tool": "tests"}, "arguments": 1, "foreach": [1, 2]}
    await engine.faults(trickle_ms=50, contains="Say much.")
    run = await client.submit(tool, llm("a", "Say much. " * 9))
    for _ in range(500):
        if len((await client.ask("GET", f"/v1/workflows/{run['id']}"))["waiting"]) == 2:
            break
        await asyncio.sleep(0.01)
    drawn = (await client.ask("GET", f"/v1/workflows/{run['id']}/graph"))["nodes"]
    assert {one["id"]: one["state"] for one in drawn} == {"t": "waiting", "a": "running"}
    await client.ask("POST", f"/v1/workflows/{run['id']}/cancel", {})
    await engine.faults()


async def test_a_schema_that_cannot_be_used_is_told_with_its_call_wherever_it_stands(client: Client) -> None:
    wrong = llm("x", "Say one.", schema={"type": "nothing"})
    for call in (wrong, {"kind": "race", "id": "r", "of": [{"calls": [wrong], "result": "{{x}}"}]}):
        refused = await client.submit(call, status=400)
        assert refused["error"]["message"].startswith("call 'x': the schema cannot be used")


async def test_a_tool_of_the_clients_is_told_and_answered(client: Client) -> None:
    tool = {"kind": "tool", "id": "t", "server": {"type": "client", "tool": "tests"}, "arguments": {"of": "{{a}}"}}
    run = await client.submit(llm("a", "Say one."), tool, llm("b", "{{t | json('$.passed')}}"))
    events = asyncio.create_task(client.events(f"/v1/workflows/{run['id']}/events"))
    await client.value(run["id"], "a")
    for _ in range(500):
        if waiting := (await client.ask("GET", f"/v1/workflows/{run['id']}"))["waiting"]:
            break
        await asyncio.sleep(0.01)
    assert (waiting[0]["tool"], waiting[0]["variable"]) == ("tests", "t")
    await client.ask("PUT", f"/v1/variables/{run['id']}.t", {"value": {"passed": True}})
    assert await client.value(run["id"], "b")
    assert "call.waiting" in [name for _, name, _ in await events]


async def test_a_tool_of_the_clients_within_a_body_is_answered_by_its_path(client: Client) -> None:
    tool = {"kind": "tool", "id": "t", "server": {"type": "client", "tool": "tests"}, "arguments": "{{x}}"}
    body = {"calls": [tool], "result": "{{t}}"}
    loop = {"kind": "workflow", "id": "w", "foreach": ["p", "q"], "inputs": {"x": "{{item}}"}, "body": body}
    run = await client.submit(loop)
    for _ in range(500):
        waiting = (await client.ask("GET", f"/v1/workflows/{run['id']}"))["waiting"]
        if len(waiting) == 2:
            break
        await asyncio.sleep(0.01)
    for one in waiting:
        path = quote(f"{run['id']}.{one['variable']}", safe="")
        told = await client.ask("PUT", f"/v1/variables/{path}", {"value": one["arguments"] * 2})
        assert told["value"] == one["arguments"] * 2
    assert await client.value(run["id"], "w") == ["pp", "qq"]


async def test_calls_are_appended_also_to_a_run_that_has_ended(client: Client) -> None:
    run = await client.submit(llm("a", "Say one."))
    await client.value(run["id"], "a")
    more = {"calls": [llm("b", "After {{a}}")]}
    for _ in range(2):
        path = f"/v1/workflows/{run['id']}/calls"
        await client.ask("POST", path, more, status=202, **{"idempotency-key": "once"})
    assert await client.value(run["id"], "b")
    wrong = {"calls": [llm("c", "After {{nothing}}")]}
    refused = await client.ask("POST", f"/v1/workflows/{run['id']}/calls", wrong, status=400)
    assert "'nothing'" in refused["error"]["message"]
    seen = await client.ask("GET", f"/v1/workflows/{run['id']}")
    assert (seen["state"], set(seen["variables"])) == ("done", {"a", "b"})


async def test_a_cancelled_run_leaves_no_call_at_the_engine(client: Client, engine: FakeEngine) -> None:
    await engine.faults(trickle_ms=50, contains="Say much.")
    run = await client.submit(llm("a", "Say much. " * 9), llm("b", "After {{a}}"))
    await engine.until(running=1)
    seen = await client.ask("POST", f"/v1/workflows/{run['id']}/cancel", {})
    assert seen["state"] == "cancelled"
    assert (await client.ask("GET", f"/v1/variables/{run['id']}.b?wait=5"))["state"] == "cancelled"
    await engine.until(running=0)
    await engine.faults()


async def test_an_edited_run_makes_only_what_has_changed(client: Client) -> None:
    calls = [llm("a", "Say one."), llm("b", "Say two."), llm("c", "{{a}} {{b}}")]
    run = await client.submit(*calls)
    first = await client.value(run["id"], "a")
    await client.value(run["id"], "c")
    edited = {"workflow": {"calls": [calls[0], llm("b", "Say three."), calls[2]]}}
    again = await client.ask("POST", f"/v1/workflows/{run['id']}/resume", edited, status=202)
    await client.value(again["id"], "c")
    assert await client.value(again["id"], "a") == first
    events = await client.events(f"/v1/workflows/{again['id']}/events")
    usage = next(data["usage"]["tokens"] for _, name, data in events if name == "run.done")
    before = (await client.ask("GET", f"/v1/workflows/{run['id']}"))["usage"]["tokens"]
    assert 0 < usage < before


async def test_the_same_submission_twice_is_one_run(client: Client) -> None:
    body = {"calls": [llm("a", "Say one.")]}
    headers = {"idempotency-key": "just once"}
    first = await client.ask("POST", "/v1/workflows", body, status=202, **headers)
    assert (await client.ask("POST", "/v1/workflows", body, status=202, **headers))["id"] == first["id"]
    other = {"calls": [llm("a", "Say two.")]}
    await client.ask("POST", "/v1/workflows", other, status=409, **headers)


async def test_no_id_of_one_tenant_means_anything_to_another(client: Client, front: GatewayProcess) -> None:
    run = await client.submit(llm("a", "Say one."), variables={"o": {"open": True}})
    await client.value(run["id"], "a")
    stranger = Client(front, OTHER_KEY)
    unknown = "run_" + "0" * 32
    for method, path, body in (
        ("GET", "/v1/workflows/{run}", None),
        ("POST", "/v1/workflows/{run}/calls", {"calls": []}),
        ("GET", "/v1/workflows/{run}/events", None),
        ("GET", "/v1/workflows/{run}/graph", None),
        ("POST", "/v1/workflows/{run}/cancel", {}),
        ("POST", "/v1/workflows/{run}/resume", {}),
        ("GET", "/v1/variables/{run}.a", None),
        ("PUT", "/v1/variables/{run}.o", {"value": 1}),
        ("GET", "/v1/variables/{run}.a/stream", None),
    ):
        told = [
            await stranger.ask(method, path.replace("{run}", one), body, status=404) for one in (run["id"], unknown)
        ]
        assert told[0]["error"]["message"].replace(run["id"], unknown) == told[1]["error"]["message"]
    assert (await stranger.ask("GET", "/v1/workflows"))["data"] == []
    await stranger.http.aclose()


async def test_a_workflow_reaches_no_endpoint_that_its_key_may_not_use(front: GatewayProcess) -> None:
    narrow = Client(front, EMBEDDINGS_KEY)
    within = {"kind": "race", "id": "r", "of": [{"calls": [llm("x", "Say one.")], "result": "{{x}}"}]}
    for call in (llm("x", "Say one."), within):
        refused = await narrow.submit(call, status=403)
        assert refused["error"]["code"] == "endpoint_not_allowed"
    run = await narrow.submit({"kind": "transform", "id": "t", "value": 1})
    path = f"/v1/workflows/{run['id']}"
    await narrow.ask("POST", f"{path}/calls", {"calls": [llm("x", "Say one.")]}, status=403)
    await narrow.ask("POST", f"{path}/resume", {"workflow": {"calls": [llm("x", "Say one.")]}}, status=403)
    await narrow.http.aclose()


async def test_who_waits_for_a_variable_while_the_gateway_shuts_down_is_told(engine: FakeEngine) -> None:
    async with GatewayProcess({"fake": attached(engine.url)}) as gateway:
        client = Client(gateway)
        run = await client.submit(llm("a", "{{ok}}"), variables={"ok": {"open": True}})
        waiting = asyncio.create_task(client.ask("GET", f"/v1/variables/{run['id']}.a?wait=30", status=503))
        await asyncio.sleep(0.3)
        gateway.terminate()
        assert (await waiting)["error"]["code"] == "draining"
        await gateway.wait()
        await client.http.aclose()


async def test_what_an_engine_refuses_is_an_error_that_names_the_call(client: Client) -> None:
    wrong = llm("a", "Say one.")
    wrong["request"]["model"] = "nothing"
    run = await client.submit(wrong, llm("b", "{{a}}"))
    told = await client.ask("GET", f"/v1/variables/{run['id']}.b?wait=10")
    assert told["state"] == "failed"
    assert (told["error"]["code"], told["error"]["call"]) == ("upstream_failed", "a")
    assert "'nothing' does not exist" in told["error"]["message"]


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with Postgres() as running:
        yield running


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
async def test_a_killed_gateway_goes_on_with_its_runs_and_makes_no_committed_call_again(
    engine: FakeEngine, tmp_path: Path, request: pytest.FixtureRequest, kind: str
) -> None:
    url = request.getfixturevalue("postgres").new_database() if kind == "postgresql" else None
    database = {"url": url} if url is not None else {}
    models = {"fake": attached(engine.url)}
    calls = [llm("m", "{{index}}", foreach="{{n}}", max_parallel=2), llm("r", "{{m | join(' ')}}")]
    await engine.reset()
    await engine.faults(trickle_ms=20)
    async with GatewayProcess(models, directory=tmp_path, database=database) as gateway:
        client = Client(gateway)
        run = await client.submit(*calls, variables={"n": {"value": list(range(12))}})
        committed: set[str] = set()
        async with client.http.stream("GET", f"/v1/workflows/{run['id']}/events") as events:
            async for line in events.aiter_lines():
                if line.startswith('data: {"variable":"m[') and '"value"' in line:
                    committed.add(json.loads(line[6:])["variable"])
                if len(committed) == 4:
                    break
        gateway.kill()
        await gateway.wait()
        await client.http.aclose()
    await engine.faults()
    async with GatewayProcess(models, directory=tmp_path, database=database) as again:
        client = Client(again)
        assert await client.value(run["id"], "r")
        assert len(await client.value(run["id"], "m")) == 12
        told = await client.events(f"/v1/workflows/{run['id']}/events")
        settled = [data["variable"] for _, name, data in told if name.startswith("variable.") and "usage" in data]
        assert len(settled) == len({*settled}) == 14, "no variable is set twice"
        assert [number for number, _, _ in told if number] == list(range(1, len(settled) + 3))
        made = (await engine.stats())["finished"] + (await engine.stats())["aborted"]
        assert made <= 13 + 2, "only what was under way is made again"
        await client.http.aclose()


async def test_a_run_that_cannot_be_gone_on_with_ends_and_the_gateway_starts(
    engine: FakeEngine, tmp_path: Path
) -> None:
    models = {"fake": attached(engine.url)}
    async with GatewayProcess(models, directory=tmp_path) as gateway:
        client = Client(gateway)
        broken = await client.submit(llm("a", "{{ok}}"), variables={"ok": {"open": True}})
        sound = await client.submit(llm("a", "{{ok}}"), variables={"ok": {"open": True}})
        gateway.kill()
        await gateway.wait()
        await client.http.aclose()
    circle = {"calls": [llm("a", "{{b}}"), llm("b", "{{a}}")]}  # as no gateway would have accepted it
    (file,) = await asyncio.to_thread(lambda: [*tmp_path.glob("**/*.db")])
    with closing(sqlite3.connect(file)) as database, database:
        changed = database.execute(
            "UPDATE runs SET graph = ? WHERE id = ?", (json.dumps(circle).encode(), broken["id"])
        )
        assert changed.rowcount == 1
    async with GatewayProcess(models, directory=tmp_path) as again:
        client = Client(again)
        await client.ask("PUT", f"/v1/variables/{sound['id']}.ok", {"value": "yes"})
        assert await client.value(sound["id"], "a")
        assert (await client.ask("GET", f"/v1/workflows/{broken['id']}"))["state"] == "failed"
        await client.http.aclose()


@pytest.mark.parametrize("is_on", [True, False])
async def test_a_long_beginning_is_computed_while_the_rest_of_the_prompt_is_made(is_on: bool) -> None:
    async with (
        FakeEngine(model="fake", tokens=30, itl_ms=20) as engine,
        GatewayProcess({"fake": attached(engine.url)}, workflows={"eager_prefill": is_on}) as gateway,
    ):
        client = Client(gateway)
        slow, late = llm("a", "Say much."), llm("b", "x" * 4_000 + " {{a}}")
        slow["request"]["max_tokens"] = 60
        run = await client.submit(slow, late)
        await client.value(run["id"], "b")
        usage = (await client.ask("GET", f"/v1/workflows/{run['id']}"))["usage"]
        await client.http.aclose()

    assert (usage["cached_tokens"] > 500) is is_on, usage
