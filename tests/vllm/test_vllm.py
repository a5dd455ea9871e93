"""What a real vLLM (CPU build, SmolLM2) does behind a gateway that launches, drains, kills and restarts it.

The lives and deaths stand at the end, each a new start of vLLM; every test finds it ready and may be run alone.
"""

import asyncio
import contextlib
import json
import re
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anthropic
import httpx
import openai
import psutil
import pytest
import pytest_asyncio
from pydantic import BaseModel

from tests.e2e.asking import logged
from tests.vllm.conftest import CONTEXT, SLOTS, START_TIMEOUT_S, Vllm

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(2.5 * START_TIMEOUT_S)]

CHAT = "/v1/chat/completions"
HELLO: list[Any] = [{"role": "user", "content": "Say hello."}]
GREEDY: dict[str, Any] = {"model": "smol", "temperature": 0, "max_tokens": 8}
ASKED: dict[str, Any] = {**GREEDY, "messages": HELLO}
TOO_LONG = "word " * (CONTEXT + 500)
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"]},
    },
}
WITH_TOOLS: dict[str, Any] = {**ASKED, "max_tokens": 64, "tools": [WEATHER], "tool_choice": "required"}
STREAMS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (CHAT, ASKED),
    "chat, usage": (CHAT, {**ASKED, "stream_options": {"include_usage": True}}),
    "chat, usage in each": (
        CHAT,
        {**ASKED, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    ),
    "chat, token ids": (CHAT, {**ASKED, "return_token_ids": True}),
    "chat, log probabilities": (CHAT, {**ASKED, "logprobs": True, "top_logprobs": 2}),
    "chat, a tool": (CHAT, WITH_TOOLS),
    "completion": ("/v1/completions", {**GREEDY, "prompt": "Once upon a time"}),
    "responses": ("/v1/responses", {"model": "smol", "temperature": 0, "max_output_tokens": 8, "input": "Say hello."}),
    "messages": ("/v1/messages", ASKED),
}
# What differs between two answers to the same question: ids and times. And vLLM puts its fingerprint on a stream's last
# event, which is the usage if that is asked for: the gateway asks, and keeps the event from who did not.
ID = re.compile(rb'"(?:chatcmpl|cmpl|resp|msg|req|call|fc)[-_][\w-]+"')
TIME = re.compile(rb'"(created(?:_at)?|completed_at)":\d+(?:\.\d+)?')
FINGERPRINT = re.compile(rb',"system_fingerprint":"[^"]*"')


class Verdict(BaseModel):
    """A structured answer."""

    ok: bool


def nameless(answer: bytes) -> bytes:
    """Return an answer without what makes it differ from another one to the same question."""
    return FINGERPRINT.sub(b"", TIME.sub(rb'"\1":0', ID.sub(b'"id"', answer)))


def events_of(stream: bytes) -> list[Any]:
    """Return the JSON of each event of a stream."""
    lines = [line.removeprefix(b"data: ") for line in stream.splitlines() if line.startswith(b"data: ")]
    return [json.loads(line) for line in lines if line != b"[DONE]"]


def story(number: int, num_tokens: int) -> dict[str, Any]:
    """Return a request whose streamed answer has exactly so many tokens, an event each."""
    messages = [{"role": "user", "content": f"Tell me story number {number}."}]
    length = {"max_tokens": num_tokens, "ignore_eos": True}
    return {**GREEDY, **length, "messages": messages, "stream": True, "stream_options": {"include_usage": True}}


class Reader:
    """Reads one stream in a task of its own."""

    def __init__(self, client: httpx.AsyncClient, body: dict[str, Any]) -> None:
        self.status = 0
        self.received = b""
        self.has_begun = asyncio.Event()
        self.task = asyncio.create_task(self._read(client, body))

    async def _read(self, client: httpx.AsyncClient, body: dict[str, Any]) -> None:
        try:
            async with client.stream("POST", CHAT, json=body) as answer:
                self.status = answer.status_code
                async for data in answer.aiter_bytes():
                    self.received += data
                    self.has_begun.set()
        finally:
            self.has_begun.set()

    @property
    def num_tokens(self) -> int:
        """How many tokens have come."""
        return sum(bool(event.get("choices")) and "role" not in event["choices"][0]["delta"] for event in self.events)

    @property
    def completion_tokens(self) -> int | None:
        """How many tokens its usage tells, if it was asked for and has come."""
        return next((event["usage"]["completion_tokens"] for event in self.events if event.get("usage")), None)

    @property
    def events(self) -> list[Any]:
        return events_of(self.received)

    @property
    def error(self) -> str | None:
        """The code of the error that ended it, if there was one; it is the last event then, and the only one."""
        errors = [event["error"]["code"] for event in self.events if "error" in event]
        assert len(errors) <= 1
        assert not errors or "error" in self.events[-1]
        return errors[0] if errors else None

    @property
    def is_complete(self) -> bool:
        return self.received.endswith(b"data: [DONE]\n\n") and self.error is None


