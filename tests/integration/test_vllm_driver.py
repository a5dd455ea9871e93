"""The drivers' dealings with a server that dies, that lacks a route, and that is left in the middle of an answer."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web

from core.chat import Call, CallContext, Endpoint, Timeouts
from core.errors import UnsupportedParameter, WorkerLost, WorkerUnreachable
from core.ids import ModelName, RequestId, TenantId
from engines.drivers.vllm import VllmDriver
from engines.process import Ports

DEAD = {
    "error": {"message": "EngineCore encountered an issue. See stack trace (above) for the root cause.", "code": 500}
}


class Server:
    """Answers like vLLM: whole, endless, silent, or with a dead engine process behind it."""

    def __init__(self) -> None:
        self.is_dead = False
        self.num_asked = 0
        self.url = ""

    async def chat(self, request: web.Request) -> web.StreamResponse:
        self.num_asked += 1
        if self.is_dead:
            return web.json_response(DEAD, status=500)
        body = await request.json()
        if body["messages"] == "silence":
            await asyncio.sleep(60)
        if not body.get("stream"):
            return web.json_response({"choices": []})
        answer = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await answer.prepare(request)
        await answer.write(b'data: {"choices":[]}\n\n')
        await asyncio.sleep(60)
        return answer

    async def health(self, request: web.Request) -> web.Response:
        return web.Response(status=503 if self.is_dead else 200)

    async def nothing(self, request: web.Request) -> web.Response:
        return web.json_response({"detail": "Not Found"}, status=404)


@pytest_asyncio.fixture
async def server() -> AsyncIterator[Server]:
    made = Server()
    app = web.Application()
    app.router.add_post("/v1/chat/completions", made.chat)
    app.router.add_post("/v1/embeddings", made.nothing)
    app.router.add_get("/health", made.health)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    made.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield made
    await runner.cleanup()


@pytest_asyncio.fixture
async def driver(server: Server) -> AsyncIterator[VllmDriver]:
    made = VllmDriver(server.url, "key", served_name="m")
    yield made
    await made.close()


def call(endpoint: Endpoint = Endpoint.CHAT, **body: Any) -> Call:
    return Call(
        id=RequestId("req_1"),
        endpoint=endpoint,
        model=ModelName("m"),
        context=CallContext(tenant=TenantId("t")),
        body={"messages": "hello", **body},
        stream=bool(body.get("stream")),
        wants_usage=False,
        timeouts=Timeouts(),
        prompt_tokens_estimate=1,
        max_tokens=1,
    )


async def whole(driver: VllmDriver, asked: Call) -> bytes:
    return b"".join([chunk.raw async for chunk in driver.run(asked)])


async def test_a_request_to_a_dead_engine_is_lost_once_and_then_spared(server: Server, driver: VllmDriver) -> None:
    server.is_dead = True

    with pytest.raises(WorkerLost) as caught:
        await whole(driver, call())
    for stream in (True, False):
        with pytest.raises(WorkerUnreachable):
            await whole(driver, call(stream=stream))

    assert not isinstance(caught.value, WorkerUnreachable)
    assert server.num_asked == 1


async def test_an_engine_that_is_well_again_is_asked_again(server: Server, driver: VllmDriver) -> None:
    server.is_dead = True
    with pytest.raises(WorkerLost):
        await whole(driver, call())
    assert await driver.health() == "unhealthy"
    with pytest.raises(WorkerUnreachable):
        await whole(driver, call())

    server.is_dead = False
    assert await driver.health() == "ok"

    assert await whole(driver, call()) == b'{"choices": []}'


async def test_a_route_that_the_engine_lacks_is_named(driver: VllmDriver) -> None:
    with pytest.raises(UnsupportedParameter, match="does not serve /v1/embeddings"):
        await whole(driver, call(Endpoint.EMBEDDINGS, input="a text"))


@pytest.mark.parametrize(("messages", "stream"), [("hello", True), ("silence", True), ("silence", False)])
async def test_closing_a_driver_ends_what_it_runs(driver: VllmDriver, messages: str, stream: bool) -> None:
    running = asyncio.create_task(whole(driver, call(stream=stream, messages=messages)))
    await asyncio.sleep(0.2)

    await driver.close()

    with pytest.raises(WorkerLost):
        await asyncio.wait_for(running, 5)


def test_two_gateways_on_a_machine_are_given_different_ports() -> None:
    first, second = Ports(28400), Ports(28400)

    ports = [first.take(), second.take(), first.take()]

    assert len(set(ports)) == 3
    for owner, port in ((first, ports[0]), (second, ports[1]), (first, ports[2])):
        owner.release(port)


def test_a_port_that_was_given_back_can_be_taken_by_another_gateway() -> None:
    first, second = Ports(28500, count=1), Ports(28500, count=1)
    first.release(first.take())

    port = second.take()

    assert port == 28500
    second.release(port)
