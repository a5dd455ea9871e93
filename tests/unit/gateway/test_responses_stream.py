"""What a reader of a background response is told, from its beginning and from any event on."""

import asyncio
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.ids import TenantId
from core.workflows import RunEvent, RunRecord
from gateway.responses.asked import OUTPUT, Conversation, workflow_of
from gateway.responses.background import Background, background_of
from gateway.responses.question import read_question
from gateway.responses.shapes import response_of
from gateway.responses.stream import Stream
from gateway.responses.tapes import Tape
from gateway.runs.following import MOST_SAYINGS, Following
from gateway.runs.history import History, Made, Settled, Used
from semantic_vars.variable import CANCELLED, Failure, Outcome, State, done

A = "resp_" + "a" * 32


def background(text: str = "Hello", *happenings: Settled, **more: Any) -> Background:
    asked = read_question({"model": "m", "input": text, **more}, {}, Conversation())
    history = History(workflow_of(asked))
    for happening in happenings:
        history.add(happening)
    record = RunRecord("run_" + "0" * 32, TenantId("t"), "k", b"", 1000.5, 1000.5, app="responses")
    found = background_of((record, history))
    assert found is not None
    return found


def ended(outcome: Outcome, completion: int = 3) -> Settled:
    used = Used(1, 7, 2, completion)
    return Settled(OUTPUT, OUTPUT, outcome, used=used, made=Made(0.0, used=used))


FAILED = Outcome(State.FAILED, failure=Failure("upstream_failed", f"{A} has failed", "x"))


def tape_of(text: str) -> Tape:
    tape = Tape(is_new=True)
    for letter in text:
        tape._pieces.append(letter)
        tape.length += 1
    return tape


def told(frames: list[bytes]) -> list[dict[str, Any]]:
    events = []
    for frame in frames:
        name, data, *_ = frame.decode().split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        events.append(event)
    return events


def kinds(events: list[dict[str, Any]]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events]


BEGINNING = ["created", "queued", "in_progress", "output_item.added", "content_part.added"]
END = ["output_text.done", "content_part.done", "output_item.done", "completed"]


# --- the response


def test_a_response_is_queued_while_it_waits_for_others() -> None:
    waiting = background(f"{{{{{A}.output_text}}}}")
    assert (waiting.status, waiting.waits_for) == ("queued", (A,))
    ready = background(f"{{{{{A}.output_text}}}}", Settled(A, None, done("x")))
    assert (ready.status, ready.waits_for) == ("in_progress", ())


def test_a_response_that_went_well_has_its_text_and_its_usage() -> None:
    whole = response_of(background("x", ended(done("Hi")), metadata={"a": "b"}, temperature=0.5))
    assert (whole["id"], whole["status"], whole["created_at"]) == ("resp_" + "0" * 32, "completed", 1000)
    (item,) = whole["output"]
    assert [part["text"] for part in item["content"]] == ["Hi"]
    assert whole["usage"]["total_tokens"] == 10
    assert whole["usage"]["input_tokens_details"]["cached_tokens"] == 2
    assert (whole["metadata"], whole["temperature"], whole["error"]) == ({"a": "b"}, 0.5, None)


def test_an_answer_with_all_tokens_that_were_allowed_is_incomplete() -> None:
    for limit, status, reason in ((3, "incomplete", {"reason": "max_output_tokens"}), (4, "completed", None)):
        whole = response_of(background("x", ended(done("Hi")), max_output_tokens=limit))
        assert (whole["status"], whole["incomplete_details"]) == (status, reason)
        assert whole["output"][0]["content"][0]["text"] == "Hi"


def test_a_response_that_failed_says_why() -> None:
    whole = response_of(background("x", ended(FAILED)))
    assert (whole["status"], whole["error"]["code"], whole["output"]) == ("failed", "upstream_failed", [])
    cancelled = response_of(background("x", ended(CANCELLED)))
    assert (cancelled["status"], cancelled["error"]) == ("cancelled", None)


# --- its events


def test_a_response_is_told_from_its_beginning_to_its_end() -> None:
    stream = Stream()
    waiting = background(f"{{{{{A}.output_text}}}}")
    ready = background(f"{{{{{A}.output_text}}}}", Settled(A, None, done("x")))
    over = background("x", ended(done("Hello")))
    assert kinds(told(list(stream.frames(waiting, None)))) == ["created", "queued"]
    assert not list(stream.frames(waiting, None))
    assert kinds(told(list(stream.frames(ready, None)))) == BEGINNING[2:]
    (piece,) = told(list(stream.frames(ready, tape_of("Hel"))))
    assert (piece["delta"], piece["sequence_number"]) == ("Hel", 7)
    last = told(list(stream.frames(over, None)))
    assert kinds(last) == ["output_text.delta", *END]
    assert last[0]["delta"] == "lo"
    assert [event["sequence_number"] for event in last] == [9, 10, 11, 12, 13]
    assert (last[-1]["response"]["status"], last[1]["text"]) == ("completed", "Hello")
    assert stream.is_over


