"""What every driver promises that can continue an answer, through the dispatcher: however often and wherever an answer
is cut, the client reads one stream, and nothing of it is lost, doubled or altered."""

import asyncio
import os
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio

from core.chat import Call, CallContext, Endpoint
from core.ids import ModelName, TenantId, WorkerId
from engines.driver import Continuation, Driver
from engines.drivers.llamacpp import LlamaCppDriver, LlamaCppEngine
from engines.drivers.openai import OpenAIDriver
from engines.drivers.sse import json_of, split
from engines.drivers.vllm import VllmDriver
from engines.models import fetch
from engines.spec import Launch, WorkerSpec
from tests.contract.beds import LENGTH, Bed, after, ask, check_equal, every, told
from tests.contract.test_drivers import free_port
from tests.fakes.engine import FakeEngine
from tests.fakes.workers import view

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]

KEY = "resuming-key"


class FakeBed(Bed):
    """Two ``engines.fake_server``."""

    engines: list[FakeEngine]


@asynccontextmanager
async def fake_bed(kind: type[OpenAIDriver] = VllmDriver, **options: Any) -> AsyncIterator[FakeBed]:
    async with AsyncExitStack() as stack:
        drivers: dict[str, Driver] = {}
        engines = []
        for name in ("m-0", "m-1"):
            flags: dict[str, Any] = {"model": "m", "tokens": 40, "glyphs": True, "api_key": KEY, "itl_ms": 0.5}
            engine = await stack.enter_async_context(FakeEngine(**flags | options))
            engines.append(engine)
            driver = kind(engine.url, KEY)
            stack.push_async_callback(driver.close)
            await driver.capabilities()
            drivers[name] = driver
        bed = FakeBed(drivers, ("id", "model", "object", "created"))
        bed.engines = engines
        async with bed.dispatcher:
            for name in drivers:
                bed.dispatcher.on_worker(view(name, slots=8))
            yield bed


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fake() -> AsyncIterator[Bed]:
    async with fake_bed() as bed:
        yield bed


# --- an engine whose answer is a function of what stands before it: nothing may differ


@pytest.mark.parametrize("endpoint", [Endpoint.CHAT, Endpoint.COMPLETIONS])
@pytest.mark.parametrize("inline", [False, True])
async def test_a_fake_answer_cut_anywhere_is_the_undisturbed_one(fake: Bed, endpoint: Endpoint, inline: bool) -> None:
    undisturbed = await fake.tell(ask(endpoint=endpoint))
    assert (undisturbed.faults, undisturbed.finish, undisturbed.legs) == ([], "length", ["done"])

    for at in range(1, LENGTH):
        cut = await fake.tell(ask(endpoint=endpoint), after(at), inline=inline)
        check_equal(cut, undisturbed)
        assert cut.legs in (["preempted", "done"], ["done"])


ANSWERS: list[dict[str, Any]] = [
    {"max_tokens": 200},
    {"max_tokens": 7},
    {"max_tokens": 1},
    {"max_tokens": 60, "ignore_eos": True, "min_tokens": 50},
    {"max_completion_tokens": 9, "max_tokens": 200},
    {"stop": [" gones"]},
    {"stop": ["gones ü", "ж zo"]},
    {"stop": "日本"},
    {"prompt": "Größe 🙂"},
]


@pytest.mark.parametrize("endpoint", [Endpoint.CHAT, Endpoint.COMPLETIONS])
@pytest.mark.parametrize("body", ANSWERS, ids=str)
async def test_an_answer_cut_again_and_again_ends_where_and_as_it_should(
    fake: Bed, endpoint: Endpoint, body: dict[str, Any]
) -> None:
    undisturbed = await fake.tell(ask(endpoint=endpoint, **body))

    for num in (1, 2, 5):
        cut = await fake.tell(ask(endpoint=endpoint, **body), every(num))
        check_equal(cut, undisturbed)
        if len(cut.legs) > 1 and "forebay" in cut.usage:
            assert cut.usage["forebay"]["recomputed_tokens"] > 0


