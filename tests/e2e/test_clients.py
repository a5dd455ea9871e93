"""The clients that people already have, unchanged, against a running gateway: fake engine and real llama.cpp."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Literal

import anthropic
import forebay
import openai
import pytest
import pytest_asyncio
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from openai.types.chat import ChatCompletionChunk, ChatCompletionMessageParam, ChatCompletionToolParam
from pydantic import BaseModel, SecretStr

from tests.e2e.conftest import LIMITED_KEY, Target
from tests.fakes.engine import FakeEngine
from tests.fakes.gateway import GatewayProcess

MOST = 12
FOR_JSON = 48  # llama.cpp counts two tokens for each that it shows under a grammar
HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Say hello."}]
SLOWLY = "please answer slowly"
WEATHER: ChatCompletionToolParam = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tell the weather of a town",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"town": {"type": "string"}},
            "required": ["town"],
            "additionalProperties": False,
        },
    },
}


class Verdict(BaseModel):
    """A structured answer that fits a few tokens."""

    verdict: Literal["yes", "no"]


@pytest_asyncio.fixture(loop_scope="module")
async def slow(engine: FakeEngine) -> AsyncIterator[FakeEngine]:
    """The fake engine, which takes ten seconds for a prompt that says `SLOWLY`; its counters start at zero."""
    await engine.reset()
    await engine.faults(trickle_ms=300, contains=SLOWLY)
    yield engine
    await engine.reset()


@pytest_asyncio.fixture(loop_scope="module")
async def client(target: Target) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=target.v1, api_key=target.key, max_retries=0, timeout=120) as made:
        yield made


@pytest.fixture
def sync_client(target: Target) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=target.v1, api_key=target.key, max_retries=0, timeout=120) as made:
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def fake_client(fake: Target) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=fake.v1, api_key=fake.key, max_retries=0) as made:
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def claude(target: Target) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(base_url=target.url, api_key=target.key, max_retries=0, timeout=120) as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def told_each(
    gateway: GatewayProcess, real_gateway: GatewayProcess, llama_index_python: Path
) -> dict[str, dict[str, Any]]:
    """What `llama_index_client.py` was told by each model: one process, since LlamaIndex takes seconds to import."""
    script = Path(__file__).with_name("llama_index_client.py")
    arguments = (gateway.url, gateway.key, "fake", real_gateway.url, real_gateway.key, "smollm2")
    process = await asyncio.create_subprocess_exec(
        str(llama_index_python), str(script), *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    answers: dict[str, dict[str, Any]] = json.loads(out)
    return answers


@pytest.fixture(scope="module")
def told(target: Target, told_each: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What `llama_index_client.py` was told."""
    return told_each[target.model]


def text_of(chunks: list[ChatCompletionChunk]) -> str:
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


