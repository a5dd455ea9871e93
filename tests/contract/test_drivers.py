"""What every driver promises, held against a script, a fake engine and a real llama.cpp."""

import asyncio
import json
import os
import socket
from abc import abstractmethod
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

import pytest
import pytest_asyncio

from core.chat import Call, Endpoint, Usage
from core.errors import (
    ContextLengthExceeded,
    ForebayError,
    UpstreamBroken,
    UpstreamBusy,
    UpstreamRefused,
    WorkerLost,
    WorkerUnreachable,
)
from core.ids import ModelName, WorkerId
from engines.dispatcher import cause_of
from engines.driver import Capabilities, Chunk, Driver, Load
from engines.drivers.llamacpp import LlamaCppEngine
from engines.drivers.openai import OpenAIDriver
from engines.drivers.vllm import VllmDriver
from engines.models import fetch
from engines.spec import Launch, WorkerSpec
from tests.fakes.drivers import Gate, ScriptedDriver, call, text
from tests.fakes.engine import FakeEngine

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]

KEY = "contract-key"
HELLO = [{"role": "user", "content": "Say hello."}]
NUM_TOKENS = 8


class Bench(Protocol):
    """A driver and the engine behind it. ``answers``, ``never_ends`` and ``refuses`` make calls of that kind."""

    driver: Driver

    @abstractmethod
    def answers(self, *, stream: bool, wants_usage: bool = False) -> Call: ...

    @abstractmethod
    def never_ends(self) -> Call: ...

    @abstractmethod
    def refuses(self) -> Call: ...

    @abstractmethod
    def nowhere(self) -> Driver:
        """Return a driver of the same kind for an engine that is not there."""

    @abstractmethod
    async def num_running(self) -> int:
        """Ask the engine itself."""


class ScriptedBench(Bench):
    """The fake that stands in for drivers in other tests: it has to keep the promises too."""

    def __init__(self) -> None:
        self.driver: ScriptedDriver = ScriptedDriver()

    def answers(self, *, stream: bool, wants_usage: bool = False) -> Call:
        usage = {"prompt_tokens": 3, "completion_tokens": 2}
        counted = Usage(prompt_tokens=3, completion_tokens=2)
        if not stream:
            whole = {"choices": [{"message": {"content": "Hi!"}, "finish_reason": "stop"}], "usage": usage}
            self.driver.plays((text(json.dumps(whole).encode(), 2, counted),))
            return call(stream=False)
        events: list[Any] = [{"choices": [{"delta": {"content": word}, "finish_reason": None}]} for word in ("Hi", "!")]
        events.append({"choices": [{"delta": {}, "finish_reason": "stop"}]})
        chunks = [text(b"data: " + json.dumps(event).encode() + b"\n\n") for event in events]
        last = b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n" if wants_usage else b""
        self.driver.plays((*chunks, text(last, 0, counted), text(b"data: [DONE]\n\n", 0, counted)))
        return call(wants_usage=wants_usage)

    def never_ends(self) -> Call:
        self.driver.plays((text(), Gate()))
        return call()

    def refuses(self) -> Call:
        self.driver.plays((ContextLengthExceeded("too long"),))
        return call()

    def nowhere(self) -> Driver:
        driver = ScriptedDriver((WorkerUnreachable("nobody"),))
        driver.state = "unreachable"
        return driver

    async def num_running(self) -> int:
        return self.driver.num_running


class ServedBench(Bench):
    """A driver that speaks HTTP to an engine of 2048 tokens of context."""

    def __init__(self, driver: Driver, lost: Driver) -> None:
        self.driver = driver
        self._lost = lost

    def answers(self, *, stream: bool, wants_usage: bool = False) -> Call:
        return self._call(stream, wants_usage, messages=HELLO, max_tokens=NUM_TOKENS)

    def never_ends(self) -> Call:
        return self._call(True, messages=HELLO, max_tokens=1800, ignore_eos=True)

    def refuses(self) -> Call:
        return self._call(True, messages=[{"role": "user", "content": "word " * 5000}], max_tokens=NUM_TOKENS)

    def _call(self, stream: bool, wants_usage: bool = False, **body: Any) -> Call:
        if wants_usage:
            body["stream_options"] = {"include_usage": True}
        whole = {"model": "m", "temperature": 0, "stream": stream, **body}
        return call(stream=stream, wants_usage=wants_usage, body=whole)

    def nowhere(self) -> Driver:
        return self._lost


