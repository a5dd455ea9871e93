import json
from typing import Any

import pytest

from core.chat import Endpoint
from core.errors import InvalidRequest, UpstreamBroken
from engines.drivers.llamacpp_answers import AnswerAssembler, read_call
from engines.drivers.llamacpp_requests import Plan, edit_request

USER = {"role": "user", "content": "hi"}
HEAD = {"created": 1, "id": "chatcmpl-1", "model": "m", "system_fingerprint": "b0", "object": "chat.completion.chunk"}
USAGE = {"completion_tokens": 2, "prompt_tokens": 5, "total_tokens": 7, "prompt_tokens_details": {"cached_tokens": 4}}
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "Of a city", "parameters": {"type": "object", "properties": {}}},
}
TIME = {"type": "function", "function": {"name": "time"}}
DONE = b"data: [DONE]\n\n"


def frame(event: Any) -> bytes:
    name = f"event: {event['type']}\n".encode() if isinstance(event, dict) and "type" in event else b""
    return name + b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n"


def chat(delta: dict[str, Any], finish: str | None = None, index: int = 0, **more: Any) -> dict[str, Any]:
    return {"choices": [{"finish_reason": finish, "index": index, "delta": delta}], **HEAD, **more}


def chat_stream(*pieces: str, finish: str = "stop", index: int = 0) -> list[dict[str, Any]]:
    return [
        chat({"role": "assistant", "content": None}, index=index),
        *[chat({"content": piece}, index=index) for piece in pieces],
        chat({}, finish, index=index),
        {"choices": [], **HEAD, "usage": USAGE, "timings": {"cache_n": 4}},
    ]


def events_of(frames: bytes) -> list[Any]:
    lines = [line[6:] for line in frames.split(b"\n") if line.startswith(b"data: ")]
    return [json.loads(line) for line in lines if line != b"[DONE]"]


def run(plan: Plan, events: list[Any], *, done: bool = True) -> bytes:
    assembler = AnswerAssembler(plan, new_id=lambda: "call_x")
    out = b"".join([assembler.feed(frame(event)) for event in events]) + (assembler.feed(DONE) if done else b"")
    return assembler.whole() if plan.whole else out


# --- requests


def test_the_engine_always_streams_and_tells_the_usage() -> None:
    body = {"messages": [USER], "stream": False}
    sent, plan = edit_request(Endpoint.CHAT, body, stream=False)
    assert sent == {"messages": [USER], "stream": True, "stream_options": {"include_usage": True}}
    assert body == {"messages": [USER], "stream": False}
    assert plan.whole
    assert not plan.passthrough


@pytest.mark.parametrize("endpoint", [Endpoint.RESPONSES, Endpoint.MESSAGES])
def test_endpoints_that_always_tell_the_usage_get_no_stream_options(endpoint: Endpoint) -> None:
    sent, plan = edit_request(endpoint, {"messages": [USER], "input": "hi"}, stream=True)
    assert sent["stream"] is True
    assert "stream_options" not in sent
    assert plan.passthrough


def test_embeddings_are_neither_streamed_nor_edited() -> None:
    sent, plan = edit_request(Endpoint.EMBEDDINGS, {"input": "hi", "id_slot": 1}, stream=False)
    assert sent == {"input": "hi"}
    assert plan.passthrough
    assert not plan.streams


def test_slot_and_kv_controls_never_reach_the_engine() -> None:
    forbidden = {
        "id_slot": 1, "slot_id": 1, "filename": "x", "action": "save", "lora": [], "n_cache_reuse": 9,
        "cache_salt": "s", "priority": 1, "n_predict": -1, "n_cmpl": 4, "verbose": True, "speculative.n_max": 9,
        "sse_ping_interval": 1, "cache_prompt": True, "kv_transfer_params": {},
    }  # fmt: skip
    allowed = {"messages": [USER], "top_k": 1, "seed": 3}
    sent, _ = edit_request(Endpoint.CHAT, allowed | forbidden, stream=True)
    assert sent == allowed | {"stream": True, "stream_options": {"include_usage": True}}


