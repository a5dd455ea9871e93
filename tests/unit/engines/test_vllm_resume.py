"""What vLLM is asked to go on with: the ids that it told, or its text; and how many tokens are left of the answer."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web

from core.chat import Endpoint
from engines.driver import Continuation, Piece
from engines.drivers.sse import StreamReader, split
from engines.drivers.vllm import VllmDriver
from engines.transcript import read
from routing.journal import Journal
from tests.contract.beds import ask

RECORDINGS = Path(__file__).parents[2] / "vllm" / "recordings"
_ENDING = 'data: {"choices": [{"text": " end", "token_ids": [7], "finish_reason": "length"}]}\n\n'
_USAGE = 'data: {"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 1}}\n\ndata: [DONE]\n\n'


class Forgetful:
    """An engine to which every text is one token; ``says`` is the text of all ids, unless ``letters`` say what each is,
    and ``num_told`` how often it was asked for that."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.says = "something else"
        self.letters: dict[int, bytes] = {}
        self.parted: list[str] = []
        self.num_told = 0

    async def tokenize(self, request: web.Request) -> web.Response:
        self.parted.append((await request.json())["prompt"])
        return web.json_response({"tokens": [9], "count": 1})

    async def detokenize(self, request: web.Request) -> web.Response:
        self.num_told += 1
        if not self.letters:
            return web.json_response({"prompt": self.says})
        made = b"".join(self.letters[token] for token in (await request.json())["tokens"])
        return web.json_response({"prompt": made.decode(errors="replace")})

    async def complete(self, request: web.Request) -> web.Response:
        self.asked.append(await request.json())
        return web.Response(text=_ENDING + _USAGE, content_type="text/event-stream")


@pytest_asyncio.fixture
async def engine() -> AsyncIterator[tuple[Forgetful, VllmDriver]]:
    forgetful = Forgetful()
    app = web.Application()
    app.router.add_post("/tokenize", forgetful.tokenize)
    app.router.add_post("/detokenize", forgetful.detokenize)
    app.router.add_post("/v1/completions", forgetful.complete)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    driver = VllmDriver(f"http://127.0.0.1:{runner.addresses[0][1]}", None, served_name="m")
    yield forgetful, driver
    await driver.close()
    await runner.cleanup()


async def pieces_of(driver: VllmDriver, past: Continuation, limit: int, **body: Any) -> list[Piece]:
    return [piece async for piece in driver.resume(ask(max_tokens=limit, **body), past)]


async def test_the_limit_counts_the_tokens_that_were_made(engine: tuple[Forgetful, VllmDriver]) -> None:
    forgetful, driver = engine
    past = Continuation(("a", "b", "c"), prompt_ids=[1, 2, 3], num_tokens=5)
    pieces = await pieces_of(driver, past, limit=6)
    assert forgetful.asked[-1]["prompt"] == [1, 2, 3, 9], "by text: no ids are known"
    assert forgetful.asked[-1]["max_tokens"] == 1
    assert pieces[-1].usage is not None
    assert (pieces[-1].usage.prompt_tokens, pieces[-1].usage.completion_tokens) == (3, 6)


async def test_nothing_is_asked_for_when_all_tokens_have_been_made(engine: tuple[Forgetful, VllmDriver]) -> None:
    forgetful, driver = engine
    past = Continuation(("a", "b"), prompt_ids=[1, 2, 3], ids=[4, 5, 6], num_tokens=3)
    (piece,) = await pieces_of(driver, past, limit=3)
    assert piece.ending == {"finish_reason": "length", "stop_reason": None}
    assert not forgetful.asked


async def test_a_text_of_more_tokens_than_it_was_made_of_still_fits_the_context(
    engine: tuple[Forgetful, VllmDriver],
) -> None:
    forgetful, driver = engine
    driver._context_tokens = 8
    past = Continuation(("abc",), prompt_ids=[1, 2, 3], num_tokens=0)  # one token by the engine's parting of today
    await pieces_of(driver, past, limit=20)
    assert forgetful.asked[-1]["max_tokens"] == 8 - 3 - 1


async def test_the_ids_that_the_engine_told_are_gone_on_from_unasked(engine: tuple[Forgetful, VllmDriver]) -> None:
    forgetful, driver = engine
    await pieces_of(driver, Continuation(("a\ufffd",), prompt_ids=[1], ids=[4, 5], num_tokens=2), limit=20)
    assert forgetful.asked[-1]["prompt"] == [1, 4, 5]
    assert forgetful.num_told == 0