class TestOpenAI:
    """The official `openai` package."""

    async def test_a_chat_is_answered_and_metered(self, client: openai.AsyncOpenAI, target: Target) -> None:
        answer = await client.chat.completions.create(model=target.model, messages=HELLO, max_tokens=MOST)

        assert answer.object == "chat.completion"
        assert answer.model == target.model
        assert answer.choices[0].message.role == "assistant"
        assert answer.choices[0].message.content
        assert answer.choices[0].finish_reason in ("stop", "length")
        assert answer.usage is not None
        assert answer.usage.prompt_tokens > 0
        assert 0 < answer.usage.completion_tokens <= MOST
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens

    async def test_a_stream_says_what_the_whole_answer_says(self, client: openai.AsyncOpenAI, target: Target) -> None:
        async with await client.chat.completions.create(
            model=target.model, messages=HELLO, max_tokens=MOST, temperature=0, seed=1, stream=True
        ) as stream:
            chunks = [chunk async for chunk in stream]
        whole = await client.chat.completions.create(
            model=target.model, messages=HELLO, max_tokens=MOST, temperature=0, seed=1
        )

        assert text_of(chunks) == whole.choices[0].message.content
        assert len({chunk.id for chunk in chunks}) == 1
        assert {chunk.model for chunk in chunks} == {target.model}
        assert chunks[0].choices[0].delta.role == "assistant"
        assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason

    async def test_usage_that_nobody_asked_for_is_not_in_the_stream(
        self, client: openai.AsyncOpenAI, target: Target
    ) -> None:
        async with await client.chat.completions.create(
            model=target.model, messages=HELLO, max_tokens=MOST, stream=True
        ) as stream:
            chunks = [chunk async for chunk in stream]

        assert all(chunk.choices for chunk in chunks)
        assert all(chunk.usage is None for chunk in chunks)

    async def test_include_usage_gives_one_last_chunk_that_counts_like_the_whole_answer(
        self, client: openai.AsyncOpenAI, target: Target
    ) -> None:
        async with await client.chat.completions.create(
            model=target.model,
            messages=HELLO,
            max_tokens=MOST,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        ) as stream:
            *chunks, last = [chunk async for chunk in stream]
        whole = await client.chat.completions.create(model=target.model, messages=HELLO, max_tokens=MOST, temperature=0)

        assert last.choices == []
        assert all(chunk.usage is None for chunk in chunks)
        assert last.usage is not None
        assert whole.usage is not None
        assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (
            whole.usage.prompt_tokens,
            whole.usage.completion_tokens,
        )

    async def test_the_accumulating_stream_helper_ends_with_the_whole_answer(
        self, fake_client: openai.AsyncOpenAI
    ) -> None:
        # The fake engine alone: the helper raises where an answer ends at max_tokens.
        async with fake_client.chat.completions.stream(model="fake", messages=HELLO) as stream:
            kinds = {event.type async for event in stream}
            final = await stream.get_final_completion()

        assert {"chunk", "content.delta", "content.done"} <= kinds
        assert final.choices[0].message.content

    async def test_several_choices_come_with_their_index(self, client: openai.AsyncOpenAI, target: Target) -> None:
        answer = await client.chat.completions.create(model=target.model, messages=HELLO, max_tokens=4, n=2)

        assert [choice.index for choice in answer.choices] == [0, 1]

    async def test_plain_completions_work_whole_and_streamed(self, client: openai.AsyncOpenAI, target: Target) -> None:
        whole = await client.completions.create(model=target.model, prompt="Once upon", max_tokens=MOST, temperature=0)
        async with await client.completions.create(
            model=target.model, prompt="Once upon", max_tokens=MOST, temperature=0, stream=True
        ) as stream:
            streamed = "".join([choice.text async for chunk in stream for choice in chunk.choices])

        assert whole.object == "text_completion"
        assert whole.choices[0].text
        assert streamed == whole.choices[0].text

    async def test_embeddings_come_as_floats_of_one_length(self, client: openai.AsyncOpenAI, target: Target) -> None:
        # The package asks for base64 by itself and decodes it.
        answer = await client.embeddings.create(model=target.model, input=["one text", "another text"])

        assert [item.index for item in answer.data] == [0, 1]
        assert len(answer.data[0].embedding) == len(answer.data[1].embedding) > 0
        assert answer.data[0].embedding != answer.data[1].embedding
        assert isinstance(answer.data[0].embedding[0], float)
        assert answer.usage.prompt_tokens > 0

    async def test_floats_that_were_asked_for_are_the_same_numbers(
        self, client: openai.AsyncOpenAI, target: Target
    ) -> None:
        packed = await client.embeddings.create(model=target.model, input="one text")
        plain = await client.embeddings.create(model=target.model, input="one text", encoding_format="float")

        assert packed.data[0].embedding == pytest.approx(plain.data[0].embedding, abs=1e-5)

    async def test_models_are_listed_and_retrieved(self, client: openai.AsyncOpenAI, target: Target) -> None:
        listed = [model.id async for model in client.models.list()]
        model = await client.models.retrieve(target.model)

        assert target.model in listed
        assert (model.id, model.object) == (target.model, "model")

    async def test_a_schema_is_parsed_into_its_class(self, client: openai.AsyncOpenAI, target: Target) -> None:
        answer = await client.chat.completions.parse(
            model=target.model,
            messages=[{"role": "user", "content": "Is water wet?"}],
            response_format=Verdict,
            max_tokens=FOR_JSON,
            temperature=0,
        )

        assert isinstance(answer.choices[0].message.parsed, Verdict)

    async def test_a_request_with_tools_is_answered(self, client: openai.AsyncOpenAI, target: Target) -> None:
        answer = await client.chat.completions.create(
            model=target.model, messages=HELLO, tools=[WEATHER], tool_choice="auto", max_tokens=MOST
        )

        assert answer.choices[0].message.content or answer.choices[0].message.tool_calls

    async def test_headers_say_what_happened(self, client: openai.AsyncOpenAI, target: Target) -> None:
        raw = await client.chat.completions.with_raw_response.create(
            model=target.model, messages=HELLO, max_tokens=4, extra_headers={"x-request-id": "mine-1"}
        )
        answer = raw.parse()

        assert answer._request_id == raw.headers["x-request-id"] == "mine-1"
        assert raw.headers["x-forebay-model"] == target.model
        assert raw.headers["x-forebay-worker"].startswith(target.model)
        assert raw.headers["x-forebay-attempts"] == "1"
        assert float(raw.headers["x-forebay-queue-ms"]) >= 0
        assert float(raw.headers["x-forebay-overhead-ms"]) >= 0

    async def test_a_stream_has_the_headers_too(self, client: openai.AsyncOpenAI, target: Target) -> None:
        async with client.chat.completions.with_streaming_response.create(
            model=target.model, messages=HELLO, max_tokens=4, stream=True
        ) as raw:
            async for _ in raw.iter_bytes():
                pass

        assert raw.headers["content-type"].startswith("text/event-stream")
        assert raw.headers["x-forebay-worker"].startswith(target.model)
        assert raw.headers["x-request-id"]

    async def test_a_response_is_created_and_streamed(self, client: openai.AsyncOpenAI, target: Target) -> None:
        whole = await client.responses.create(
            model=target.model, input="Say hello.", max_output_tokens=MOST, temperature=0
        )
        async with await client.responses.create(
            model=target.model, input="Say hello.", max_output_tokens=MOST, temperature=0, stream=True
        ) as stream:
            events = [event async for event in stream]

        assert whole.output_text
        assert events[0].type == "response.created"
        assert events[-1].type in ("response.completed", "response.incomplete")
        assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole.output_text

    def test_the_sync_client_chats_and_streams(self, sync_client: openai.OpenAI, target: Target) -> None:
        whole = sync_client.chat.completions.create(model=target.model, messages=HELLO, max_tokens=MOST, temperature=0)
        with sync_client.chat.completions.create(
            model=target.model, messages=HELLO, max_tokens=MOST, temperature=0, stream=True
        ) as stream:
            streamed = text_of(list(stream))

        assert whole.choices[0].message.content
        assert streamed == whole.choices[0].message.content

    def test_the_sync_client_lists_embeds_and_completes(self, sync_client: openai.OpenAI, target: Target) -> None:
        assert target.model in [model.id for model in sync_client.models.list()]
        assert sync_client.embeddings.create(model=target.model, input="one text").data[0].embedding
        assert sync_client.completions.create(model=target.model, prompt="Once", max_tokens=4).choices[0].text