async def test_who_asks_for_a_whole_answer_gets_one_however_often_it_begins_anew(fake: Bed) -> None:
    undisturbed = await fake.tell(ask(stream=False))
    run = fake.dispatcher.submit(asked := ask(stream=False), inline=True)
    reader = asyncio.create_task(run.first_byte())
    for _ in range(3):
        await asyncio.sleep(0)
        fake.dispatcher.carry_out(fake.scheduler.cut(asked.id))
    await reader
    answer = told(asked, b"".join(run.journal.frames), run, ())
    run.close()

    check_equal(answer, undisturbed)
    assert answer.legs == ["preempted", "done"]


@pytest.mark.parametrize(
    "faults",
    [{"cut_after": 5}, {"error_after": 5}, {"cut_after": 1}, {"cut_after": LENGTH + 1}, {"malformed_after": 0}],
    ids=str,
)
async def test_an_answer_whose_worker_fails_goes_on_elsewhere(fake: Bed, faults: dict[str, Any]) -> None:
    undisturbed = await fake.tell(ask())
    assert isinstance(fake, FakeBed)
    await fake.engines[0].faults(**faults, times=1)

    check_equal(await fake.tell(ask()), undisturbed)
    assert fake.scheduler.ended[-1].cause == "done"


async def test_an_engine_killed_in_the_middle_of_an_answer_costs_nothing_but_time() -> None:
    for at in (1, 7, 8):
        async with fake_bed() as bed:
            undisturbed = await bed.tell(ask())
            await bed.engines[0].faults(die_after=at)
            answer = await bed.tell(ask())

            check_equal(answer, undisturbed)
            assert answer.legs == ["lost", "done"]


async def test_the_client_sees_no_ids_and_its_frames_are_the_engines_own(fake: Bed) -> None:
    assert isinstance(fake, FakeBed)
    driver = OpenAIDriver(fake.engines[0].url, KEY)
    plain = b"".join([chunk.raw async for chunk in driver.run(ask())])
    await driver.close()
    run = fake.dispatcher.submit(ask())
    body = b"".join([piece async for piece in run.chunks()])
    run.close()

    identity = re.compile(rb'"id":"[^"]*"|"created":[0-9]*|"cached_tokens":[0-9]*')
    assert identity.sub(b"", body) == identity.sub(b"", plain)
    assert b"token_ids" in body


PINNED: list[dict[str, Any]] = [
    {"n": 2},
    {"logprobs": True},
    {"presence_penalty": 0.5},
    {"response_format": {"type": "json_object"}},
    {"tools": [{"type": "function", "function": {"name": "f"}}]},
    {"seed": 1, "temperature": 1},
    {"return_token_ids": True},
    {"something_new": 1},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
]


@pytest.mark.parametrize("body", PINNED, ids=str)
async def test_what_no_leg_could_go_on_with_is_pinned_and_left_alone(fake: Bed, body: dict[str, Any]) -> None:
    answer = await fake.tell(ask(**body), every(1))

    assert fake.scheduler.submits[-1].is_pinned
    assert answer.legs == ["done"]


@pytest.mark.parametrize("body", [{}, {"seed": 1}, {"n": 1, "presence_penalty": 0, "tools": [], "user": "u"}], ids=str)
async def test_plain_text_is_not_pinned(fake: Bed, body: dict[str, Any]) -> None:
    await fake.tell(ask(**body))

    assert not fake.scheduler.submits[-1].is_pinned