async def until(is_so: Callable[[], Awaitable[bool] | bool], timeout_s: float, what: str) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = is_so()
        if found if isinstance(found, bool) else await found:
            return
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        await asyncio.sleep(0.1)


async def until_gone(processes: list[psutil.Process], url: str, timeout_s: float) -> None:
    """Wait until none of the processes is left and nobody listens where they did."""
    await until(lambda: not [one for one in processes if alive(one)], timeout_s, f"{processes} are gone")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", int(url.rsplit(":", 1)[1])))


def alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


async def num_requests(direct: httpx.AsyncClient) -> tuple[int, int]:
    """Return how many requests vLLM runs, and how many wait in it."""
    text = (await direct.get("/metrics")).text
    found = dict(re.findall(r"^vllm:num_requests_(running|waiting)(?:{.*})? ([\d.]+)$", text, re.MULTILINE))
    return int(float(found["running"])), int(float(found["waiting"]))


@pytest_asyncio.fixture
async def client(vllm: Vllm) -> AsyncIterator[httpx.AsyncClient]:
    """A bare client of the gateway."""
    async with vllm.client() as made:
        yield made


@pytest_asyncio.fixture
async def direct(vllm: Vllm) -> AsyncIterator[httpx.AsyncClient]:
    """A bare client of vLLM itself."""
    async with vllm.direct() as made:
        yield made


@pytest_asyncio.fixture
async def gpt(vllm: Vllm) -> AsyncIterator[openai.AsyncOpenAI]:
    """OpenAI's own client."""
    async with openai.AsyncOpenAI(base_url=vllm.url + "/v1", api_key=vllm.key, max_retries=0, timeout=600) as made:
        yield made


@pytest_asyncio.fixture
async def claude(vllm: Vllm) -> AsyncIterator[anthropic.AsyncAnthropic]:
    """Anthropic's own client."""
    async with anthropic.AsyncAnthropic(base_url=vllm.url, api_key=vllm.key, max_retries=0, timeout=600) as made:
        yield made


