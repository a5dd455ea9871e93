"""Answers of a real vLLM that are cut and go on: nothing delivered is lost, doubled or altered, and greedy ones differ
from the undisturbed only where rounding does."""

from collections.abc import AsyncIterator
from typing import Any

import msgspec
import psutil
import pytest
import pytest_asyncio

from core.chat import Call, Endpoint
from engines.driver import Continuation
from engines.drivers.vllm import VllmDriver
from tests.contract.beds import Bed, after, ask, every
from tests.fakes.workers import view
from tests.vllm.conftest import SLOTS, START_TIMEOUT_S, Vllm

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(2.5 * START_TIMEOUT_S)]

PROMPT = "Repeat exactly: 🙂🙂 Größe, 世界, naïve. Then count to ten in words."


@pytest_asyncio.fixture
async def bed(vllm: Vllm) -> AsyncIterator[Bed]:
    worker = vllm.worker()
    key = psutil.Process(worker["pid"]).environ()["VLLM_API_KEY"]
    driver = VllmDriver(worker["url"], key, served_name="smol")
    assert (await driver.capabilities()).continuation
    made = Bed({"m-0": driver}, ("id", "model", "object", "created"))
    async with made.dispatcher:
        made.dispatcher.on_worker(view("m-0", slots=SLOTS))
        yield made
    await driver.close()


@pytest.mark.parametrize("endpoint", [Endpoint.CHAT, Endpoint.COMPLETIONS])
async def test_a_greedy_answer_cut_here_and_there_is_the_undisturbed_one(bed: Bed, endpoint: Endpoint) -> None:
    undisturbed = await bed.tell(ask(endpoint=endpoint, prompt=PROMPT))
    num_equal = num_cut = 0
    for at in (1, 2, 5, 11, 17):
        cut = await bed.tell(ask(endpoint=endpoint, prompt=PROMPT), after(at))
        assert cut.faults == []
        assert cut.legs in (["preempted", "done"], ["done"])  # a starved server sends the rest at once: nothing to cut
        num_cut += len(cut.legs) > 1
        assert cut.usage["prompt_tokens"] == undisturbed.usage["prompt_tokens"]
        assert cut.usage["completion_tokens"] <= undisturbed.usage["completion_tokens"] or cut.finish == "stop"
        num_equal += (cut.text, cut.finish) == (undisturbed.text, undisturbed.finish)
    print(f"{num_equal} of 5 equal the undisturbed answer, {num_cut} were cut")
    assert num_equal
    assert num_cut >= 2


@pytest.mark.parametrize("body", [{"max_tokens": 9}, {"stop": ["ten", "two"]}, {"max_tokens": 64}], ids=str)
async def test_an_answer_cut_again_and_again_keeps_its_limits(bed: Bed, body: dict[str, Any]) -> None:
    cut = await bed.tell(ask(prompt=PROMPT, **body), every(6))

    assert cut.faults == []
    assert cut.finish in {"stop", "length"}
    assert cut.usage["completion_tokens"] <= body.get("max_tokens", 24)
    assert (cut.finish == "length") == (cut.usage["completion_tokens"] == body.get("max_tokens", 24))
    assert not any(stop in cut.text for stop in body.get("stop", ()))


async def test_an_answer_with_special_tokens_goes_on_by_the_ids_that_vllm_told(
    bed: Bed, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(_: object) -> dict[str, object]:
        raise AssertionError("the ids of an answer are known")

    def asked() -> Call:  # past its end the model writes the marks of turns, which have no text
        return ask(prompt="Say hi.", max_tokens=48, ignore_eos=True)

    undisturbed = await bed.tell(asked())
    monkeypatch.setattr(bed.drivers["m-0"], "tokenize", refuse)
    cut = await bed.tell(asked(), every(5))

    print(f"{len(cut.legs)} legs, equal to the undisturbed answer: {cut.text == undisturbed.text}")
    assert (cut.faults, cut.finish, cut.usage["completion_tokens"]) == ([], "length", 48)
    assert cut.text[:8] == undisturbed.text[:8]


async def test_a_prompt_that_would_end_in_half_a_letter_is_not_told_again(bed: Bed) -> None:
    driver, asked = bed.drivers["m-0"], ask(prompt="Say foxes.", max_tokens=24, ignore_eos=True)
    assert isinstance(driver, VllmDriver)
    told = await driver.tokenize({"prompt": "one 🦊🐻", "add_special_tokens": False})
    ids = msgspec.convert(told["tokens"], list[int])[:-1]
    past = Continuation(("one 🦊",), ids=ids, num_at_once=len(ids), num_tokens=len(ids))

    pieces = [piece async for piece in driver.resume(asked, past)]

    text = "".join(piece.text for piece in pieces)
    assert "foxes" not in text, "vLLM tells all of a prompt that ends in half a letter"
    assert "user" not in text
    assert pieces[-1].usage is not None
    assert pieces[-1].usage.completion_tokens == 24


async def test_what_the_client_reads_of_an_undisturbed_answer_is_what_vllm_writes(bed: Bed, vllm: Vllm) -> None:
    asked = ask(prompt=PROMPT, max_tokens=6)
    run = bed.dispatcher.submit(asked)
    body = b"".join([piece async for piece in run.chunks()])
    run.close()
    async with vllm.direct() as client:
        plain = await client.post("/v1/chat/completions", json={**asked.body, "model": "smol"})

    assert members(body) == members(plain.content)
    assert b'token_ids":[' not in body


def members(body: bytes) -> list[list[bytes]]:
    """Return the events' bytes less what is another one in every answer."""
    changing = (b'"id":', b'"created":', b'"usage":')
    frames = [frame for frame in body.split(b"\n\n") if b"[DONE]" not in frame and b'"usage":{' not in frame]
    return [[part for part in frame.split(b",") if not any(name in part for name in changing)] for frame in frames]
