"""The benchmarks' client against a server that answers as engines and gateways do."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web

from benchmarks.contention.replay import CHAT, Target, play
from benchmarks.contention.trace import Ask

ROLE = {"choices": [{"delta": {"role": "assistant", "content": ""}}]}
WORD = {"choices": [{"delta": {"content": "a "}}]}
END = {"choices": [{"delta": {}, "finish_reason": "length"}]}
USAGE = {"prompt_tokens": 9, "completion_tokens": 2, "forebay": {"legs": 2, "recomputed_tokens": 5}}


class Server:
    """Refuses the first of everybody's requests, then answers; ``hangs``: after the first word, for ever."""

    def __init__(self, *, hangs: bool = False, fails: bool = False) -> None:
        self._hangs = hangs
        self._fails = fails
        self.keys: list[str] = []
        self.bodies: list[dict[str, object]] = []

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.keys.append(request.headers["authorization"])
        self.bodies.append(await request.json())
        if len(self.keys) == 1:
            return web.json_response({}, status=429, headers={"retry-after": "0"})
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for event in (ROLE, WORD):
            await _send(response, json.dumps(event))
        if self._hangs:
            await asyncio.Event().wait()
        if self._fails:
            await _send(response, json.dumps({"error": {"code": "worker_lost"}}))
            return response
        for last in (WORD, END, {"choices": [], "usage": USAGE}):
            await _send(response, json.dumps(last))
        await _send(response, "[DONE]")
        return response


async def _send(response: web.StreamResponse, data: str) -> None:
    await response.write(f"data: {data}\n\n".encode())


@asynccontextmanager
async def serving(server: Server) -> AsyncIterator[Target]:
    app = web.Application()
    app.router.add_post(CHAT, server.answer)
    runner = web.AppRunner(app, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    try:
        yield Target(f"http://127.0.0.1:{port}", "m", {"hog": "fbk_1"}, {"hog": {"priority": 10}})
    finally:
        await runner.cleanup()


async def test_a_refused_request_comes_again_and_its_answer_is_counted_from_the_first_try() -> None:
    server = Server()
    async with serving(server) as target:
        (answer,) = await play([Ask(0.0, "hog", "Hi.", 2)], target)

    assert answer.is_whole
    assert (answer.tries, answer.text, answer.tokens, answer.prompt_tokens) == (2, "a a ", 2, 9)
    assert (answer.legs, answer.recomputed, len(answer.times)) == (2, 5, 2)
    assert answer.first is not None
    assert answer.asked <= answer.first <= answer.times[0]
    assert server.keys == ["Bearer fbk_1"] * 2
    assert server.bodies[0]["priority"] == 10
    assert server.bodies[0]["max_tokens"] == 2


async def test_an_answer_that_is_not_over_when_the_window_closes_is_what_had_come() -> None:
    async with serving(Server(hangs=True)) as target:
        (answer,) = await play([Ask(0.0, "hog", "Hi.", 2)], target, until=0.3)

    assert (answer.end, answer.text, answer.problem) == (None, "a ", "")
    assert not answer.is_whole


async def test_an_error_in_a_stream_is_what_is_wrong_with_the_answer() -> None:
    async with serving(Server(fails=True)) as target:
        (answer,) = await play([Ask(0.0, "hog", "Hi.", 2)], target)

    assert "worker_lost" in answer.problem
    assert not answer.is_whole