@pytest.mark.parametrize("kind", [OpenAIDriver, VllmDriver])
async def test_an_engine_that_has_not_shown_that_it_can_continue_pins_all(fake: Bed, kind: type[OpenAIDriver]) -> None:
    assert isinstance(fake, FakeBed)
    driver = kind(fake.engines[0].url, KEY)
    bed = Bed({"m-0": driver}, ())
    async with bed.dispatcher:
        bed.dispatcher.on_worker(view("m-0"))
        answer = await bed.tell(ask(), every(1))
    await driver.close()

    assert bed.scheduler.submits[-1].is_pinned
    assert answer.legs == ["done"]


# --- an engine of which nothing is known but that it goes on with text


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def foreign() -> AsyncIterator[FakeBed]:
    async with fake_bed(OpenAIDriver) as bed:
        yield bed


@pytest.fixture
def short_parts(monkeypatch: pytest.MonkeyPatch, foreign: FakeBed) -> Iterator[FakeBed]:
    """Others wait, and a part has five tokens."""
    monkeypatch.setattr("engines.drivers.openai._QUANTUM", 5)
    foreign.scheduler.num_others = 1
    yield foreign
    foreign.scheduler.num_others = 0


@pytest.mark.parametrize("endpoint", [Endpoint.CHAT, Endpoint.COMPLETIONS])
async def test_an_answer_made_in_parts_is_the_one_made_at_once(short_parts: FakeBed, endpoint: Endpoint) -> None:
    short_parts.scheduler.num_others = 0
    undisturbed = await short_parts.tell(ask(endpoint=endpoint))
    short_parts.scheduler.num_others = 1

    for length in (4, 5, 6, LENGTH, 200):
        short_parts.scheduler.num_others = 0
        undisturbed = await short_parts.tell(ask(endpoint=endpoint, max_tokens=length))
        short_parts.scheduler.num_others = 1
        answer = await short_parts.tell(ask(endpoint=endpoint, max_tokens=length))
        check_equal(answer, undisturbed)
        assert answer.legs == ["done"]


@pytest.mark.parametrize("endpoint", [Endpoint.CHAT, Endpoint.COMPLETIONS])
async def test_an_answer_made_in_parts_is_cut_where_a_part_ends(short_parts: FakeBed, endpoint: Endpoint) -> None:
    short_parts.scheduler.num_others = 0
    undisturbed = await short_parts.tell(ask(endpoint=endpoint))
    short_parts.scheduler.num_others = 1
    await short_parts.engines[0].reset()

    for cuts in (*(after(at) for at in (1, 3, 8, 10)), every(3)):
        for inline in (True, False):
            cut = await short_parts.tell(ask(endpoint=endpoint), cuts, inline=inline)
            check_equal(cut, undisturbed)
            assert cut.legs[0] == "preempted"

    assert (await short_parts.engines[0].stats())["aborted"] == 0, "each leg has come to its own end"


async def test_an_engine_lost_in_the_middle_of_a_part_costs_nothing_but_time(short_parts: FakeBed) -> None:
    undisturbed = await short_parts.tell(ask(max_tokens=20))
    await short_parts.engines[0].faults(cut_after=8, times=1)
    await short_parts.engines[0].faults(error_after=3, times=1)

    answer = await short_parts.tell(ask(max_tokens=20))

    assert (answer.faults, answer.legs) == ([], ["broken", "done"])
    assert answer.text.startswith(undisturbed.text[:60])


@pytest.mark.parametrize("endpoint", [Endpoint.CHAT, Endpoint.COMPLETIONS])
async def test_an_answer_that_was_begun_while_nobody_waited_is_cut_at_once(
    foreign: FakeBed, endpoint: Endpoint
) -> None:
    undisturbed = await foreign.tell(ask(endpoint=endpoint))
    for cuts in (after(1), after(7), every(4)):
        cut = await foreign.tell(ask(endpoint=endpoint), cuts)
        assert (cut.faults, cut.text, cut.finish) == ([], undisturbed.text, undisturbed.finish)
        assert cut.usage["completion_tokens"] == LENGTH  # where each token is a piece; the prompt may be estimated
        assert cut.legs in (["preempted"] * (len(cut.legs) - 1) + ["done"], ["done"])


