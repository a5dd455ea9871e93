"""One call of an MCP server's tool: what is said, what comes of each answer, however its bytes are parted."""

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.mcp import REVISION, Answer, McpError, call

HELLO: dict[str, Any] = {"jsonrpc": "2.0", "id": 1, "result": {"protocolVersion": REVISION, "capabilities": {}}}


class Body:
    """An answer, in pieces."""

    def __init__(self, *given: bytes, media_type: str = "application/json", session: str | None = None) -> None:
        self.media_type = media_type
        self.session = session
        self._given = given

    async def pieces(self) -> AsyncIterator[bytes]:
        for piece in self._given:
            yield piece


class Script:
    """A server that answers requests in turn, and takes all else that it is told."""

    def __init__(self, *answers: Body) -> None:
        self._answers = list(answers)
        self.heard: list[Any] = []
        self.headers: list[dict[str, str]] = []
        self.left_with: Mapping[str, str] | None = None

    @asynccontextmanager
    async def post(self, content: bytes, headers: Mapping[str, str]) -> AsyncIterator[Answer]:
        message = json.loads(content)
        self.heard.append(message)
        self.headers.append(dict(headers))
        yield self._answers.pop(0) if {"method", "id"} <= message.keys() else Body()

    async def delete(self, headers: Mapping[str, str]) -> None:
        self.left_with = dict(headers)


def hello(**more: Any) -> Body:
    return Body(json.dumps(HELLO).encode(), **more)


def result(said: Mapping[str, Any]) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": 2, "result": said}


def text(*texts: str) -> dict[str, Any]:
    return {"content": [{"type": "text", "text": one} for one in texts]}


def stream(*messages: Any, end: str = "\n") -> bytes:
    return "".join(f"event: message{end}id: 7{end}data: {json.dumps(one)}{end}{end}" for one in messages).encode()


async def value_of(message: Any) -> Any:
    return await call(Script(hello(), Body(json.dumps(message).encode())), "t", {}, key="k")


async def failure_of(*answers: Body, arguments: Any = None) -> McpError:
    with pytest.raises(McpError) as caught:
        await call(Script(*answers), "t", arguments, key="k")
    return caught.value


async def test_a_session_begins_calls_once_and_ends() -> None:
    server = Script(hello(session="s-1"), Body(json.dumps(result(text("hi"))).encode()))

    assert await call(server, "greet", {"whom": "you"}, key="k") == "hi"

    assert [one["method"] for one in server.heard] == ["initialize", "notifications/initialized", "tools/call"]
    assert server.heard[0]["params"]["protocolVersion"] == REVISION
    assert server.heard[2]["params"] == {"name": "greet", "arguments": {"whom": "you"}}
    assert all(one["jsonrpc"] == "2.0" for one in server.heard)
    first, *rest = server.headers
    assert "mcp-session-id" not in first
    assert all((one["mcp-session-id"], one["mcp-protocol-version"]) == ("s-1", REVISION) for one in rest)
    assert all(one["accept"] == "application/json, text/event-stream" for one in server.headers)
    assert [one.get("idempotency-key") for one in server.headers] == [None, None, "k"]
    assert server.left_with is not None
    assert server.left_with["mcp-session-id"] == "s-1"


async def test_a_server_that_keeps_no_session_is_told_no_good_bye() -> None:
    server = Script(hello(), Body(json.dumps(result(text("hi"))).encode()))

    await call(server, "t", None, key="k")

    assert server.left_with is None
    assert server.heard[2]["params"]["arguments"] == {}


async def test_a_session_ends_also_after_a_failure() -> None:
    server = Script(hello(session="s-1"), Body(json.dumps(result({**text("no"), "isError": True})).encode()))

    with pytest.raises(McpError):
        await call(server, "t", None, key="k")

    assert server.left_with is not None


@pytest.mark.parametrize(
    ("said", "value"),
    [
        (text("a", "b"), "a\nb"),
        ({**text('{"a": 1}'), "structuredContent": {"a": 1}}, {"a": 1}),
        ({**text("x"), "structuredContent": {}}, {}),
        ({**text("x"), "structuredContent": None}, "x"),
        ({"content": []}, ""),
        ({"content": [{"type": "image", "data": "AA=="}, {"type": "text", "text": "seen"}]}, "seen"),
    ],
)
async def test_the_value_is_what_has_structure_or_else_the_text(said: dict[str, Any], value: Any) -> None:
    assert await value_of(result(said)) == value