def test_the_newer_name_of_the_token_limit_wins() -> None:
    sent, _ = edit_request(Endpoint.CHAT, {"messages": [], "max_completion_tokens": 3, "max_tokens": 9}, stream=True)
    assert sent["max_tokens"] == 3
    assert "max_completion_tokens" not in sent
    sent, _ = edit_request(Endpoint.RESPONSES, {"input": "", "max_output_tokens": 3}, stream=True)
    assert sent["max_output_tokens"] == 3


@pytest.mark.parametrize("limit", [0, -1, "5", 2.5, True])
def test_a_token_limit_the_engine_would_misread_is_refused(limit: object) -> None:
    with pytest.raises(InvalidRequest, match="max_tokens must be an integer of at least 1"):
        edit_request(Endpoint.CHAT, {"messages": [USER], "max_tokens": limit}, stream=True)


@pytest.mark.parametrize(
    ("prompt", "count"),
    [("a", 1), (["a"], 1), (["a", "b"], 2), ([1, 2, 3], 1), ([[1], [2]], 2), ([1, "a"], 1), (None, 1), ([], 1)],
)
def test_prompts_are_counted_as_the_engine_counts_them(prompt: object, count: int) -> None:
    _, plan = edit_request(Endpoint.COMPLETIONS, {"prompt": prompt, "n": 3}, stream=True)
    assert (plan.num_choices, plan.per_prompt) == (3 * count, 3)


def test_an_assistants_turn_of_a_response_is_spelt_out() -> None:
    sent, _ = edit_request(
        Endpoint.RESPONSES, {"input": [USER, {"role": "assistant", "content": "a"}, USER]}, stream=True
    )
    part = {"type": "output_text", "text": "a"}
    assert sent["input"] == [USER, {"type": "message", "role": "assistant", "content": [part]}, USER]


# --- plain answers


def test_a_plain_stream_passes_byte_for_byte() -> None:
    _, plan = edit_request(Endpoint.CHAT, {"messages": [USER]}, stream=True)
    assert plan.passthrough
    raw = b": ping\n\n" + b"".join(map(frame, chat_stream("a", "b"))) + DONE
    assert AnswerAssembler(plan).feed(raw) == raw


