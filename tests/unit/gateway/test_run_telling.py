"""What a run tells while it runs: its events with their times, its usage, counts and spans."""

import asyncio

import pytest

from gateway.runs.history import HAPPENING, Appended, Began, Finished, History, Settled, Used, Waiting
from gateway.runs.log import RunLog
from gateway.runs.spans import MOST
from gateway.tracing import SUBMITTER, UNTRACED
from semantic_vars.budget import Spent
from semantic_vars.events import Done, Failed, Put, Start
from semantic_vars.variable import State
from tests.unit.gateway.houses import House, Worker
from tests.unit.semantic_vars.runs import llm, workflow

PARENT = b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"

CHAIN = workflow(llm("a", "x"), llm("b", "{{a}}"))


async def test_an_end_is_kept_with_its_time_and_how_it_was_made() -> None:
    house = House()
    run = await house.through(CHAIN)
    began, a, b, finished = (HAPPENING.decode(event.body) for event in house.events)
    assert isinstance(began, Began)
    assert isinstance(a, Settled)
    assert isinstance(b, Settled)
    assert isinstance(finished, Finished)
    assert a.made is not None
    assert (a.at, a.made.began, a.made.attempts, a.made.queue_s, a.made.engine_s) == (1001.0, 1000.0, 1, 0.25, 0.5)
    assert a.made.used == Used(1, 10, 4, 3)
    assert (b.at, b.used, finished.used) == (1002.0, Used(2, 20, 8, 6), Used(2, 20, 8, 6))
    assert run.told.used == Used(2, 20, 8, 6)
    assert run.told.spent == Spent(26, 1.0)


async def test_events_of_before_times_were_kept_are_read_as_they_are() -> None:
    history = History(CHAIN)
    history.read(
        [
            b'{"type":"run.started","calls":["a","b"]}',
            b'{"type":"call.waiting","call":"t","variable":"t","tool":"x","arguments":null}',
            b'{"type":"variable","variable":"a","call":"a","outcome":{"state":"done","value":1,"failure":null,'
            b'"missing":0,"total":0},"key":"k","order":[],"spent":{"tokens":4,"cost":0.5}}',
            b'{"type":"run.ended","state":"done","spent":{"tokens":4,"cost":0.5}}',
        ]
    )
    assert (history.spent, history.used, history.span) == (Spent(4, 0.5), None, None)
    assert (history.ends["a"].at, history.ends["a"].made) == (0.0, None)
    assert history.waiting["t"].at == 0.0


async def test_what_an_attempt_that_failed_took_belongs_to_the_call() -> None:
    num_failed = 0

    async def say(start: Start) -> Done | Failed:
        nonlocal num_failed
        num_failed += 1
        if num_failed == 1:
            return Failed(start.call, start.epoch, "engine", "broken", "it broke")
        return Done(start.call, start.epoch, "x")

    house = House()
    run = await house.through(workflow(llm("a", "x", retry={"max": 1, "backoff_s": 0.0})), Worker(house.clock, say))
    made = run.told.ends["a"].made
    assert made is not None
    assert (made.attempts, made.queue_s, made.used) == (2, 0.5, Used(2, 20, 8, 6))
    assert house.value("forebay_run_calls_retried_total", kind="llm") == 1
    assert house.value("forebay_run_calls_started_total", kind="llm") == 1


async def test_a_run_is_counted_from_its_beginning_to_its_end() -> None:
    house = House()
    await house.through(CHAIN)
    assert house.value("forebay_runs_accepted_total") == 1
    assert house.value("forebay_runs_ended_total", state="done") == 1
    assert house.value("forebay_runs_open") == 0
    assert house.value("forebay_run_duration_seconds_sum") == pytest.approx(2.0)
    assert house.value("forebay_run_calls_ended_total", kind="llm", state="done") == 2
    assert house.value("forebay_run_commit_events_sum") == len(house.events) == 4


