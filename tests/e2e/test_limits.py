"""Bad input, slow clients and crowds; and what every answer says of itself (R20)."""

import asyncio
import json
import resource
import socket
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web

from tests.e2e.asking import PATIENCE_S, Answer, Client, Kind, ask, connected, kinds, logged, until
from tests.fakes.engine import FakeEngine
from tests.fakes.gateway import GatewayProcess, attached
from tests.fakes.replay import Replay

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Hello."}]
LIMITED_KEY = "fbk_limited-to-the-model-fake-alone"
POST_ROUTES = [CHAT, "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages"]
LIGHT_ROUTES = ["/v1/messages/count_tokens", "/tokenize", "/detokenize"]
CONTEXT = 512


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[FakeEngine]:
    async with FakeEngine(model="fake", tokens=12, max_model_len=CONTEXT) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def replay() -> AsyncIterator[Replay]:
    async with Replay("big") as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def front(engine: FakeEngine, replay: Replay) -> AsyncIterator[GatewayProcess]:
    """A gateway with little patience for its clients."""
    models = {"fake": attached(engine.url), "org/hidden": attached(engine.url), "big": attached(replay.url)}
    limited = {"name": "limited", "tenant": "limited", "key": LIMITED_KEY, "models": ["fake"]}
    server = {"header_timeout": 1, "body_timeout": 1, "client_idle": 1.5, "max_stream_bytes": 2**20}
    async with GatewayProcess(models, keys=[limited], server=server) as gateway:
        yield gateway


@pytest.fixture(autouse=True)
async def others_are_served(front: GatewayProcess) -> AsyncIterator[None]:
    """Whatever a test does, the next client is answered at once."""
    yield
    async with asyncio.timeout(5):
        answer = await ask(front, CHAT, chat())
    assert answer.status == 200
    assert float(answer.headers["x-forebay-queue-ms"]) < 150


def chat(**more: Any) -> dict[str, Any]:
    return {"model": "fake", "messages": MESSAGES, **more}


def assert_refused(answer: Answer, status: int, code: str, param: str | None = None, path: str = CHAT) -> None:
    """The one envelope: OpenAI's, or Anthropic's on Anthropic's routes; never a framework's."""
    assert (answer.status, answer.json.get("error", answer.json).get("code")) == (status, code), answer.body[:500]
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    error = answer.json["error"]
    assert isinstance(error["message"], str)
    assert 0 < len(error["message"]) < 1000
    if path.startswith("/v1/messages"):
        assert set(answer.json) == {"type", "error", "request_id"}
        assert answer.json["type"] == "error"
        assert isinstance(error["type"], str)
    else:
        assert set(answer.json) == {"error"}
        assert set(error) == {"message", "type", "param", "code"}
        assert error["param"] == param


def by_name(kind: Kind) -> str:
    return kind.name