class TestOpenAITools:
    """Tool calls that are sure to come: those of the fake engine."""

    async def test_a_required_tool_is_called(self, fake_client: openai.AsyncOpenAI) -> None:
        answer = await fake_client.chat.completions.create(
            model="fake", messages=HELLO, tools=[WEATHER], tool_choice="required"
        )

        (call,) = answer.choices[0].message.tool_calls or []
        assert answer.choices[0].finish_reason == "tool_calls"
        assert call.type == "function"
        assert call.function.name == "weather"
        assert set(json.loads(call.function.arguments)) == {"town"}

    async def test_a_streamed_tool_call_is_put_together_by_its_index(self, fake_client: openai.AsyncOpenAI) -> None:
        async with fake_client.chat.completions.stream(
            model="fake", messages=HELLO, tools=[WEATHER], tool_choice="required"
        ) as stream:
            async for _ in stream:
                pass
            final = await stream.get_final_completion()

        (call,) = final.choices[0].message.tool_calls or []
        assert call.function.name == "weather"
        assert set(json.loads(call.function.arguments)) == {"town"}

    async def test_the_answer_of_a_tool_can_be_sent_back(self, fake_client: openai.AsyncOpenAI) -> None:
        asked = await fake_client.chat.completions.create(
            model="fake", messages=HELLO, tools=[WEATHER], tool_choice="required"
        )
        (call,) = asked.choices[0].message.tool_calls or []

        messages: list[Any] = [
            *HELLO,
            asked.choices[0].message.model_dump(exclude_none=True),
            {"role": "tool", "tool_call_id": call.id, "content": "rain"},
        ]
        answer = await fake_client.chat.completions.create(model="fake", messages=messages, tools=[WEATHER])

        assert answer.choices[0].message.content