class FakeServerBench(ServedBench):
    """Against ``engines.fake_server``."""

    def __init__(self, driver: Driver, lost: Driver, engine: FakeEngine) -> None:
        super().__init__(driver, lost)
        self.engine = engine

    async def num_running(self) -> int:
        return int((await self.engine.stats())["running"])


class LlamaBench(ServedBench):
    """Against llama.cpp."""

    async def num_running(self) -> int:
        load = await self.driver.load()
        assert load is not None
        return load.running


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@asynccontextmanager
async def fake_bench(kind: type[OpenAIDriver]) -> AsyncIterator[Bench]:
    async with FakeEngine(model="m", tokens=NUM_TOKENS, itl_ms=2, max_model_len=2048, api_key=KEY) as engine:
        driver, lost = kind(engine.url, KEY), kind(f"http://127.0.0.1:{free_port()}", KEY)
        yield FakeServerBench(driver, lost, engine)
        await driver.close()
        await lost.close()


@asynccontextmanager
async def llama_bench() -> AsyncIterator[Bench]:
    path = await asyncio.to_thread(fetch, "smollm2", Path.home() / ".cache/forebay/models")
    spec = WorkerSpec(
        id=WorkerId("m-0"), model=ModelName("m"), engine="llamacpp", launch=Launch(source=str(path), slots=2, threads=1)
    )
    engine, port = LlamaCppEngine(), free_port()
    command = engine.command(spec, port, KEY)
    process = await asyncio.create_subprocess_exec(
        *command.argv,
        env={**os.environ, **command.env},
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    driver, lost = (
        engine.driver(spec, f"http://127.0.0.1:{port}", KEY),
        engine.driver(spec, f"http://127.0.0.1:{free_port()}", KEY),
    )
    try:
        async with asyncio.timeout(60):
            while await driver.health() != "ok":
                assert process.returncode is None
                await asyncio.sleep(0.05)
        yield LlamaBench(driver, lost)
    finally:
        process.kill()
        await process.wait()
        await driver.close()
        await lost.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["scripted", "openai", "vllm", "llamacpp"])
async def bench(request: pytest.FixtureRequest) -> AsyncIterator[Bench]:
    async with AsyncExitStack() as stack:
        match request.param:
            case "scripted":
                yield ScriptedBench()
            case "openai":
                yield await stack.enter_async_context(fake_bench(OpenAIDriver))
            case "vllm":
                yield await stack.enter_async_context(fake_bench(VllmDriver))
            case _:
                yield await stack.enter_async_context(llama_bench())


async def chunks_of(driver: Driver, asked: Call) -> list[Chunk]:
    async with aclosing(driver.run(asked)) as chunks:  # type: ignore[type-var] # drivers are generators
        return [chunk async for chunk in chunks]


def raw(chunks: list[Chunk]) -> bytes:
    return b"".join(chunk.raw for chunk in chunks)


def events(chunks: list[Chunk]) -> list[Any]:
    frames = [frame for frame in raw(chunks).split(b"\n\n") if frame.startswith(b"data: {")]
    return [json.loads(frame[6:]) for frame in frames]


def check_metering(chunks: list[Chunk]) -> None:
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.prompt_tokens > 0
    assert 0 < usage.completion_tokens <= NUM_TOKENS
    assert 0 < sum(chunk.num_tokens for chunk in chunks) <= usage.completion_tokens + 1


# --- answers


async def test_a_whole_answer_is_one_json_object_and_metered(bench: Bench) -> None:
    chunks = await chunks_of(bench.driver, bench.answers(stream=False))

    choice = json.loads(raw(chunks))["choices"][0]
    assert choice["message"]["content"]
    assert choice["finish_reason"] in {"stop", "length"}
    check_metering(chunks)