@given(st.text(max_size=20), st.integers(-1, 40), st.integers(0, 20))
def test_whoever_comes_back_goes_on_where_they_were(text: str, after: int, heard: int) -> None:
    over = background("x", ended(done(text)))
    whole = told(list(Stream().frames(over, None)))
    rest = told(list(Stream(after).frames(over, None)))
    said = "".join(event["delta"] for event in rest if "delta" in event)
    assert said == text[max(0, after - 4) :]
    assert kinds(rest)[-1] == "completed"
    expected = [event for event in whole if event["sequence_number"] > after and "delta" not in event]
    assert kinds([event for event in rest if "delta" not in event]) == (kinds(expected) or ["completed"])
    piecewise = Stream()
    live = background("x")
    events = told([*piecewise.frames(live, tape_of(text[:heard])), *piecewise.frames(over, None)])
    assert "".join(event["delta"] for event in events if "delta" in event) == text
    numbers = [event["sequence_number"] for event in events]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] == whole[-1]["sequence_number"]


def test_one_that_failed_or_was_cancelled_ends_with_an_event_also_for_who_was_far() -> None:
    for after in (-1, 3, 50):
        for outcome, status in ((FAILED, "failed"), (CANCELLED, "cancelled")):
            stream = Stream(after)
            events = told(list(stream.frames(background("x", ended(outcome)), None)))
            assert (events[-1]["type"], events[-1]["response"]["status"]) == ("response.failed", status)
            assert events[-1]["sequence_number"] > after
            assert stream.is_over


def test_who_has_had_more_of_an_answer_than_there_is_now_still_hears_of_its_end() -> None:
    events = told(list(Stream(60).frames(background("x", ended(done("short"))), None)))
    assert (kinds(events), events[0]["sequence_number"]) == (["completed"], 61)


# --- what is said meanwhile


class Live:
    """What a tape needs of a run."""

    def __init__(self) -> None:
        self.following = Following("r", self._nothing)
        self.told = History(workflow_of(read_question({"model": "m", "input": "x"}, {}, Conversation())))

    async def _nothing(self, _run: str, _after: int) -> list[RunEvent]:
        raise AssertionError("all of it is in memory")

    def say(self, text: str, variable: str = OUTPUT) -> None:
        said = {"event": "variable.delta", "variable": variable, "attempt": 1, "text": text}
        self.following.say(msgspec.json.encode(said))

    def begin(self) -> None:
        self.following.say(msgspec.json.encode({"event": "call.started", "call": OUTPUT, "attempt": 1}))


async def turns(count: int = 10) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


@pytest.mark.parametrize("is_new", [True, False])
async def test_a_tape_holds_what_was_said_since_the_call_began(is_new: bool) -> None:
    live, tape = Live(), Tape(is_new=is_new)
    task = asyncio.create_task(tape.record(live))  # type: ignore[arg-type]
    await turns()
    live.say("Hel")
    live.say("other", "x")
    await turns()
    assert tape.since(0) == ("Hel" if is_new else "")
    live.begin()
    live.say("Good")
    live.say("bye")
    await turns()
    assert [tape.since(start) for start in (0, 2, 4, 5, 7, 9)] == ["Goodbye", "odbye", "bye", "ye", "", ""]
    changed = asyncio.create_task(tape.changed())
    await turns()
    assert not changed.done()
    live.following.end()
    await asyncio.gather(task, changed)
    assert tape.is_over


async def test_a_tape_stops_where_it_may_have_missed_a_piece() -> None:
    live, tape = Live(), Tape(is_new=True)
    task = asyncio.create_task(tape.record(live))  # type: ignore[arg-type]
    await turns()
    for number in range(MOST_SAYINGS + 5):
        live.say(f"{number} ")
    await turns()
    live.say("and on")
    await turns()
    whole = "".join(f"{number} " for number in range(MOST_SAYINGS + 5))
    assert whole.startswith(tape.since(0))
    assert tape.length > 0
    assert "and on" not in tape.since(0)
    live.following.end()
    await task