def test_a_whole_chat_answer_joins_text_reasoning_logprobs_and_tool_calls() -> None:
    events = [
        chat({"role": "assistant", "content": None}),
        chat({"reasoning_content": "so "}),
        chat({"reasoning_content": "it is"}),
        {
            "choices": [{"finish_reason": None, "index": 0, "delta": {"content": "Le"}, "logprobs": {"content": [1]}}],
            **HEAD,
        },
        {
            "choices": [{"finish_reason": None, "index": 0, "delta": {"content": "t"}, "logprobs": {"content": [2]}}],
            **HEAD,
        },
        chat(
            {"tool_calls": [{"index": 0, "id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"'}}]}
        ),
        chat({"tool_calls": [{"index": 0, "function": {"arguments": 'a":1}'}}]}),
        chat(
            {"tool_calls": [{"index": 1, "id": "c2", "type": "function", "function": {"name": "g", "arguments": "{}"}}]}
        ),
        chat({}, "tool_calls"),
        {"choices": [], **HEAD, "usage": USAGE, "timings": {"cache_n": 4}},
    ]
    answer = json.loads(run(Plan(Endpoint.CHAT, whole=True), events))
    assert answer == HEAD | {
        "object": "chat.completion",
        "usage": USAGE,
        "timings": {"cache_n": 4},
        "choices": [
            {
                "finish_reason": "tool_calls",
                "index": 0,
                "logprobs": {"content": [1, 2]},
                "message": {
                    "role": "assistant",
                    "content": "Let",
                    "reasoning_content": "so it is",
                    "tool_calls": [
                        {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}},
                        {"id": "c2", "type": "function", "function": {"name": "g", "arguments": "{}"}},
                    ],
                },
            }
        ],
    }


def test_a_whole_answer_without_text_has_empty_content() -> None:
    answer = json.loads(run(Plan(Endpoint.CHAT, whole=True), chat_stream()))
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": ""}


def test_a_stream_that_ends_early_is_no_answer() -> None:
    for endpoint in (Endpoint.CHAT, Endpoint.MESSAGES, Endpoint.RESPONSES):
        with pytest.raises(UpstreamBroken):
            run(Plan(endpoint, whole=True), [chat({"content": "a"})], done=False)


def test_an_error_event_passes_to_whoever_reads_errors() -> None:
    error = {"error": {"code": 500, "message": "x"}}
    assert run(Plan(Endpoint.CHAT, forces_tool=True), [error]) == frame(error) + DONE


def test_a_whole_anthropic_message_joins_thinking_text_and_tool_input() -> None:
    events = [
        {"type": "message_start", "message": {"id": "m", "role": "assistant", "content": [], "stop_reason": None,
                                              "usage": {"input_tokens": 3, "output_tokens": 0}}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "thinking", "thinking": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "thinking_delta", "thinking": "hm"}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "signature_delta", "signature": "s"}},
        {"type": "content_block_stop", "index": 0},
        {"type": "content_block_start", "index": 1, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 1, "delta": {"type": "text_delta", "text": "a"}},
        {"type": "content_block_delta", "index": 1, "delta": {"type": "text_delta", "text": "b"}},
        {"type": "content_block_start", "index": 2,
         "content_block": {"type": "tool_use", "id": "t", "name": "f", "input": {}}},
        {"type": "content_block_delta", "index": 2, "delta": {"type": "input_json_delta", "partial_json": '{"x":'}},
        {"type": "content_block_delta", "index": 2, "delta": {"type": "input_json_delta", "partial_json": "1}"}},
        {"type": "message_delta", "delta": {"stop_reason": "tool_use", "stop_sequence": None},
         "usage": {"output_tokens": 9}},
        {"type": "message_stop"},
    ]  # fmt: skip
    answer = json.loads(run(Plan(Endpoint.MESSAGES, whole=True), events, done=False))
    assert answer["content"] == [
        {"type": "thinking", "thinking": "hm", "signature": "s"},
        {"type": "text", "text": "ab"},
        {"type": "tool_use", "id": "t", "name": "f", "input": {"x": 1}},
    ]
    assert answer["usage"] == {"input_tokens": 3, "output_tokens": 9}
    assert answer["stop_reason"] == "tool_use"


# --- several choices


def _two_choices() -> list[dict[str, Any]]:
    first, second = chat_stream("a", "b", index=0), chat_stream("c", index=1)
    return [second[0], first[0], second[1], first[1], *second[2:], *first[2:]]


def test_several_choices_share_one_usage_at_the_end() -> None:
    _, plan = edit_request(Endpoint.CHAT, {"messages": [USER], "n": 2}, stream=True)
    out = run(plan, _two_choices())
    events = events_of(out)
    assert [event["usage"] for event in events if "usage" in event] == [
        USAGE | {"completion_tokens": 4, "total_tokens": 9}
    ]
    assert events[-1]["choices"] == []
    assert out.endswith(DONE)


def test_whole_choices_are_in_order_however_they_came() -> None:
    _, plan = edit_request(Endpoint.CHAT, {"messages": [USER], "n": 2}, stream=False)
    answer = json.loads(run(plan, _two_choices()))
    assert [(choice["index"], choice["message"]["content"]) for choice in answer["choices"]] == [(0, "ab"), (1, "c")]
    assert answer["usage"]["completion_tokens"] == 4


def test_each_prompt_of_several_counts_once_and_a_null_event_is_dropped() -> None:
    def piece(index: int, text: str, **more: Any) -> dict[str, Any]:
        finish = "length" if more else None
        return {"choices": [{"text": text, "index": index, "logprobs": None, "finish_reason": finish}], **HEAD, **more}

    events = [
        None,
        *[piece(index, "x") for index in range(4)],
        *[piece(index, "", usage=USAGE) for index in (3, 2, 1, 0)],
    ]
    _, plan = edit_request(Endpoint.COMPLETIONS, {"prompt": ["a", "b"], "n": 2}, stream=True)
    out = run(plan, events)
    assert None not in events_of(out)
    assert events_of(out)[-1]["usage"] == {
        "completion_tokens": 8, "prompt_tokens": 10, "total_tokens": 18, "prompt_tokens_details": {"cached_tokens": 8},
    }  # fmt: skip
    assert all("usage" not in event for event in events_of(out)[:-1])


