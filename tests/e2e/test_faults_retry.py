"""Who tries again, and when nobody does: retries, breakers and health (R6, R7, R8)."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
import pytest_asyncio

from tests.e2e.asking import Client, ask, connected, until
from tests.fakes.engine import FakeEngine
from tests.fakes.gateway import GatewayProcess, attached
from tests.fakes.replay import Replay

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT = "/v1/chat/completions"
QUICK_MS = 150.0  # less than the breaker's shortest pause


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engines() -> AsyncIterator[tuple[FakeEngine, FakeEngine]]:
    async with FakeEngine(model="fake", tokens=12) as first, FakeEngine(model="fake", tokens=12) as second:
        yield first, second


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def front(engines: tuple[FakeEngine, FakeEngine]) -> AsyncIterator[GatewayProcess]:
    """`fake` has the first engine, `other` the second, `both` has both; none is waited for longer than 2 s."""
    first, second = (attached(engine.url, served_name="fake")["workers"][0] for engine in engines)
    models = {"fake": {"workers": [first]}, "other": {"workers": [second]}, "both": {"workers": [first, second]}}
    async with GatewayProcess(models, retry={"attempts": 3, "max_retry_after": 2}) as gateway:
        yield gateway


@pytest_asyncio.fixture(loop_scope="module")
async def engine(engines: tuple[FakeEngine, FakeEngine], front: GatewayProcess) -> AsyncIterator[FakeEngine]:
    """The first engine, without a past."""
    for one in engines:
        await one.reset()
    yield engines[0]
    for one in engines:
        await one.reset()
    for model in ("fake", "both", "both"):
        assert (await ask(front, CHAT, chat(model))).status == 200


def chat(model: str = "fake", text: str = "Hello.", **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": text}], **more}


class TestRetries:
    """R6."""

    @pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
    @pytest.mark.parametrize("fault", [{"refuse_status": 500}, {"refuse_status": 503}, {"cut_after": 0}], ids=str)
    async def test_the_openai_package_does_not_multiply_our_attempts(
        self, front: GatewayProcess, engine: FakeEngine, fault: dict[str, Any], stream: bool
    ) -> None:
        await engine.faults(**fault)
        async with openai.AsyncOpenAI(base_url=front.url + "/v1", api_key=front.key, max_retries=5) as client:
            with pytest.raises(openai.APIStatusError) as caught:
                await client.chat.completions.create(**chat(), stream=stream)
        assert (await engine.stats())["started"] == 3
        assert caught.value.response.headers["x-should-retry"] == "false"
        assert caught.value.response.headers["x-forebay-attempts"] == "3"
        assert isinstance(caught.value.code, str)

    async def test_a_refusal_of_the_request_itself_is_not_tried_again(
        self, front: GatewayProcess, engine: FakeEngine
    ) -> None:
        await engine.faults(refuse_status=400)
        answer = await ask(front, CHAT, chat("both"))
        assert answer.status == 400
        assert answer.headers["x-forebay-attempts"] == "1"

    async def test_an_engine_s_retry_after_is_waited_for(self, front: GatewayProcess, engine: FakeEngine) -> None:
        await engine.faults(times=1, refuse_status=429, retry_after=0.6)
        began = time.monotonic()
        answer = await ask(front, CHAT, chat())
        assert answer.status == 200
        assert answer.headers["x-forebay-attempts"] == "2"
        assert time.monotonic() - began >= 0.6

    async def test_a_request_that_waits_for_retry_after_holds_nobody_else_up(
        self, front: GatewayProcess, engine: FakeEngine
    ) -> None:
        await engine.faults(refuse_status=429, retry_after=1.5, contains="Refused.", times=1)
        async with connected(front) as waiting:
            waiting.ask(CHAT, chat(text="Refused."))
            await engine.until(started=1)
            other = await ask(front, CHAT, chat())
            assert other.status == 200
            assert float(other.headers["x-forebay-queue-ms"]) < 1000
            assert (await waiting.answer()).status == 200

    async def test_a_retry_after_that_is_too_long_is_handed_to_the_client(
        self, front: GatewayProcess, engine: FakeEngine
    ) -> None:
        await engine.faults(refuse_status=429, retry_after=60)
        began = time.monotonic()
        answer = await ask(front, CHAT, chat())
        assert time.monotonic() - began < 2
        assert answer.status == 429
        assert answer.headers["retry-after"] == "60"
        assert answer.headers["x-forebay-attempts"] == "1"

    async def test_a_fallback_answers_when_the_model_cannot(self, front: GatewayProcess, engine: FakeEngine) -> None:
        await engine.faults(refuse_status=500)
        answer = await ask(front, CHAT, chat(forebay={"fallbacks": ["other"]}))
        assert answer.status == 200
        assert answer.headers["x-forebay-model"] == "other"
        assert answer.headers["x-forebay-attempts"] == "4"

    async def test_a_stream_that_has_begun_falls_back_to_nothing(
        self, front: GatewayProcess, engine: FakeEngine, engines: tuple[FakeEngine, FakeEngine]
    ) -> None:
        await engine.faults(cut_after=2)
        answer = await ask(front, CHAT, chat(stream=True, forebay={"fallbacks": ["other"]}))
        assert [error["error"]["code"] for error in answer.errors] == ["worker_lost"]
        assert (await engines[1].stats())["started"] == 0


class TestBreaker:
    """R7."""

    async def test_a_storm_of_bad_requests_keeps_the_worker_up(self, front: GatewayProcess, engine: FakeEngine) -> None:
        await engine.faults(refuse_status=400, contains="Too long.")
        statuses = await asyncio.gather(*(ask(front, CHAT, chat(text="Too long.")) for _ in range(40)))
        assert {answer.status for answer in statuses} == {400}
        good = await ask(front, CHAT, chat())
        assert good.status == 200
        assert float(good.headers["x-forebay-queue-ms"]) < QUICK_MS

    async def test_streams_that_break_take_the_worker_out_and_it_comes_back_by_itself(
        self, front: GatewayProcess, engine: FakeEngine, engines: tuple[FakeEngine, FakeEngine]
    ) -> None:
        await engine.faults(cut_after=3)
        answers = [await ask(front, CHAT, chat("both", stream=True)) for _ in range(20)]
        broken = sum(bool(answer.errors) for answer in answers)
        assert (await engine.stats())["started"] == broken
        assert 2 <= broken <= 5, "two open it; each later one is a trial"
        assert (await engines[1].stats())["finished"] == 20 - broken

        await engine.faults()

        async def is_back() -> bool:
            answer = await ask(front, CHAT, chat("both"))
            assert answer.status == 200
            return answer.headers["x-forebay-worker"] == "both-0"

        assert await until(is_back, "the first worker gets work again") < 12

    async def test_the_only_worker_is_waited_for_while_its_breaker_is_open(
        self, front: GatewayProcess, engine: FakeEngine
    ) -> None:
        await engine.faults(times=4, refuse_status=500)
        first = await ask(front, CHAT, chat())  # three attempts, the last one a trial
        second = await ask(front, CHAT, chat())
        assert first.status == 502
        assert second.status == 200
        assert second.headers["x-forebay-attempts"] == "2"
        assert float(second.headers["x-forebay-queue-ms"]) > QUICK_MS

    async def test_a_poisonous_request_does_not_take_the_worker_from_others(
        self, front: GatewayProcess, engine: FakeEngine
    ) -> None:
        deep: Any = 1
        for _ in range(300):
            deep = {"a": deep}
        for extra in ({"seed": 10**40}, {"odd": deep}, {"stream_options": {"include_usage": "yes"}}):
            await ask(front, CHAT, chat(**extra))
        good = await ask(front, CHAT, chat())
        assert good.status == 200
        assert float(good.headers["x-forebay-queue-ms"]) < QUICK_MS


class TestHealth:
    """R8."""

    async def test_a_last_worker_that_says_it_is_ill_is_used_all_the_same(self) -> None:
        async with FakeEngine(model="fake") as ill, FakeEngine(model="fake") as well:
            probes = {"probe_interval": 0.1, "fall": 2, "rise": 2}
            one, two = ({"engine": "vllm", "url": each.url, "lifecycle": probes} for each in (ill, well))
            models = {"fake": {"workers": [one, two]}}
            async with GatewayProcess(models) as gateway:
                await ill.faults(unhealthy=True)
                await until(lambda: is_healthy(gateway, "fake-0", wanted=False), "the first worker is seen to be ill")
                workers = {(await ask(gateway, CHAT, chat())).headers["x-forebay-worker"] for _ in range(5)}
                assert workers == {"fake-1"}, "a worker that is well comes first"

                await well.faults(unhealthy=True)
                await until(lambda: is_healthy(gateway, "fake-1", wanted=False), "both are seen to be ill")
                for _ in range(5):
                    assert (await ask(gateway, CHAT, chat())).status == 200

                await ill.faults()
                await well.faults()
                await until(lambda: is_healthy(gateway, "fake-0", wanted=True), "it is well again")

    async def test_an_engine_too_busy_to_be_probed_keeps_its_streams_and_gets_more(self) -> None:
        async with Replay("fake") as engine:
            engine.says_stream(CHAT, [frame(index) for index in range(45)] + [frame(45, "stop"), DONE], pause_s=0.1)
            lifecycle = {"probe_interval": 0.1, "fall": 1}
            model = attached(engine.url, lifecycle=lifecycle)
            async with GatewayProcess({"fake": model}) as gateway, connected(gateway) as client:
                client.ask(CHAT, chat(stream=True))
                await client.head()
                engine.is_silent = True
                await asyncio.sleep(3.0)  # longer than a probe may take
                engine.says_stream(CHAT, [frame(0, "stop"), DONE])
                late = await ask(gateway, CHAT, chat(stream=True, forebay={"timeouts": {"queue": 2}}))
                assert late.status == 200
                assert DONE in late.body
                assert DONE in await client.rest()


DONE = b"data: [DONE]\n\n"


def frame(index: int, finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": {"content": f"{index} "}, "finish_reason": finish}
    event = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "fake", "choices": [choice]}
    return b"data: " + json.dumps(event).encode() + b"\n\n"


async def is_healthy(gateway: GatewayProcess, worker: str, *, wanted: bool) -> bool:
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.admin_port)
    try:
        client = Client(reader, writer, gateway.admin_key)
        client.ask(f"/admin/v1/workers/{worker}", b"", method="GET")
        return bool((await client.answer()).json["healthy"] is wanted)
    finally:
        writer.transport.abort()