async def test_a_run_is_a_span_below_its_submitters_and_calls_are_spans_below_it() -> None:
    house = House()
    worker = Worker(house.clock)
    SUBMITTER.set(PARENT)
    await house.through(CHAIN, worker)
    run, run_id, submitter = house.spans[""]
    assert (run.name, run.began_at, run.ended_at, submitter) == (
        "invoke_workflow summary",
        1000,
        1002,
        0xF067AA0BA902B7,
    )
    assert dict(run.attributes) == {
        "gen_ai.operation.name": "invoke_workflow",
        "gen_ai.workflow.name": "summary",
        "gen_ai.usage.input_tokens": 20,
        "gen_ai.usage.output_tokens": 6,
        "gen_ai.usage.cache_read.input_tokens": 8,
        "forebay.run.id": "run_1",
        "forebay.run.state": "done",
        "forebay.run.calls": 2,
        "forebay.run.calls_without_span": 0,
        "forebay.tenant": "acme",
        "forebay.cost_usd": 1.0,
    }
    b, b_id, parent = house.spans["b"]
    assert (b.name, b.began_at, b.ended_at, b.error, parent) == ("call b", 1001, 1002, None, run_id)
    assert dict(b.attributes) == {
        "forebay.run.id": "run_1",
        "forebay.call.path": "b",
        "forebay.call.state": "done",
        "forebay.call.criteria": "latency",
        "forebay.call.attempts": 1,
        "forebay.queue_ms": 250.0,
        "gen_ai.usage.input_tokens": 10,
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.usage.cache_read.input_tokens": 4,
    }
    assert worker.parents["b"] == b"00-4bf92f3577b34da6a3ce929d0e0e4736-%016x-01" % b_id


async def test_calls_within_calls_are_spans_within_spans() -> None:
    body = {"calls": [llm("c", "{{item}}"), {"kind": "transform", "id": "t", "value": "{{c}}"}], "result": "{{t}}"}
    house = House()
    await house.through(
        workflow({"kind": "workflow", "id": "w", "foreach": ["p", "q"], "inputs": {}, "body": body}, llm("z", "{{w}}"))
    )
    ids = {path: span_id for path, (_, span_id, _) in house.spans.items()}
    parents = {path: parent for path, (_, _, parent) in house.spans.items()}
    assert parents["w[1]/c"] == ids["w[1]"]
    assert parents["w[1]"] == ids["w"]
    assert parents["w"] == parents["z"] == ids[""]
    assert "w[1]/t" not in ids, "nothing was asked of anybody for it"


async def test_a_call_that_failed_says_why_and_its_tool_is_named_and_never_its_address() -> None:
    async def say(start: Start) -> Done | Failed:
        return Failed(start.call, start.epoch, "tool", "tool_failed", "the secret reason")

    tool = {"kind": "tool", "id": "t", "server": {"type": "mcp", "url": "https://u:p@canary/", "tool": "search"}}
    house = House()
    await house.through(workflow({**tool, "arguments": {"q": "canary"}}), Worker(house.clock, say))
    span, *_ = house.spans["t"]
    assert (span.name, span.error, span.attributes["gen_ai.tool.name"]) == (
        "execute_tool search",
        "tool_failed",
        "search",
    )
    assert house.spans[""][0].error == "workflow_failed"
    said = repr([span for span, _ in house.traced])
    assert "canary" not in said
    assert "secret" not in said


async def test_what_is_computed_ahead_of_a_call_hangs_below_the_run_and_is_no_part_of_the_call() -> None:
    house, begun = House(), asyncio.Event()

    async def say(start: Start) -> Done | Failed:
        await begun.wait()
        return Done(start.call, start.epoch, "x")

    worker = Worker(house.clock, say)
    asyncio.get_running_loop().call_later(0, begun.set)
    run = await house.through(workflow(llm("a", "x"), llm("b", "x" * 2_000 + "{{a}}")), worker)
    _, run_id, _ = house.spans[""]
    assert worker.parents_ahead["b"].endswith(b"-%016x-01" % run_id)
    made = run.told.ends["b"].made
    assert made is not None
    assert made.used == Used(1, 10, 4, 3)