class TestHeaders:
    """R20: each answer says what happened."""

    CONTRACT = (
        "x-request-id",
        "x-forebay-model",
        "x-forebay-worker",
        "x-forebay-attempts",
        "x-forebay-queue-ms",
        "x-forebay-overhead-ms",
        "x-forebay-cache",
    )

    @pytest.mark.parametrize("kind", kinds(), ids=by_name)
    async def test_an_answer_tells_who_gave_it_and_what_it_took(self, front: GatewayProcess, kind: Kind) -> None:
        headers = {"x-request-id": f"contract.{kind.name}"}
        answer = await ask(front, kind.path, {"model": "fake", **kind.body}, headers=headers)
        assert answer.status == 200
        assert [name for name in self.CONTRACT if name not in answer.headers] == []
        assert answer.headers["x-request-id"] == f"contract.{kind.name}"
        assert answer.headers["x-forebay-model"] == "fake"
        assert answer.headers["x-forebay-worker"] == "fake-0"
        assert answer.headers["x-forebay-attempts"] == "1"
        assert float(answer.headers["x-forebay-queue-ms"]) >= 0
        assert 0 < float(answer.headers["x-forebay-overhead-ms"]) < 1000
        assert answer.headers["x-forebay-cache"] == "disabled"
        if kind.streams:
            assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
            assert answer.headers["cache-control"] == "no-cache"
            assert answer.headers["x-accel-buffering"] == "no"
            assert "content-encoding" not in answer.headers
        else:
            assert answer.headers["content-type"] == "application/json"
        if kind.path == "/v1/messages":
            assert answer.headers["request-id"] == f"contract.{kind.name}"

    @pytest.mark.parametrize("path", POST_ROUTES)
    async def test_an_error_tells_as_much_as_there_is_to_tell(self, front: GatewayProcess, path: str) -> None:
        answer = await ask(front, path, b"{", headers={"x-request-id": "wrong"})
        assert_refused(answer, 400, "invalid_json", path=path)
        assert answer.headers["x-request-id"] == "wrong"
        assert answer.headers["x-forebay-attempts"] == "0"
        assert answer.headers["x-forebay-cache"] == "disabled"
        assert answer.headers["x-should-retry"] == "false"

    async def test_an_engine_s_refusal_tells_how_often_it_was_asked(
        self, front: GatewayProcess, engine: FakeEngine
    ) -> None:
        await engine.faults(refuse_status=400)
        answer = await ask(front, CHAT, chat())
        await engine.faults()
        assert answer.headers["x-forebay-attempts"] == "1"
        assert "x-forebay-queue-ms" in answer.headers

    @pytest.mark.parametrize("given", ["", "a b", "x" * 129, "a\tb", "ä", "a;b"])
    async def test_a_request_id_that_is_not_sane_is_replaced(self, front: GatewayProcess, given: str) -> None:
        answer = await ask(front, CHAT, chat(), headers={"x-request-id": given})
        assert answer.status == 200
        assert answer.headers["x-request-id"].startswith("req_")

    @pytest.mark.parametrize("path", ["/v1/models", "/health/readiness", "/nowhere"])
    async def test_light_routes_echo_the_id_too(self, front: GatewayProcess, path: str) -> None:
        answer = await ask(front, path, b"", method="GET", headers={"x-request-id": "light"})
        assert answer.headers["x-request-id"] == "light"

    async def test_nothing_of_ours_reaches_the_engine_and_nothing_of_theirs_is_lost(
        self, front: GatewayProcess, engine: FakeEngine
    ) -> None:
        own = {"session": "s", "end_user": "u", "timeouts": {"total": 5}}
        headers = {"x-request-id": "passed", "x-forebay-program": "p", "openai-beta": "x", "cookie": "a=b"}
        trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        body = chat(forebay=own, priority=3, top_k=20, chat_template_kwargs={"enable_thinking": False}, odd=None)
        await ask(front, CHAT, body, headers={**headers, "traceparent": trace})
        seen = (await engine.stats())["requests"][-1]
        assert seen["body"] == {
            "model": "fake",
            "messages": MESSAGES,
            "top_k": 20,
            "chat_template_kwargs": {"enable_thinking": False},
            "odd": None,
        }
        assert seen["headers"]["x-request-id"] == "passed"
        assert seen["headers"]["traceparent"] == trace
        leaked = {"authorization", "cookie", "x-forebay-program", "openai-beta"} & set(seen["headers"])
        assert not leaked
        record = await logged(front, "passed")
        assert (record["session"], record["end_user"], record["program"]) == ("s", "u", "p")