class TestOpenAICancel:
    """A client that goes away stops the engine."""

    async def test_closing_an_async_stream_aborts_the_engine(
        self, fake_client: openai.AsyncOpenAI, slow: FakeEngine
    ) -> None:
        async with await fake_client.chat.completions.create(
            model="fake", messages=[{"role": "user", "content": SLOWLY}], stream=True
        ) as stream:
            await anext(aiter(stream))

        stats = await slow.until(aborted=1, in_flight=0)
        assert stats["finished"] == 0

    async def test_closing_a_sync_stream_aborts_the_engine(self, fake: Target, slow: FakeEngine) -> None:
        def read_one() -> None:
            with (
                openai.OpenAI(base_url=fake.v1, api_key=fake.key, max_retries=0) as client,
                client.chat.completions.create(
                    model="fake", messages=[{"role": "user", "content": SLOWLY}], stream=True
                ) as stream,
            ):
                next(iter(stream))

        await asyncio.to_thread(read_one)

        await slow.until(aborted=1, in_flight=0)

    async def test_cancelling_the_wait_for_a_whole_answer_aborts_the_engine(
        self, fake_client: openai.AsyncOpenAI, slow: FakeEngine
    ) -> None:
        async with asyncio.TaskGroup() as group:
            waiting = group.create_task(fake_client.completions.create(model="fake", prompt=SLOWLY, max_tokens=32))
            await slow.until(in_flight=1)
            waiting.cancel()

        await slow.until(aborted=1, in_flight=0)