class TestAnswers:
    """Nothing is lost or changed on the way."""

    async def test_a_chat_is_answered_and_counted(self, gpt: openai.AsyncOpenAI) -> None:
        answer = await gpt.chat.completions.create(model="smol", messages=HELLO, max_tokens=8, temperature=0)

        assert answer.model == "smol"
        assert answer.choices[0].message.content
        assert answer.usage is not None
        assert answer.usage.prompt_tokens > 20
        assert answer.usage.completion_tokens == 8

    async def test_a_prompt_is_cached_for_its_own_tenant_alone(self, vllm: Vllm, client: httpx.AsyncClient) -> None:
        body = {
            "model": "smol",
            "prompt": "A secret of one tenant. " * 30,
            "max_tokens": 1,
            "cache_salt": "everybody's",
        }

        async def num_cached(asker: httpx.AsyncClient) -> int:
            answer = (await asker.post("/v1/completions", json=body)).raise_for_status()
            details = answer.json()["usage"]["prompt_tokens_details"] or {}
            return int(details.get("cached_tokens") or 0)

        async with vllm.stranger() as stranger:
            cached = [await num_cached(asker) for asker in (client, client, stranger, stranger)]
        assert [num > 100 for num in cached] == [False, True, False, True]
        assert cached[2] == 0

    @pytest.mark.parametrize("kind", STREAMS)
    async def test_a_stream_has_the_bytes_that_vllm_sends(
        self, kind: str, client: httpx.AsyncClient, direct: httpx.AsyncClient
    ) -> None:
        path, body = STREAMS[kind]
        await direct.post(path, json={**body, "stream": True})  # from here on the prompt is in its cache

        expected = await direct.post(path, json={**body, "stream": True})
        answer = await client.post(path, json={**body, "stream": True})

        assert expected.status_code == answer.status_code == 200, answer.text
        assert nameless(answer.content) == nameless(expected.content)
        assert answer.headers["content-type"].startswith("text/event-stream")

    async def test_a_whole_answer_has_the_bytes_that_vllm_sends(
        self, client: httpx.AsyncClient, direct: httpx.AsyncClient
    ) -> None:
        await direct.post(CHAT, json=ASKED)

        expected, answer = await direct.post(CHAT, json=ASKED), await client.post(CHAT, json=ASKED)

        assert nameless(answer.content) == nameless(expected.content)

    async def test_the_first_token_comes_long_before_the_last(self, client: httpx.AsyncClient) -> None:
        began = time.monotonic()
        reader = Reader(client, story(1, 120))
        await reader.has_begun.wait()
        first_s = time.monotonic() - began
        await reader.task

        assert reader.num_tokens == 120
        assert first_s < (time.monotonic() - began) / 2

    @pytest.mark.parametrize("path", [CHAT, "/v1/messages"])
    async def test_a_stream_is_metered_though_its_usage_was_not_asked_for(
        self, path: str, vllm: Vllm, client: httpx.AsyncClient
    ) -> None:
        answer = await client.post(path, json={**ASKED, "stream": True})
        usage = (await logged(vllm.gateway, answer.headers["x-request-id"]))["usage"]
        assert usage["completion_tokens"] == 8
        assert usage["prompt_tokens"] == (await client.post(CHAT, json=ASKED)).json()["usage"]["prompt_tokens"]

    async def test_a_prompt_of_token_ids_is_completed_with_token_ids(self, client: httpx.AsyncClient) -> None:
        prompt = [28120, 905, 260]

        answer = await client.post("/v1/completions", json={**GREEDY, "prompt": prompt, "return_token_ids": True})

        (choice,) = answer.json()["choices"]
        assert choice["prompt_token_ids"] == prompt
        assert len(choice["token_ids"]) == 8

    async def test_a_started_message_is_continued(self, client: httpx.AsyncClient) -> None:
        messages = [*HELLO, {"role": "assistant", "content": "Hello, my name is"}]

        answer = await client.post(
            CHAT, json={**ASKED, "messages": messages, "continue_final_message": True, "add_generation_prompt": False}
        )

        assert answer.status_code == 200, answer.text
        assert not answer.json()["choices"][0]["message"]["content"].startswith("Hello, my name is")

    async def test_a_structured_output_follows_its_schema(self, gpt: openai.AsyncOpenAI) -> None:
        answer = await gpt.chat.completions.parse(
            model="smol", messages=HELLO, max_tokens=64, temperature=0, response_format=Verdict
        )

        assert isinstance(answer.choices[0].message.parsed, Verdict)

    async def test_a_required_tool_is_called(self, gpt: openai.AsyncOpenAI) -> None:
        answer = await gpt.chat.completions.create(**WITH_TOOLS)

        calls = answer.choices[0].message.tool_calls
        assert calls
        assert calls[0].type == "function"
        assert calls[0].function.name == "get_weather"
        json.loads(calls[0].function.arguments)

    async def test_a_response_is_created(self, gpt: openai.AsyncOpenAI) -> None:
        answer = await gpt.responses.create(model="smol", input="Say hello.", max_output_tokens=8)

        assert answer.output_text
        assert answer.usage is not None
        assert answer.usage.output_tokens == 8

    async def test_a_response_is_streamed(self, gpt: openai.AsyncOpenAI) -> None:
        stream = await gpt.responses.create(model="smol", input="Say hello.", max_output_tokens=8, stream=True)

        kinds = [event.type async for event in stream]

        assert kinds[0] == "response.created"
        assert kinds.count("response.output_text.delta") >= 4
        assert kinds[-1] in {"response.completed", "response.incomplete"}

    async def test_a_message_is_created(self, claude: anthropic.AsyncAnthropic) -> None:
        answer = await claude.messages.create(model="smol", max_tokens=8, messages=HELLO)

        assert answer.content[0].type == "text"
        assert answer.content[0].text
        assert answer.stop_reason == "max_tokens"
        assert answer.usage.output_tokens == 8

    async def test_a_message_is_streamed(self, claude: anthropic.AsyncAnthropic) -> None:
        async with claude.messages.stream(model="smol", max_tokens=8, messages=HELLO) as stream:
            texts = [text async for text in stream.text_stream]
            message = await stream.get_final_message()

        assert len(texts) >= 4
        assert message.content[0].type == "text"
        assert message.content[0].text == "".join(texts)
        assert message.usage.output_tokens == 8

    async def test_the_tokens_of_a_message_are_counted(
        self, claude: anthropic.AsyncAnthropic, client: httpx.AsyncClient
    ) -> None:
        counted = await claude.messages.count_tokens(model="smol", messages=HELLO)

        assert counted.input_tokens == (await client.post(CHAT, json=ASKED)).json()["usage"]["prompt_tokens"]

    async def test_a_text_goes_to_tokens_and_back(self, client: httpx.AsyncClient) -> None:
        tokens = (await client.post("/tokenize", json={"model": "smol", "prompt": "year 2024"})).json()
        text = (await client.post("/detokenize", json={"model": "smol", "tokens": tokens["tokens"]})).json()

        assert tokens["count"] == len(tokens["tokens"]) > 1
        assert tokens["max_model_len"] == CONTEXT
        assert text == {"prompt": "year 2024"}