BROKEN: list[tuple[str, bytes]] = [
    ("empty", b""),
    ("cut", b'{"model": "fake", "messages": ['),
    ("array", b"[]"),
    ("text", b'"hello"'),
    ("null", b"null"),
    ("not_a_number", b'{"model": "fake", "temperature": NaN}'),
    ("bom", b'\xef\xbb\xbf{"model": "fake"}'),
    ("invalid_utf8", b'{"model": "fake", "messages": [{"role": "user", "content": "\xff\xfe"}]}'),
    ("surrogate_bytes", b'{"model": "fake", "messages": [{"role": "user", "content": "\xed\xa0\x80"}]}'),
    ("lone_surrogate", b'{"model": "fake", "messages": [{"role": "user", "content": "\\ud800 and more text"}]}'),
    ("lone_low_surrogate", b'{"model": "fake", "messages": [{"role": "user", "content": "\\udc00 and more"}]}'),
    ("deep_arrays", b'{"model": "fake", "messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    ("deep_objects", b'{"model": "fake", "x": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}"),
    ("endless_number", b'{"model": "fake", "seed": ' + b"9" * 10_000 + b"}"),
    ("form", b"model=fake&prompt=hello"),
]

WRONG: list[tuple[str, dict[str, Any], str, str]] = [
    (CHAT, {"model": 5}, "invalid_request", "model"),
    (CHAT, {"model": None}, "invalid_request", "model"),
    (CHAT, {"model": ""}, "invalid_request", "model"),
    (CHAT, {"model": ["fake"]}, "invalid_request", "model"),
    (CHAT, {"messages": None}, "invalid_request", "messages"),
    (CHAT, {"messages": "Hello."}, "invalid_request", "messages"),
    (CHAT, {"messages": {}}, "invalid_request", "messages"),
    (CHAT, {"messages": []}, "invalid_request", "messages"),
    (CHAT, {"messages": ["Hello."]}, "invalid_request", "messages[0]"),
    (CHAT, {"messages": [*MESSAGES, {"content": "x"}]}, "invalid_request", "messages[1]"),
    (CHAT, {"messages": [{"role": 1, "content": "x"}]}, "invalid_request", "messages[0]"),
    (CHAT, {"n": 0}, "invalid_request", "n"),
    (CHAT, {"n": -1}, "invalid_request", "n"),
    (CHAT, {"n": 1000}, "invalid_request", "n"),
    (CHAT, {"n": "2"}, "invalid_request", "n"),
    (CHAT, {"n": 1.5}, "invalid_request", "n"),
    (CHAT, {"n": True}, "invalid_request", "n"),
    (CHAT, {"max_tokens": -1}, "invalid_request", "max_tokens"),
    (CHAT, {"max_tokens": 0}, "invalid_request", "max_tokens"),
    (CHAT, {"max_tokens": "8"}, "invalid_request", "max_tokens"),
    (CHAT, {"max_tokens": 8.5}, "invalid_request", "max_tokens"),
    (CHAT, {"max_completion_tokens": -5}, "invalid_request", "max_completion_tokens"),
    (CHAT, {"max_completion_tokens": []}, "invalid_request", "max_completion_tokens"),
    (CHAT, {"stream": "true"}, "invalid_request", "stream"),
    (CHAT, {"stream": 1}, "invalid_request", "stream"),
    (CHAT, {"stream_options": "usage"}, "invalid_request", "stream_options"),
    (CHAT, {"forebay": "x"}, "invalid_request", "forebay"),
    (CHAT, {"forebay": []}, "invalid_request", "forebay"),
    (CHAT, {"forebay": {"sesion": "x"}}, "unsupported_parameter", "forebay.sesion"),
    (CHAT, {"forebay": {"x" * 5000: 1}}, "unsupported_parameter", "forebay." + "x" * 64),
    (CHAT, {"forebay": {"cache": {"mode": "exact"}}}, "unsupported_parameter", "forebay.cache"),
    (CHAT, {"forebay": {"objective": "both"}}, "invalid_request", "forebay.objective"),
    (CHAT, {"forebay": {"deadline_ms": "5"}}, "invalid_request", "forebay.deadline_ms"),
    (CHAT, {"forebay": {"class": "urgent"}}, "invalid_request", "forebay.class"),
    (CHAT, {"forebay": {"route": {}}}, "unsupported_parameter", "forebay.route"),
    (CHAT, {"forebay": {"examples": True}}, "unsupported_parameter", "forebay.examples"),
    (CHAT, {"forebay": {"kv": {}}}, "unsupported_parameter", "forebay.kv"),
    (CHAT, {"forebay": {"session": ""}}, "invalid_request", "forebay.session"),
    (CHAT, {"forebay": {"session": 5}}, "invalid_request", "forebay.session"),
    (CHAT, {"forebay": {"session": "x" * 200}}, "invalid_request", "forebay.session"),
    (CHAT, {"forebay": {"timeouts": 5}}, "invalid_request", "forebay.timeouts"),
    (CHAT, {"forebay": {"timeouts": {"totl": 5}}}, "unsupported_parameter", "forebay.timeouts.totl"),
    (CHAT, {"forebay": {"timeouts": {"total": 0}}}, "invalid_request", "forebay.timeouts.total"),
    (CHAT, {"forebay": {"timeouts": {"total": "5"}}}, "invalid_request", "forebay.timeouts.total"),
    (CHAT, {"forebay": {"timeouts": {"total": True}}}, "invalid_request", "forebay.timeouts.total"),
    (CHAT, {"forebay": {"timeouts": {"idle": -1}}}, "invalid_request", "forebay.timeouts.idle"),
    (CHAT, {"forebay": {"fallbacks": "fake"}}, "invalid_request", "forebay.fallbacks"),
    (CHAT, {"forebay": {"fallbacks": ["fake"] * 9}}, "invalid_request", "forebay.fallbacks"),
    (CHAT, {"forebay": {"fallbacks": [5]}}, "invalid_request", "forebay.fallbacks"),
    ("/v1/completions", {"prompt": None}, "invalid_request", "prompt"),
    ("/v1/completions", {"prompt": 5}, "invalid_request", "prompt"),
    ("/v1/completions", {"prompt": {}}, "invalid_request", "prompt"),
    ("/v1/completions", {"max_tokens": -1}, "invalid_request", "max_tokens"),
    ("/v1/embeddings", {"input": None}, "invalid_request", "input"),
    ("/v1/embeddings", {"input": 5}, "invalid_request", "input"),
    ("/v1/responses", {"input": 5}, "invalid_request", "input"),
    ("/v1/responses", {"max_output_tokens": -1}, "invalid_request", "max_output_tokens"),
    ("/v1/messages", {"messages": "x"}, "invalid_request", "messages"),
    ("/v1/messages", {"max_tokens": 0}, "invalid_request", "max_tokens"),
]


class TestBadBodies:
    @pytest.mark.parametrize("path", POST_ROUTES + LIGHT_ROUTES)
    @pytest.mark.parametrize(("name", "raw"), BROKEN, ids=[name for name, _ in BROKEN])
    async def test_what_is_not_a_json_object_is_invalid_json(
        self, front: GatewayProcess, path: str, name: str, raw: bytes
    ) -> None:
        assert_refused(await ask(front, path, raw), 400, "invalid_json", path=path)

    @pytest.mark.parametrize(("path", "wrong", "code", "param"), WRONG, ids=lambda value: str(value)[:40])
    async def test_a_wrong_field_is_named(
        self, front: GatewayProcess, path: str, wrong: dict[str, Any], code: str, param: str
    ) -> None:
        body = {"model": "fake", "messages": MESSAGES, "prompt": "x", "input": "x", "max_tokens": 4, **wrong}
        assert_refused(await ask(front, path, body), 400, code, param, path)

    @pytest.mark.parametrize(
        "header",
        [("x-forebay-cache", "no-store"), ("x-forebay-nonsense", "1"), ("x-forebay-timeouts", "total"),
         ("x-forebay-timeouts", "total=nan"), ("x-forebay-timeouts", "total=1e999"), ("x-forebay-session", "")],
    )  # fmt: skip
    async def test_a_wrong_header_is_refused(self, front: GatewayProcess, header: tuple[str, str]) -> None:
        answer = await ask(front, CHAT, chat(), headers=dict([header]))
        assert answer.status == 400
        assert answer.json["error"]["code"] in ("unsupported_parameter", "invalid_request")

    @pytest.mark.parametrize("path", POST_ROUTES + LIGHT_ROUTES)
    async def test_an_unknown_model_is_not_found(self, front: GatewayProcess, path: str) -> None:
        body = {"model": "fakee", "messages": MESSAGES, "prompt": "x", "input": "x", "max_tokens": 4, "tokens": [1]}
        answer = await ask(front, path, body)
        assert_refused(answer, 404, "model_not_found", "model", path)
        assert "fake" in answer.json["error"]["message"]

    async def test_a_model_name_of_megabytes_costs_no_time(self, front: GatewayProcess) -> None:
        began = time.monotonic()
        assert_refused(await ask(front, CHAT, chat(model="f" * 8_000_000)), 404, "model_not_found", "model")
        assert time.monotonic() - began < 1

    @pytest.mark.parametrize("path", POST_ROUTES + LIGHT_ROUTES)
    async def test_a_key_without_the_model_is_denied(self, front: GatewayProcess, path: str) -> None:
        body = {"model": "org/hidden", "messages": MESSAGES, "prompt": "x", "input": "x", "max_tokens": 4}
        assert_refused(await ask(front, path, body, key=LIMITED_KEY), 403, "model_not_allowed", "model", path)

    @pytest.mark.parametrize("path", POST_ROUTES + LIGHT_ROUTES)
    async def test_an_unknown_key_is_refused(self, front: GatewayProcess, path: str) -> None:
        assert_refused(await ask(front, path, chat(), key="fbk_wrong"), 401, "invalid_api_key", path=path)

    async def test_a_fallback_that_the_key_may_not_use_is_denied(self, front: GatewayProcess) -> None:
        body = chat(forebay={"fallbacks": ["org/hidden"]})
        assert_refused(await ask(front, CHAT, body, key=LIMITED_KEY), 403, "model_not_allowed", "model")

    @pytest.mark.parametrize("kind", kinds("word " * 2 * CONTEXT), ids=by_name)
    async def test_a_prompt_that_is_too_long_is_told_as_such(self, front: GatewayProcess, kind: Kind) -> None:
        answer = await ask(front, kind.path, {"model": "fake", **kind.body})
        assert_refused(answer, 400, "context_length_exceeded", "messages", kind.path)

    async def test_of_a_doubled_key_the_last_counts(self, front: GatewayProcess, engine: FakeEngine) -> None:
        raw = b'{"model": "nobody", "model": "fake", "prompt": "a", "prompt": "b", "max_tokens": 2}'
        assert (await ask(front, "/v1/completions", raw)).status == 200
        assert (await engine.stats())["requests"][-1]["body"]["prompt"] == "b"

    async def test_odd_but_legal_json_passes_untouched(self, front: GatewayProcess, engine: FakeEngine) -> None:
        odd = {"seed": 10**30, "x": [1.5e-300, -0.0, 2**63, True, None, "\U0001f600\u0000\u2028"], "": {"a": [[[{}]]]}}
        assert (await ask(front, CHAT, chat(**odd))).status == 200
        seen = (await engine.stats())["requests"][-1]["body"]
        assert {name: seen[name] for name in odd} == odd

    @pytest.mark.parametrize("path", POST_ROUTES + LIGHT_ROUTES)
    @pytest.mark.parametrize("is_chunked", [False, True], ids=["declared", "chunked"])
    async def test_a_body_of_33_mib_is_too_large(self, front: GatewayProcess, path: str, is_chunked: bool) -> None:
        piece = b"x" * 2**20
        async with connected(front) as client:
            size = {"transfer-encoding": "chunked"} if is_chunked else {"content-length": str(33 * 2**20)}
            lines = {"host": "x", "authorization": f"Bearer {front.key}", **size}
            head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
            client.write(f"POST {path} HTTP/1.1\r\n{head}\r\n".encode())

            async def upload() -> None:
                for _ in range(33):
                    client.write(b"%x\r\n%b\r\n" % (len(piece), piece) if is_chunked else piece)
                    await client.writer.drain()
                if is_chunked:
                    client.write(b"0\r\n\r\n")

            uploading = asyncio.ensure_future(upload())
            try:
                answer = await client.answer()
            finally:
                uploading.cancel()
                await asyncio.gather(uploading, return_exceptions=True)
        assert_refused(answer, 413, "request_too_large", path=path)

    async def test_a_body_of_31_mib_is_served(self, front: GatewayProcess, replay: Replay) -> None:
        replay.says_json(CHAT, {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1}})
        text = "x" * (31 * 2**20)
        answer = await ask(front, CHAT, {"model": "big", "messages": [{"role": "user", "content": text}]})
        assert answer.status == 200
        assert replay.bodies.pop()["messages"][0]["content"] == text


