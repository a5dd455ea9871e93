"""The judge of disrupted streams sees what it has to see: each kind of damage to a good stream is told."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.e2e.questions import CHAT, Nature, Question, questions
from tests.e2e.stories import DONE, Story, differences, story_of

BODY = {"model": "m", "messages": [], "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 8}
ASKED = Question(0, CHAT, BODY, is_pinned=False, is_free=False, steady=("id", "created"))
NATURE = Nature("m", (1, 2), ("a", "b"), ({"n": 2},))
Frames = list[bytes]


def frame(delta: dict[str, Any], finish: str | None = None, **more: Any) -> bytes:
    choices = [{"index": 0, "delta": delta, "finish_reason": finish}]
    return b"data: " + json.dumps({"id": "x", "created": 1, "model": "m", "choices": choices, **more}).encode()


GOOD: Frames = [
    frame({"role": "assistant", "content": ""}),
    *(frame({"content": text}) for text in ("one", " two", " 🦊", " four")),
    frame({"content": " five"}, "stop"),
    frame({}, choices=[], usage={"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}),
    DONE,
]


def read(frames: Frames) -> Story:
    return story_of(ASKED, 200, b"".join(frame + b"\n\n" for frame in frames))


def without(at: int) -> Callable[[Frames], Frames]:
    return lambda frames: [frame for number, frame in enumerate(frames) if number != at]


def twice(at: int) -> Callable[[Frames], Frames]:
    return lambda frames: [*frames[: at + 1], *frames[at:]]


def other(at: int, new: bytes) -> Callable[[Frames], Frames]:
    return lambda frames: [*frames[:at], new, *frames[at + 1 :]]


def test_a_good_stream_has_no_faults_and_says_what_it_says() -> None:
    assert read(GOOD) == Story(("one two 🦊 four five",), ("stop",), (1,), 3, 5)
    assert not differences(read(GOOD), read(GOOD))


@pytest.mark.parametrize(
    "damage",
    [
        without(0),
        without(2),
        without(5),
        without(6),
        without(7),
        twice(0),
        twice(3),
        twice(5),
        twice(6),
        twice(7),
        other(2, frame({"content": " tw"})),
        other(3, frame({"content": " \ufffd"})),
        other(3, frame({"content": " 🦊"}, id="y")),
        other(3, frame({"content": " 🦊"}, created=2)),
        other(3, frame({"content": " 🦊"}, token_ids=[1])),
        other(3, frame({"role": "assistant", "content": " 🦊"})),
        other(3, frame({"content": " 🦊"}, "length")),
        other(3, b'data: {"id":'),
        other(6, frame({}, choices=[], usage={"prompt_tokens": 3, "completion_tokens": 9, "total_tokens": 12})),
        other(6, frame({}, choices=[], usage={"prompt_tokens": 9, "completion_tokens": 5, "total_tokens": 14})),
        other(3, b'data: {"error":{"code":"worker_lost"}}'),
    ],
)
def test_damage_is_told(damage: Callable[[Frames], Frames]) -> None:
    story = read(damage(GOOD))
    assert story.faults or differences(story, read(GOOD))


def test_one_error_at_the_end_is_no_fault_of_the_wire() -> None:
    story = read([*GOOD[:4], b'data: {"error":{"code":"worker_lost"}}'])
    assert (story.error, story.faults) == ("worker_lost", ())


def test_the_same_seed_asks_the_same_and_all_kinds_are_among_it() -> None:
    asked = questions(NATURE, 200, seed=1)
    assert asked == questions(NATURE, 200, seed=1) != questions(NATURE, 200, seed=2)
    kinds = {(one.path, one.streams, one.wants_usage, one.is_pinned, "stop" in one.body) for one in asked}
    assert len(kinds) >= 20