class TestRefusals:
    """What cannot be answered is said so, in the client's own terms."""

    async def test_embeddings_of_a_model_that_has_none_are_refused(self, gpt: openai.AsyncOpenAI) -> None:
        with pytest.raises(openai.BadRequestError, match="does not serve /v1/embeddings") as caught:
            await gpt.embeddings.create(model="smol", input="a text")

        assert caught.value.code == "unsupported_parameter"

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize(
        ("path", "prompt"),
        [
            (CHAT, {"messages": [{"role": "user", "content": TOO_LONG}]}),
            ("/v1/completions", {"prompt": TOO_LONG}),
            ("/v1/responses", {"input": TOO_LONG}),
            ("/v1/messages", {"messages": [{"role": "user", "content": TOO_LONG}], "max_tokens": 8}),
        ],
    )
    async def test_a_prompt_longer_than_the_context_is_refused(
        self, path: str, prompt: dict[str, Any], stream: bool, client: httpx.AsyncClient
    ) -> None:
        answer = await client.post(path, json={"model": "smol", "stream": stream, **prompt})

        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "context_length_exceeded"
        assert str(CONTEXT) in answer.json()["error"]["message"]

    async def test_a_bad_value_is_refused_once(self, client: httpx.AsyncClient) -> None:
        answer = await client.post(CHAT, json={**ASKED, "temperature": -1})

        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "temperature"

    async def test_vllm_itself_answers_nobody_but_the_gateway(self, vllm: Vllm) -> None:
        async with httpx.AsyncClient(base_url=vllm.worker()["url"], trust_env=False, timeout=60) as stranger:
            answer = await stranger.post(CHAT, json=ASKED)

        assert answer.status_code == 401