class TestOpenAIErrors:
    """Each refusal is the class that a program catches."""

    async def test_an_unknown_key(self, target: Target) -> None:
        async with openai.AsyncOpenAI(base_url=target.v1, api_key="fbk_nobody-issued-this-one") as client:
            with pytest.raises(openai.AuthenticationError) as caught:
                await client.chat.completions.create(model=target.model, messages=HELLO)

        assert caught.value.code == "invalid_api_key"
        assert caught.value.request_id

    async def test_an_unknown_model(self, client: openai.AsyncOpenAI) -> None:
        with pytest.raises(openai.NotFoundError) as caught:
            await client.chat.completions.create(model="no-such-model", messages=HELLO)
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("no-such-model")

        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")

    async def test_a_model_that_the_key_may_not_use(self, fake: Target) -> None:
        async with openai.AsyncOpenAI(base_url=fake.v1, api_key=LIMITED_KEY) as client:
            allowed = await client.chat.completions.create(model="fake", messages=HELLO, max_tokens=4)
            with pytest.raises(openai.PermissionDeniedError) as caught:
                await client.chat.completions.create(model="org/hidden", messages=HELLO)
            listed = [model.id async for model in client.models.list()]

        assert allowed.choices
        assert caught.value.code == "model_not_allowed"
        assert listed == ["fake"]

    @pytest.mark.parametrize(
        "wrong",
        [
            {"max_tokens": -1},
            {"n": 0},
            {"max_tokens": "many"},
            {"messages": []},
            {"extra_body": {"forebay": {"no_such_option": 1}}},
            {"extra_body": {"forebay": "text"}},
        ],
        ids=["negative max_tokens", "n of 0", "max_tokens as text", "no messages", "unknown option", "options as text"],
    )
    async def test_a_bad_request(self, client: openai.AsyncOpenAI, target: Target, wrong: dict[str, Any]) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(**{"model": target.model, "messages": HELLO, **wrong})

        assert caught.value.type == "invalid_request_error"
        assert isinstance(caught.value.code, str)

    async def test_a_prompt_longer_than_the_context(self, client: openai.AsyncOpenAI, target: Target) -> None:
        long = "water and stone " * 4000

        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(
                model=target.model, messages=[{"role": "user", "content": long}], max_tokens=4
            )

        assert caught.value.code == "context_length_exceeded"

    async def test_an_unknown_route(self, client: openai.AsyncOpenAI) -> None:
        with pytest.raises(openai.NotFoundError) as caught:
            await client.fine_tuning.jobs.list()

        assert caught.value.code == "unknown_url"

    async def test_an_error_in_the_stream_is_raised_after_what_came_before_it(
        self, fake_client: openai.AsyncOpenAI, engine: FakeEngine
    ) -> None:
        await engine.faults(error_after=3, contains="break in the middle")

        async with await fake_client.chat.completions.create(
            model="fake", messages=[{"role": "user", "content": "break in the middle"}], stream=True
        ) as stream:
            chunks = [await anext(aiter(stream)) for _ in range(3)]
            with pytest.raises(openai.APIError) as caught:
                await anext(aiter(stream))
        await engine.reset()

        assert not isinstance(caught.value, openai.APIStatusError)
        assert text_of(chunks)

    async def test_our_errors_are_not_repeated_by_the_package(self, fake: Target, engine: FakeEngine) -> None:
        await engine.reset()
        await engine.faults(refuse_status=500, contains="always fails")

        async with openai.AsyncOpenAI(base_url=fake.v1, api_key=fake.key, max_retries=2) as client:
            with pytest.raises(openai.InternalServerError) as caught:
                await client.chat.completions.create(
                    model="fake", messages=[{"role": "user", "content": "always fails"}]
                )
        started = (await engine.stats())["started"]
        await engine.reset()

        assert caught.value.response.headers["x-should-retry"] == "false"
        assert started <= 3  # our own attempts, once; the package's two retries would make it nine


