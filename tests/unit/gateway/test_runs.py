"""What a run keeps of itself: its history, the log that makes it durable, and those who follow it."""

import asyncio
from collections.abc import Sequence

import msgspec
import pytest

from core.workflows import RunEvent, RunState
from gateway.runs.following import MOST_SAYINGS, TAIL, Following
from gateway.runs.history import (
    INTERRUPTED,
    Appended,
    Attempted,
    Began,
    Finished,
    Happening,
    History,
    Settled,
    Stopped,
    Waiting,
    Wanted,
)  # fmt: skip
from gateway.runs.log import RunLog
from semantic_vars.budget import Spent
from semantic_vars.calls import Given, Workflow
from semantic_vars.variable import Failure, Outcome, State, done
from storage.sql.database import Conflict, StorageUnavailable
from storage.sql.workflows import Change
from tests.fakes.clock import ManualClock
from tests.unit.semantic_vars.runs import llm, workflow


def history_of(given: Workflow, *happenings: Happening) -> History:
    history = History(given)
    history.read(msgspec.json.encode(one) for one in happenings)
    return history


def test_a_history_is_the_same_read_from_what_was_kept() -> None:
    more = workflow(llm("b", "{{a}}"))
    history = history_of(
        workflow(llm("a", "x")),
        Began(("a",)),
        Settled("a", "a", done({"n": [1]}), "key", (), Spent(4, 0.5)),
        Finished(State.DONE, Spent(4, 0.5)),
        Appended(more.calls, {"v": Given(value=2)}, ("b",)),
        Wanted("b", "throughput"),
        Stopped(("b",)),
    )
    assert history.number == 6
    assert history.state == "running", "what was appended has not ended"
    assert history.outcome("a") == done({"n": [1]})
    assert history.outcome("v") == done(2)
    assert history.outcome("b") is None
    assert history.names() == ("v", "a", "b")
    assert [type(one) for one in history.asked] == [Appended, Wanted, Stopped]
    assert history.spent == Spent(4, 0.5)
    assert history.facts["a"].key == "key"
    assert [call.id for call in history.whole().calls] == ["a", "b"]


def test_elements_of_a_map_are_facts_and_no_variables() -> None:
    history = history_of(workflow(llm("m", "{{item}}", foreach=[1])), Settled("m[0]", "m[0]", done("x"), "k"))
    assert history.facts.keys() == {"m[0]"}
    assert not history.outcomes


def test_a_tool_that_may_run_once_and_may_have_run_is_not_run_again() -> None:
    begun = history_of(workflow(llm("a", "x")), Attempted("t", "t", "key"))
    failure = begun.facts_to_go_on()["t"].outcome.failure
    assert failure is not None
    assert failure.code == INTERRUPTED
    begun.add(Settled("t", "t", done(1), "key"))
    assert begun.facts_to_go_on()["t"].outcome == done(1)


def test_a_tool_of_the_clients_waits_until_it_is_answered() -> None:
    history = history_of(workflow(llm("a", "x")), Waiting("t", "t", "tests", None))
    assert history.waiting.keys() == {"t"}
    history.add(Settled("t", "t", done(1)))
    assert not history.waiting


def test_only_what_went_well_is_of_use_to_another_run() -> None:
    failed = Outcome(State.FAILED, failure=Failure("broken", "it broke", "b"))
    history = history_of(workflow(llm("a", "x")), Settled("a", "a", done(1), "k"), Settled("b", "b", failed, "l"))
    assert history.facts_of_successes().keys() == {"a"}
    assert history.facts_to_go_on().keys() == {"a", "b"}


class Wrote:
    """A run that has events to be written."""

    def __init__(self, name: str) -> None:
        self.id = name
        self.state: RunState = "running"
        self.unwritten: list[RunEvent] = []
        self.durable: list[int] = []
        self.is_lost = False

    def note(self, number: int) -> None:
        self.unwritten.append(RunEvent(self.id, number, b"{}"))

    def take_unwritten(self) -> tuple[RunEvent, ...]:
        events, self.unwritten = tuple(self.unwritten), []
        return events

    def written(self, events: Sequence[RunEvent]) -> None:
        self.durable += [event.number for event in events]

    def lost(self) -> None:
        self.is_lost = True


