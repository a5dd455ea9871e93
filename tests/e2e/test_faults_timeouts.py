"""The five named timeouts, each with its code; what an engine sends to keep a connection alive resets none (R2)."""

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import pytest_asyncio

from tests.e2e.asking import ask, connected, logged
from tests.fakes.engine import FakeEngine
from tests.fakes.gateway import GatewayProcess, attached
from tests.fakes.replay import Replay

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT = "/v1/chat/completions"
SLACK_S = 2.0  # of a machine with two busy cores


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running() -> AsyncIterator[FakeEngine]:
    async with FakeEngine(model="fake", tokens=200) as engine:
        yield engine


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def patient(running: FakeEngine) -> AsyncIterator[GatewayProcess]:
    """A gateway whose model may be tried once, so that one deadline passes once."""
    models = {"fake": attached(running.url, max_inflight=1)}
    async with GatewayProcess(models, retry={"attempts": 1}) as gateway:
        yield gateway


@pytest_asyncio.fixture(loop_scope="module")
async def engine(running: FakeEngine) -> AsyncIterator[FakeEngine]:
    await running.until(in_flight=0)
    await running.reset()
    yield running
    await running.reset()


def chat(*, stream: bool = True, **timeouts: float) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Hello."}]
    return {"model": "fake", "messages": messages, "stream": stream, "forebay": {"timeouts": timeouts}}


async def test_a_silent_engine_ends_in_first_token_timeout(patient: GatewayProcess, engine: FakeEngine) -> None:
    await engine.faults(silent=True)
    began = time.monotonic()
    answer = await ask(patient, CHAT, chat(first_token=0.4), headers={"x-request-id": "silent"})

    assert 0.4 <= time.monotonic() - began < 0.4 + SLACK_S
    assert answer.status == 504
    assert answer.json["error"]["code"] == "first_token_timeout"
    assert answer.json["error"]["type"] == "timeout_error"
    assert (await logged(patient, "silent"))["error"] == "first_token_timeout"
    await engine.until(in_flight=0, aborted=1)


async def test_pings_before_the_first_token_do_not_reset_its_timer(patient: GatewayProcess, engine: FakeEngine) -> None:
    await engine.faults(stall_after=0, ping_ms=50)
    answer = await ask(patient, CHAT, chat(first_token=0.4))
    assert answer.status == 504
    assert answer.json["error"]["code"] == "first_token_timeout"


@pytest.mark.parametrize("ping_ms", [None, 50], ids=["mute", "pinging"])
async def test_a_stalled_stream_ends_in_idle_timeout(
    patient: GatewayProcess, engine: FakeEngine, ping_ms: int | None
) -> None:
    await engine.faults(stall_after=3, ping_ms=ping_ms)
    began = time.monotonic()
    answer = await ask(patient, CHAT, chat(idle=0.4))

    assert 0.4 <= time.monotonic() - began < 0.4 + SLACK_S
    assert answer.status == 200
    assert [error["error"]["code"] for error in answer.errors] == ["idle_timeout"]
    assert b"[DONE]" not in answer.body
    await engine.until(in_flight=0, aborted=1)


async def test_a_trickle_does_not_defeat_total_in_a_stream(patient: GatewayProcess, engine: FakeEngine) -> None:
    await engine.faults(trickle_ms=50)
    began = time.monotonic()
    answer = await ask(patient, CHAT, chat(total=0.6, idle=0.5))

    assert 0.6 <= time.monotonic() - began < 0.6 + SLACK_S
    assert [error["error"]["code"] for error in answer.errors] == ["upstream_timeout"]
    assert len(answer.events) > 3
    await engine.until(in_flight=0, aborted=1)


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/embeddings"])
async def test_a_whole_answer_that_does_not_come_ends_in_total(
    patient: GatewayProcess, engine: FakeEngine, path: str
) -> None:
    await engine.faults(silent=True)
    body = chat(stream=False, total=0.4) | {"prompt": "Hello.", "input": "Hello."}
    answer = await ask(patient, path, body)
    assert answer.status == 504
    assert answer.json["error"]["code"] == "upstream_timeout"
    assert answer.headers["x-should-retry"] == "false"
    await engine.until(in_flight=0, aborted=1)