@pytest.mark.parametrize(
    ("message", "told", "can_retry"),
    [
        (result({**text("quota is used up"), "isError": True}), "the tool failed: quota is used up", True),
        ({"id": 2, "error": {"code": -32602, "message": "no tool t"}}, "the error -32602: no tool t", False),
        ({"id": 2, "error": {"code": -32603, "message": "oops"}}, "the error -32603: oops", True),
        ({"id": 3, "result": text("for somebody else")}, "before it had given one", True),
        (result({"content": [{"type": "image"}]}), "without text, by image alone", False),
        (result({"content": "x"}), "no result of a tool", False),
        (result({**text("y" * 500), "isError": True}), "y" * 200, True),
        ("x", "no message of JSON-RPC", False),
    ],
)
async def test_what_is_no_value_is_a_failure(message: Any, told: str, can_retry: bool) -> None:
    error = await failure_of(hello(), Body(json.dumps(message).encode()))

    assert told in str(error)
    assert "y" * 201 not in str(error)
    assert error.can_retry is can_retry


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 5000, b'{"id": {}}'])
async def test_bytes_that_are_no_message_are_a_failure(content: bytes) -> None:
    assert "no message" in str(await failure_of(hello(), Body(content)))


async def test_answers_of_another_kind_are_refused() -> None:
    assert "neither JSON" in str(await failure_of(Body(b"<html>", media_type="text/html")))


@pytest.mark.parametrize("arguments", [[], "x", 1, False])
async def test_arguments_are_an_object(arguments: Any) -> None:
    assert "an object" in str(await failure_of(arguments=arguments))


async def test_a_server_of_an_unknown_revision_is_not_asked() -> None:
    server = Script(Body(json.dumps({"id": 1, "result": {"protocolVersion": "1999-01-01"}}).encode()))

    with pytest.raises(McpError, match="1999-01-01"):
        await call(server, "t", None, key="k")

    assert len(server.heard) == 1


@pytest.mark.parametrize("name", ["", "a b", "a\r\nx: y", "ä", "s" * 1025])
async def test_a_session_is_named_by_visible_letters(name: str) -> None:
    assert "no such name" in str(await failure_of(hello(session=name)))


async def test_what_a_server_asks_on_the_way_is_answered() -> None:
    answer = stream(
        {"jsonrpc": "2.0", "method": "notifications/progress", "params": {"progress": 1}},
        {"jsonrpc": "2.0", "id": "p", "method": "ping"},
        {"jsonrpc": "2.0", "id": 9, "method": "sampling/createMessage", "params": {}},
        result(text("done")),
    )
    server = Script(hello(), Body(answer, media_type="text/event-stream"))

    assert await call(server, "t", None, key="k") == "done"

    ping, sampling = server.heard[3:]
    assert (ping["id"], ping["result"]) == ("p", {})
    assert (sampling["id"], sampling["error"]["code"]) == (9, -32601)


async def test_a_batch_of_an_older_revision_is_understood() -> None:
    progress = {"jsonrpc": "2.0", "method": "notifications/progress"}

    assert await value_of([progress, result(text("x"))]) == "x"


@given(
    end=st.sampled_from(["\n", "\r\n"]),
    said=st.text(max_size=20),
    cuts=st.lists(st.integers(0, 400), max_size=8),
)
async def test_a_stream_says_the_same_wherever_it_is_cut(end: str, said: str, cuts: list[int]) -> None:
    whole = b": hello\r\n\r\ndata:\n\n" + stream({"jsonrpc": "2.0", "method": "x"}, result(text(said)), end=end)
    places = sorted({0, len(whole), *(cut for cut in cuts if cut < len(whole))})
    pieces = [whole[start:stop] for start, stop in pairwise(places)]

    value = await call(Script(hello(), Body(*pieces, media_type="text/event-stream")), "t", None, key="k")

    assert value == said


async def test_data_of_several_lines_are_one_message() -> None:
    lines = json.dumps(result(text("x")), indent=1).splitlines()
    body = Body("".join(f"data: {line}\n" for line in lines).encode() + b"\n", media_type="text/event-stream")

    assert await call(Script(hello(), body), "t", None, key="k") == "x"


async def test_a_stream_that_breaks_off_may_go_better_another_time() -> None:
    body = Body(stream(result(text("x")))[:-1], media_type="text/event-stream")

    error = await failure_of(hello(), body)

    assert error.can_retry
