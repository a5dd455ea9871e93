"""What is read of a leg that was cut, and how later legs are told: the same text, however it came in pieces."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.chat import Call, Endpoint, Usage
from engines.driver import Continuation, Exactness, Piece
from engines.drivers.sse import StreamReader, split
from engines.transcript import read
from routing.journal import Journal
from tests.fakes.drivers import call

RECORDINGS = Path(__file__).parents[2] / "vllm" / "recordings"
WORDS = st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=4), min_size=1, max_size=8)
ENDPOINTS = st.sampled_from([Endpoint.CHAT, Endpoint.COMPLETIONS])


def frame(endpoint: Endpoint, words: str, ids: list[int], finish: str | None = None) -> bytes:
    said: dict[str, Any] = {"text": words} if endpoint is Endpoint.COMPLETIONS else {"delta": {"content": words}}
    choice = {"index": 0, **said, "finish_reason": finish, "token_ids": ids}
    event = {"id": "c", "object": "o", "created": 1, "model": "m", "choices": [choice]}
    return b"data: " + msgspec.json.encode(event) + b"\n\n"


def journal_of(asked: Call, frames: Sequence[bytes], joins: Sequence[bool]) -> Journal:
    """Return the journal of frames that came joined as told, with their ids taken out."""
    reader = StreamReader(asked.endpoint, strips_usage=False, takes_ids=True)
    journal = Journal(asked)
    pending = b""
    for number, one in enumerate(frames):
        pending += one
        if number + 1 < len(frames) and joins[number % len(joins)]:
            continue
        journal.append(reader.read(pending), reader.num_tokens)
        journal.asides += reader.aside
        pending = b""
    return journal


class Scripted:
    """Goes on with the same pieces always."""

    def __init__(self, pieces: list[Piece]) -> None:
        self.pieces = pieces
        self.past: Continuation | None = None

    def exactness(self, call: Call) -> Exactness:
        return "prefix"

    async def resume(self, call: Call, past: Continuation) -> AsyncIterator[Piece]:
        self.past = past
        for piece in self.pieces:
            yield piece

    async def park(self, call: Call, num_expected: Callable[[], int]) -> None:
        return


@given(words=WORDS, cut=st.integers(1, 8), joins=st.lists(st.booleans(), min_size=1, max_size=8), endpoint=ENDPOINTS)
def test_any_cut_of_any_frames_however_joined_gives_the_whole_text_once(
    words: list[str], cut: int, joins: list[bool], endpoint: Endpoint
) -> None:
    asyncio.run(tell(words, min(cut, len(words)), joins, endpoint))


async def tell(words: list[str], cut: int, joins: list[bool], endpoint: Endpoint) -> None:
    asked = call(endpoint=endpoint, wants_usage=True)
    frames = [frame(endpoint, word, [number, number + 1]) for number, word in enumerate(words)]
    journal = journal_of(asked, frames[:cut], joins)
    transcript = read(journal)
    assert transcript is not None
    rest = [Piece(word, 2, [9, 9]) for word in words[cut:]]
    driver = Scripted([*rest, Piece(ending={"finish_reason": "stop"}, usage=Usage(3, 5), prefilled=1)])

    told = b"".join([chunk.raw async for chunk in transcript.go_on(driver, asked)])

    assert driver.past is not None
    assert driver.past.text == "".join(words[:cut])
    assert driver.past.ids == [number + more for number in range(cut) for more in (0, 1)]
    events = [json.loads(one[6:]) for one in split(b"".join(journal.frames) + told) if b"[DONE]" not in one]
    choices = [choice for event in events for choice in event["choices"]]
    texts = [choice["text"] if "text" in choice else choice.get("delta", {}).get("content") for choice in choices]
    assert "".join(text or "" for text in texts) == "".join(words)
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["stop"]
    assert [event["usage"]["completion_tokens"] for event in events if event.get("usage")] == [5]
    identities = {(event["id"], event["created"], event["model"], event["object"]) for event in events}
    assert identities == {("c", 1, "m", "o")}


@pytest.mark.parametrize("name", ["chat_stream_token_ids", "completion_stream_token_ids"])
def test_the_frames_of_vllm_lose_their_ids_and_the_transcript_has_them(name: str) -> None:
    told = json.loads((RECORDINGS / f"{name}.json").read_text())
    frames = split((RECORDINGS / f"{name}.sse").read_bytes())
    asked = call(endpoint=Endpoint(told["path"]))
    for cut in range(1, len(frames) - 3):
        journal = journal_of(asked, frames[:cut], [False])
        transcript = read(journal)
        assert transcript is not None
        past = transcript.past()

        events = [json.loads(one[6:])["choices"][0] for one in frames[:cut]]
        assert past.ids == [token for event in events for token in event.get("token_ids") or []]
        assert past.text == "".join(event["text"] if "text" in event else event["delta"]["content"] for event in events)
        assert past.prompt_ids is not None
        assert b'ids":[' not in b"".join(journal.frames)


def test_ids_of_text_that_is_held_back_are_not_gone_on_from() -> None:
    asked = call()
    frames = [frame(Endpoint.CHAT, "one", [1]), frame(Endpoint.CHAT, "", [2]), frame(Endpoint.CHAT, "", [3])]

    transcript = read(journal_of(asked, frames, [False]))

    assert transcript is not None
    assert transcript.past() == Continuation(("one",), ids=[1], num_tokens=1, num_pieces=1)


@pytest.mark.parametrize(
    ("told", "num_at_once"),
    [
        ([("a", [1]), ("", [10]), ("", [11]), ("🦊", [12])], 0),
        ([("a", [1]), ("", [10]), ("🦊", [11, 12])], 3),  # the last of them may begin another letter
        ([("a", [1, 2]), ("b", [3])], 0),
    ],
)
def test_a_past_says_which_ids_came_at_once_with_the_last_text(
    told: list[tuple[str, list[int]]], num_at_once: int
) -> None:
    frames = [frame(Endpoint.CHAT, text, ids) for text, ids in told]

    transcript = read(journal_of(call(), frames, [False]))

    assert transcript is not None
    assert transcript.past().num_at_once == num_at_once


@pytest.mark.parametrize(
    "choice",
    [
        {"delta": {"reasoning_content": "hm"}},
        {"delta": {"tool_calls": [{"index": 0}]}},
        {"delta": {"content": "a"}, "logprobs": {"content": [{}]}},
        {"delta": {"content": "a"}, "index": 1},
    ],
    ids=str,
)
def test_what_plain_text_cannot_follow_is_no_transcript(choice: dict[str, Any]) -> None:
    journal = Journal(call())
    journal.append(b"data: " + msgspec.json.encode({"choices": [{"index": 0} | choice]}) + b"\n\n", 1)

    assert read(journal) is None
