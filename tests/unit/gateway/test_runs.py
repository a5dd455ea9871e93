"""What a run keeps of itself: its history, the log that makes it durable, and those who follow it."""

import asyncio
from collections.abc import Callable, Sequence

import msgspec
import pytest

from core.errors import Conflict as Refused
from core.errors import InternalError, UnknownId
from core.workflows import RunAnswer, RunEvent, RunLetter
from gateway.runs.following import MOST_SAYINGS, MOST_TEXT, TAIL, Following
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
from gateway.runs.letters import Askable, Letter, answer_to, check
from gateway.runs.log import RunLog
from semantic_vars.budget import Spent
from semantic_vars.calls import Criteria, Given, Workflow
from semantic_vars.events import Put
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
        self.unwritten: list[RunEvent] = []
        self.durable: list[int] = []
        self.is_lost = False

    def note(self, number: int) -> None:
        self.unwritten.append(RunEvent(self.id, number, b"{}"))

    def take_change(self, at: float) -> Change:
        events, self.unwritten = tuple(self.unwritten), []
        return Change(self.id, events, "running", at)

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


class Asked:
    """A run that notes what it is asked for, and refuses it with an error that it was given."""

    def __init__(self, error: Exception | None = None) -> None:
        self.asked: list[object] = []
        self.error = error

    def _take(self, what: object) -> None:
        if self.error is not None:
            raise self.error
        self.asked.append(what)

    def append(self, more: Appended) -> None:
        self._take(more)

    def want(self, variable: str, criteria: Criteria, deadline_s: float | None = None) -> None:
        self._take(Wanted(variable, criteria, deadline_s))

    def cancel(self, calls: tuple[str, ...]) -> None:
        self._take(Stopped(calls))

    def put(self, put: Put) -> None:
        self._take(put)


MORE = Appended(workflow(llm("b", "{{a}}")).calls, {"v": Given(value=2), "o": Given(open=True)}, ("b",), "once")
ASKS: Sequence[Callable[[Askable], None]] = (
    lambda run: run.append(MORE),
    lambda run: run.want("b", "throughput"),
    lambda run: run.want("b", "latency", 2.5),
    lambda run: run.cancel(("a", "b")),
    lambda run: run.cancel(()),
    lambda run: run.put(Put("v", {"n": [1, None]})),
    lambda run: run.put(Put("v", failure="no")),
)


@pytest.mark.parametrize("ask", ASKS)
def test_a_run_is_asked_by_letter_as_it_would_be_asked_itself(ask: Callable[[Askable], None]) -> None:
    direct, through, letter = Asked(), Asked(), Letter()
    ask(direct)
    ask(letter)
    check(answer_to(RunLetter(1, "r", letter.body), through))
    assert through.asked == direct.asked
    assert len(direct.asked) == 1


@pytest.mark.parametrize("error", [Refused("it is set"), UnknownId("no such variable"), InternalError("hm")])
def test_who_is_refused_by_letter_gets_the_same_error(error: Exception) -> None:
    letter = Letter()
    letter.put(Put("v", 1))
    answer = answer_to(RunLetter(7, "r", letter.body), Asked(error))
    assert answer.number == 7
    with pytest.raises(type(error), match=str(error)):
        check(answer)


def test_a_letter_that_breaks_something_is_answered_all_the_same() -> None:
    letter = Letter()
    letter.cancel(())
    with pytest.raises(InternalError, match="its log has more"):
        check(answer_to(RunLetter(1, "r", letter.body), Asked(ZeroDivisionError())))
    with pytest.raises(InternalError, match="its log has more"):
        check(answer_to(RunLetter(1, "r", b"nonsense"), Asked()))


def test_an_answer_that_says_nothing_is_a_yes() -> None:
    check(RunAnswer(1, b"{}"))


def event(number: int) -> RunEvent:
    return RunEvent("r", number, b"%d" % number)


async def nothing(_run: str, _after: int) -> Sequence[RunEvent]:
    raise AssertionError("all of it is in memory")


