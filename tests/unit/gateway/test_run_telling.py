"""What a run tells while it runs: its events with their times, its usage, counts and spans."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import cast

import pytest

from core.chat import Usage
from core.ids import TenantId
from core.workflows import RunEvent, RunRecord
from gateway.metrics import Metrics
from gateway.runs import work
from gateway.runs.following import Following
from gateway.runs.history import HAPPENING, Appended, Began, Finished, History, Settled, Used, Waiting
from gateway.runs.live import LiveRun
from gateway.runs.log import RunLog
from gateway.runs.spans import MOST
from gateway.runs.telling import Telling
from gateway.runs.underway import UNDERWAY
from gateway.tracing import SUBMITTER, UNTRACED, Span, Tracing
from gateway.tracing import Finished as Traced
from semantic_vars.budget import Spent
from semantic_vars.calls import Call, Workflow
from semantic_vars.events import Done, Failed, Prefill, Put, Start, Work
from semantic_vars.executor import Executor
from semantic_vars.graph import USUAL
from semantic_vars.variable import State
from storage.sql.workflows import Change
from tests.fakes.clock import ManualClock
from tests.unit.semantic_vars.runs import llm, workflow

PARENT = b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
Say = Callable[[Start], Awaitable[Done | Failed]]


class Worker:
    """Does what `say` does with a call; it takes a second, of which a quarter is spent in the queue."""

    prefills = True

    def __init__(self, clock: ManualClock, say: Say | None = None) -> None:
        self.parents: dict[str, bytes] = {}
        self.parents_ahead: dict[str, bytes] = {}
        self._clock = clock
        self._say = say or self._done

    async def do(self, run: RunRecord, start: Start, on_text: Callable[[str], None]) -> Done | Failed:
        underway = UNDERWAY.get()
        assert underway is not None
        self.parents[start.call] = underway.parent
        underway.waited(0.25)
        self._clock.advance(1.0)
        underway.worked(Usage(10, 3, 4), 0.5)
        return await self._say(start)

    async def prefill(self, run: RunRecord, ahead: Prefill) -> None:
        underway = UNDERWAY.get()
        assert underway is not None
        self.parents_ahead[ahead.call] = underway.parent
        underway.worked(Usage(10, 1, 0), 0.5)

    async def _done(self, start: Start) -> Done | Failed:
        return Done(start.call, start.epoch, "x", Spent(13, 0.5))

    def most(self, given: Work) -> Spent:
        return Spent(13, 0.5)

    def seconds(self, call: Call) -> float:
        return 1.0


class House:
    """A log that keeps events in memory, and runs whose spans are kept too."""

    def __init__(self, *, sample: float = 1.0, is_traced: bool = True) -> None:
        self.clock = ManualClock()
        self.metrics = Metrics()
        self.traced: list[Traced] = []
        self.events: list[RunEvent] = []
        self.tracing = Tracing(self._export, lambda: sample, draw=lambda: 0.5) if is_traced else None
        self.telling = Telling(self.metrics.runs, self.tracing)
        self.log = RunLog(self.telling.counting(self._write), self.clock)

    def _export(self, finished: Sequence[Traced]) -> bool:
        self.traced += finished
        return True

    async def _write(self, changes: Sequence[Change]) -> None:
        self.events += [event for change in changes for event in change.events]

    def run(self, given: Workflow, worker: Worker) -> LiveRun:
        """Return a run that was submitted, or that goes on behind the events that were kept."""
        record = RunRecord("run_1", TenantId("acme"), "key", b"", self.clock.wall(), self.clock.wall(), app="summary")
        history, told = History(given), History(given)
        for one in (history, told):
            one.read(event.body for event in self.events)
        doing = cast(work.Worker, worker)
        executor = Executor(
            given, doing, bounds=USUAL, facts=history.facts_to_go_on(), spent=history.spent, prefills=doing.prefills
        )
        return LiveRun(
            record, history, told, executor=executor, worker=doing, log=self.log, clock=self.clock,
            following=Following("run_1", nothing, told.number), on_end=lambda _: None, telling=self.telling,
        )  # fmt: skip

    async def through(self, given: Workflow, worker: Worker | None = None) -> LiveRun:
        """Run to the end."""
        async with self.log:
            run = self.run(given, worker or Worker(self.clock))
            run.begin()
            while run.told.state == "running":
                await run.following.changed()
            run.leave()
        if self.tracing is not None:
            await self.tracing.flush()
        return run

    @property
    def spans(self) -> dict[str, tuple[Span, int, int | None]]:
        """The spans, with their ids and their parents', by call; that of the run is the one without."""
        found = {}
        for span, trace in self.traced:
            assert isinstance(span, Span)
            path = str(span.attributes.get("forebay.call.path", ""))
            assert path not in found
            found[path] = span, trace.span_id, trace.parent_id
        return found

    def value(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(name, labels)


async def nothing(_run: str, _after: int) -> Sequence[RunEvent]:
    return ()


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
        assert run.num_underway == 1
        house.clock.advance(7.0)
        run.put(Put("t", "passed"))
        await run.durable()
        run.leave()
    waiting, made = HAPPENING.decode(house.events[1].body), run.told.ends["t"].made
    assert isinstance(waiting, Waiting)
    assert made is not None
    assert (waiting.at, made.began, run.told.ends["t"].at) == (1000.0, 1000.0, 1007.0)
    assert run.num_underway == 0


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
