"""Engines that are tried whether they go on with an answer, and parts of answers whose ends are not told."""

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.chat import Endpoint, Usage
from core.errors import UpstreamBroken, WorkerLost
from engines.driver import Chunk, Continuation
from engines.drivers.continuing import Rest, Tail, Way, continued, proven_way
from engines.drivers.parts import PieceCount, limit_to, part_for, without_our_end
from engines.drivers.sse import StreamReader
from tests.contract.beds import ask

ANSWER = [f"word{number} " for number in range(40)]


def said(text: str | None, *, finish: str | None = None, **delta: Any) -> bytes:
    told = delta if text is None else {"content": text, **delta}
    return (
        b"data: " + json.dumps({"choices": [{"index": 0, "delta": told, "finish_reason": finish}]}).encode() + b"\n\n"
    )


class Model:
    """Answers ANSWER; ``way`` is how it lets an answer go on."""

    def __init__(self, way: str) -> None:
        self.way = way
        self.num_asked = 0

    async def fetch(self, path: str, body: dict[str, Any]) -> tuple[int, bytes]:
        self.num_asked += 1
        if path != Endpoint.CHAT:
            raise WorkerLost("there is nothing here")
        last, begins = body["messages"][-1], 0
        if last["role"] == "assistant":
            if self.way == "strict" and "continue_final_message" in body:
                return 400, b'{"error": {"message": "unknown field"}}'
            if {"flag": "continue_final_message" in body, "prefix": "prefix" in last}.get(self.way, self.way != "none"):
                begins = last["content"].count("word")
        words = ANSWER[begins : begins + body["max_tokens"]]
        if begins and self.way == "trims":
            words = [" ", *words[:-1]]
        if begins and self.way == "echoes":
            words = [last["content"], *words]
        if self.way == "thinks":
            return 200, said(None, reasoning_content="hm") + b"data: [DONE]\n\n"
        if self.way == "wavers":
            words = [f"{word}{self.num_asked} " for word in words]
        return 200, b"".join(said(word) for word in words) + said(None, finish="length") + b"data: [DONE]\n\n"


@pytest.mark.parametrize(
    ("way", "found"),
    [
        ("flag", Way(body={"continue_final_message": True, "add_generation_prompt": False})),
        ("trims", Way(body={"continue_final_message": True, "add_generation_prompt": False})),
        ("prefix", Way(message={"prefix": True})),
        ("strict", Way(message={"prefix": True})),
        ("none", None),
        ("echoes", None),
        ("thinks", None),
        ("wavers", None),
    ],
)
async def test_an_engine_goes_on_in_a_way_that_gave_the_undisturbed_answer(way: str, found: Way | None) -> None:
    model = Model(way)
    assert await proven_way(model.fetch, Endpoint.CHAT, "m") == found
    assert model.num_asked <= 5


async def test_an_endpoint_that_is_not_there_costs_one_request() -> None:
    model = Model("flag")
    assert await proven_way(model.fetch, Endpoint.COMPLETIONS, None) is None
    assert model.num_asked == 1


def test_white_space_at_the_end_is_not_sent_and_not_told_twice() -> None:
    body, tail = continued(Endpoint.CHAT, {"messages": [{"role": "user", "content": "a"}]}, "one\n\n", Way())
    assert body["messages"][-1] == {"role": "assistant", "content": "one"}
    assert [tail.add(text) for text in ("\n", "\n\ntwo", "\n")] == ["", "\ntwo", "\n"]

    body, tail = continued(Endpoint.COMPLETIONS, {"prompt": "zero "}, "one\n", Way())
    assert (body["prompt"], tail.add("\ntwo")) == ("zero one\n", "\ntwo")


@given(text=st.text(" \n", max_size=4), rest=st.lists(st.text(" \nab", max_size=3), max_size=5))
def test_nothing_but_what_was_delivered_is_left_out(text: str, rest: list[str]) -> None:
    tail, whole = Tail(text), "".join(rest)
    told = "".join(tail.add(piece) for piece in rest)
    assert whole.endswith(told)
    assert text.startswith(whole.removesuffix(told))


@pytest.mark.parametrize(
    ("texts", "num_tokens", "silent"),
    [
        (["a", "b"], 2, 0),
        (["a", "", "b", "", ""], 5, 2),  # a character has begun; the ending is a token's
        (["a", "", "b", "", ""], 4, 1),  # the ending is nothing's
        (["a", "b", ""], 9, 0),  # several tokens a piece: nobody knows
        (["", ""], 2, 2),
    ],
)
def test_tokens_that_have_said_nothing_yet_are_told_apart(texts: list[str], num_tokens: int, silent: int) -> None:
    count = PieceCount()
    for text in texts:
        count.add(text)
    assert count.num_silent(num_tokens) == silent


async def parts_of(frames: list[bytes], usage: Usage | None, most: int) -> bytes:
    reader = StreamReader(Endpoint.CHAT, strips_usage=False)
    reader.usage = usage

    async def chunks() -> AsyncIterator[Chunk]:
        for frame in frames:
            yield Chunk(frame, 1)

    return b"".join([chunk.raw async for chunk in without_our_end(chunks(), reader, most)])


async def test_the_end_of_a_part_is_not_told_and_that_of_the_answer_is() -> None:
    done = b"data: [DONE]\n\n"
    bare, full = said(None, finish="length"), said("b\ufffd", finish="length")
    used = Usage(3, 5)

    assert await parts_of([said("a"), bare, done], used, 5) == said("a")
    assert await parts_of([said("a") + bare + done], used, 5) == said("a")
    told = await parts_of([said("a"), full, done], used, 5)
    assert json.loads(told.split(b"\n\n")[1][6:])["choices"] == [
        {"index": 0, "delta": {"content": "b"}, "finish_reason": None}
    ]
    for ending, most in ((bare, 6), (said(None, finish="stop"), 5)):  # out of room; or it has ended by itself
        assert await parts_of([said("a"), ending, done], used, most) == said("a") + ending + done


def test_a_limit_keeps_the_name_that_the_client_gave_it() -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        asked = ask()
        body = {"max_tokens": 9, "max_completion_tokens": 9}
        asked.body.pop("max_tokens")
        asked.body[name] = 9
        limit_to(body, asked, 4)
        assert body == {name: 4}
        assert (part_for(asked, 4), part_for(asked, 9), part_for(asked, 4, num_past=5)) == (4, None, None)


def test_what_is_no_text_breaks_an_answer_that_goes_on() -> None:
    rest = Rest(Endpoint.CHAT, Continuation(("a",)), 1, Tail(""))
    with pytest.raises(UpstreamBroken):
        rest.add({"choices": [{"delta": {"tool_calls": [{"index": 0}]}}]})


def test_an_answer_that_goes_on_counts_all_its_legs() -> None:
    rest = Rest(Endpoint.CHAT, Continuation(("a\n",), usage=Usage(7, 2, 4)), 2, Tail("\n"))
    pieces = [
        rest.add({"choices": [{"delta": {"content": text}, "finish_reason": end}]})
        for text, end in (("\n", None), ("b", None), ("c\ufffd", "length"))
    ]
    assert [piece.text for piece in pieces] == ["", "b", "c"]
    last = rest.close(Usage(9, 3), 4)
    assert (last.text, last.ending) == ("\ufffd", {"finish_reason": "length"})
    assert last.usage == Usage(7, 2 + 3 - 1, 4)
