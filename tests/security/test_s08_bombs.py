"""S8: what would cost far more than it costs to send is refused with a clear 400; what is accepted stalls nobody."""

import gc
import json
import time
from collections.abc import MutableMapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.chat import Endpoint
from core.errors import InvalidJson, InvalidRequest
from core.ids import ModelName, RequestId
from core.tenancy import Ceilings
from gateway.app import data_app
from gateway.ceilings import check_depth
from gateway.connection import EXTENSION
from gateway.requests import parse_body, read_call
from routing.catalog import Catalog, Model
from tests.fakes.admin import opened
from tests.fakes.replay import Replay
from tests.fakes.tenancy import principal, tenant

CATALOG = Catalog((Model(name=ModelName("m")),))
BODY = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "prompt": "Hi", "input": "Hi"}


def read(endpoint: Endpoint = Endpoint.CHAT, /, ceilings: Ceilings | None = None, **more: Any) -> int:
    raw = json.dumps({**BODY, **more}).encode()
    caller = principal(of=tenant(ceilings=ceilings or Ceilings()))
    return read_call(endpoint, raw, {}, request_id=RequestId("r"), principal=caller, catalog=CATALOG).max_tokens


def schema(inner: dict[str, Any]) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": inner}}}


def tool(parameters: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": parameters}}


def pattern(text: str) -> dict[str, Any]:
    return schema({"type": "object", "properties": {"pattern": {"type": "string", "pattern": text}}})


ENUM = {"enum": [f"v{i}" for i in range(129)]}
WIDE = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(257)}}
LONG = {"description": "x" * 70_000}
BOMBS: list[tuple[Endpoint, dict[str, Any]]] = [
    (Endpoint.CHAT, {"n": 17}),
    (Endpoint.COMPLETIONS, {"best_of": 17}),
    (Endpoint.CHAT, {"logprobs": True, "top_logprobs": 21}),
    (Endpoint.COMPLETIONS, {"logprobs": 21}),
    (Endpoint.CHAT, {"n_probs": 10**9}),
    (Endpoint.CHAT, {"prompt_logprobs": -1}),
    (Endpoint.CHAT, {"stop": ["x"] * 33}),
    (Endpoint.CHAT, {"stop": "x" * 257}),
    (Endpoint.MESSAGES, {"stop_sequences": ["x" * 257], "max_tokens": 1}),
    (Endpoint.CHAT, {"stop_token_ids": [1] * 1025}),
    (Endpoint.CHAT, {"dry_sequence_breakers": ["x"] * 9}),
    (Endpoint.CHAT, {"logit_bias": {str(i): 1 for i in range(1025)}}),
    (Endpoint.CHAT, {"logit_bias": [["x" * 300, 1]]}),
    (Endpoint.CHAT, {"tools": [tool({})] * 129}),
    (Endpoint.CHAT, {"functions": [{}] * 129}),
    (Endpoint.EMBEDDINGS, {"input": ["x"] * 2049}),
    (Endpoint.COMPLETIONS, {"prompt": ["x"] * 129}),
    (Endpoint.CHAT, {"grammar": 'root ::= "a"'}),
    (Endpoint.CHAT, {"guided_grammar": 'root ::= "a"'}),
    (Endpoint.CHAT, {"grammar_triggers": [{"type": 2, "value": "(a+)+"}]}),
    (Endpoint.CHAT, {"structured_outputs": {"grammar": 'root ::= "a"'}}),
    (Endpoint.CHAT, {"guided_regex": "a" * 513}),
    (Endpoint.CHAT, {"structured_outputs": {"regex": "a" * 513}}),
    (Endpoint.CHAT, {"structured_outputs": {"choice": ["a"] * 129}}),
    (Endpoint.CHAT, {"guided_choice": ["a"] * 129}),
    (Endpoint.CHAT, {"guided_json": ENUM}),
    (Endpoint.CHAT, {"json_schema": ENUM}),
    (Endpoint.RESPONSES, {"text": {"format": {"type": "json_schema", "schema": ENUM}}}),
    (Endpoint.MESSAGES, {"output_format": {"type": "json_schema", "schema": ENUM}, "max_tokens": 1}),
    (Endpoint.MESSAGES, {"tools": [{"name": "f", "input_schema": ENUM}], "max_tokens": 1}),
    (Endpoint.CHAT, {"tools": [tool(ENUM)]}),
    (Endpoint.CHAT, {"tools": [tool(LONG)]}),
    (Endpoint.CHAT, schema(LONG)),
    (Endpoint.CHAT, schema(ENUM)),
    (Endpoint.CHAT, schema(WIDE)),
    (Endpoint.CHAT, schema({"anyOf": [{"type": "string"}] * 129})),
    (Endpoint.CHAT, schema({"oneOf": [{"anyOf": [{"type": "string"}] * 12}] * 12})),
    (Endpoint.CHAT, schema({"properties": {f"p{i}": {"pattern": "a*b*c*d*"} for i in range(33)}})),
    (Endpoint.CHAT, schema({"patternProperties": {"a" * 513: {}}})),
    (Endpoint.CHAT, pattern("a" * 513)),
    (Endpoint.CHAT, pattern("^a{1,10000}$")),
    (Endpoint.CHAT, pattern("^(" + "|".join(["[a-z]"] * 16) + ")+$")),
    (Endpoint.CHAT, pattern(".?" * 16)),
    (Endpoint.CHAT, pattern("^(([a-z ]{1,6}){1,6}){1,6}$")),
    (Endpoint.CHAT, pattern("^((a{99}){99}){99}$")),
]