async def collect(following: Following, after: int, into: list[int | bytes]) -> None:
    async for one in following.follow(after):
        into.append(one if isinstance(one, bytes) else one.number)


def text_of(told: int | bytes) -> int | str:
    if isinstance(told, int):
        return told
    piece = msgspec.json.decode(told)
    assert piece["event"] == "variable.delta"
    return f"{piece['variable']}/{piece['attempt']} {piece['text']}"


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


async def test_who_leaves_takes_nothing_from_the_others() -> None:
    following = Following("r", nothing)
    seen: list[list[int | bytes]] = [[] for _ in range(3)]
    tasks = [asyncio.create_task(collect(following, 0, one)) for one in seen]
    await turns()
    tasks[1].cancel()
    await turns()
    following.say(b"text")
    following.end()
    await asyncio.wait(tasks)
    assert seen == [[b"text"], [], [b"text"]]


async def test_a_follower_that_is_far_behind_reads_what_was_kept() -> None:
    async def read(_run: str, after: int) -> Sequence[RunEvent]:
        return [event(number) for number in range(after + 1, min(after + 401, TAIL + 50))]

    following = Following("r", read)
    seen: list[int | bytes] = []
    following.tell([event(number) for number in range(1, TAIL + 100)])
    following.end()
    await collect(following, 5, seen)
    assert seen == list(range(6, TAIL + 100))


async def test_a_late_follower_gets_first_what_calls_under_way_have_said() -> None:
    following = Following("r", nothing)
    early: list[int | bytes] = []
    late: list[int | bytes] = []
    following.tell([event(1)])
    following.say_text("a", 1, "One, ")
    tasks = [asyncio.create_task(collect(following, 0, early))]
    await turns()
    following.say_text("a", 1, "two, ")
    following.say_text("b", 2, "else")
    tasks.append(asyncio.create_task(collect(following, 0, late)))
    await turns()
    following.say_text("a", 1, "three.")
    following.fall_silent("a", 1)
    await turns()
    following.tell([event(2)])
    following.end()
    await asyncio.gather(*tasks)
    assert [text_of(one) for one in early] == [1, "a/1 One, ", "a/1 two, ", "b/2 else", "a/1 three.", 2]
    assert [text_of(one) for one in late] == [1, "a/1 One, two, ", "b/2 else", "a/1 three.", 2]


async def test_what_was_said_by_a_call_that_has_ended_is_not_told_to_who_comes_later() -> None:
    following = Following("r", nothing)
    seen: list[int | bytes] = []
    following.say_text("a", 1, "void")
    following.fall_silent("a", 1)
    following.say_text("a", 2, "")
    following.end()
    await collect(following, 0, seen)
    assert seen == []


async def test_a_text_that_is_too_long_to_be_kept_is_not_told_in_part() -> None:
    following = Following("r", nothing)
    seen: list[int | bytes] = []
    following.say_text("a", 1, "x" * MOST_TEXT)
    following.say_text("b", 1, "y" * MOST_TEXT)
    following.say_text("b", 1, "y")
    following.say_text("b", 1, "y")
    following.end()
    await collect(following, 0, seen)
    assert [text_of(one) for one in seen] == ["a/1 " + "x" * MOST_TEXT]


async def test_pieces_that_come_while_a_late_follower_catches_up_come_once() -> None:
    async def read(_run: str, after: int) -> Sequence[RunEvent]:
        following.say_text("a", 1, "b")
        await asyncio.sleep(0)
        return [event(after + 1)]

    following = Following("r", read, last=3)
    seen: list[int | bytes] = []
    following.say_text("a", 1, "a")
    task = asyncio.create_task(collect(following, 0, seen))
    await turns()
    following.say_text("a", 1, "c")
    following.end()
    await task
    assert [text_of(one) for one in seen] == [1, 2, 3, "a/1 abbb", "a/1 c"]


async def test_a_run_whose_events_are_gone_is_followed_no_longer() -> None:
    async def read(_run: str, _after: int) -> Sequence[RunEvent]:
        return ()

    seen: list[int | bytes] = []
    await collect(Following("r", read, last=3), 0, seen)
    assert seen == []


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
