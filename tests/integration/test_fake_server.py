"""The fake engine behaves as the engines that it stands in for, and misbehaves exactly as told."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import psutil
import pytest
import pytest_asyncio

from tests.fakes.engine import EngineExitedError, FakeEngine

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT = "/v1/chat/completions"
HELLO: dict[str, Any] = {"model": "fake", "messages": [{"role": "user", "content": "Hello there"}]}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 3}, "skipped": {"type": "null"}},
    "required": ["name", "age"],
}
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": SCHEMA}}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared() -> AsyncIterator[FakeEngine]:
    async with FakeEngine(tokens=12, slots=4, max_model_len=200) as engine:
        yield engine


@pytest_asyncio.fixture(loop_scope="module")
async def engine(shared: FakeEngine) -> FakeEngine:
    await shared.reset()
    return shared


async def post(engine: FakeEngine, path: str, body: Any, **headers: str) -> tuple[int, Any]:
    async with engine.session.post(engine.url + path, json=body, headers=headers) as response:
        return response.status, await response.json()


async def ask(engine: FakeEngine, path: str = CHAT, **body: Any) -> Any:
    status, answer = await post(engine, path, {**(HELLO if path == CHAT else {}), **body})
    assert status == 200, answer
    return answer


async def lines(engine: FakeEngine, path: str = CHAT, **body: Any) -> list[str]:
    body = {**(HELLO if path == CHAT else {}), **body, "stream": True}
    async with engine.session.post(engine.url + path, json=body) as response:
        assert response.status == 200
        return [line for line in (await response.text()).split("\n\n") if line]


async def chunks(engine: FakeEngine, path: str = CHAT, **body: Any) -> list[Any]:
    frames = await lines(engine, path, **body)
    assert frames.pop() == "data: [DONE]"
    return [json.loads(frame.removeprefix("data: ")) for frame in frames]


async def frames_until_cut(engine: FakeEngine) -> int:
    got = b""
    async with engine.session.post(engine.url + CHAT, json={**HELLO, "stream": True}) as response:
        try:
            async for part in response.content.iter_any():
                got += part
        except aiohttp.ClientPayloadError:
            return got.count(b"data: ")
    raise AssertionError("the stream came to its proper end")


def content(answer: Any) -> str:
    text: str = answer["choices"][0]["message"]["content"]
    return text


def joined(parts: list[Any], index: int = 0) -> str:
    choices = [choice for part in parts for choice in part["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


async def test_the_same_prompt_gives_the_same_answer_in_another_process(engine: FakeEngine) -> None:
    first = content(await ask(engine))
    async with FakeEngine(tokens=12) as other, FakeEngine(tokens=12, salt="x") as salted:
        assert content(await ask(other)) == first
        assert content(await ask(salted)) != first
    assert len(first.split()) == 12
    assert content(await ask(engine, messages=[{"role": "user", "content": "Bye"}])) != first


async def test_a_stream_says_what_the_plain_answer_says(engine: FakeEngine) -> None:
    parts = await chunks(engine)
    assert joined(parts) == content(await ask(engine))
    assert parts[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert parts[-1]["choices"][0]["finish_reason"] == "stop"
    assert {part["choices"][0]["finish_reason"] for part in parts[:-1]} == {None}
    assert len({part["id"] for part in parts}) == 1


async def test_usage_stands_alone_in_the_last_chunk_when_asked_for(engine: FakeEngine) -> None:
    *parts, last = await chunks(engine, stream_options={"include_usage": True})
    assert all(part["usage"] is None for part in parts)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 12
    assert last["usage"] == {**(await ask(engine))["usage"], "prompt_tokens_details": {"cached_tokens": 0}}


async def test_max_tokens_ends_with_length_and_a_full_answer_with_stop(engine: FakeEngine) -> None:
    whole = content(await ask(engine))
    for short in (await ask(engine, max_tokens=5), await ask(engine, max_completion_tokens=5)):
        assert short["choices"][0]["finish_reason"] == "length"
        assert short["usage"]["completion_tokens"] == 5
        assert whole.startswith(content(short))
    assert (await ask(engine, max_tokens=12))["choices"][0]["finish_reason"] == "stop"
    assert (await ask(engine, max_tokens=20, ignore_eos=True))["usage"]["completion_tokens"] == 20


async def test_prompt_and_emitted_token_ids_give_the_rest_of_the_answer(engine: FakeEngine) -> None:
    parts = await chunks(engine, return_token_ids=True)
    prompt = parts[0]["prompt_token_ids"]
    emitted = [token for part in parts for token in part["choices"][0].get("token_ids", ())]
    texts = [part["choices"][0]["delta"]["content"] for part in parts[1:]]
    assert len(emitted) == 12
    for cut in (0, 1, 7, 12):
        rest = await ask(engine, "/v1/completions", prompt=prompt + emitted[:cut], return_token_ids=True)
        choice = rest["choices"][0]
        assert choice["text"] == "".join(texts[cut:])
        assert choice["token_ids"] == emitted[cut:]
        assert choice["prompt_token_ids"] == prompt + emitted[:cut]
        assert choice["finish_reason"] == "stop"


async def test_a_final_assistant_message_is_continued_and_not_repeated(engine: FakeEngine) -> None:
    whole = content(await ask(engine))
    start = " ".join(whole.split()[:5])
    messages = [*HELLO["messages"], {"role": "assistant", "content": start}]
    rest = await ask(engine, messages=messages, continue_final_message=True, add_generation_prompt=False)
    assert start + content(rest) == whole
    status, _ = await post(engine, CHAT, {"messages": messages, "continue_final_message": True})
    assert status == 400


async def test_tokens_and_text_turn_into_each_other(engine: FakeEngine) -> None:
    text = "Hello  wörld,\n\tthis is ünïcode 🙂 and a veryveryverylongword "
    _, answer = await post(engine, "/tokenize", {"prompt": text})
    assert answer["count"] == len(answer["tokens"])
    assert answer["max_model_len"] == 200
    assert max(answer["tokens"]) < 2**31
    assert (await post(engine, "/detokenize", {"tokens": answer["tokens"]}))[1] == {"prompt": text}
    _, chat = await post(engine, "/tokenize", {"messages": HELLO["messages"]})
    assert chat["count"] == (await ask(engine))["usage"]["prompt_tokens"]
    status, _ = await post(engine, "/v1/completions", {"prompt": [2**31 - 1]})
    assert status == 400


async def test_several_choices_differ_and_carry_their_index(engine: FakeEngine) -> None:
    whole = await ask(engine, n=3)
    texts = [choice["message"]["content"] for choice in whole["choices"]]
    assert len(set(texts)) == 3
    assert whole["usage"]["completion_tokens"] == 36
    parts = await chunks(engine, n=3)
    assert [joined(parts, index) for index in range(3)] == texts
    many = await ask(engine, "/v1/completions", prompt=["one", "two"], n=2)
    assert [choice["index"] for choice in many["choices"]] == [0, 1, 2, 3]


async def test_a_stop_string_ends_the_answer_before_itself(engine: FakeEngine) -> None:
    words = content(await ask(engine)).split()
    stop = f"{words[3][-2:]} {words[4][:2]}"
    stopped = await ask(engine, stop=[stop, "never said"])
    assert content(stopped) == " ".join(words[:4])[:-2]
    assert stopped["choices"][0]["finish_reason"] == "stop"
    assert joined(await chunks(engine, stop=stop)) == content(stopped)


async def test_logprobs_come_for_every_token(engine: FakeEngine) -> None:
    rows = (await ask(engine, logprobs=True, top_logprobs=2))["choices"][0]["logprobs"]["content"]
    assert len(rows) == 12
    assert rows[0]["top_logprobs"][0] == {key: rows[0][key] for key in ("token", "logprob", "bytes")}
    parts = await chunks(engine, logprobs=True, top_logprobs=2)
    assert [row for part in parts[1:] for row in part["choices"][0]["logprobs"]["content"]] == rows
    plain = (await ask(engine, "/v1/completions", prompt="abc", logprobs=1))["choices"][0]
    assert "".join(plain["logprobs"]["tokens"]) == plain["text"]
    streamed = await chunks(engine, "/v1/completions", prompt="abc", logprobs=1)
    offsets = [offset for part in streamed for offset in part["choices"][0]["logprobs"]["text_offset"]]
    assert offsets == plain["logprobs"]["text_offset"]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "look_up"}}])
async def test_a_demanded_tool_is_called_with_valid_arguments(engine: FakeEngine, choice: Any) -> None:
    whole = (await ask(engine, tools=[TOOL], tool_choice=choice))["choices"][0]
    call = whole["message"]["tool_calls"][0]["function"]
    assert whole["finish_reason"] == "tool_calls"
    assert call["name"] == "look_up"
    assert json.loads(call["arguments"]).keys() == {"name", "age"}
    parts = await chunks(engine, tools=[TOOL], tool_choice=choice)
    deltas = [tool for part in parts for tool in part["choices"][0]["delta"].get("tool_calls", ())]
    assert deltas[0]["function"] == {"name": "look_up", "arguments": ""}
    assert len(deltas) > 3
    assert all(delta["index"] == 0 and "id" not in delta for delta in deltas[1:])
    assert "".join(delta["function"]["arguments"] for delta in deltas) == call["arguments"]
    assert parts[-1]["choices"][0]["finish_reason"] == "tool_calls"


async def test_a_json_schema_gets_an_instance(engine: FakeEngine) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
    text = content(await ask(engine, response_format=form))
    assert json.loads(text)["age"] == 3
    assert joined(await chunks(engine, response_format=form)) == text


async def test_a_known_prefix_counts_as_cached(engine: FakeEngine) -> None:
    messages = [{"role": "user", "content": "alpha beta gamma " * 12}]

    async def cached(salt: str) -> int:
        usage = (await ask(engine, messages=messages, cache_salt=salt))["usage"]
        count: int = usage["prompt_tokens_details"]["cached_tokens"]
        return count

    assert await cached("a") == 0
    assert await cached("a") == 32
    assert await cached("b") == 0


async def test_a_prompt_beyond_the_context_is_refused_with_its_code(engine: FakeEngine) -> None:
    status, answer = await post(engine, CHAT, {"messages": [{"role": "user", "content": "word " * 200}]})
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")


async def test_wrong_requests_get_the_error_envelope(engine: FakeEngine) -> None:
    assert (await post(engine, CHAT, {**HELLO, "model": "none"}))[1]["error"]["code"] == "model_not_found"
    assert (await post(engine, CHAT, {**HELLO, "max_tokens": 0}))[0] == 400
    assert (await post(engine, CHAT, {"messages": "text"}))[1]["error"]["type"] == "invalid_request_error"
    assert (await post(engine, "/v1/messages", {"messages": []}))[1]["type"] == "error"
    assert (await post(engine, "/v1/none", {}))[0] == 404
    assert (await post(engine, CHAT, {**HELLO, "unheard_of": {"a": 1}}))[0] == 200


async def test_embeddings_of_similar_texts_are_near(engine: FakeEngine) -> None:
    texts = ["the cat sat down", "the cat sat up", "entirely different words"]
    data = (await ask(engine, "/v1/embeddings", input=texts))["data"]
    one, two, three = (row["embedding"] for row in data)

    def cosine(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True))

    assert cosine(one, one) == pytest.approx(1)
    assert cosine(one, two) > 0.5 > cosine(one, three)


async def test_responses_and_messages_stream_named_events(engine: FakeEngine) -> None:
    for path, body, last in (
        ("/v1/responses", {"input": "Hello there"}, "response.completed"),
        ("/v1/messages", {**HELLO, "max_tokens": 50}, "message_stop"),
    ):
        events = [json.loads(line.split("\ndata: ")[1]) for line in await lines(engine, path, **body)]
        assert events[-1]["type"] == last
        deltas = [event["delta"] for event in events if event["type"].endswith("delta") and "index" in str(event)]
        texts = [delta if isinstance(delta, str) else delta.get("text", "") for delta in deltas]
        whole = await ask(engine, path, **body)
        said = whole["content"][0] if "content" in whole else whole["output"][0]["content"][0]
        assert "".join(texts) == said["text"] == content(await ask(engine))
    _, count = await post(engine, "/v1/messages/count_tokens", HELLO)
    assert count["input_tokens"] == (await ask(engine))["usage"]["prompt_tokens"]


async def test_requests_beyond_the_slots_wait_and_show_in_the_metrics(engine: FakeEngine) -> None:
    await engine.faults(stall_after=2)
    body = {**HELLO, "stream": True}
    tasks = [asyncio.create_task(lines(engine, **body)) for _ in range(6)]
    stats = await engine.until(running=4, waiting=2)
    assert stats["max_in_flight"] == 6
    async with engine.session.get(engine.url + "/metrics") as response:
        text = await response.text()
    assert 'vllm:num_requests_running{engine="0",model_name="fake"} 4.0' in text
    assert 'vllm:num_requests_waiting{engine="0",model_name="fake"} 2.0' in text
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await engine.until(in_flight=0, running=0, waiting=0, aborted=6)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_is_noticed_at_once(engine: FakeEngine, stream: bool) -> None:
    await engine.faults(stall_after=3)
    task = asyncio.create_task(post(engine, CHAT, {**HELLO, "stream": stream}))
    await engine.until(running=1)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    left = time.monotonic()
    stats = await engine.until(aborted=1, in_flight=0, running=0)
    assert time.monotonic() - left < 0.25
    assert stats["requests"][-1]["state"] == "aborted"


async def test_stats_show_each_request_with_headers_and_body(engine: FakeEngine) -> None:
    await post(engine, CHAT, HELLO, **{"X-Trace": "7"})
    stats = await engine.stats()
    assert (stats["started"], stats["finished"], stats["in_flight"]) == (1, 1, 0)
    request = stats["requests"][0]
    assert (request["endpoint"], request["body"], request["headers"]["x-trace"]) == (CHAT, HELLO, "7")


async def test_a_refusal_lasts_as_many_requests_as_told(engine: FakeEngine) -> None:
    await engine.faults(refuse_status=429, retry_after=2, times=1, contains="Hello")
    assert (await post(engine, "/v1/completions", {"prompt": "other"}))[0] == 200
    async with engine.session.post(engine.url + CHAT, json=HELLO) as response:
        assert (response.status, response.headers["Retry-After"]) == (429, "2")
        assert (await response.json())["error"]["type"] == "rate_limit_error"
    assert (await post(engine, CHAT, HELLO))[0] == 200


async def test_a_cut_stream_ends_after_the_frames_told(engine: FakeEngine) -> None:
    await engine.faults(cut_after=3)
    assert await frames_until_cut(engine) == 3
    with pytest.raises(aiohttp.ClientPayloadError):
        await post(engine, CHAT, HELLO)
    await engine.faults(cut_after=0)
    with pytest.raises(aiohttp.ServerDisconnectedError):
        await post(engine, CHAT, HELLO)
    stats = await engine.until(in_flight=0)
    assert (stats["finished"], stats["aborted"]) == (3, 0)


async def test_errors_come_inside_a_stream_that_began_with_200(engine: FakeEngine) -> None:
    for fault, before in ({"error_first": True}, 0), ({"error_after": 4}, 4):
        await engine.faults(**fault)
        parts = await chunks(engine)
        assert len(parts) == before + 1
        assert parts[-1]["error"]["type"] == "server_error"


async def test_one_malformed_frame_leaves_the_others_whole(engine: FakeEngine) -> None:
    await engine.faults(malformed_after=2)
    frames = await lines(engine)
    with pytest.raises(json.JSONDecodeError):
        json.loads(frames[2].removeprefix("data: "))
    assert len(frames) == 14
    assert json.loads(frames[3].removeprefix("data: "))


async def test_usage_may_stand_beside_choices_and_done_come_twice_or_never(engine: FakeEngine) -> None:
    await engine.faults(usage_with_choices=True, duplicate_done=True)
    frames = await lines(engine)
    assert frames[-2:] == ["data: [DONE]"] * 2
    last = json.loads(frames[-3].removeprefix("data: "))
    assert last["choices"]
    assert last["usage"]["completion_tokens"] == 12
    await engine.faults(no_done=True)
    assert "data: [DONE]" not in await lines(engine)


async def test_comments_fill_the_silence_between_trickling_frames(engine: FakeEngine) -> None:
    await engine.faults(ping_ms=10, trickle_ms=35)
    frames = await lines(engine, max_tokens=2)
    assert frames.count(": ping") >= 6
    assert [frame for frame in frames if frame != ": ping"][-1] == "data: [DONE]"


async def test_a_silent_engine_sends_not_even_headers(engine: FakeEngine) -> None:
    await engine.faults(silent=True)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await post(engine, CHAT, {**HELLO, "stream": True})
    await engine.until(aborted=1)


async def test_an_unhealthy_engine_still_serves(engine: FakeEngine) -> None:
    await engine.faults(unhealthy=True)
    async with engine.session.get(engine.url + "/health") as response:
        assert response.status == 500
    assert (await post(engine, CHAT, HELLO))[0] == 200


async def test_an_unknown_fault_is_refused(engine: FakeEngine) -> None:
    assert (await post(engine, "/fake/faults", {"explode": True}))[0] == 400


async def test_a_key_is_required_once_one_is_set() -> None:
    async with FakeEngine(env={"FAKE_API_KEY": "k"}, model=["a", "b"], ttft_ms=20, itl_ms=10) as engine:
        status, answer = await post(engine, CHAT, HELLO)
        assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
        began = time.monotonic()
        body = {**HELLO, "model": "b", "max_tokens": 5}
        assert (await post(engine, CHAT, body, Authorization="Bearer k"))[0] == 200
        assert 0.05 < time.monotonic() - began < 1
        async with engine.session.get(engine.url + "/v1/models", headers={"Authorization": "Bearer k"}) as response:
            assert [row["id"] for row in (await response.json())["data"]] == ["a", "b"]


async def test_an_engine_that_dies_takes_its_stream_along() -> None:
    async with FakeEngine(die_after=2) as engine:
        assert await frames_until_cut(engine) == 2
        assert await engine.wait() == 70


async def test_an_engine_may_end_at_its_start() -> None:
    with pytest.raises(EngineExitedError) as caught:
        async with FakeEngine(exit_at_start=3):
            pass
    assert caught.value.args == (3,)


async def test_sigterm_ends_it_within_a_second_with_a_request_in_flight_and_leaves_its_child() -> None:
    async with FakeEngine(silent=True, spawn_child=True, start_delay_s=0.3) as engine:
        async with engine.session.get(engine.url + "/health") as response:
            assert response.status == 503
        await asyncio.sleep(0.4)
        child = (await engine.stats())["child_pid"]
        task = asyncio.create_task(post(engine, CHAT, HELLO))
        await engine.until(in_flight=1)
        began = time.monotonic()
        engine.terminate()
        assert await engine.wait() == 0
        assert time.monotonic() - began < 1
        assert psutil.pid_exists(child)
        assert isinstance((await asyncio.gather(task, return_exceptions=True))[0], aiohttp.ClientError)


async def test_sigterm_may_be_ignored() -> None:
    async with FakeEngine(ignore_sigterm=True) as engine:
        engine.terminate()
        await asyncio.sleep(0.1)
        assert (await engine.stats())["started"] == 0
