"""Traces: ids at the start, span trees at the end, and a collector that may be anywhere."""

import asyncio
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import msgspec
import pytest
from structlog.testing import capture_logs

from core.chat import Usage
from core.records import LegRecord, RequestRecord
from core.spans import span_of_leg
from gateway.otlp import Exporter
from gateway.tracing import UNTRACED, Finished, Span, Trace, Tracing
from tests.fakes.collector import Collector

PARENT = b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
UNSAMPLED = PARENT[:-1] + b"0"
ENGINES = {"big-0": "vllm", "big-1": "vllm", "small-0": "llamacpp"}


def record(**more: object) -> RequestRecord:
    fields = {"time": 101.0, "id": "req_0", "endpoint": "/v1/chat/completions", "status": 200, "duration_s": 1.0}
    return msgspec.convert({**fields, **more}, RequestRecord)


def nowhere(finished: Sequence[Finished]) -> bool:
    raise AssertionError("nothing is exported here")


def tracing(export: Callable[[Sequence[Finished]], bool] = nowhere, *, sample: float = 1.0) -> Tracing:
    return Tracing(export, lambda: sample, draw=lambda: 0.5)


def trace_of(traceparent: bytes | None = None) -> Trace:
    trace = tracing().start(traceparent)
    assert trace is not None
    return trace


def exporter(url: str) -> Exporter:
    return Exporter(url, "forebay-test", ENGINES.get)


# --- the start


def test_a_request_without_a_parent_begins_a_trace() -> None:
    trace = trace_of()

    assert trace.parent_id is None
    assert trace.traceparent == f"00-{trace.hex_id}-{trace.span_id:016x}-01".encode()
    assert trace.hex_id != trace_of().hex_id


def test_the_clients_span_is_the_parent_and_others_are_told_of_ours() -> None:
    trace = trace_of(PARENT)

    assert trace.hex_id == "4bf92f3577b34da6a3ce929d0e0e4736"
    assert trace.parent_id == 0x00F067AA0BA902B7
    assert trace.span_id != trace.parent_id
    assert trace.traceparent.startswith(b"00-4bf92f3577b34da6a3ce929d0e0e4736-")
    assert trace.traceparent.endswith(f"-{trace.span_id:016x}-01".encode())


def test_the_client_decides_whether_it_is_traced() -> None:
    assert tracing(sample=0.0).start(PARENT) is not None
    assert tracing(sample=1.0).start(UNSAMPLED) is None


def test_without_a_clients_word_the_settings_decide() -> None:
    assert tracing(sample=0.5).start(None) is None
    assert tracing(sample=0.51).start(None) is not None


@pytest.mark.parametrize(
    "header",
    [b"", b"junk", PARENT.upper(), PARENT + b"-more", b"ff" + PARENT[2:], PARENT[:3] + b"0" * 32 + PARENT[35:],
     PARENT[:36] + b"0" * 16 + PARENT[52:], PARENT + b"\n", b"\xff" * 55],
    ids=["empty", "junk", "upper", "more", "version", "trace", "span", "newline", "bytes"],
)  # fmt: skip
def test_a_malformed_parent_is_none(header: bytes) -> None:
    assert trace_of(header).parent_id is None


def test_a_parent_of_a_later_version_may_say_more() -> None:
    assert trace_of(b"01" + PARENT[2:] + b"-more").parent_id == 0x00F067AA0BA902B7


# --- the spans


async def exported(*finished: Finished) -> Collector:
    async with Collector() as collector:
        sender = exporter(collector.url)
        try:
            assert await asyncio.to_thread(sender, finished)
        finally:
            sender.close()
    return collector