async def test_a_streamed_answer_is_whole_frames_to_the_last_word_and_metered(bench: Bench) -> None:
    chunks = await chunks_of(bench.driver, bench.answers(stream=True))

    assert all(chunk.raw.endswith(b"\n\n") for chunk in chunks if chunk.raw)
    assert raw(chunks).endswith(b"data: [DONE]\n\n")
    assert any(choice["delta"].get("content") for event in events(chunks) for choice in event["choices"])
    check_metering(chunks)


async def test_usage_is_shown_to_those_who_asked_for_it(bench: Bench) -> None:
    shown = events(await chunks_of(bench.driver, bench.answers(stream=True, wants_usage=True)))
    hidden = events(await chunks_of(bench.driver, bench.answers(stream=True)))

    assert shown[-1]["usage"]["completion_tokens"] > 0
    assert not any(event.get("usage") for event in hidden)


async def test_many_calls_share_one_driver(bench: Bench) -> None:
    asked = [bench.answers(stream=True) for _ in range(3)]

    answers = await asyncio.gather(*(chunks_of(bench.driver, one) for one in asked))

    assert all(raw(chunks).endswith(b"data: [DONE]\n\n") for chunks in answers)


async def test_a_stream_reports_progress(bench: Bench) -> None:
    assert bench.driver.reports_progress(bench.answers(stream=True))


async def test_a_cancelled_call_is_closed_at_the_engine_and_settle_returns(bench: Bench) -> None:
    asked, begun = bench.never_ends(), asyncio.Event()

    async def follow() -> None:
        async with aclosing(bench.driver.run(asked)) as chunks:  # type: ignore[type-var] # drivers are generators
            async for _ in chunks:
                begun.set()

    task = asyncio.create_task(follow())
    await begun.wait()
    assert await bench.num_running() == 1
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await asyncio.wait_for(bench.driver.settle(lambda: 0), 25)

    async with asyncio.timeout(2):  # a foreign endpoint cannot be asked: settle returns at once
        while await bench.num_running() > 0:  # noqa: ASYNC110 - the engine is another process
            await asyncio.sleep(0.01)


# --- errors


async def test_a_request_that_the_engine_dislikes_is_refused(bench: Bench) -> None:
    with pytest.raises((ContextLengthExceeded, UpstreamRefused)) as caught:
        await chunks_of(bench.driver, bench.refuses())

    assert cause_of(caught.value) == "refused"


async def test_an_engine_that_is_not_there_is_unreachable(bench: Bench) -> None:
    asked = bench.answers(stream=True)

    with pytest.raises(WorkerUnreachable):
        await chunks_of(bench.nowhere(), asked)
    assert await bench.nowhere().health() == "unreachable"


async def test_an_engine_that_is_not_there_breaks_no_question_about_it(bench: Bench) -> None:
    lost = bench.nowhere()

    assert isinstance(await lost.capabilities(), Capabilities)
    assert await lost.load() is None or isinstance(lost, ScriptedDriver)
    await asyncio.wait_for(lost.settle(lambda: 0), 5)


# --- questions


async def test_a_running_engine_is_ok(bench: Bench) -> None:
    assert await bench.driver.health() == "ok"


async def test_the_load_of_an_idle_engine_is_nothing_or_unknown(bench: Bench) -> None:
    load = await bench.driver.load()

    assert load is None or (isinstance(load, Load) and (load.running, load.waiting) == (0, 0))


async def test_capabilities_name_the_model_and_the_context(bench: Bench) -> None:
    known = await bench.driver.capabilities()

    assert known.models == ("m",)
    assert known.context_tokens in {64, 2048}
    assert set(known.endpoints) <= set(Endpoint)


@pytest.mark.parametrize("words", ["Hello world", "Grüße, 世界! 🙂"])
async def test_tokens_turn_back_into_the_text(bench: Bench, words: str) -> None:
    told = await bench.driver.tokenize({"model": "m", "prompt": words})
    back = await bench.driver.detokenize({"model": "m", "tokens": told["tokens"]})

    assert told["count"] == len(told["tokens"])  # type: ignore[arg-type] # a list, as the next line needs it
    assert told["max_model_len"] in {64, 2048}
    assert back["prompt"] == words


