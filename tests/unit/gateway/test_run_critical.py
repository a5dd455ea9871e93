"""The critical path: what of a run has taken its time, found in what the real executor has done in a virtual time."""

import heapq
import random
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import pytest
from hypothesis import given as given_by
from hypothesis import strategies as st

from core.workflows import RunState
from gateway.runs.critical import CriticalPath, Ended, Step, critical_path
from gateway.runs.history import Appended, End, Finished, Happening, History, Made, Settled, Used, Waiting
from semantic_vars.calls import Client, Workflow
from semantic_vars.events import (
    Abort,
    Append,
    Cancel,
    Done,
    Effect,
    Errand,
    Event,
    Failed,
    Put,
    Resolved,
    Start,
    Tick,
)
from semantic_vars.events import Ended as EndedEffect
from semantic_vars.executor import Executor
from semantic_vars.graph import USUAL, Node, Reader
from semantic_vars.variable import State
from tests.unit.semantic_vars.graphs import workflows
from tests.unit.semantic_vars.runs import Broken, Guess, echo, llm, workflow

T0 = 1_000_000.0
Seconds = Callable[[str], float]


class Timed:
    """A run of the real executor in which a call of a path takes `seconds`; a quarter of it in the queue. `later` are
    events that come at their times."""

    def __init__(self, given: Workflow, seconds: Seconds, *, later: Mapping[float, Event] | None = None) -> None:
        self.history = History(given)
        self.now = 0.0
        self._seconds = seconds
        self._began: dict[str, tuple[float, int]] = {}
        self._upcoming: list[tuple[float, int, Event]] = []
        self._number = 0
        self._executor = Executor(given, Guess())
        for at, event in (later or {}).items():
            self._plan(at, event)
        self._take(self._executor.begin(0.0))
        while self._upcoming or (self.history.state == "running" and self._executor.next_wakeup() is not None):
            alarm = self._executor.next_wakeup()
            if alarm is not None and (not self._upcoming or alarm < self._upcoming[0][0]):
                self.now, event = max(self.now, alarm), Tick()
            else:
                self.now, _, event = heapq.heappop(self._upcoming)
            if isinstance(event, Append):
                self._note(Appended(event.calls, event.variables, event.outputs, at=T0 + self.now))
            self._take(self._executor.on(event, self.now))

    @property
    def nodes(self) -> tuple[Node, ...]:
        whole = self.history.whole()
        return Reader(USUAL).nodes(whole.calls, frozenset(whole.variables))

    @property
    def path(self) -> CriticalPath:
        found = critical_path(self.nodes, Ended.of(self.history, T0))
        assert found is not None
        return found

    def _plan(self, at: float, event: Event) -> None:
        self._number += 1
        heapq.heappush(self._upcoming, (at, self._number, event))

    def _note(self, happening: Happening) -> None:
        self.history.read([msgspec.json.encode(happening)])

    def _take(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Start():
                    began, attempts = self._began.get(effect.call, (T0 + self.now, 0))
                    self._began[effect.call] = began, attempts + 1
                    self._start(effect)
                case Abort():
                    self._plan(self.now, Failed(effect.call, effect.epoch, "engine", "aborted", "", can_retry=False))
                case Resolved():
                    made = self._made(effect.call) if effect.call is not None else None
                    at, key = T0 + self.now, effect.key
                    self._note(
                        Settled(effect.variable, effect.call, effect.outcome, key, effect.order, at=at, made=made)
                    )
                case EndedEffect(state=state) if self.history.state == "running":
                    self._note(Finished(state, at=T0 + self.now))
                case _:
                    pass

    def _start(self, start: Start) -> None:
        if isinstance(start.work, Errand) and isinstance(start.work.server, Client):
            self._note(Waiting(start.call, start.variable, start.work.server.tool, None, T0 + self.now))
            return
        try:
            event: Event = Done(start.call, start.epoch, echo(start.work))
        except Broken as error:
            event = Failed(start.call, start.epoch, "engine", "broken", str(error))
        self._plan(self.now + self._seconds(start.call), event)

    def _made(self, call: str) -> Made | None:
        if call not in self._began:
            return None
        began, attempts = self._began.pop(call)
        took = T0 + self.now - began
        return Made(began, attempts, took / 4, took / 2, Used(1, 10, 4, 2))


def timed(*calls: Mapping[str, Any], seconds: Mapping[str, float], **rest: Any) -> Timed:
    later = rest.pop("later", None)
    return Timed(workflow(*calls, **rest), lambda path: seconds[path], later=later)


def names(path: CriticalPath) -> list[str]:
    return [step.call for step in path.steps]


def test_of_two_ways_the_longer_one_is_the_path() -> None:
    run = timed(
        llm("a", "x"), llm("b", "{{a}}"), llm("c", "{{a}}"), llm("d", "{{b}} {{c}}"),
        seconds={"a": 1.0, "b": 2.0, "c": 4.0, "d": 8.0},
    )  # fmt: skip
    path = run.path
    assert names(path) == ["a", "c", "d"]
    assert path.seconds == pytest.approx(13.0)
    assert [step.started_at - T0 for step in path.steps] == [0.0, 1.0, 5.0]
    assert [(step.kind, step.attempts, step.queue_s, step.engine_s, step.other_s) for step in path.steps] == [
        ("llm", 1, 0.25, 0.5, 0.25), ("llm", 1, 1.0, 2.0, 1.0), ("llm", 1, 2.0, 4.0, 2.0)
    ]  # fmt: skip


def test_what_a_chain_saves_is_a_round_trip_for_each_call_but_the_first_and_what_was_cached() -> None:
    path = timed(llm("a", "x"), llm("b", "{{a}}"), llm("c", "{{b}}"), seconds=dict.fromkeys("abc", 1.0)).path
    assert (path.round_trips_saved, path.prefill_saved) == (2, 12)


def test_of_a_map_the_element_that_ended_last_counts_and_how_long_it_was_held_for_its_turn() -> None:
    run = timed(
        llm("m", "{{item}}", foreach=["p", "q", "r"], max_parallel=2), llm("z", "{{m | join(' ')}}"),
        seconds={"m[0]": 3.0, "m[1]": 5.0, "m[2]": 4.0, "z": 1.0},
    )  # fmt: skip
    last, z = run.path.steps
    assert (last.call, last.held_s, last.ended_at - last.started_at) == ("m[2]", 3.0, 4.0)
    assert (z.call, z.held_s) == ("z", 0.0)
    assert run.path.seconds == pytest.approx(8.0)


def test_a_loop_is_walked_from_its_last_time_to_its_first() -> None:
    loop = {
        "kind": "loop", "id": "l", "state": {"s": "{{a}}"}, "calls": [llm("b", "{{s}}"), llm("c", "{{b}}")],
        "next": {"s": "{{c}}"}, "until": "{{c | contains('never')}}", "result": "{{c}}", "max_iterations": 3,
    }  # fmt: skip
    calls = ["a", *(f"l#{number}/{name}" for number in range(3) for name in "bc"), "z"]
    run = timed(llm("a", "x"), loop, llm("z", "{{l}}"), seconds=dict.fromkeys(calls, 1.0))
    assert names(run.path) == calls
    assert run.path.seconds == pytest.approx(8.0)


def test_what_is_within_a_branch_within_a_workflow_follows_what_those_have_waited_for() -> None:
    inner = {"kind": "branch", "id": "b", "if": "{{x}}", "then": {"calls": [llm("t", "{{x}}")], "result": "{{t}}"}}
    sub = {"kind": "workflow", "id": "w", "inputs": {"x": "{{a}}"}, "body": {"calls": [inner], "result": "{{b}}"}}
    run = timed(llm("a", "x"), sub, llm("z", "{{w}}"), seconds={"a": 1.0, "w/b#then/t": 2.0, "z": 3.0})
    assert names(run.path) == ["a", "w/b#then/t", "z"]


def test_what_only_one_body_of_a_branch_uses_begins_when_the_branch_is_decided() -> None:
    branch = {"kind": "branch", "id": "b", "if": "{{a}}", "then": {"calls": [llm("t", "{{c}}")], "result": "{{t}}"}}
    run = timed(llm("a", "x"), llm("c", "y"), branch, seconds={"a": 3.0, "c": 1.0, "b#then/t": 1.0}, outputs=["b"])
    assert [(step.call, step.held_s) for step in run.path.steps] == [("a", 0.0), ("c", 0.0), ("b#then/t", 0.0)]
    assert run.path.seconds == pytest.approx(5.0)


def test_a_race_is_won_by_who_was_first_and_the_others_held_nothing_up() -> None:
    of = [{"calls": [llm("p", "{{a}}")], "result": "{{p}}"}, {"calls": [llm("q", "{{a}}")], "result": "{{q}}"}]
    run = timed(
        llm("a", "x"), {"kind": "race", "id": "r", "of": of}, llm("z", "{{r}}"),
        seconds={"a": 1.0, "r#0/p": 9.0, "r#1/q": 2.0, "z": 1.0},
    )  # fmt: skip
    assert names(run.path) == ["a", "r#1/q", "z"]
    assert run.path.seconds == pytest.approx(4.0)


def test_a_transform_is_a_step_that_takes_no_time_and_saves_no_round_trip() -> None:
    transform = {"kind": "transform", "id": "t", "value": "{{a}}"}
    path = timed(llm("a", "x"), transform, llm("b", "{{t}}"), seconds={"a": 1.0, "b": 1.0}).path
    assert [(step.call, step.kind, step.seconds) for step in path.steps][1] == ("t", "transform", 0.0)
    assert path.round_trips_saved == 1


def test_a_variable_that_somebody_set_is_where_the_path_begins_and_its_time_is_the_clients() -> None:
    path = timed(
        llm("a", "x"), llm("b", "{{a}} {{ok}}"), seconds={"a": 1.0, "b": 1.0}, variables={"ok": {"open": True}},
        later={5.0: Put("ok", "yes")},
    ).path  # fmt: skip
    assert [(step.call, step.kind, step.client_s) for step in path.steps] == [
        ("ok", "variable", 5.0),
        ("b", "llm", 0.0),
    ]
    assert (path.seconds, path.round_trips_saved) == (6.0, 0)


def test_a_tool_of_the_clients_takes_the_clients_time() -> None:
    tool = {"kind": "tool", "id": "t", "server": {"type": "client", "tool": "tests"}, "arguments": "{{a}}"}
    path = timed(
        llm("a", "x"), tool, llm("b", "{{t}}"), seconds={"a": 1.0, "b": 1.0}, later={7.0: Put("t", "passed")}
    ).path
    assert [(step.call, step.client_s) for step in path.steps] == [("a", 0.0), ("t", 6.0), ("b", 0.0)]
    assert path.round_trips_saved == 0, "the client is in between"


def test_what_was_appended_later_was_not_held_up_by_us() -> None:
    more = workflow(llm("b", "{{a}}"))
    path = timed(llm("a", "x"), seconds={"a": 1.0, "b": 2.0}, later={4.0: Append(more.calls)}).path
    assert [(step.call, step.client_s, step.held_s) for step in path.steps] == [("a", 0.0, 0.0), ("b", 3.0, 0.0)]
    assert path.seconds == pytest.approx(6.0)


def test_a_call_that_failed_ends_the_path_of_what_it_took_with_it() -> None:
    run = timed(
        llm("a", "x"), llm("b", "{{a | json('$.x')}}"), llm("c", "{{b}}"), llm("d", "slow"),
        seconds={"a": 1.0, "d": 0.5}, outputs=["c", "d"],
    )  # fmt: skip
    assert [(step.call, step.state) for step in run.path.steps] == [
        ("a", State.DONE), ("b", State.FAILED), ("c", State.FAILED)
    ]  # fmt: skip


def test_of_a_run_that_was_cancelled_the_path_ends_with_what_was_under_way() -> None:
    run = timed(llm("a", "x"), llm("b", "{{a}}"), seconds={"a": 1.0, "b": 9.0}, later={3.0: Cancel()})
    assert [(step.call, step.state) for step in run.path.steps] == [("a", State.DONE), ("b", State.CANCELLED)]
    assert run.path.seconds == pytest.approx(3.0)


def test_a_run_of_which_nothing_has_ended_or_no_times_were_kept_has_no_path() -> None:
    whole = workflow(llm("a", "x"))
    nodes = Reader(USUAL).nodes(whole.calls, frozenset())
    assert critical_path(nodes, Ended(T0, {})) is None
    history = History(whole)
    history.read([b'{"type":"variable","variable":"a","call":"a","outcome":{"state":"done","value":"x"}}'])
    assert critical_path(nodes, Ended.of(history, T0)) is None


def test_a_clock_that_was_set_back_between_two_gateways_makes_no_time_negative() -> None:
    whole = workflow(llm("a", "x"), llm("b", "{{a}}"))
    made = Made(T0 + 4, queue_s=7.0)
    ends = {"a": End(T0 + 9, State.DONE, Made(T0), number=1), "b": End(T0 + 5, State.DONE, made, number=2)}
    found = critical_path(Reader(USUAL).nodes(whole.calls, frozenset()), Ended(T0, ends))
    assert found is not None
    assert all(part >= 0 for step in found.steps for part in parts(step))


def parts(step: Step) -> tuple[float, ...]:
    return step.client_s, step.held_s, step.queue_s, step.engine_s, step.other_s


def drawn(seed: int) -> Seconds:
    """Return whole seconds for each path, always the same: sums of them are exact."""
    return lambda path: float(random.Random(f"{seed} {path}").randint(0, 9))


@given_by(given=workflows(), seed=st.integers(0, 2**32))
def test_the_steps_of_any_run_fill_its_time_and_each_begins_when_what_it_waited_for_has_ended(
    given: Workflow, seed: int
) -> None:
    run = Timed(given, drawn(seed))
    path = run.path
    ended: RunState = run.history.state
    assert ended != "running"
    before = T0
    for step in path.steps:
        assert step.started_at >= before
        assert step.started_at <= step.ended_at
        assert all(part >= 0 for part in parts(step))
        assert step.client_s == 0
        assert step.held_s == 0 or "[" in step.call, "only elements wait here for their turn"
        assert before + step.seconds == pytest.approx(step.ended_at)
        before = step.ended_at
    lasts = [end.at for end in run.history.ends.values() if end.state is not State.CANCELLED]
    assert before == pytest.approx(max(lasts, default=T0))
    assert path.seconds == pytest.approx(before - T0)


@st.composite
def dags(draw: st.DrawFn) -> dict[str, tuple[list[str], float]]:
    """Return calls, each with those that it uses and its seconds."""
    found: dict[str, tuple[list[str], float]] = {}
    for number in range(draw(st.integers(1, 12))):
        uses = draw(st.lists(st.sampled_from(sorted(found)), max_size=4, unique=True)) if found else []
        found[f"c{number}"] = uses, float(draw(st.integers(0, 9)))
    return found


@given_by(dag=dags())
def test_the_path_is_as_long_as_the_longest_way_through_the_graph(dag: dict[str, tuple[list[str], float]]) -> None:
    calls = [llm(name, name + "".join(f"{{{{{one}}}}}" for one in uses)) for name, (uses, _) in dag.items()]
    path = Timed(workflow(*calls, outputs=list(dag)), lambda name: dag[name][1]).path
    longest: dict[str, float] = {}
    for name, (uses, seconds) in dag.items():
        longest[name] = seconds + max((longest[one] for one in uses), default=0.0)
    assert path.seconds == pytest.approx(max(longest.values()))
    assert path.seconds == pytest.approx(sum(dag[step.call][1] for step in path.steps))
    for before, step in zip(path.steps, path.steps[1:], strict=False):
        assert before.call in dag[step.call][0]
        assert all(longest[one] <= step.started_at - T0 for one in dag[step.call][0])
