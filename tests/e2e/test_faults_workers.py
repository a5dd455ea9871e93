"""A worker that is killed, a gateway that is killed, and a gateway that is asked to go (R15, R17)."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import psutil
import pytest

from tests.e2e.asking import Answer, Client, ask, connected, event_of, logged, until
from tests.fakes.engine import FakeEngine
from tests.fakes.gateway import GatewayProcess, attached

CHAT = "/v1/chat/completions"
NUM_STREAMS = 16


def launched(count: int, *flags: str) -> dict[str, Any]:
    """Return a model with this many fake engines that the gateway itself starts."""
    command = [sys.executable, "-m", "engines.fake_server", "--port", "{port}", "--model", "fake", *flags]
    launch = {"command": command, "env": {"FAKE_API_KEY": "{key}"}}
    lifecycle = {"probe_interval": 0.2, "backoff_base": 0.1, "stop_timeout": 2}
    worker = {"engine": "openai", "launch": launch, "replicas": count, "max_inflight": NUM_STREAMS}
    return {"workers": [{**worker, "lifecycle": lifecycle, "probe_continuation": False}]}


def chat(number: int = 0, **more: Any) -> dict[str, Any]:
    return {"model": "fake", "messages": [{"role": "user", "content": f"Question {number}."}], "stream": True, **more}


@asynccontextmanager
async def streams(gateway: GatewayProcess) -> AsyncIterator[list[Client]]:
    """Ask sixteen questions at once."""
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(connected(gateway)) for _ in range(NUM_STREAMS)]
        for number, client in enumerate(clients):
            client.ask(CHAT, chat(number))
        yield clients


async def admin(gateway: GatewayProcess, path: str) -> Any:
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.admin_port)
    try:
        client = Client(reader, writer, gateway.admin_key)
        client.ask(path, b"", method="GET")
        return (await client.answer()).json
    finally:
        writer.transport.abort()


async def workers(gateway: GatewayProcess) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (await admin(gateway, "/admin/v1/workers"))["data"]
    return found


async def until_all_ready(gateway: GatewayProcess) -> None:
    async def are_ready() -> bool:
        return all(worker["state"] == "ready" for worker in await workers(gateway))

    await until(are_ready, "all workers are ready", 30)


async def until_all_run(gateway: GatewayProcess) -> None:
    async def do_run() -> bool:
        return sum(int(worker["running"]) for worker in await workers(gateway)) == NUM_STREAMS

    await until(do_run, "all streams run")


async def kill_first(gateway: GatewayProcess) -> str:
    """SIGKILL the first worker and return its id."""
    worker = (await workers(gateway))[0]
    os.kill(worker["pid"], signal.SIGKILL)
    return str(worker["id"])


@pytest.mark.parametrize("count", [2, 1], ids=["two_workers", "one_worker"])
class TestKilledWorker:
    """R15: `kill -9` of a worker under sixteen streams."""

    async def test_no_stream_fails_before_its_first_byte(self, count: int) -> None:
        async with GatewayProcess({"fake": launched(count, "--ttft-ms=1500", "--tokens=8")}) as gateway:
            await until_all_ready(gateway)
            async with streams(gateway) as clients:
                await until_all_run(gateway)
                killed = await kill_first(gateway)
                answers = await asyncio.gather(*(client.answer() for client in clients))
        assert [answer.status for answer in answers] == [200] * NUM_STREAMS
        assert all(is_whole(answer) for answer in answers)
        again = sum(int(answer.headers["x-forebay-attempts"]) > 1 for answer in answers)
        assert again == NUM_STREAMS // count
        assert count == 1 or all(answer.headers["x-forebay-worker"] != killed for answer in answers)

    async def test_a_stream_in_its_middle_is_told_once_and_the_others_go_on(self, count: int) -> None:
        async with GatewayProcess({"fake": launched(count, "--itl-ms=100", "--tokens=25")}) as gateway:
            await until_all_ready(gateway)
            async with streams(gateway) as clients:
                heads = [await client.head() for client in clients]
                begun = [await client.piece() + await client.piece() for client in clients]
                killed = await kill_first(gateway)
                rests = await asyncio.gather(*(client.rest() for client in clients))
            after = await ask(gateway, CHAT, chat(max_tokens=2))
        assert after.status == 200
        assert is_whole(after)
        lost = 0
        for (status, headers), beginning, rest in zip(heads, begun, rests, strict=True):
            answer = Answer(status, headers, beginning + rest)
            assert status == 200
            if headers["x-forebay-worker"] == killed:
                lost += 1
                assert [error["error"]["code"] for error in answer.errors] == ["worker_lost"]
                assert event_of(answer.events[-1]) == answer.errors[0]
                assert b"[DONE]" not in answer.body
            else:
                assert is_whole(answer)
        assert lost == NUM_STREAMS // count


def is_whole(answer: Answer) -> bool:
    return answer.events[-1] == b"data: [DONE]" and not answer.errors


async def test_a_killed_gateway_leaves_no_child() -> None:
    async with GatewayProcess({"fake": launched(2, "--spawn-child", "--ignore-sigterm")}) as gateway:
        await until_all_ready(gateway)
        below = gateway.descendants()
        assert len(below) >= 4, "two engines with a child each"
        async with connected(gateway) as client:
            client.ask(CHAT, chat())
            await client.head()
            gateway.kill()

            async def are_gone() -> bool:
                return not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in below)

            await until(are_gone, "no child is left")


class TestDrain:
    """R17: SIGTERM."""

    async def test_running_streams_end_uncut_and_new_requests_are_refused(self) -> None:
        async with FakeEngine(model="fake", itl_ms=60, tokens=40) as engine:
            async with GatewayProcess({"fake": attached(engine.url)}) as gateway, streams(gateway) as clients:
                heads = [await client.head() for client in clients]
                assert {status for status, _ in heads} == {200}
                async with connected(gateway) as kept:
                    kept.ask("/health/readiness", b"", method="GET")
                    assert (await kept.answer()).status == 200
                    gateway.terminate()

                    async def is_draining() -> bool:
                        kept.ask("/health/readiness", b"", method="GET")
                        answer = await kept.answer()
                        return answer.status == 503 and answer.json["status"] == "draining"

                    assert await until(is_draining, "readiness tells of the drain") < 1
                live = await ask(gateway, "/health/liveness", b"", method="GET")
                assert live.status == 200
                refused = await ask(gateway, CHAT, chat())
                assert refused.status == 503
                assert refused.json["error"]["code"] == "draining"
                assert int(refused.headers["retry-after"]) >= 1
                assert refused.headers["x-should-retry"] == "true"
                answers = [Answer(*head, await client.rest()) for head, client in zip(heads, clients, strict=True)]
                assert all(is_whole(answer) for answer in answers)
                assert {len(answer.events) for answer in answers} <= {41, 42}
                assert await gateway.wait(10) == 0
                assert (await logged(gateway, heads[0][1]["x-request-id"]))["status"] == 200
            assert (await engine.stats())["aborted"] == 0

    async def test_drain_timeout_bounds_it(self) -> None:
        async with FakeEngine(model="fake", itl_ms=200, tokens=1000) as engine:
            async with (
                GatewayProcess({"fake": attached(engine.url)}, server={"drain_timeout": 1}) as gateway,
                connected(gateway) as client,
                connected(gateway) as waiting,
            ):
                client.ask(CHAT, chat())
                head = await client.head()
                waiting.ask(CHAT, chat(stream=False))
                await engine.until(in_flight=2)
                began = time.monotonic()
                gateway.terminate()
                cut = Answer(*head, await client.rest())
                refused = await waiting.answer()
                assert await gateway.wait(15) == 0
                assert 1 <= time.monotonic() - began < 8
            assert [error["error"]["code"] for error in cut.errors] == ["draining"]
            assert refused.status == 503
            assert refused.json["error"]["code"] == "draining"
            await engine.until(in_flight=0)

    async def test_an_idle_gateway_goes_at_once(self) -> None:
        async with (
            FakeEngine(model="fake") as engine,
            GatewayProcess({"fake": attached(engine.url)}) as gateway,
            connected(gateway),
        ):
            gateway.terminate()
            assert await gateway.wait(5) == 0