# --- prefill


PREFILLED = [USER, {"role": "assistant", "content": "1, 2é,"}]


def test_a_stream_that_continues_an_assistants_message_passes_byte_for_byte() -> None:
    _, plan = edit_request(Endpoint.CHAT, {"messages": PREFILLED}, stream=True)
    assert plan.passthrough


def test_the_closing_events_of_a_response_say_what_its_deltas_said() -> None:
    part = {"type": "output_text", "annotations": [], "text": "1, 2é, 3"}
    item = {"type": "message", "id": "msg", "role": "assistant", "status": "completed", "content": [part]}
    events = [
        {"type": "response.output_text.delta", "item_id": "msg", "delta": " "},
        {"type": "response.output_text.delta", "item_id": "msg", "delta": "3"},
        {"type": "response.output_text.done", "item_id": "msg", "text": "1, 2é, 3"},
        {"type": "response.content_part.done", "item_id": "msg", "part": part},
        {"type": "response.output_item.done", "item": item},
        {"type": "response.completed", "response": {"status": "completed", "created_at": 5, "output": [item]}},
    ]
    _, plan = edit_request(Endpoint.RESPONSES, {"input": PREFILLED}, stream=True)
    out = run(plan, events, done=False)
    assert b"1, 2" not in out
    assert out.startswith(frame(events[0]) + frame(events[1]) + b"event: response.output_text.done\n")
    _, plan = edit_request(Endpoint.RESPONSES, {"input": PREFILLED}, stream=False)
    answer = json.loads(run(plan, events, done=False))
    assert answer["output"][0]["content"][0]["text"] == " 3"
    assert answer["completed_at"] == 5


# --- forced tools

CALL = '{\n "name": "weather",\n "arguments": {"city": "Par\\"is"}\n}'


@pytest.mark.parametrize("choice", ["auto", "none", None, {"type": "allowed_tools", "allowed_tools": {"mode": "auto"}}])
def test_a_choice_that_is_left_to_the_model_is_not_touched(choice: object) -> None:
    body = {"messages": [USER], "tools": [WEATHER], "tool_choice": choice}
    sent, plan = edit_request(Endpoint.CHAT, body, stream=True)
    assert {key: sent[key] for key in body} == body
    assert plan.passthrough


def test_a_required_call_becomes_a_schema_over_all_tools_and_an_instruction() -> None:
    body = {
        "messages": [{"role": "system", "content": "Be brief."}, USER],
        "tools": [WEATHER, TIME], "tool_choice": "required", "parallel_tool_calls": True,
        "response_format": {"type": "text"},
    }  # fmt: skip
    sent, plan = edit_request(Endpoint.CHAT, body, stream=True)
    schema = sent["response_format"]["json_schema"]["schema"]
    assert [call["properties"]["name"] for call in schema["anyOf"]] == [{"const": "weather"}, {"const": "time"}]
    assert not {"tools", "tool_choice", "parallel_tool_calls"} & sent.keys()
    assert [message["role"] for message in sent["messages"]] == ["system", "user"]
    assert sent["messages"][0]["content"].startswith("Be brief.\n\nYou can call these functions:")
    assert plan.forces_tool


@pytest.mark.parametrize(
    "choice",
    [
        {"type": "function", "function": {"name": "time"}},
        {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [TIME]}},
    ],
)
def test_a_named_function_is_the_only_one_in_the_schema(choice: object) -> None:
    sent, _ = edit_request(
        Endpoint.CHAT, {"messages": [USER], "tools": [WEATHER, TIME], "tool_choice": choice}, stream=True
    )
    assert sent["response_format"]["json_schema"]["schema"]["properties"]["name"] == {"const": "time"}
    assert "weather" not in sent["messages"][0]["content"]


