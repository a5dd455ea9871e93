"""What a stream carries, what it costs, and how it ends when something breaks (R3, R4, R5)."""

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web

from tests.e2e.asking import Answer, Kind, ask, connected, event_of, kinds, logged
from tests.fakes.engine import FakeEngine
from tests.fakes.gateway import GatewayProcess, attached
from tests.fakes.replay import Replay, recording, stream

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT = "/v1/chat/completions"
RECORDINGS = sorted((Path(__file__).resolve().parents[1] / "vllm" / "recordings").glob("*.sse"))
WHOLE_RECORDINGS = [path for path in RECORDINGS if "died" not in path.name]
STREAMED = [kind for kind in kinds() if kind.streams]
OPENAI_STREAMED = [kind for kind in STREAMED if kind.path in (CHAT, "/v1/completions")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running() -> AsyncIterator[FakeEngine]:
    async with FakeEngine(model="fake", tokens=12) as engine:
        yield engine


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def replay() -> AsyncIterator[Replay]:
    async with Replay("smol") as engine:
        yield engine


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def front(running: FakeEngine, replay: Replay) -> AsyncIterator[GatewayProcess]:
    """A gateway that tries once, so that a fault is told at once."""
    models = {"fake": attached(running.url), "smol": attached(replay.url)}
    async with GatewayProcess(models, retry={"attempts": 1}) as gateway:
        yield gateway


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair(running: FakeEngine) -> AsyncIterator[GatewayProcess]:
    """A gateway that has the engine twice, so that there is another worker to go to."""
    async with GatewayProcess({"fake": {"workers": attached(running.url)["workers"] * 2}}) as gateway:
        yield gateway


@pytest_asyncio.fixture(loop_scope="module")
async def engine(running: FakeEngine, front: GatewayProcess) -> AsyncIterator[FakeEngine]:
    """The fake engine without a past; what a test did to the breaker goes with it."""
    await running.reset()
    yield running
    await running.reset()
    healed = await ask(front, "/v1/completions", {"model": "fake", "prompt": "Heal.", "max_tokens": 1})
    assert healed.status == 200


def by_name(kind: Kind) -> str:
    return kind.name


def asked(kind: Kind, **more: Any) -> dict[str, Any]:
    return {"model": "fake", **kind.body, **more}


def frames_of(raw: bytes) -> list[bytes]:
    return [frame + b"\n\n" for frame in raw.split(b"\n\n") if frame]


def cuts_of(raw: bytes, size: int) -> list[bytes]:
    return [raw[at : at + size] for at in range(0, len(raw), size)]


def nameless(raw: bytes) -> bytes:
    """Leave out what differs between two answers of one engine to one question."""
    raw = re.sub(rb'"(?:chatcmpl-|cmpl-|resp_|msg_)[0-9a-f]+"', b'"ID"', raw)
    return re.sub(rb'"created(?:_at)?":[0-9.]+', b'"created":0', raw)


class TestBytes:
    """R3: what the engine sent is what the client gets."""

    @pytest.mark.parametrize("path", WHOLE_RECORDINGS, ids=lambda path: path.stem)
    async def test_a_recorded_stream_of_vllm_passes_byte_for_byte(
        self, front: GatewayProcess, replay: Replay, path: Path
    ) -> None:
        url, body, raw = recording(path)
        for pieces in ([raw], frames_of(raw), cuts_of(raw, 997)):
            replay.says_stream(url, pieces)
            answer = await ask(front, url, body)
            assert answer.status == 200
            assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
            assert answer.body == raw

    @pytest.mark.parametrize("kind", STREAMED, ids=by_name)
    async def test_a_stream_is_the_same_through_the_gateway_as_without_it(
        self, front: GatewayProcess, engine: FakeEngine, kind: Kind
    ) -> None:
        body = asked(kind)
        if kind in OPENAI_STREAMED:
            body["stream_options"] = {"include_usage": True}
        async with engine.session.post(engine.url + kind.path, json=body) as response:
            direct = await response.read()
        # The engine counts what it has seen before as cached: the third time is like the second.
        async with engine.session.post(engine.url + kind.path, json=body) as response:
            direct = await response.read()
        assert nameless((await ask(front, kind.path, body)).body) == nameless(direct)

    async def test_lines_may_end_as_windows_likes_them(self, front: GatewayProcess, replay: Replay) -> None:
        raw = recording(RECORDINGS[0].with_name("chat_stream_usage.sse"))[2].replace(b"\n", b"\r\n")
        replay.says_stream(CHAT, cuts_of(raw, 211))
        body = {"model": "smol", "messages": [{"role": "user", "content": "x"}], "stream": True}
        answer = await ask(front, CHAT, {**body, "stream_options": {"include_usage": True}})
        assert answer.body == raw

    async def test_the_first_token_is_never_held(self, front: GatewayProcess, replay: Replay) -> None:
        raw = frames_of(recording(RECORDINGS[0].with_name("chat_stream_plain.sse"))[2])
        may_go_on = asyncio.Event()

        async def gated(request: web.Request) -> web.StreamResponse:
            response = await stream(request, raw[:1])
            await may_go_on.wait()
            for frame in raw[1:]:
                await response.write(frame)
            return response

        replay.says(CHAT, gated)
        async with connected(front) as client:
            body = {"model": "smol", "messages": [{"role": "user", "content": "x"}], "stream": True}
            client.ask(CHAT, body)
            assert (await client.head())[0] == 200
            assert await client.piece() == raw[0]
            may_go_on.set()
            assert await client.rest() == b"".join(raw[1:])

    async def test_comments_pass_and_are_no_events(self, front: GatewayProcess, engine: FakeEngine) -> None:
        await engine.faults(trickle_ms=60, ping_ms=20)
        answer = await ask(front, CHAT, asked(STREAMED[0], max_tokens=3))
        assert b": ping\n\n" in answer.body
        assert answer.events[-1] == b"data: [DONE]"

    @pytest.mark.parametrize("fault", ["duplicate_done", "no_done"])
    @pytest.mark.parametrize("kind", OPENAI_STREAMED, ids=by_name)
    async def test_done_comes_exactly_once(
        self, front: GatewayProcess, engine: FakeEngine, kind: Kind, fault: str
    ) -> None:
        await engine.faults(**{fault: True})
        answer = await ask(front, kind.path, asked(kind))
        assert answer.events.count(b"data: [DONE]") == 1
        assert answer.events[-1] == b"data: [DONE]"
        assert not answer.errors


class TestUsage:
    """R4: every answer is metered, and alike."""

    @pytest.mark.parametrize("kind", STREAMED, ids=by_name)
    @pytest.mark.parametrize("with_choices", [False, True], ids=["alone", "with_choices"])
    async def test_a_stream_costs_what_the_whole_answer_costs(
        self, front: GatewayProcess, engine: FakeEngine, kind: Kind, with_choices: bool
    ) -> None:
        await engine.faults(usage_with_choices=with_choices)
        texts = ("Hi.", "Ünï" * 40, "one two " * 100)
        ids = [
            [f"cost-{kind.name}-{with_choices}-{at}-{how}" for how in ("stream", "whole")] for at in range(len(texts))
        ]
        for text, (stream_id, whole_id) in zip(texts, ids, strict=True):
            body = asked(next(one for one in kinds(text) if one.name == kind.name))
            for request_id, streams in ((stream_id, True), (whole_id, False)):
                asking = {**body, "stream": streams}
                assert (await ask(front, kind.path, asking, headers={"x-request-id": request_id})).status == 200
        for both in ids:
            streamed, whole = [(await logged(front, request_id))["usage"] for request_id in both]
            assert streamed["prompt_tokens"] == whole["prompt_tokens"] > 0
            assert streamed["completion_tokens"] == whole["completion_tokens"] > 0

    @pytest.mark.parametrize("kind", OPENAI_STREAMED, ids=by_name)
    @pytest.mark.parametrize("options", [None, {}, {"include_usage": False}], ids=["none", "empty", "false"])
    @pytest.mark.parametrize("with_choices", [False, True], ids=["alone", "with_choices"])
    async def test_usage_that_nobody_asked_for_is_taken_out(
        self, front: GatewayProcess, engine: FakeEngine, kind: Kind, options: Any, with_choices: bool
    ) -> None:
        await engine.faults(usage_with_choices=with_choices)
        answer = await ask(front, kind.path, asked(kind, stream_options=options))
        assert b'"usage"' not in answer.body
        assert all(event["choices"] for frame in answer.events if (event := event_of(frame)))
        sent = (await engine.stats())["requests"][-1]["body"]
        assert sent["stream_options"] == {"include_usage": True}

    @pytest.mark.parametrize("kind", OPENAI_STREAMED, ids=by_name)
    async def test_usage_that_was_asked_for_stays(self, front: GatewayProcess, engine: FakeEngine, kind: Kind) -> None:
        answer = await ask(front, kind.path, asked(kind, stream_options={"include_usage": True}))
        last = event_of(answer.events[-2])
        assert last["choices"] == []
        assert last["usage"]["completion_tokens"] > 0

    async def test_embeddings_are_metered_and_never_streamed(self, front: GatewayProcess, engine: FakeEngine) -> None:
        body = {"model": "fake", "input": ["a b", "c"], "stream": True}
        answer = await ask(front, "/v1/embeddings", body, headers={"x-request-id": "embedded"})
        assert answer.status == 200
        assert len(answer.json["data"]) == 2
        assert (await logged(front, "embedded"))["usage"]["prompt_tokens"] == answer.json["usage"]["prompt_tokens"]

    async def test_an_answer_that_breaks_is_paid_as_far_as_it_came(
        self, front: GatewayProcess, engine: FakeEngine
    ) -> None:
        await engine.faults(cut_after=6)
        await ask(front, CHAT, asked(STREAMED[0]), headers={"x-request-id": "broken"})
        record = await logged(front, "broken")
        assert record["error"] == "worker_lost"
        assert record["usage"]["completion_tokens"] == 5  # of six frames, the first has the role alone
        assert record["usage"]["prompt_tokens"] > 0


BEFORE: list[tuple[dict[str, Any], int, str]] = [
    ({"refuse_status": 400}, 400, "invalid_request"),
    ({"refuse_status": 401}, 502, "upstream_auth"),
    ({"refuse_status": 404}, 404, "invalid_request"),
    ({"refuse_status": 422}, 422, "invalid_request"),
    ({"refuse_status": 429}, 429, "upstream_busy"),
    ({"refuse_status": 500}, 502, "upstream_error"),
    ({"refuse_status": 503}, 503, "upstream_busy"),
    ({"cut_after": 0}, 502, "worker_lost"),
    ({"error_first": True}, 502, "upstream_error"),
    ({"malformed_after": 0}, 502, "upstream_error"),
]
OWN_CODE = "server_error"  # the fake engine's in a stream of /v1/responses, where a code belongs to the event
AFTER: list[tuple[dict[str, Any], str]] = [
    ({"cut_after": 4}, "worker_lost"),
    ({"error_after": 4}, "upstream_error"),
]


# The fake engine's embeddings know only the faults that strike before there is an answer at all.
CASES = [
    (kind, *case)
    for kind in kinds()
    for case in BEFORE
    if kind.name != "embeddings" or not {"error_first", "malformed_after"} & set(case[0])
]


def case_name(value: Any) -> str | None:
    return value.name if isinstance(value, Kind) else fault_name(value)


def fault_name(value: Any) -> str | None:
    return "_".join(f"{name}_{number}" for name, number in value.items()) if isinstance(value, dict) else None


class TestErrors:
    """R5: a real status before the first byte, one error in the stream after it."""

    @pytest.mark.parametrize(("kind", "fault", "status", "code"), CASES, ids=case_name)
    async def test_a_fault_before_the_first_byte_has_a_status(
        self, front: GatewayProcess, engine: FakeEngine, kind: Kind, fault: dict[str, Any], status: int, code: str
    ) -> None:
        await engine.faults(**fault)
        answer = await ask(front, kind.path, asked(kind))
        assert answer.status == status
        assert answer.headers["content-type"] == "application/json"
        error = answer.json["error"]
        assert error["code"] == (OWN_CODE if kind.name == "responses_stream" and "error_first" in fault else code)
        assert isinstance(error["message"], str)
        assert isinstance(error["type"], str)
        assert answer.json.get("type") == ("error" if kind.path == "/v1/messages" else None)
        assert answer.headers["x-should-retry"] == "false"

    @pytest.mark.parametrize("kind", STREAMED, ids=by_name)
    @pytest.mark.parametrize(("fault", "code"), AFTER, ids=fault_name)
    async def test_a_fault_in_mid_stream_is_told_once_and_ends_it(
        self, front: GatewayProcess, engine: FakeEngine, kind: Kind, fault: dict[str, Any], code: str
    ) -> None:
        await engine.faults(**fault)
        answer = await ask(front, kind.path, asked(kind))
        assert answer.status == 200
        if kind.name == "responses_stream" and "error_after" in fault:
            code = OWN_CODE
        assert_told_once(answer, kind, code)
        assert len(answer.events) == 5
        assert (await engine.stats())["started"] == 1, "no second try once bytes are out"

    @pytest.mark.parametrize("kind", STREAMED, ids=by_name)
    @pytest.mark.parametrize(
        "fault",
        [{"error_first": True}, {"malformed_after": 0}, {"cut_after": 0}, {"refuse_status": 500}],
        ids=fault_name,
    )
    async def test_a_fault_before_the_first_byte_sends_the_request_to_another_worker(
        self, pair: GatewayProcess, engine: FakeEngine, kind: Kind, fault: dict[str, Any]
    ) -> None:
        await engine.faults(times=1, **fault)
        answer = await ask(pair, kind.path, asked(kind))
        assert answer.status == 200
        assert not answer.errors
        assert answer.headers["x-forebay-attempts"] == "2"
        assert (await engine.stats())["started"] == 2

    @pytest.mark.parametrize("kind", [kind for kind in kinds() if not kind.streams], ids=by_name)
    async def test_a_whole_answer_cut_in_its_middle_comes_from_another_worker(
        self, pair: GatewayProcess, engine: FakeEngine, kind: Kind
    ) -> None:
        await engine.faults(times=1, cut_after=0 if kind.name == "embeddings" else 1)
        answer = await ask(pair, kind.path, asked(kind))
        assert answer.status == 200
        assert answer.json
        assert answer.headers["x-forebay-attempts"] == "2"

    async def test_an_engine_of_vllm_that_dies_in_mid_stream_is_told_once(
        self, front: GatewayProcess, replay: Replay
    ) -> None:
        raw = RECORDINGS[0].with_name("chat_stream_engine_died.sse").read_bytes()
        body = {"model": "smol", "messages": [{"role": "user", "content": "x"}], "stream": True}
        good = raw[: raw.index(b'data: {"error"')]
        for pieces in ([raw], frames_of(raw)):
            replay.says_stream(CHAT, pieces)
            answer = await ask(front, CHAT, body)
            assert answer.status == 200
            assert answer.body.startswith(good)
            assert_told_once(answer, STREAMED[0], "upstream_error")

    async def test_a_stream_that_ends_without_finishing_is_an_error(
        self, front: GatewayProcess, replay: Replay
    ) -> None:
        raw = frames_of(recording(RECORDINGS[0].with_name("chat_stream_plain.sse"))[2])
        replay.says_stream(CHAT, raw[:3])
        body = {"model": "smol", "messages": [{"role": "user", "content": "x"}], "stream": True}
        answer = await ask(front, CHAT, body)
        assert answer.body.startswith(b"".join(raw[:3]))
        assert_told_once(answer, STREAMED[0], "upstream_error")

    @pytest.mark.parametrize("code", [429, "429", None, "server_busy", {"odd": 1}])
    async def test_a_code_is_text_whatever_the_engine_sent(
        self, front: GatewayProcess, replay: Replay, code: Any
    ) -> None:
        replay.says_json(CHAT, {"error": {"message": "no", "type": "x", "param": None, "code": code}}, status=409)
        answer = await ask(front, CHAT, {"model": "smol", "messages": [{"role": "user", "content": "x"}]})
        assert answer.status == 409
        assert isinstance(answer.json["error"]["code"], str)

    @pytest.mark.parametrize("raw", [b"", b"<html>Bad gateway</html>", b'{"detail": [{"loc": ["body"], "msg": "no"}]}'])
    async def test_an_engine_s_own_way_to_fail_never_leaks(
        self, front: GatewayProcess, replay: Replay, raw: bytes
    ) -> None:
        async def odd(request: web.Request) -> web.StreamResponse:
            return web.Response(status=422, body=raw)

        replay.says(CHAT, odd)
        answer = await ask(front, CHAT, {"model": "smol", "messages": [{"role": "user", "content": "x"}]})
        assert answer.status == 422
        assert set(answer.json) == {"error"}
        assert set(answer.json["error"]) == {"message", "type", "param", "code"}


def assert_told_once(answer: Answer, kind: Kind, code: str) -> None:
    assert [error["error"]["code"] for error in answer.errors] == [code]
    assert event_of(answer.events[-1]) == answer.errors[0]
    assert b"[DONE]" not in answer.body
    assert b"message_stop" not in answer.body
    is_named = answer.events[-1].startswith(b"event: error\n")
    assert is_named == (kind.path in ("/v1/messages", "/v1/responses"))