class TestBadHttp:
    @pytest.mark.parametrize("path", POST_ROUTES)
    @pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH"])
    async def test_a_post_route_takes_nothing_else(self, front: GatewayProcess, path: str, method: str) -> None:
        assert_refused(await ask(front, path, b"", method=method), 405, "method_not_allowed", path=path)

    async def test_head_on_a_post_route_has_no_body(self, front: GatewayProcess) -> None:
        async with connected(front) as client:
            client.ask(CHAT, b"", method="HEAD", headers={"connection": "close"})
            status, _ = await client.head()
            assert status == 405
            assert await client.reader.read() == b""

    @pytest.mark.parametrize(
        "path",
        ["/", "/v1", "/v1/nothing", "/v1/chat/completions/", "/v1//chat/completions", "/%ff%00", "/v1/models/no"],
    )
    async def test_an_unknown_url_is_told_in_our_words(self, front: GatewayProcess, path: str) -> None:
        answer = await ask(front, path, b"", method="GET")
        code = "model_not_found" if path == "/v1/models/no" else "unknown_url"
        assert answer.json["error"]["code"] == code
        assert answer.status == 404
        assert set(answer.json) == {"error"}

    async def test_a_get_route_does_not_take_post(self, front: GatewayProcess) -> None:
        assert_refused(await ask(front, "/v1/models", {}), 405, "method_not_allowed")

    @pytest.mark.parametrize(
        "raw",
        [b"hello\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GET / HTTP/9.9\r\n\r\n", b"\x00" * 64,
         b"POST /v1/completions HTTP/1.1\r\ncontent-length: -5\r\n\r\n",
         b"POST /v1/completions HTTP/1.1\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\nhello",
         b"POST /v1/completions HTTP/1.1\r\nbad header\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"],
        ids=["words", "tls", "version", "zeros", "length", "smuggling", "header", "http2"],
    )  # fmt: skip
    async def test_what_is_not_http_is_refused_and_closed(self, front: GatewayProcess, raw: bytes) -> None:
        async with connected(front) as client:
            client.write(raw)
            answer = await client.answer()
            assert_refused(answer, 400, "invalid_http")
            await client.closed()

    @pytest.mark.parametrize(
        "header",
        ["x-big: " + "x" * 100_000, "\r\n".join(f"x-{at}: {'y' * 90}" for at in range(1000))],
        ids=["one", "many"],
    )
    async def test_headers_that_are_too_large_are_refused(self, front: GatewayProcess, header: str) -> None:
        async with connected(front) as client:
            client.write(f"GET /v1/models HTTP/1.1\r\nhost: x\r\n{header}\r\n\r\n".encode())
            assert_refused(await client.answer(), 431, "headers_too_large")
            await client.closed()

    @pytest.mark.parametrize("start", [b"GET /", b"GET / HTTP/1.1\r\nx-endless: "], ids=["url", "header"])
    async def test_a_head_without_end_is_refused_before_it_fills_the_memory(
        self, front: GatewayProcess, start: bytes
    ) -> None:
        async with connected(front) as client:
            client.write(start + b"a" * 2**20)
            assert_refused(await client.answer(), 431, "headers_too_large")

    async def test_a_refused_client_that_goes_on_sending_is_cut_after_some_seconds(self, front: GatewayProcess) -> None:
        async def go_on(client: Client) -> None:
            while True:
                client.write(b"a" * 2**16)
                await client.writer.drain()
                await asyncio.sleep(0.02)

        async with connected(front) as client, asyncio.timeout(PATIENCE_S):
            client.write(b"not http\r\n\r\n")
            assert_refused(await client.answer(), 400, "invalid_http")
            with pytest.raises(ConnectionError):
                await go_on(client)

    async def test_a_client_that_asks_for_an_upgrade_is_answered_in_http_1(self, front: GatewayProcess) -> None:
        headers = {
            "connection": "Upgrade, HTTP2-Settings",
            "upgrade": "h2c",
            "http2-settings": "AAMAAABkAARAAAAAAAIAAAAA",
        }
        assert (await ask(front, CHAT, chat(), headers=headers)).status == 200

    async def test_a_client_that_waits_for_100_continue_gets_it(self, front: GatewayProcess) -> None:
        raw = json.dumps(chat()).encode()
        async with connected(front) as client:
            client.ask(CHAT, b"", headers={"expect": "100-continue", "content-length": str(len(raw))})
            assert (await client.head())[0] == 100
            client.write(raw)
            assert (await client.answer()).status == 200

    async def test_requests_that_come_at_once_are_answered_in_order(self, front: GatewayProcess) -> None:
        async with connected(front) as client:
            for number in range(4):
                client.ask(CHAT, chat(stream=number % 2 == 0), headers={"x-request-id": f"pipelined-{number}"})
            answers = [await client.answer() for _ in range(4)]
        assert [answer.headers["x-request-id"] for answer in answers] == [f"pipelined-{number}" for number in range(4)]
        assert {answer.status for answer in answers} == {200}

    async def test_a_connection_serves_one_request_after_another(self, front: GatewayProcess) -> None:
        async with connected(front) as client:
            for body, status in ((chat(), 200), (chat(n=0), 400), (chat(stream=True), 200), (chat(), 200)):
                client.ask(CHAT, body)
                assert (await client.answer()).status == status