class TestAnthropic:
    """The official `anthropic` package, with the gateway's address and an x-api-key."""

    async def test_a_message_is_answered_and_metered(self, claude: anthropic.AsyncAnthropic, target: Target) -> None:
        message = await claude.messages.create(
            model=target.model, max_tokens=MOST, system="Be brief.", messages=[{"role": "user", "content": "Hello!"}]
        )

        assert message.type == "message"
        assert message.role == "assistant"
        assert message.model == target.model
        assert message.content[0].type == "text"
        assert message.content[0].text
        assert message.stop_reason in ("end_turn", "max_tokens")
        assert message.usage.input_tokens > 0
        assert 0 < message.usage.output_tokens <= MOST
        assert message._request_id

    async def test_a_stream_says_what_the_whole_message_says(
        self, claude: anthropic.AsyncAnthropic, target: Target
    ) -> None:
        asked: Any = {
            "model": target.model,
            "max_tokens": MOST,
            "messages": [{"role": "user", "content": "Hello!"}],
            "extra_body": {"temperature": 0},
        }
        async with claude.messages.stream(**asked) as stream:
            text = "".join([piece async for piece in stream.text_stream])
            final = await stream.get_final_message()
        whole = await claude.messages.create(**asked)

        assert whole.content[0].type == "text"
        assert text == whole.content[0].text
        assert final.stop_reason == whole.stop_reason
        assert final.usage.output_tokens == whole.usage.output_tokens

    async def test_raw_events_come_in_their_order(self, claude: anthropic.AsyncAnthropic, target: Target) -> None:
        async with await claude.messages.create(
            model=target.model, max_tokens=MOST, messages=[{"role": "user", "content": "Hello!"}], stream=True
        ) as stream:
            kinds = [event.type async for event in stream]

        assert kinds[:2] == ["message_start", "content_block_start"]
        assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
        assert set(kinds[2:-3]) == {"content_block_delta"}

    async def test_tokens_are_counted_before_they_are_spent(
        self, claude: anthropic.AsyncAnthropic, target: Target
    ) -> None:
        short = await claude.messages.count_tokens(model=target.model, messages=[{"role": "user", "content": "Hello!"}])
        longer = await claude.messages.count_tokens(
            model=target.model, messages=[{"role": "user", "content": "Hello, you over there!"}]
        )

        assert 0 < short.input_tokens < longer.input_tokens

    def test_the_sync_client_works_too(self, target: Target) -> None:
        with anthropic.Anthropic(base_url=target.url, api_key=target.key, max_retries=0, timeout=120) as client:
            message = client.messages.create(
                model=target.model, max_tokens=4, messages=[{"role": "user", "content": "Hello!"}]
            )

        assert message.content

    async def test_leaving_a_stream_aborts_the_engine(self, fake: Target, slow: FakeEngine) -> None:
        async with (
            anthropic.AsyncAnthropic(base_url=fake.url, api_key=fake.key, max_retries=0) as client,
            client.messages.stream(
                model="fake", max_tokens=32, messages=[{"role": "user", "content": SLOWLY}]
            ) as stream,
        ):
            await anext(aiter(stream))

        await slow.until(aborted=1, in_flight=0)

    async def test_an_unknown_key(self, target: Target) -> None:
        async with anthropic.AsyncAnthropic(base_url=target.url, api_key="fbk_nobody-issued-this-one") as client:
            with pytest.raises(anthropic.AuthenticationError) as caught:
                await client.messages.create(
                    model=target.model, max_tokens=4, messages=[{"role": "user", "content": "Hello!"}]
                )

        assert isinstance(caught.value.body, dict)
        assert caught.value.body["type"] == "error"
        assert caught.value.body["error"]["type"] == "authentication_error"
        assert caught.value.request_id

    async def test_an_unknown_model(self, claude: anthropic.AsyncAnthropic) -> None:
        with pytest.raises(anthropic.NotFoundError) as caught:
            await claude.messages.create(
                model="no-such-model", max_tokens=4, messages=[{"role": "user", "content": "Hello!"}]
            )
        with pytest.raises(anthropic.NotFoundError):
            await claude.messages.count_tokens(model="no-such-model", messages=[{"role": "user", "content": "Hello!"}])

        assert isinstance(caught.value.body, dict)
        assert caught.value.body["error"]["type"] == "not_found_error"

    async def test_a_model_that_the_key_may_not_use(self, fake: Target) -> None:
        async with anthropic.AsyncAnthropic(base_url=fake.url, api_key=LIMITED_KEY) as client:
            with pytest.raises(anthropic.PermissionDeniedError):
                await client.messages.create(
                    model="org/hidden", max_tokens=4, messages=[{"role": "user", "content": "Hello!"}]
                )

    async def test_a_bad_request(self, claude: anthropic.AsyncAnthropic, target: Target) -> None:
        with pytest.raises(anthropic.BadRequestError) as caught:
            await claude.messages.create(
                model=target.model, max_tokens=-1, messages=[{"role": "user", "content": "Hello!"}]
            )

        assert isinstance(caught.value.body, dict)
        assert caught.value.body["error"]["type"] == "invalid_request_error"