async def test_a_request_is_a_tree_of_queue_and_legs() -> None:
    legs = (LegRecord("big-0", "big", 0.2, 0.3, "lost"), LegRecord("big-1", "big", 0.5, 0.5, "done", recomputed=7))
    trace = trace_of(PARENT)
    finished = record(
        model="big", asked_model="big", worker="big-1", stream=True, attempts=2, queue_s=0.2, first_byte_s=0.6,
        usage=Usage(5, 3, 2), cost=1_500_000_000_000, tenant="acme", legs=legs,
    )  # fmt: skip
    spans = sorted((await exported((finished, trace))).spans, key=lambda span: (span.started_at, -span.ended_at))

    assert [(span.name, span.kind) for span in spans] == [
        ("chat big", "server"), ("queue", "internal"), ("chat big", "client"), ("chat big", "client")
    ]  # fmt: skip
    root, queue, first, second = spans
    assert {span.trace_id for span in spans} == {trace.hex_id}
    assert root.parent_id == "00f067aa0ba902b7"
    assert {span.parent_id for span in spans[1:]} == {root.id} == {f"{trace.span_id:016x}"}
    assert [span.id for span in (first, second)] == [f"{span_of_leg(trace.span_id, index):016x}" for index in (0, 1)]
    assert (root.started_at, root.ended_at) == pytest.approx((100.0, 101.0))
    assert (queue.started_at, queue.ended_at) == pytest.approx((100.0, 100.2))
    assert (second.started_at, second.ended_at) == pytest.approx((100.5, 101.0))
    assert root.service == "forebay-test"
    assert root.attributes == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "vllm",
        "gen_ai.request.model": "big",
        "gen_ai.request.stream": True,
        "gen_ai.response.model": "big",
        "gen_ai.response.time_to_first_chunk": 0.6,
        "gen_ai.usage.input_tokens": 5,
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.usage.cache_read.input_tokens": 2,
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "http.route": "/v1/chat/completions",
        "forebay.request.id": "req_0",
        "forebay.tenant": "acme",
        "forebay.worker": "big-1",
        "forebay.attempts": 2,
        "forebay.cost_usd": 1.5,
    }
    assert first.attributes["error.type"] == "lost"
    assert first.attributes["forebay.worker"] == "big-0"
    assert [span.is_error for span in spans] == [False, False, True, False]
    assert second.attributes == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "vllm",
        "gen_ai.request.model": "big",
        "forebay.worker": "big-1",
        "forebay.leg.index": 1,
        "forebay.leg.cause": "done",
        "forebay.leg.is_resumed": True,
        "forebay.leg.recomputed_tokens": 7,
    }


@pytest.mark.parametrize(
    ("more", "error"),
    [
        ({"status": 503, "error": "queue_timeout", "queue_s": 1.0}, "queue_timeout"),
        ({"status": 499}, "client_disconnect"),
    ],
    ids=["refused", "left"],
)
async def test_a_request_that_failed_says_why(more: dict[str, object], error: str) -> None:
    collector = await exported((record(asked_model="big", model="big", **more), trace_of()))

    root = next(span for span in collector.spans if span.kind == "server")
    assert (root.is_error, root.attributes["error.type"]) == (True, error)
    assert root.parent_id == ""
    assert root.attributes["gen_ai.provider.name"] == "forebay"
    assert "gen_ai.response.model" not in root.attributes


@pytest.mark.parametrize(
    ("endpoint", "name"),
    [("/v1/completions", "text_completion m"), ("/v1/embeddings", "embeddings m"), ("/v1/messages", "chat m")],
)
async def test_each_endpoint_has_its_operation(endpoint: str, name: str) -> None:
    collector = await exported((record(endpoint=endpoint, model="m"), trace_of()))

    assert collector.spans[0].name == name


async def test_a_request_that_came_to_no_model_is_traced_all_the_same() -> None:
    collector = await exported((record(status=401, error="invalid_api_key"), trace_of()))

    assert collector.spans[0].name == "chat"


async def test_who_the_end_user_is_and_what_it_calls_its_work_stays_here() -> None:
    private = {name: f"canary-{name}" for name in ("end_user", "session", "program", "run", "stage", "key")}
    collector = await exported((record(model="m", **private), trace_of()))

    assert b"canary" not in collector.raw