class TestSlowClients:
    async def test_a_head_that_stalls_is_closed_in_time(self, front: GatewayProcess) -> None:
        async with connected(front) as client:
            client.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n")
            began = time.monotonic()
            assert_refused(await client.answer(), 408, "request_timeout")
            await client.closed()
        assert 0.9 < time.monotonic() - began < 4

    async def test_a_head_that_trickles_is_closed_in_time(self, front: GatewayProcess) -> None:
        async with connected(front) as client:
            began = time.monotonic()

            async def trickle() -> None:
                for letter in b"POST /v1/chat/completions HTTP/1.1\r\nhost: " + b"x" * 1000:
                    client.write(bytes([letter]))
                    await asyncio.sleep(0.05)

            trickling = asyncio.ensure_future(trickle())
            assert_refused(await client.answer(), 408, "request_timeout")
            trickling.cancel()
        assert 0.9 < time.monotonic() - began < 4

    async def test_a_body_that_stalls_is_told_and_closed_in_time(self, front: GatewayProcess) -> None:
        async def stall(path: str) -> None:
            async with connected(front) as client:
                client.ask(path, b'{"model"', headers={"content-length": "100"})
                began = time.monotonic()
                assert_refused(await client.answer(), 408, "request_timeout", path=path)
                await client.closed()
            assert 0.9 < time.monotonic() - began < 4

        await asyncio.gather(*(stall(path) for path in (CHAT, "/v1/messages", "/tokenize")))

    async def test_a_connection_that_says_nothing_is_closed(self, front: GatewayProcess) -> None:
        async with connected(front) as client:
            began = time.monotonic()
            await client.closed()
        assert time.monotonic() - began < 4

    async def test_a_client_that_reads_a_byte_a_second_is_cut_and_disturbs_nobody(
        self, front: GatewayProcess, replay: Replay
    ) -> None:
        is_gone = asyncio.Event()

        async def flood(request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            event = b'data: {"choices":[{"index":0,"delta":{"content":"' + b"x" * 8000 + b'"}}]}\n\n'
            try:
                while True:
                    await response.write(event)
            finally:
                is_gone.set()

        replay.says(CHAT, flood)
        raw = json.dumps({"model": "big", "messages": MESSAGES, "stream": True}).encode()
        lines = {"authorization": f"Bearer {front.key}", "x-request-id": "slow-reader", "content-length": str(len(raw))}
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        loop = asyncio.get_running_loop()
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.setblocking(False)
            await loop.sock_connect(slow, ("127.0.0.1", front.port))
            await loop.sock_sendall(slow, f"POST {CHAT} HTTP/1.1\r\nhost: x\r\n{head}\r\n".encode() + raw)
            for _ in range(3):
                await loop.sock_recv(slow, 1)
                began = time.monotonic()
                assert (await ask(front, CHAT, chat(stream=True))).status == 200
                assert time.monotonic() - began < 1
                await asyncio.sleep(1)
            async with asyncio.timeout(10):
                await is_gone.wait()
        record = await logged(front, "slow-reader")
        assert record["error"] == "client_idle"
        assert record["usage"]["completion_tokens"] > 0


async def test_a_tenant_may_have_only_so_many_answers_open(engine: FakeEngine) -> None:
    await engine.faults(silent=True, contains="Hang.")
    try:
        async with GatewayProcess({"fake": attached(engine.url)}, server={"max_tenant_streams": 2}) as gateway:
            async with connected(gateway) as one, connected(gateway) as two:
                for client in (one, two):
                    client.ask("/v1/completions", {"model": "fake", "prompt": "Hang."})
                await engine.until(in_flight=2)
                third = await ask(gateway, CHAT, chat())
                assert_refused(third, 429, "connection_limit")
                assert third.headers["retry-after"] == "1"
            await engine.until(in_flight=0)

            async def is_served() -> bool:
                return (await ask(gateway, CHAT, chat())).status == 200

            await until(is_served, "there is room again")
    finally:
        await engine.faults()


async def test_a_queue_that_is_full_refuses_at_once(engine: FakeEngine) -> None:
    await engine.faults(silent=True, contains="Hang.")
    try:
        models = {"fake": attached(engine.url, max_inflight=1)}
        async with GatewayProcess(models, queue={"size": 1}) as gateway, AsyncExitStack() as stack:
            for number in range(2):
                client = await stack.enter_async_context(connected(gateway))
                client.ask("/v1/completions", {"model": "fake", "prompt": f"Hang. {number}"})
                await engine.until(in_flight=1)
            await asyncio.sleep(0.1)
            full = await ask(gateway, CHAT, chat())
            assert_refused(full, 503, "queue_full")
            assert full.headers["retry-after"] == "1"
            assert full.headers["x-should-retry"] == "true"
    finally:
        await engine.faults()


async def test_a_crowd_of_idle_connections_disturbs_nobody(engine: FakeEngine) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    count = 10_000 if hard >= 12_000 else 2_000
    idle: list[socket.socket] = []
    try:
        async with GatewayProcess({"fake": attached(engine.url)}, server={"header_timeout": 120}) as gateway:
            loop = asyncio.get_running_loop()
            for _ in range(count):
                idle.append(one := socket.socket())
                one.setblocking(False)
                await loop.sock_connect(one, ("127.0.0.1", gateway.port))
            slowest = 0.0
            for _ in range(20):
                began = time.monotonic()
                assert (await ask(gateway, CHAT, chat(stream=True))).status == 200
                slowest = max(slowest, time.monotonic() - began)
            print(f"\nbehind {count} idle connections the slowest of 20 requests took {slowest * 1e3:.0f} ms")
            assert slowest < 2
            for one in idle:
                one.close()
    finally:
        for one in idle:
            one.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