class TestLangChain:
    """LangChain's `ChatOpenAI` and `OpenAIEmbeddings`."""

    @pytest_asyncio.fixture(loop_scope="module")
    async def connections(self) -> AsyncIterator[dict[str, Any]]:
        """HTTP clients that are closed; LangChain leaves its own to the garbage collector."""
        with openai.DefaultHttpxClient() as sync:
            async with openai.DefaultAsyncHttpxClient() as asynchronous:
                yield {"http_client": sync, "http_async_client": asynchronous}

    @pytest.fixture
    def llm(self, target: Target, connections: dict[str, Any]) -> ChatOpenAI:
        return ChatOpenAI(
            model=target.model,
            base_url=target.v1,
            api_key=SecretStr(target.key),
            max_retries=0,
            timeout=120,
            temperature=0,
            max_completion_tokens=MOST,
            **connections,
        )

    @pytest.fixture
    def fake_llm(self, fake: Target, connections: dict[str, Any]) -> ChatOpenAI:
        return ChatOpenAI(model="fake", base_url=fake.v1, api_key=SecretStr(fake.key), max_retries=0, **connections)

    async def test_invoke_answers_and_counts(self, llm: ChatOpenAI) -> None:
        answer = await llm.ainvoke("Say hello.")

        assert answer.text
        assert answer.usage_metadata is not None
        assert 0 < answer.usage_metadata["output_tokens"] <= MOST

    def test_the_sync_invoke_answers(self, llm: ChatOpenAI) -> None:
        assert llm.invoke("Say hello.").text

    async def test_a_stream_joins_to_the_whole_answer(self, llm: ChatOpenAI) -> None:
        pieces = [piece async for piece in llm.astream("Say hello.")]

        assert len(pieces) > 1
        assert "".join(piece.text for piece in pieces) == (await llm.ainvoke("Say hello.")).text

    async def test_a_stream_tells_its_usage_if_asked(self, llm: ChatOpenAI) -> None:
        pieces = [piece async for piece in llm.astream("Say hello.", stream_usage=True)]

        usages = [piece.usage_metadata for piece in pieces if piece.usage_metadata]
        assert len(usages) == 1
        assert usages[0]["input_tokens"] > 0

    async def test_a_structured_output_is_its_class(self, llm: ChatOpenAI) -> None:
        roomy = llm.model_copy(update={"max_tokens": FOR_JSON})

        verdict = await roomy.with_structured_output(Verdict, method="json_schema").ainvoke("Is water wet?")

        assert isinstance(verdict, Verdict)

    async def test_bound_tools_are_called(self, fake_llm: ChatOpenAI) -> None:
        answer = await fake_llm.bind_tools([dict(WEATHER)], tool_choice="any").ainvoke("How is the weather?")

        (call,) = answer.tool_calls
        assert call["name"] == "weather"
        assert set(call["args"]) == {"town"}

    async def test_texts_are_embedded(self, target: Target, connections: dict[str, Any]) -> None:
        embeddings = OpenAIEmbeddings(
            model=target.model,
            base_url=target.v1,
            api_key=SecretStr(target.key),
            max_retries=0,
            check_embedding_ctx_length=False,
            **connections,
        )

        first, second = await embeddings.aembed_documents(["one text", "another text"])

        assert len(first) == len(second) > 0
        assert first != second

    async def test_leaving_a_stream_aborts_the_engine(self, fake_llm: ChatOpenAI, slow: FakeEngine) -> None:
        stream = fake_llm.astream(SLOWLY)

        await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]  # declared as an iterator, is a generator

        await slow.until(aborted=1, in_flight=0)


class TestLlamaIndex:
    """LlamaIndex's `OpenAILike`, in a process and, where needed, an environment of its own."""

    def test_chat_answers(self, told: dict[str, Any]) -> None:
        assert told["chat"]

    def test_stream_chat_joins_to_the_whole_answer(self, told: dict[str, Any]) -> None:
        assert len(told["stream"]) > 1
        assert "".join(told["stream"]) == told["chat"]

    def test_complete_answers(self, told: dict[str, Any]) -> None:
        assert told["complete"]

    def test_a_structured_output_is_its_class(self, told: dict[str, Any]) -> None:
        assert told["verdict"] in ("yes", "no")

    def test_texts_are_embedded(self, told: dict[str, Any]) -> None:
        first, second = told["vectors"]
        assert len(first) == len(second) > 0
        assert first != second