class Store:
    """Takes batches, or fails."""

    def __init__(self) -> None:
        self.batches: list[list[tuple[str, int]]] = []
        self.taken: set[str] = set()
        self.is_away = False

    async def write(self, changes: Sequence[Change]) -> None:
        await asyncio.sleep(0)
        if self.is_away:
            raise StorageUnavailable("away")
        if any(change.run in self.taken for change in changes):
            raise Conflict("taken")
        self.batches.append([(change.run, len(change.events)) for change in changes])


async def turns(count: int = 20) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_what_comes_while_a_batch_is_written_is_the_next_batch() -> None:
    store, one, other = Store(), Wrote("one"), Wrote("other")
    async with RunLog(store.write, ManualClock()) as log:
        one.note(1)
        log.touch(one)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        for number in (2, 3):
            one.note(number)
            log.touch(one)
        other.note(1)
        log.touch(other)
        await turns()
    assert store.batches == [[("one", 1)], [("one", 2), ("other", 1)]]
    assert (one.durable, other.durable) == ([1, 2, 3], [1])


async def test_nothing_is_durable_while_the_database_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.runs.log.RETRY_S", 0.0)
    store, one = Store(), Wrote("one")
    store.is_away = True
    async with RunLog(store.write, ManualClock()) as log:
        one.note(1)
        log.touch(one)
        await turns()
        assert log.is_away
        assert not one.durable
        store.is_away = False
        await turns()
    assert one.durable == [1]
    assert not log.is_away


async def test_a_run_that_another_gateway_has_is_let_go_and_the_others_are_kept() -> None:
    store, one, other = Store(), Wrote("one"), Wrote("other")
    store.taken = {"one"}
    async with RunLog(store.write, ManualClock()) as log:
        for run in (one, other):
            run.note(1)
            log.touch(run)
        await turns()
    assert one.is_lost
    assert not other.is_lost
    assert other.durable == [1]


def event(number: int) -> RunEvent:
    return RunEvent("r", number, b"%d" % number)


async def nothing(_run: str, _after: int) -> Sequence[RunEvent]:
    raise AssertionError("all of it is in memory")


async def collect(following: Following, after: int, into: list[int | bytes]) -> None:
    async for one in following.follow(after):
        into.append(one if isinstance(one, bytes) else one.number)


async def test_a_follower_gets_every_event_once_and_what_is_said_meanwhile() -> None:
    following = Following("r", nothing)
    seen: list[int | bytes] = []
    following.tell([event(1), event(2)])
    task = asyncio.create_task(collect(following, 0, seen))
    await turns()
    following.say(b"text")
    await turns()
    following.tell([event(3)])
    following.end()
    await task
    assert seen == [1, 2, b"text", 3]
    assert following.num_listeners == 0


async def test_a_follower_that_is_far_behind_reads_what_was_kept() -> None:
    async def read(_run: str, after: int) -> Sequence[RunEvent]:
        return [event(number) for number in range(after + 1, min(after + 401, TAIL + 50))]

    following = Following("r", read)
    seen: list[int | bytes] = []
    following.tell([event(number) for number in range(1, TAIL + 100)])
    following.end()
    await collect(following, 5, seen)
    assert seen == list(range(6, TAIL + 100))


async def test_a_slow_follower_loses_what_is_said_and_nothing_that_is_kept() -> None:
    following = Following("r", nothing)
    seen: list[int | bytes] = []
    task = asyncio.create_task(collect(following, 0, seen))
    await turns()
    for _ in range(MOST_SAYINGS + 100):
        following.say(b"text")
    following.tell([event(1)])
    following.end()
    await task
    assert seen == [b"text"] * MOST_SAYINGS + [1]


async def test_a_thousand_followers_are_told() -> None:
    following = Following("r", nothing)
    seen: list[list[int | bytes]] = [[] for _ in range(1_000)]
    tasks = [asyncio.create_task(collect(following, 0, one)) for one in seen]
    await turns()
    following.tell([event(1)])
    following.end()
    await asyncio.gather(*tasks)
    assert seen == [[1]] * 1_000