async def test_total_counts_the_wait_in_the_queue_too(patient: GatewayProcess, engine: FakeEngine) -> None:
    await engine.faults(silent=True, contains="Hello.")
    async with connected(patient) as holder:
        holder.ask(CHAT, chat())
        await engine.until(in_flight=1)
        answer = await ask(patient, CHAT, chat(total=0.4))
    assert answer.status == 504
    assert answer.json["error"]["code"] == "upstream_timeout"


async def test_a_request_that_no_worker_takes_ends_in_queue_timeout(
    patient: GatewayProcess, engine: FakeEngine
) -> None:
    await engine.faults(silent=True)
    async with connected(patient) as holder:
        holder.ask(CHAT, chat())
        await engine.until(in_flight=1)
        began = time.monotonic()
        answer = await ask(patient, CHAT, chat(queue=0.4))

        assert 0.4 <= time.monotonic() - began < 0.4 + SLACK_S
        assert answer.status == 503
        assert answer.json["error"]["code"] == "queue_timeout"
        assert answer.headers["x-should-retry"] == "true"
        assert int(answer.headers["retry-after"]) >= 1
        assert float(answer.headers["x-forebay-queue-ms"]) >= 0
    await engine.until(in_flight=0)
    assert (await engine.stats())["started"] == 1


async def test_a_header_shortens_a_timeout_like_the_body(patient: GatewayProcess, engine: FakeEngine) -> None:
    await engine.faults(silent=True)
    body = {"model": "fake", "prompt": "Hello.", "stream": True}
    answer = await ask(patient, "/v1/completions", body, headers={"x-forebay-timeouts": "first_token=0.3,total=5"})
    assert answer.json["error"]["code"] == "first_token_timeout"


async def test_a_caller_in_a_hurry_does_not_take_the_worker_from_others(
    patient: GatewayProcess, engine: FakeEngine
) -> None:
    await engine.faults(trickle_ms=100, contains="Hello.")
    for _ in range(5):
        hasty = await ask(patient, CHAT, chat(first_token=0.001))
        assert hasty.json["error"]["code"] == "first_token_timeout"
    other = await ask(patient, "/v1/completions", {"model": "fake", "prompt": "Next.", "max_tokens": 2})
    assert other.status == 200
    assert float(other.headers["x-forebay-queue-ms"]) < 200  # less than the breaker's shortest pause


async def test_anthropic_s_route_hears_of_a_timeout_in_its_own_words(
    patient: GatewayProcess, engine: FakeEngine
) -> None:
    await engine.faults(silent=True)
    body = chat(first_token=0.3) | {"max_tokens": 8}
    answer = await ask(patient, "/v1/messages", body)
    assert answer.status == 504
    assert answer.json["type"] == "error"
    assert answer.json["error"]["code"] == "first_token_timeout"


async def test_a_worker_that_does_not_accept_ends_in_connect_timeout() -> None:
    async with Replay("fake") as engine:
        models = {"fake": attached(engine.url, lifecycle={"probe_interval": 600})}
        async with GatewayProcess(models, retry={"attempts": 2}) as gateway:
            await engine.stop()
            with full_backlog(engine.port):
                began = time.monotonic()
                answer = await ask(gateway, CHAT, chat(connect=0.4))
                took = time.monotonic() - began
    assert answer.status == 502
    assert answer.json["error"]["code"] == "connect_timeout"
    assert answer.headers["x-forebay-attempts"] == "2"
    assert 0.8 <= took < 0.8 + 2 * SLACK_S


@contextlib.contextmanager
def full_backlog(port: int) -> Iterator[None]:
    """Listen on a port without ever accepting, until the kernel drops what comes."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen(0)
        for _ in range(8):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                filler.connect(("127.0.0.1", port))
        yield


async def test_a_client_cannot_make_total_longer_than_the_operator_s() -> None:
    async with FakeEngine(model="fake", silent=True) as engine:
        models = {"fake": attached(engine.url)}
        async with GatewayProcess(models, timeouts={"total": 0.5}, retry={"attempts": 1}) as gateway:
            async with asyncio.timeout(0.5 + SLACK_S):
                answer = await ask(gateway, CHAT, chat(total=3600.0, first_token=3600.0))
    assert answer.json["error"]["code"] in ("upstream_timeout", "first_token_timeout")
