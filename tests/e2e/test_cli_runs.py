"""What took a run its time, over real HTTP: by the wire, by the SDK, and by `forebay runs`."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import forebay
import pytest
import pytest_asyncio
from click.testing import CliRunner, Result
from forebay import Input, llm

from gateway.cli import main
from tests.e2e.test_workflows import Client
from tests.e2e.test_workflows import llm as call
from tests.fakes.engine import FakeEngine
from tests.fakes.gateway import GatewayProcess, attached

pytestmark = pytest.mark.asyncio(loop_scope="module")

SLOW = "Say it slowly."


class Application:
    """Somebody at a terminal with a tenant's key."""

    def __init__(self, front: GatewayProcess, key_file: Path) -> None:
        self._front = front
        self._key_file = key_file

    async def __call__(self, *arguments: str, status: int = 0) -> str:
        """Run a verb and return what it prints; `status` is the exit status that it should have."""
        found = ["--url", self._front.url, "--key-file", str(self._key_file)]
        result: Result = await asyncio.to_thread(CliRunner().invoke, main, ["runs", *arguments, *found])
        assert result.exit_code == status, result.output
        return result.output


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def front(engine: FakeEngine) -> AsyncIterator[GatewayProcess]:
    async with GatewayProcess({"fake": {**attached(engine.url), "price": {"input": 1, "output": 2}}}) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def client(front: GatewayProcess) -> AsyncIterator[Client]:
    made = Client(front)
    yield made
    await made.http.aclose()


@pytest.fixture
def runs(front: GatewayProcess, tmp_path: Path) -> Application:
    path = tmp_path / "app.key"
    path.write_text(front.key)
    return Application(front, path)


async def test_the_slower_of_two_ways_is_the_critical_path(client: Client, engine: FakeEngine) -> None:
    await engine.faults(trickle_ms=60, contains=SLOW)
    run = await client.submit(
        call("a", "Say one."), call("fast", "After {{a}}"), call("slow", SLOW + " {{a}}"),
        call("end", "{{fast}} and {{slow}}"),
    )  # fmt: skip
    await client.value(run["id"], "end")
    await engine.faults()
    seen = await client.ask("GET", f"/v1/workflows/{run['id']}?critical_path=true")
    path = seen["critical_path"]
    assert [one["call"] for one in path["calls"]] == ["a", "slow", "end"]
    assert path["round_trips_saved"] == 2
    slow = path["calls"][1]
    assert slow["engine_s"] > 0.2
    assert slow["started_at"] >= path["calls"][0]["ended_at"]
    sums = [path[name] for name in ("client_s", "held_s", "queue_s", "engine_s", "other_s")]
    assert sum(sums) == pytest.approx(path["seconds"], abs=0.01)
    assert path["seconds"] == pytest.approx(path["calls"][-1]["ended_at"] - seen["created_at"], abs=0.01)
    assert seen["calls"] == {"running": 0, "done": 4, "failed": 0, "skipped": 0, "cancelled": 0}
    used = seen["usage"]
    assert used["requests"] == 4
    assert used["prompt_tokens"] + used["completion_tokens"] == used["tokens"]
    assert "critical_path" not in await client.ask("GET", f"/v1/workflows/{run['id']}"), "only if it is asked for"
    drawn = await client.ask("GET", f"/v1/workflows/{run['id']}/graph")
    assert {one["id"] for one in drawn["nodes"] if one["critical"]} == {"a", "slow", "end"}


@llm(model="fake", max_tokens=6)
def step(text: Input[str]) -> str:
    return f"After {text}"


async def test_the_sdk_tells_the_critical_path(front: GatewayProcess) -> None:
    async with forebay.AsyncClient(front.url, api_key=front.key) as sdk, sdk.run() as run:
        await step(step("one"))
        path = await run.critical_path()
        status = await run.status()

    assert path is not None
    assert [one.call for one in path.steps] == ["step", "step_2"]
    assert path.round_trips_saved == 1
    assert status.calls == {"done": 2}
    assert status.usage["requests"] == 2


async def test_a_run_is_looked_at_and_drawn_from_a_terminal(client: Client, runs: Application) -> None:
    run = await client.submit(call("a", "Say one."), call("b", "After {{a}}"), app="terminal")
    await client.value(run["id"], "b")
    watched = await runs("watch", run["id"])
    assert [line.split() for line in watched.splitlines()] == [
        ["run.started", run["id"]], ["variable.done", "a"], ["variable.done", "b"], ["run.done", run["id"]]
    ]  # fmt: skip
    listed = await runs("ls", "--state", "done", "--limit", "1")
    assert run["id"] in listed
    assert "terminal" in listed
    shown = await runs("show", run["id"])
    assert "1 round trips of a client were saved" in shown
    assert json.loads(await runs("show", run["id"], "--json"))["critical_path"]["calls"][0]["call"] == "a"
    assert (await runs("graph", run["id"])).startswith("flowchart LR")
    assert (await runs("graph", run["id"], "--format", "svg")).startswith("<svg")
    drawn: Any = json.loads(await runs("graph", run["id"], "--format", "json"))
    assert [one["state"] for one in drawn["nodes"]] == ["done", "done"]


async def test_a_run_is_watched_while_it_runs(client: Client, runs: Application, engine: FakeEngine) -> None:
    await engine.faults(trickle_ms=50, contains=SLOW)
    run = await client.submit(call("a", SLOW * 9), call("b", "After {{a}}"))
    watching = asyncio.create_task(runs("watch", run["id"], status=1))
    await engine.until(running=1)
    await client.ask("POST", f"/v1/workflows/{run['id']}/cancel", {})
    assert f"run.cancelled       {run['id']}" in await watching
    await engine.until(running=0)
    await engine.faults()


async def test_a_run_is_cancelled_from_a_terminal(client: Client, runs: Application, engine: FakeEngine) -> None:
    await engine.faults(trickle_ms=50, contains=SLOW)
    run = await client.submit(call("a", SLOW * 9), call("b", "After {{a}}"))
    await engine.until(running=1)
    assert await runs("cancel", run["id"]) == f"{run['id']} is cancelled\n"
    await engine.until(running=0)
    await engine.faults()


async def test_a_run_that_is_not_there_is_told_so(runs: Application) -> None:
    for verb in ("show", "watch", "cancel", "graph"):
        assert "there is no run 'run_nothing'" in await runs(verb, "run_nothing", status=1)
