"""How many tokens are left of an answer that vLLM goes on with, where its text is other tokens when parted anew."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web

from engines.driver import Continuation, Piece
from engines.drivers.vllm import VllmDriver
from tests.contract.beds import ask

_ENDING = 'data: {"choices": [{"text": " end", "token_ids": [7], "finish_reason": "length"}]}\n\n'
_USAGE = 'data: {"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 1}}\n\ndata: [DONE]\n\n'


class Forgetful:
    """An engine to which every text is one token, and to which ids do not say what they said."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.says = "something else"

    async def tokenize(self, _: web.Request) -> web.Response:
        return web.json_response({"tokens": [9], "count": 1})

    async def detokenize(self, _: web.Request) -> web.Response:
        return web.json_response({"prompt": self.says})

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


async def pieces_of(driver: VllmDriver, past: Continuation, limit: int) -> list[Piece]:
    return [piece async for piece in driver.resume(ask(max_tokens=limit), past)]


async def test_the_limit_counts_the_tokens_that_were_made(engine: tuple[Forgetful, VllmDriver]) -> None:
    forgetful, driver = engine
    past = Continuation(("a", "b", "c"), prompt_ids=[1, 2, 3], ids=[4, 5, 6, 7, 8], num_tokens=5)
    pieces = await pieces_of(driver, past, limit=6)
    assert forgetful.asked[-1]["prompt"] == [1, 2, 3, 9], "by text: the ids do not say it"
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


@pytest.mark.parametrize(
    ("says", "text", "goes_by_ids"),
    [
        ("a\ufffd\ufffdb", "a\ufffdb", True),  # bytes that are no text, told as so many signs or so
        ("ab\ufffd", "ab", False),  # half a character that the client has not got
        ("ab\ufffd\ufffd", "ab\ufffd", True),
        ("abc", "ab", False),
    ],
)
async def test_ids_are_gone_on_from_if_they_say_what_was_delivered(
    engine: tuple[Forgetful, VllmDriver], says: str, text: str, goes_by_ids: bool
) -> None:
    forgetful, driver = engine
    forgetful.says = says
    await pieces_of(driver, Continuation((text,), prompt_ids=[1], ids=[4, 5], num_tokens=2), limit=20)
    assert forgetful.asked[-1]["prompt"] == ([1, 4, 5] if goes_by_ids else [1, 9])