async def test_tokens_of_a_messages_body_are_counted(bench: Bench) -> None:
    told = await bench.driver.count_tokens({"model": "m", "messages": HELLO, "max_tokens": 5})

    assert isinstance(told["input_tokens"], int)
    assert told["input_tokens"] > 0


async def test_a_driver_may_be_closed_twice(bench: Bench) -> None:
    lost = bench.nowhere()

    await lost.close()
    await lost.close()


# --- faults of engines that speak OpenAI's wire


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=[OpenAIDriver, VllmDriver])
async def faulty(request: pytest.FixtureRequest) -> AsyncIterator[FakeServerBench]:
    async with fake_bench(request.param) as bench:
        assert isinstance(bench, FakeServerBench)
        yield bench


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("faults", "kind", "cause"),
    [
        ({"refuse_status": 400}, UpstreamRefused, "refused"),
        ({"refuse_status": 422}, UpstreamRefused, "refused"),
        ({"refuse_status": 401}, UpstreamBroken, "broken"),
        ({"refuse_status": 429, "retry_after": 3}, UpstreamBusy, "busy"),
        ({"refuse_status": 503, "retry_after": 3}, UpstreamBusy, "busy"),
        ({"refuse_status": 500}, UpstreamBroken, "broken"),
        ({"cut_after": 0}, WorkerLost, "lost"),
    ],
)
async def test_what_goes_wrong_before_the_answer_has_a_name(
    faulty: FakeServerBench, faults: dict[str, Any], kind: type[ForebayError], cause: str, stream: bool
) -> None:
    await faulty.engine.faults(**faults)

    with pytest.raises(kind) as caught:
        await chunks_of(faulty.driver, faulty.answers(stream=stream))

    assert cause_of(caught.value) == cause
    assert caught.value.retry_after == faults.get("retry_after")


@pytest.mark.parametrize(
    "faults", [{"error_first": True}, {"error_after": 3}, {"cut_after": 3}, {"malformed_after": 0}], ids=str
)
async def test_what_goes_wrong_in_a_stream_is_raised_and_never_yielded(
    faulty: FakeServerBench, faults: dict[str, Any]
) -> None:
    await faulty.engine.faults(**faults)
    seen: list[Chunk] = []

    async def follow() -> None:
        async for chunk in faulty.driver.run(faulty.answers(stream=True)):
            seen.append(chunk)

    with pytest.raises((UpstreamBroken, WorkerLost)):
        await follow()
    assert b"error" not in raw(seen)
    assert bool(raw(seen)) == ("error_first" not in faults and "malformed_after" not in faults)


@pytest.mark.parametrize("faults", [{"no_done": True}, {"duplicate_done": True}, {"ping_ms": 1}], ids=str)
async def test_oddities_of_a_stream_are_mended(faulty: FakeServerBench, faults: dict[str, Any]) -> None:
    await faulty.engine.faults(**faults)

    chunks = await chunks_of(faulty.driver, faulty.answers(stream=True))

    assert raw(chunks).count(b"[DONE]") == 1
    assert all(chunk.is_progress == (b"data:" in chunk.raw or not chunk.raw) for chunk in chunks)


async def test_usage_beside_the_last_words_is_taken_out_alone(faulty: FakeServerBench) -> None:
    await faulty.engine.faults(usage_with_choices=True)

    chunks = await chunks_of(faulty.driver, faulty.answers(stream=True))

    check_metering(chunks)
    assert b'"usage"' not in raw(chunks)
    assert events(chunks)[-1]["choices"][0]["finish_reason"] in {"stop", "length"}


async def test_a_vllm_that_says_it_is_ill_is_unhealthy(faulty: FakeServerBench) -> None:
    await faulty.engine.faults(unhealthy=True)

    assert await faulty.driver.health() == ("unhealthy" if isinstance(faulty.driver, VllmDriver) else "ok")


async def test_an_engine_that_still_loads_is_not_ok() -> None:
    async with FakeEngine(start_delay_s=60) as engine:
        for kind in (OpenAIDriver, VllmDriver):
            driver = kind(engine.url, None)
            assert await driver.health() != "ok"
            await driver.close()