async def test_an_engine_that_begins_anew_is_never_asked_to_go_on() -> None:
    async with fake_bed(OpenAIDriver, begins_anew=True) as bed:
        answer = await bed.tell(ask(), every(1))

    assert bed.scheduler.submits[-1].is_pinned
    assert answer.legs == ["done"]


async def test_an_engine_that_is_not_to_be_tried_is_asked_nothing(foreign: FakeBed) -> None:
    await foreign.engines[0].reset()
    driver = OpenAIDriver(foreign.engines[0].url, KEY, probes_continuation=False)
    known = await driver.capabilities()
    await driver.close()

    assert (known.models, known.continuation) == (("m",), False)
    assert (await foreign.engines[0].stats())["started"] == 0


@pytest.mark.parametrize(
    "body", [*PINNED, {"chat_template_kwargs": {"enable_thinking": True}}, {"stream": False}], ids=str
)
async def test_what_text_alone_does_not_carry_is_pinned(foreign: FakeBed, body: dict[str, Any]) -> None:
    asked = ask(**body)
    driver = foreign.drivers["m-0"]
    assert isinstance(driver, OpenAIDriver)

    assert driver.exactness(asked) == "pinned"


# --- llama.cpp


class LlamaBed(Bed):
    """A llama.cpp at ``url``."""

    url: str