def test_definitions_of_a_tools_schema_move_to_the_root() -> None:
    parameters = {
        "type": "object",
        "properties": {"at": {"$ref": "#/$defs/Place"}},
        "$defs": {"Place": {"type": "object", "properties": {"next": {"$ref": "#/$defs/Place"}}}},
    }
    tool = {"type": "function", "function": {"name": "go", "parameters": parameters}}
    sent, _ = edit_request(Endpoint.CHAT, {"messages": [], "tools": [tool], "tool_choice": "required"}, stream=True)
    schema = sent["response_format"]["json_schema"]["schema"]
    assert schema["properties"]["arguments"]["properties"]["at"] == {"$ref": "#/$defs/tool0_Place"}
    assert schema["$defs"]["tool0_Place"]["properties"]["next"] == {"$ref": "#/$defs/tool0_Place"}


@pytest.mark.parametrize(
    "body",
    [{"tools": [TIME], "tool_choice": {"type": "function", "function": {"name": "x"}}}, {"tool_choice": "required"}],
)
def test_a_demand_for_a_function_that_is_not_there_is_refused(body: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="not among tools"):
        edit_request(Endpoint.CHAT, {"messages": [USER]} | body, stream=True)


@pytest.mark.parametrize(
    "more",
    [{"tools": [TIME], "tool_choice": "required"}, {"response_format": {"type": "json_object"}}, {"grammar": "x"}],
)
def test_a_grammar_cannot_continue_an_assistant_message(more: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="cannot continue an assistant message"):
        edit_request(Endpoint.CHAT, {"messages": PREFILLED} | more, stream=True)


def _forced(stream: bool) -> Plan:
    body = {"messages": [USER], "tools": [WEATHER], "tool_choice": "required"}
    return edit_request(Endpoint.CHAT, body, stream=stream)[1]


@pytest.mark.parametrize("cut", range(0, len(CALL), 5))
def test_a_forced_call_is_streamed_as_a_tool_call(cut: int) -> None:
    events = events_of(run(_forced(stream=True), chat_stream(CALL[:cut], CALL[cut:])))
    deltas = [choice["delta"] for event in events for choice in event["choices"]]
    assert deltas[0] == {"role": "assistant", "content": None}
    function = {"name": "weather", "arguments": '{"city":"Par\\"is"}'}
    assert deltas[1] == {"tool_calls": [{"index": 0, "id": "call_x", "type": "function", "function": function}]}
    assert deltas[2:] == [{}]
    assert events[2]["choices"][0]["finish_reason"] == "tool_calls"
    assert events[-1]["usage"] == USAGE


def test_frames_fed_together_become_what_they_become_one_by_one() -> None:
    frames = [frame(event) for event in chat_stream(CALL[:20], CALL[20:])]
    apart = AnswerAssembler(_forced(stream=True), new_id=lambda: "call_x")
    expected = b"".join(map(apart.feed, frames))
    for at in range(len(frames) + 1):
        together = AnswerAssembler(_forced(stream=True), new_id=lambda: "call_x")
        assert together.feed(b"".join(frames[:at])) + together.feed(b"".join(frames[at:])) == expected


def test_a_forced_call_is_a_tool_call_in_the_whole_answer_too() -> None:
    choice = json.loads(run(_forced(stream=False), chat_stream(CALL)))["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "weather"


def test_a_forced_call_that_was_cut_keeps_its_beginning_and_says_length() -> None:
    choice = json.loads(run(_forced(stream=False), chat_stream(CALL[:45], finish="length")))["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city":'}


@pytest.mark.parametrize("length", range(len(CALL)))
def test_reading_a_call_that_was_cut_anywhere_never_fails(length: int) -> None:
    call = read_call(CALL[:length])
    assert call is None or (call[0] == "weather" and '{"city": "Par\\"is"}\n}'.startswith(call[1]))