@pytest.mark.parametrize(("endpoint", "bomb"), BOMBS, ids=lambda value: str(value)[:60])
def test_a_bomb_is_refused_and_the_field_is_named(endpoint: Endpoint, bomb: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read(endpoint, **bomb)

    field = next(iter(set(bomb) - {"max_tokens"}), "")
    assert caught.value.param in (*bomb, "top_logprobs")
    assert f"`{caught.value.param}`" in caught.value.message, field
    assert len(caught.value.message) < 300


@pytest.mark.parametrize(
    "more",
    [
        {"n": 16, "logprobs": True, "top_logprobs": 20, "stop": ["a", "b"], "logit_bias": {"1": -100}},
        pattern(r"^[a-z0-9]+(-[a-z0-9]+)*$"),
        pattern(r"^\d{4}-\d{2}-\d{2}T\d{2}:\d{2}(\.\d{1,6})?Z$"),
        pattern(r"^[^@\s]+@[^@\s]+\.[a-z]{2,}$"),
        pattern(r"^([0-9a-f]{2}:){5}[0-9a-f]{2}$"),
        pattern(r"^[?*+|{}]{3}\|\*$"),
        schema({"type": "object", "properties": {"enum": {"enum": ["a", "b"]}, "anyOf": {"type": "string"}}}),
        {"tools": [tool({"type": "object", "properties": {"unit": {"enum": ["C", "F"]}}})] * 64},
        {"response_format": {"type": "json_object"}},
    ],
)
def test_what_people_really_send_is_accepted(more: dict[str, Any]) -> None:
    read(**more)


def test_a_tenant_has_its_own_ceilings() -> None:
    tight = Ceilings(choices=1, depth=8, pattern=4)
    for more in ({"n": 2}, pattern("abcde"), {"x": [[[[[[[[1]]]]]]]]}):
        with pytest.raises(InvalidRequest):
            read(ceilings=tight, **more)

    read(ceilings=Ceilings(grammars=True), grammar='root ::= "a"')


def test_each_prompt_counts_in_what_a_call_may_use() -> None:
    assert read(Endpoint.COMPLETIONS, prompt=["a", "b", "c"], max_tokens=10, n=2) == 60
    assert read(Endpoint.COMPLETIONS, prompt=[1, 2, 3], max_tokens=10) == 10


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_depth_is_seen_before_anything_is_parsed(opening: str) -> None:
    closing = "]" if opening == "[" else "}"
    check_depth(('{"x":' + opening * 63 + "1" + closing * 63 + "}").encode(), 64)
    with pytest.raises(InvalidJson, match="deeper than the 64 levels"):
        check_depth(('{"x":' + opening * 64 + "1" + closing * 64 + "}").encode(), 64)
    with pytest.raises(InvalidJson):
        check_depth((opening * 10_000_000).encode(), 64)


_TREES = st.recursive(
    st.sampled_from([1, "[{", None]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=40,
)


def depth_of(tree: object) -> int:
    parts = list(tree.values()) if isinstance(tree, dict) else tree if isinstance(tree, list) else None
    return 0 if parts is None else 1 + max(map(depth_of, parts), default=0)


@given(tree=_TREES)
def test_what_is_as_deep_as_it_may_be_passes_and_one_level_more_does_not(tree: object) -> None:
    wide = [tree] * 20  # so that there is something to look at
    raw, depth = json.dumps(wide).encode(), depth_of(wide)
    check_depth(raw, depth)
    if depth > 1:
        with pytest.raises(InvalidJson):
            check_depth(raw, depth - 1)


def test_brackets_in_text_are_no_depth() -> None:
    for text in ("[" * 5000, '\\"[' * 999, '\\\\"[' * 999, "\\" * 77 + '"[{' * 999, '"' * 5001 + "[" * 99):
        raw = json.dumps({"a": text, "b": [[text]]}).encode()
        check_depth(raw, 4)
        assert parse_body(raw)["a"] == text


@pytest.mark.parametrize(
    "raw", [b'{"a":[' + b"[]," * 10_000_000 + b"1]}", b'{"a":["' + b'","' * 10_000_000 + b'"]}' + b"[" * 65]
)
def test_a_body_of_millions_of_parts_is_refused_at_once(raw: bytes) -> None:
    began = time.monotonic()
    with pytest.raises(InvalidJson, match="more than"):
        parse_body(raw)

    assert time.monotonic() - began < 2  # a generous bound: it takes 0.1 s


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b'{"model": "m", "tools": [' + b'{"type": "function"},' * 999 + b"0]}", 400),
        (b'{"model": ', 400),
        (b'{"model": "n"}', 404),
        (b'{"model": "m", "messages": [{"role": "user", "content": "the worker of m fails"}]}', 502),
    ],
)
async def test_what_was_refused_is_gone_at_once_and_waits_for_no_collector(
    raw: bytes, status: int, tmp_path: Path
) -> None:
    key = "fbk_0123456789-of-the-attacker"
    sent: list[MutableMapping[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": raw}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": "POST", "path": "/v1/chat/completions",
        "headers": [(b"authorization", f"Bearer {key}".encode())],
        "extensions": {EXTENSION: SimpleNamespace(watch=lambda left: None, unwatch=lambda: None)},
    }  # fmt: skip
    async with Replay("m") as worker:
        worker.says_json("/v1/chat/completions", {"error": {"message": "no"}}, 500)
        models = {"m": {"workers": [{"engine": "openai", "url": worker.url}]}}
        async with opened(tmp_path, keys=[{"name": "k", "tenant": "t", "key": key}], models=models) as (_, services):
            app = data_app(services)
            gc.collect()
            gc.disable()
            try:
                await app(scope, receive, send)
                kept = [one for one in gc.get_objects() if type(one).__name__ in {"_Exchange", "Run"}]
            finally:
                gc.enable()

    assert sent[0]["status"] == status
    assert not kept