class TestWatching:
    """What the gateway knows of vLLM."""

    def test_its_capabilities_are_proven(self, vllm: Vllm) -> None:
        worker = vllm.worker()

        known = worker["capabilities"]
        assert worker["context_tokens"] == known["context_tokens"] == CONTEXT
        assert known["token_ids"]
        assert known["token_prompts"]
        assert known["continuation"]
        assert known["metrics"]
        assert known["models"] == ["smol"]
        assert known["version"]
        assert set(known["endpoints"]) == {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"}

    async def test_its_load_is_read_while_it_works(self, vllm: Vllm, client: httpx.AsyncClient) -> None:
        readers = [Reader(client, story(number, 300)) for number in range(3)]

        await until(lambda: vllm.worker()["load"]["running"] == 3, 120, "three run")
        assert vllm.worker()["running"] == 3
        await asyncio.gather(*(reader.task for reader in readers))
        await until(lambda: vllm.worker()["load"]["running"] == 0, 60, "none runs")

        assert [reader.num_tokens for reader in readers] == [300] * 3

    async def test_more_requests_than_slots_wait_in_the_gateway(
        self, client: httpx.AsyncClient, direct: httpx.AsyncClient
    ) -> None:
        readers = [Reader(client, story(number, 40)) for number in range(2 * SLOTS)]
        finished = asyncio.gather(*(reader.task for reader in readers))
        seen = []
        while not finished.done():
            seen.append(await num_requests(direct))
            await asyncio.sleep(0.05)

        assert all(reader.is_complete and reader.num_tokens == 40 for reader in readers)
        assert max(running + waiting for running, waiting in seen) <= SLOTS

    async def test_a_client_that_leaves_frees_its_slot(
        self, vllm: Vllm, client: httpx.AsyncClient, direct: httpx.AsyncClient
    ) -> None:
        async with client.stream("POST", CHAT, json=story(1, 1900)) as answer:
            await anext(answer.aiter_bytes())
            assert await num_requests(direct) == (1, 0)

        async def is_free() -> bool:
            return await num_requests(direct) == (0, 0)

        await until(is_free, 30, "vLLM runs nothing")
        await until(lambda: vllm.worker()["running"] == 0, 30, "the gateway knows")


class TestLife:
    """Drain, restart, death. Each test costs a start of vLLM."""

    async def test_a_drain_finishes_what_runs_and_leaves_nothing(self, vllm: Vllm, client: httpx.AsyncClient) -> None:
        processes, url = vllm.processes(), vllm.worker()["url"]
        reader = Reader(client, story(1, 250))
        await reader.has_begun.wait()

        drain = asyncio.create_task(asyncio.to_thread(vllm.tell, "drain"))
        await until(lambda: vllm.worker()["state"] == "draining", 30, "it drains")
        late = await client.post(CHAT, json=ASKED)
        await reader.task
        await drain

        assert late.status_code == 503
        assert reader.is_complete
        assert reader.num_tokens == 250
        assert vllm.worker()["state"] == "stopped"
        await until_gone(processes, url, 5)

    async def test_a_restart_serves_again(self, launched: Vllm) -> None:
        launched.tell("restart")
        await asyncio.to_thread(launched.until_ready)

        async with launched.client() as client:
            answer = await client.post(CHAT, json=ASKED)

        assert answer.status_code == 200

    async def test_a_killed_engine_process_is_replaced_and_nobody_notices(
        self, vllm: Vllm, client: httpx.AsyncClient
    ) -> None:
        processes, before = vllm.processes(), vllm.worker()
        running = [Reader(client, story(number, 600)) for number in range(SLOTS)]
        await asyncio.gather(*(reader.has_begun.wait() for reader in running))
        waiting = [Reader(client, story(number, 20)) for number in range(SLOTS)]
        await asyncio.sleep(0.5)

        next(one for one in processes if "EngineCore" in one.name()).kill()
        await asyncio.gather(*(reader.task for reader in running))
        await until_gone(processes, before["url"], 10)
        await asyncio.gather(*(reader.task for reader in waiting))

        assert [(reader.status, reader.is_complete, reader.completion_tokens) for reader in running] == [
            (200, True, 600)
        ] * SLOTS
        assert [(reader.status, reader.is_complete, reader.num_tokens) for reader in waiting] == [
            (200, True, 20)
        ] * SLOTS
        after = vllm.worker()
        assert after["restarts"] == before["restarts"] + 1
        assert after["state"] == "ready"

    async def test_a_stop_waits_for_nobody_and_leaves_nothing(self, vllm: Vllm, client: httpx.AsyncClient) -> None:
        processes, url = vllm.processes(), vllm.worker()["url"]
        readers = [Reader(client, story(number, 1500)) for number in range(3)]
        await asyncio.gather(*(reader.has_begun.wait() for reader in readers))

        await asyncio.to_thread(vllm.tell, "stop")
        await until_gone(processes, url, 5)
        await asyncio.gather(*(reader.task for reader in readers))

        assert vllm.worker()["state"] == "stopped"
        assert [reader.error for reader in readers] == ["worker_lost"] * 3

    async def test_a_gateway_killed_by_force_leaves_no_vllm(self, vllm: Vllm, client: httpx.AsyncClient) -> None:
        processes, url = [*vllm.processes(), *vllm.gateway.descendants()], vllm.worker()["url"]
        readers = [Reader(client, story(number, 1500)) for number in range(3)]
        await asyncio.gather(*(reader.has_begun.wait() for reader in readers))

        vllm.gateway.kill()
        await until_gone(processes, url, 10)
        ends = await asyncio.gather(*(reader.task for reader in readers), return_exceptions=True)

        assert all(isinstance(end, httpx.TransportError) for end in ends)
