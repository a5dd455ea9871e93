"""What an operator sees of runs: one trace from the submitter to the engine, also over a crash, and the metrics."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.test_observability import CANARY, PARENT, series
from tests.e2e.test_workflows import Client, llm
from tests.fakes.collector import Collector, Span
from tests.fakes.engine import FakeEngine
from tests.fakes.gateway import GatewayProcess, attached

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def tree(collector: Collector) -> tuple[Span, dict[str, Span]]:
    """Wait for the span of a run that was submitted below PARENT; return it, and those of its calls by path."""
    for _ in range(1_000):
        spans = [span for span in collector.spans if span.trace_id == PARENT[3:35]]
        if root := next((span for span in spans if span.name.startswith("invoke_workflow")), None):
            return root, {path: span for span in spans if (path := span.attributes.get("forebay.call.path"))}
        await asyncio.sleep(0.01)
    raise AssertionError("no run was traced")


async def test_a_run_is_one_trace_from_the_submitter_to_the_engine(engine: FakeEngine) -> None:
    await engine.reset()
    async with (
        Collector() as collector,
        GatewayProcess({"fake": attached(engine.url)}, tracing={"endpoint": collector.url}) as gateway,
    ):
        client = Client(gateway)
        calls = [llm("m", CANARY + " {{item}}", foreach=["p", "q"]), llm("z", "{{m | join(' ')}}")]
        run = await client.ask(
            "POST", "/v1/workflows", {"calls": calls, "app": "summary"}, status=202, traceparent=PARENT
        )
        await client.value(run["id"], "z")
        root, below = await tree(collector)
        assert (root.name, root.parent_id) == ("invoke_workflow summary", PARENT[36:52])
        assert root.attributes["forebay.run.id"] == run["id"]
        assert {*below} == {"m", "m[0]", "m[1]", "z"}
        assert below["m[1]"].parent_id == below["m"].id
        assert below["m"].parent_id == below["z"].parent_id == root.id

        spans = {span.id: span for span in collector.spans if span.trace_id == root.trace_id}
        requests = [span for span in spans.values() if span.kind == "server"]
        assert {span.parent_id for span in requests} == {below[path].id for path in ("m[0]", "m[1]", "z")}
        legs = [span for span in spans.values() if span.kind == "client"]
        assert {leg.parent_id for leg in legs} == {span.id for span in requests}
        told = {request["headers"].get("traceparent") for request in (await engine.stats())["requests"]}
        assert told >= {f"00-{root.trace_id}-{leg.id}-01" for leg in legs}
        assert root.attributes["gen_ai.usage.input_tokens"] == sum(
            span.attributes["gen_ai.usage.input_tokens"] for span in requests
        )
        assert CANARY.encode() not in collector.raw

        async with client.http.stream("GET", f"/v1/workflows/{run['id']}/events") as events:
            assert events.status_code == 200
        seen = await series(gateway)
        assert (seen["forebay_runs_accepted_total"], seen["forebay_runs_ended_total"]) == (1, 1)
        assert (seen["forebay_run_calls_started_total"], seen["forebay_run_calls_ended_total"]) == (3, 3)
        assert seen["forebay_run_duration_seconds_count"] == 1
        assert seen["forebay_run_commit_events_sum"] == 6
        assert seen["forebay_runs_open"] == 0
        await client.http.aclose()


async def test_a_run_that_goes_on_after_a_crash_stays_one_trace(engine: FakeEngine, tmp_path: Path) -> None:
    await engine.faults(trickle_ms=40, contains="slowly")
    async with Collector() as collector:
        more: dict[str, Any] = {"tracing": {"endpoint": collector.url}, "directory": tmp_path}
        async with GatewayProcess({"fake": attached(engine.url)}, **more) as gateway:
            client = Client(gateway)
            calls = [llm("a", "Say one."), llm("b", "Go on slowly, after {{a}}")]
            run = await client.ask("POST", "/v1/workflows", {"calls": calls}, status=202, traceparent=PARENT)
            await client.value(run["id"], "a")
            await engine.until(running=1)
            gateway.kill()
            await gateway.wait()
            await client.http.aclose()
        await engine.faults()
        async with GatewayProcess({"fake": attached(engine.url)}, **more) as again:
            client = Client(again)
            await client.value(run["id"], "b")
            root, below = await tree(collector)
            await client.http.aclose()
    assert root.parent_id == PARENT[36:52]
    assert below["b"].parent_id == root.id
    assert below["b"].attributes["forebay.call.state"] == "done"