async def test_a_run_that_is_not_traced_has_no_request_that_is() -> None:
    house = House(sample=0.5)
    worker = Worker(house.clock)
    await house.through(CHAIN, worker)
    assert not house.traced
    assert worker.parents == {"a": UNTRACED, "b": UNTRACED}
    assert house.tracing is not None
    assert house.tracing.start(UNTRACED) is None


async def test_without_a_collector_a_run_is_the_same() -> None:
    house = House(is_traced=False)
    run = await house.through(CHAIN)
    assert run.told.state == "done"


async def test_of_a_wide_map_the_first_calls_have_spans_and_how_many_have_none_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert MOST == 1_000
    monkeypatch.setattr("gateway.runs.spans.MOST", 4)
    house = House()
    worker = Worker(house.clock)
    await house.through(workflow(llm("m", "{{item}}", foreach=[1] * 10)), worker)
    assert {*house.spans} == {"", "m", "m[0]", "m[1]", "m[2]"}
    assert house.spans[""][0].attributes["forebay.run.calls_without_span"] == 7
    assert worker.parents["m[9]"] == UNTRACED


async def test_a_run_that_is_gone_on_with_hangs_its_calls_below_the_same_span() -> None:
    house, stopped = House(), asyncio.Event()

    async def say(start: Start) -> Done | Failed:
        if start.call == "b":
            stopped.set()
            await asyncio.Event().wait()
        return Done(start.call, start.epoch, "x")

    async with house.log:
        first = house.run(CHAIN, Worker(house.clock, say))
        first.begin()
        await stopped.wait()
        await first.durable()
        first.leave()
        await first.left()
    assert house.tracing is not None
    await house.tracing.flush()
    assert {*house.spans} == {"a"}
    house.log = RunLog(house.telling.counting(house._write), house.clock)
    run = await house.through(CHAIN)
    _, run_id, _ = house.spans[""]
    assert {*house.spans} == {"", "a", "b"}
    assert house.spans["a"][2] == house.spans["b"][2] == run_id
    assert {trace.trace_id for _, trace in house.traced} == {house.traced[0][1].trace_id}
    assert run.told.num_calls[State.DONE] == 2
    assert house.value("forebay_runs_accepted_total") == 1


async def test_a_tool_of_the_clients_is_under_way_since_it_was_told_of() -> None:
    tool = {"kind": "tool", "id": "t", "server": {"type": "client", "tool": "tests"}, "arguments": None}
    house = House()
    async with house.log:
        run = house.run(workflow(tool), Worker(house.clock))
        run.begin()
        await run.durable()
        assert len(run.underway) == 1
        house.clock.advance(7.0)
        run.put(Put("t", "passed"))
        await run.durable()
        run.leave()
    waiting, made = HAPPENING.decode(house.events[1].body), run.told.ends["t"].made
    assert isinstance(waiting, Waiting)
    assert made is not None
    assert (waiting.at, made.began, run.told.ends["t"].at) == (1000.0, 1000.0, 1007.0)
    assert not run.underway


async def test_what_is_appended_is_kept_with_its_time() -> None:
    house = House()
    async with house.log:
        run = house.run(CHAIN, Worker(house.clock))
        run.begin()
        while run.told.state == "running":
            await run.following.changed()
        house.clock.advance(5.0)
        run.append(Appended(workflow(llm("c", "{{b}}")).calls))
        while "c" not in run.told.outcomes:
            await run.following.changed()
        await run.durable()
        run.leave()
    assert run.told.added == {"c": 1007.0}
    assert house.value("forebay_runs_ended_total", state="done") == 2
    assert house.value("forebay_run_duration_seconds_count") == 1, "what came later is not its time"