class TestForebay:
    """Our own client."""

    @pytest_asyncio.fixture(loop_scope="module")
    async def ours(self, target: Target) -> AsyncIterator[forebay.AsyncClient]:
        async with forebay.AsyncClient(target.url, api_key=target.key, max_retries=0) as made:
            yield made

    async def test_a_chat_is_answered_and_told_about(self, ours: forebay.AsyncClient, target: Target) -> None:
        answer = await ours.chat.create(
            model=target.model,
            messages=[{"role": "user", "content": "Say hello."}],
            max_tokens=MOST,
            forebay={"end_user": "u1", "session": "s1", "timeouts": {"total": 100.0}},
        )

        assert answer.text
        assert answer.usage is not None
        assert answer.usage.completion_tokens > 0
        assert answer.forebay.request_id
        assert answer.forebay.model == target.model
        assert (answer.forebay.worker or "").startswith(target.model)
        assert answer.forebay.attempts == 1
        assert answer.forebay.queue_ms is not None
        assert answer.forebay.overhead_ms is not None

    async def test_a_stream_joins_to_the_whole_answer(self, ours: forebay.AsyncClient, target: Target) -> None:
        asked: Any = {"model": target.model, "messages": HELLO, "max_tokens": MOST, "temperature": 0}

        async with ours.chat.stream(**asked) as stream:
            text = "".join([chunk.text async for chunk in stream])

        assert text == (await ours.chat.create(**asked)).text
        assert stream.forebay.request_id

    async def test_models_and_health(self, ours: forebay.AsyncClient, target: Target) -> None:
        assert target.model in [model.id for model in (await ours.models.list()).data]
        assert (await ours.models.retrieve(target.model)).id == target.model
        assert await ours.health.live()
        assert await ours.health.ready()

    def test_the_sync_client_works_too(self, target: Target) -> None:
        hello = [{"role": "user", "content": "Hi"}]

        with (
            forebay.Client(target.url, api_key=target.key) as client,
            client.chat.stream(model=target.model, messages=hello, max_tokens=4) as stream,
        ):
            assert "".join(chunk.text for chunk in stream)
            assert client.health.ready()

    async def test_a_model_with_a_slash_is_retrieved(self, fake: Target) -> None:
        async with forebay.AsyncClient(fake.url, api_key=fake.key) as client:
            assert (await client.models.retrieve("org/hidden")).id == "org/hidden"

    async def test_errors_are_the_classes_of_our_tree(self, fake: Target) -> None:
        hello = [{"role": "user", "content": "Hi"}]
        typo: Any = {"typo": 1}
        async with (
            forebay.AsyncClient(fake.url, api_key=LIMITED_KEY) as limited,
            forebay.AsyncClient(fake.url, api_key="fbk_nobody-issued-this-one") as nobody,
        ):
            with pytest.raises(forebay.NotFound, match="no-such-model"):
                await limited.chat.create(model="no-such-model", messages=hello)
            with pytest.raises(forebay.PermissionDenied):
                await limited.chat.create(model="org/hidden", messages=hello)
            with pytest.raises(forebay.BadRequest):
                await limited.chat.create(model="fake", messages=hello, forebay=typo)
            with pytest.raises(forebay.AuthenticationError) as caught:
                await nobody.chat.create(model="fake", messages=hello)

        assert caught.value.request_id

    async def test_an_error_in_the_stream_breaks_it(self, fake: Target, engine: FakeEngine) -> None:
        await engine.faults(error_after=3, contains="break in the middle")
        messages = [{"role": "user", "content": "break in the middle"}]

        async with (
            forebay.AsyncClient(fake.url, api_key=fake.key) as client,
            client.chat.stream(model="fake", messages=messages) as stream,
        ):
            texts = [(await anext(stream)).text for _ in range(3)]
            with pytest.raises(forebay.StreamBroken) as caught:
                await anext(stream)
        await engine.reset()

        assert "".join(texts)
        assert caught.value.code

    async def test_leaving_a_stream_aborts_the_engine(self, fake: Target, slow: FakeEngine) -> None:
        async with (
            forebay.AsyncClient(fake.url, api_key=fake.key) as client,
            client.chat.stream(model="fake", messages=[{"role": "user", "content": SLOWLY}]) as stream,
        ):
            await anext(stream)

        await slow.until(aborted=1, in_flight=0)