async def test_special_tokens_and_broken_characters_are_gone_on_from_wherever_the_answer_is_cut(
    engine: tuple[Forgetful, VllmDriver],
) -> None:
    forgetful, driver = engine
    recorded = split((RECORDINGS / "chat_stream_special_ids.sse").read_bytes())
    told = [json.loads(frame[6:])["choices"] for frame in recorded if frame.startswith(b"data: {")]
    ids: list[int] = []
    for num in range(2, len(told) - 1):
        ids += told[num - 1][0]["token_ids"]
        if not told[num - 1][0]["delta"]["content"]:
            continue
        asked = ask(max_tokens=100)
        journal, reader = Journal(asked), StreamReader(Endpoint.CHAT, strips_usage=False, takes_ids=True)
        for frame in recorded[:num]:
            journal.append(reader.read(frame), 0)
            journal.asides += reader.aside
        transcript = read(journal)
        assert transcript is not None
        _ = [chunk async for chunk in transcript.go_on(driver, asked)]

        prompt = told[0] and json.loads(recorded[0][6:])["prompt_token_ids"]
        assert forgetful.asked[-1]["prompt"] == prompt + ids
        assert forgetful.asked[-1]["max_tokens"] == 100 - len(ids)
    assert forgetful.num_told == 0
    assert {2, 254, 130} < set(ids)


@pytest.mark.parametrize(
    ("says", "limit", "text", "ending"),
    [
        ("abc st", 20, "c st end", "length"),  # held back: it might have become a stop string
        ("abc st", 2, "c st", "length"),  # and nothing is left to be made
        ("abc x", 20, "c x end", "length"),
        ("abc e", 20, "c ", "stop"),
    ],
)
async def test_what_an_engine_held_back_for_a_stop_string_is_delivered_when_the_answer_goes_on(
    engine: tuple[Forgetful, VllmDriver], says: str, limit: int, text: str, ending: str
) -> None:
    forgetful, driver = engine
    forgetful.says = says
    past = Continuation(("ab",), prompt_ids=[1], ids=[4, 5], num_tokens=2)
    pieces = await pieces_of(driver, past, limit, stop=["stop", "e end"])
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.ending["finish_reason"] for piece in pieces if piece.ending] == [ending]
    assert all(asked["prompt"] == [1, 4, 5] for asked in forgetful.asked)


@pytest.mark.parametrize("says", ["another", "ab\ufffd", "abc<|end|>d"])
async def test_ids_that_say_what_was_never_streamed_are_not_gone_on_from_where_text_may_be_held_back(
    engine: tuple[Forgetful, VllmDriver], says: str
) -> None:
    forgetful, driver = engine
    forgetful.says = says
    past = Continuation(("ab",), prompt_ids=[1], ids=[4, 5], num_tokens=2)
    await pieces_of(driver, past, limit=20, stop="stop")
    assert forgetful.asked[-1]["prompt"] == [1, 9]


@pytest.mark.parametrize(
    ("at_once", "text", "torn"),
    [
        ([1, 2], "ab", 0),
        ([1, 2, 10], "ab", 1),
        ([1, 2, 10, 11], "ab", 2),
        ([10, 11, 12, 10], "🦊", 1),
        ([10, 2], "\ufffdb", 0),
        ([2, 10, 7], "b", 2),  # a special token after the beginning of a letter
    ],
)
async def test_an_answer_that_ends_in_half_a_letter_goes_on_by_its_text(
    engine: tuple[Forgetful, VllmDriver], at_once: list[int], text: str, torn: int
) -> None:
    forgetful, driver = engine
    forgetful.letters = {1: b"a", 2: b"b", 7: b"<|end|>", 10: b"\xf0\x9f", 11: b"\xa6", 12: b"\x8a"}
    ids = [1, *at_once]
    past = Continuation(("a", text), prompt_ids=[1], ids=ids, num_at_once=len(at_once), num_tokens=len(ids))
    await pieces_of(driver, past, limit=20)
    assert forgetful.asked[-1]["prompt"] == ([1, 9] if torn else [1, *ids])
    assert forgetful.parted == (["a" + text] if torn else [])
    assert forgetful.asked[-1]["max_tokens"] == 20 - len(ids) + torn


async def test_a_text_whose_last_letter_was_none_goes_on_without_it(engine: tuple[Forgetful, VllmDriver]) -> None:
    forgetful, driver = engine
    await pieces_of(driver, Continuation(("a", "b\ufffd"), prompt_ids=[1], num_tokens=2), limit=20)
    assert forgetful.parted == ["ab"]