async def test_a_span_that_is_complete_is_sent_as_it_is() -> None:
    trace = trace_of(PARENT)
    run = Span("invoke_workflow summary", 100.0, 101.5, {"forebay.run.id": "run_1", "forebay.run.calls": 2}, "broken")
    (span,) = (await exported((run, trace))).spans

    assert (span.name, span.kind, span.is_error) == ("invoke_workflow summary", "internal", True)
    assert (span.trace_id, span.id, span.parent_id) == (trace.hex_id, f"{trace.span_id:016x}", "00f067aa0ba902b7")
    assert (span.started_at, span.ended_at) == pytest.approx((100.0, 101.5))
    assert span.attributes == {"forebay.run.id": "run_1", "forebay.run.calls": 2, "error.type": "broken"}


def test_below_a_span_that_is_not_traced_nothing_is() -> None:
    assert tracing(sample=1.0).start(UNTRACED) is None


# --- batches


class Sink:
    """An exporter in memory; a collector that is away takes nothing."""

    def __init__(self) -> None:
        self.batches: list[list[Finished]] = []
        self.is_away = False

    def __call__(self, finished: Sequence[Finished]) -> bool:
        self.batches.append(list(finished))
        return not self.is_away


async def test_finished_requests_go_in_batches() -> None:
    sink = Sink()
    traces = tracing(sink)
    for _ in range(Tracing.BATCH + 1):
        traces.add(record(), trace_of())
    await traces.flush()

    assert [len(batch) for batch in sink.batches] == [Tracing.BATCH, 1]
    assert (traces.num_exported, traces.num_dropped) == (Tracing.BATCH + 1, 0)


async def test_a_full_queue_drops_and_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tracing, "MAX_QUEUE", 2)
    traces = tracing(Sink())
    for _ in range(5):
        traces.add(record(), trace_of())
    await traces.flush()

    assert (traces.num_exported, traces.num_dropped) == (2, 3)


async def test_a_collector_that_is_away_costs_the_traces_and_one_line_per_change() -> None:
    sink = Sink()
    traces = tracing(sink)
    with capture_logs() as told:
        for is_away in (True, True, True, False, False, True):
            sink.is_away = is_away
            traces.add(record(), trace_of())
            await traces.flush()

    assert (traces.num_exported, traces.num_dropped) == (2, 4)
    assert [line["event"] for line in told] == [
        "trace_collector_away", "trace_collector_back", "trace_collector_away"
    ]  # fmt: skip


async def test_leaving_exports_what_is_left() -> None:
    sink = Sink()
    async with tracing(sink) as traces:
        traces.add(record(), trace_of())

    assert len(sink.batches) == 1


@contextmanager
def black_hole() -> Iterator[str]:
    """A collector that takes connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


async def test_leaving_waits_for_a_silent_collector_two_seconds_at_most(caplog: pytest.LogCaptureFixture) -> None:
    with black_hole() as url:
        sender = exporter(url)
        began = time.monotonic()
        async with tracing(sender) as traces:
            for _ in range(3 * Tracing.BATCH):
                traces.add(record(), trace_of())
        sender.close()
        took = time.monotonic() - began

    assert took < 2.5
    assert (traces.num_exported, traces.num_dropped) == (0, 3 * Tracing.BATCH)
    assert not caplog.records


@pytest.mark.parametrize("status", [400, 401, 503])
async def test_a_collector_that_refuses_is_as_one_that_is_away(status: int, caplog: pytest.LogCaptureFixture) -> None:
    async with Collector() as collector:
        collector.status = status
        sender = exporter(collector.url + "/v1/traces")
        assert not await asyncio.to_thread(sender, [(record(), trace_of())])
        sender.close()
    assert not caplog.records


async def test_nobody_at_the_address_is_a_collector_that_is_away() -> None:
    with black_hole() as url:
        pass
    sender = exporter(url)
    assert not await asyncio.to_thread(sender, [(record(), trace_of())])
    sender.close()