@asynccontextmanager
async def llama_bed() -> AsyncIterator[LlamaBed]:
    path = await asyncio.to_thread(fetch, "smollm2", Path.home() / ".cache/forebay/models")
    engine, port = LlamaCppEngine(), free_port()
    launch = Launch(source=str(path), slots=2, threads=1)
    spec = WorkerSpec(id=WorkerId("m-0"), model=ModelName("m"), engine="llamacpp", launch=launch)
    command = engine.command(spec, port, KEY)
    process = await asyncio.create_subprocess_exec(
        *command.argv,
        env={**os.environ, **command.env},
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    driver = engine.driver(spec, url, KEY)
    try:
        async with asyncio.timeout(60):
            while await driver.health() != "ok":
                assert process.returncode is None
                await asyncio.sleep(0.05)
        await driver.capabilities()
        bed = LlamaBed({"m-0": driver}, ("id", "model", "object"))  # its "created" is the time of each frame
        bed.url = url
        async with bed.dispatcher:
            bed.dispatcher.on_worker(view("m-0", slots=2))
            yield bed
    finally:
        process.kill()
        await process.wait()
        await driver.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def llama() -> AsyncIterator[LlamaBed]:
    async with llama_bed() as bed:
        yield bed


@pytest.mark.parametrize("endpoint", [Endpoint.CHAT, Endpoint.COMPLETIONS])
async def test_a_greedy_answer_of_llamacpp_cut_here_and_there_is_the_undisturbed_one(
    llama: Bed, endpoint: Endpoint
) -> None:
    prompt = "Repeat exactly: 🙂🙂 Größe, 世界, naïve. Then count to ten."
    undisturbed = await llama.tell(ask(endpoint=endpoint, prompt=prompt))
    assert (undisturbed.faults, undisturbed.legs) == ([], ["done"])

    for at in (1, 2, 7, 12):
        cut = await llama.tell(ask(endpoint=endpoint, prompt=prompt), after(at))
        check_equal(cut, undisturbed)
        # Its slot has kept all the rest.
        assert cut.usage["forebay"] == {"legs": 2, "recomputed_tokens": 1, "exactness": "token"}


@pytest.mark.parametrize("body", [{"max_tokens": 40}, {"max_tokens": 9}, {"stop": ["ten", "guid"]}], ids=str)
async def test_an_answer_of_llamacpp_cut_again_and_again_ends_where_it_should(llama: Bed, body: dict[str, Any]) -> None:
    prompt = "Count to ten in words."
    undisturbed = await llama.tell(ask(prompt=prompt, **body))

    cut = await llama.tell(ask(prompt=prompt, **body), every(7))

    check_equal(cut, undisturbed)


async def test_a_whole_answer_of_llamacpp_loses_nothing_when_it_is_cut(llama: Bed) -> None:
    undisturbed = await llama.tell(ask(stream=False))

    cut = await llama.tell(ask(stream=False), every(6))

    check_equal(cut, undisturbed)
    assert cut.usage["forebay"]["legs"] > 2
    assert cut.legs[:3] == ["preempted"] * 3


@pytest.mark.parametrize("num_expected", [0, 2])  # two more may have been started, of which the engine does not know
async def test_a_slot_that_others_have_had_meanwhile_is_restored(llama: Bed, num_expected: int) -> None:
    driver = llama.drivers["m-0"]
    assert isinstance(driver, LlamaCppDriver)
    question = "Who was the first man on the moon? " * 8
    for _ in range(2):  # the second finds the prompt in its slot, as the third will: rounding is the same then
        undisturbed = await llama.tell(ask(prompt=question))
    texts = await beginning(driver, asked := ask(prompt=question), num=10)
    await driver.park(asked, lambda: num_expected)
    others = [ask(prompt=f"What is {number} and one?") for number in (1, 2)]
    others = [msgspec.structs.replace(other, context=CallContext(TenantId("other"))) for other in others]
    await asyncio.gather(*(llama.tell(other) for other in others))

    pieces = [piece async for piece in driver.resume(asked, Continuation(texts))]

    assert "".join(texts) + "".join(piece.text for piece in pieces) == undisturbed.text
    assert next(piece.prefilled for piece in pieces if piece.prefilled is not None) == 1


async def test_what_was_saved_of_one_request_is_given_to_no_other(llama: Bed) -> None:
    driver = llama.drivers["m-0"]
    assert isinstance(driver, LlamaCppDriver)
    prompt = "Tell me of the sea, and of the ships on it, and of the wind. " * 4
    texts = await beginning(driver, asked := ask(prompt=prompt), num=5)
    await driver.park(asked, lambda: 0)
    stranger = msgspec.structs.replace(ask(prompt=prompt), context=CallContext(TenantId("other")))

    pieces = [piece async for piece in driver.resume(stranger, Continuation(texts))]

    assert next(piece.prefilled for piece in pieces if piece.prefilled is not None) > 50


async def test_a_real_engine_that_nothing_is_known_of_makes_an_answer_in_parts(
    llama: LlamaBed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engines.drivers.openai._QUANTUM", 8)
    driver = OpenAIDriver(llama.url, KEY)
    assert (await driver.capabilities()).continuation
    bed = Bed({"m-0": driver}, llama.constant)
    bed.scheduler.num_others = 1
    async with bed.dispatcher:
        bed.dispatcher.on_worker(view("m-0", slots=2))
        cut = await bed.tell(ask(prompt="Tell me of ships."), after(3))
    await driver.close()

    assert cut.faults == []
    # The first may be lost: llama.cpp closes some connections that it has promised to keep.
    assert [leg for leg in cut.legs if leg != "lost"] == ["preempted", "done"]
    assert (cut.finish, cut.usage["completion_tokens"]) == ("length", LENGTH)
    assert cut.usage["forebay"]["legs"] >= 3


async def beginning(driver: Driver, asked: Call, *, num: int) -> list[str]:
    """Ask, leave after so many pieces, and return the texts of these."""
    texts: list[str] = []
    async with aclosing(driver.run(asked)) as chunks:  # type: ignore[type-var] # drivers are generators
        async for chunk in chunks:
            events = [json_of(frame) for frame in split(chunk.raw)]
            texts += [text for event in events if (text := event["choices"][0]["delta"].get("content"))]
            if len(texts) >= num:
                break
    return texts
