"""Metrics with bounded labels, and a request log that never holds a request up."""

import stat
from pathlib import Path

import msgspec
import pytest
from prometheus_client import Counter, generate_latest
from structlog.testing import capture_logs

from core.chat import Endpoint, Usage
from core.errors import InvalidRequest
from core.ids import ModelName, TenantId, new_request_id
from gateway.api.requests import read_call
from gateway.auth import Principal
from gateway.metrics import Metrics
from gateway.telemetry import RequestLog, RequestRecord
from routing.catalog import Catalog, Model


def record(number: int = 0, **more: object) -> RequestRecord:
    fields = {"time": 1.0, "id": f"req_{number}", "endpoint": "/v1/chat/completions", "status": 200, "duration_s": 0.1}
    return msgspec.convert({**fields, **more}, RequestRecord)


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def log(tmp_path: Path, metrics: Metrics) -> RequestLog:
    return RequestLog(tmp_path / "requests.jsonl", 1000, metrics.log_dropped)


def dropped(metrics: Metrics) -> float | None:
    return value(metrics, "forebay_log_dropped_total")


# --- the log


async def test_records_are_written_as_lines_without_what_is_empty(log: RequestLog, tmp_path: Path) -> None:
    log.add(record(1, usage={"prompt_tokens": 3, "completion_tokens": 2}))
    log.add(record(2, error="queue_full"))
    await log.flush()

    lines = [msgspec.json.decode(line) for line in (tmp_path / "requests.jsonl").read_bytes().splitlines()]
    assert [line["id"] for line in lines] == ["req_1", "req_2"]
    assert (lines[0]["usage"]["prompt_tokens"], lines[1]["error"]) == (3, "queue_full")
    assert "worker" not in lines[0]


async def test_the_log_is_for_its_owner_alone(log: RequestLog, tmp_path: Path) -> None:
    log.add(record())
    await log.flush()

    assert stat.S_IMODE((tmp_path / "requests.jsonl").stat().st_mode) == 0o600


async def test_a_full_queue_drops_and_counts(
    log: RequestLog, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RequestLog, "MAX_QUEUE", 3)
    for number in range(5):
        log.add(record(number))
    assert dropped(metrics) == 2

    await log.flush()
    log.add(record(9))

    assert dropped(metrics) == 2


async def test_a_log_that_is_too_long_starts_anew_and_its_predecessor_is_kept(log: RequestLog, tmp_path: Path) -> None:
    for number in range(60):
        log.add(record(number))
        await log.flush()

    files = [tmp_path / "requests.jsonl", tmp_path / "requests.jsonl.1"]
    assert all(0 < file.stat().st_size < 1200 for file in files)
    assert stat.S_IMODE(files[0].stat().st_mode) == 0o600
    assert msgspec.json.decode(files[0].read_bytes().splitlines()[-1])["id"] == "req_59"


async def test_leaving_writes_what_is_left(log: RequestLog, tmp_path: Path) -> None:
    async with log:
        log.add(record(7))

    assert b"req_7" in (tmp_path / "requests.jsonl").read_bytes()


async def test_a_disk_that_refuses_costs_the_lines_and_nothing_else(tmp_path: Path, metrics: Metrics) -> None:
    log = RequestLog(tmp_path / "missing" / "requests.jsonl", 1000, metrics.log_dropped)
    log.add(record())
    with capture_logs() as told:
        await log.flush()

    assert dropped(metrics) == 1
    assert told[0]["event"] == "request_log_failed"


# --- metrics


def test_a_request_is_counted_by_model_endpoint_and_status(metrics: Metrics) -> None:
    metrics.observe(
        record(model="big", usage=Usage(5, 3, 2), attempts=3, first_byte_s=0.05, queue_s=0.01, overhead_s=0.001)
    )

    endpoint = "/v1/chat/completions"
    assert value(metrics, "forebay_requests_total", model="big", endpoint=endpoint, code="200") == 1
    assert value(metrics, "forebay_tokens_total", model="big", endpoint=endpoint, type="input") == 5
    assert value(metrics, "forebay_tokens_total", model="big", endpoint=endpoint, type="output") == 3
    assert value(metrics, "forebay_tokens_total", model="big", endpoint=endpoint, type="cached") == 2
    assert value(metrics, "forebay_retries_total", model="big", endpoint=endpoint) == 2
    assert value(metrics, "forebay_overhead_seconds_count", model="big", endpoint=endpoint) == 1


def test_a_client_that_left_is_counted(metrics: Metrics) -> None:
    metrics.observe(record(model="big", status=499))

    assert value(metrics, "forebay_client_disconnects_total", model="big", endpoint="/v1/chat/completions") == 1


def test_the_metrics_stay_as_many_under_ten_thousand_model_names(metrics: Metrics) -> None:
    catalog = Catalog((Model(name=ModelName("big")),))
    metrics.observe(record(model="big"))
    metrics.observe(record(status=404))
    before = generate_latest(metrics.registry).count(b"\n")

    for number in range(10_000):
        metrics.observe(record(status=404, model=model_of(f"model-{number}", catalog)))

    assert generate_latest(metrics.registry).count(b"\n") == before
    assert (
        value(metrics, "forebay_requests_total", model="other", endpoint="/v1/chat/completions", code="404") == 10_001
    )


def model_of(name: str, catalog: Catalog) -> str | None:
    """Return what the data plane puts into the record: the model of the call, if it came to one."""
    body = msgspec.json.encode({"model": name, "messages": [{"role": "user", "content": "x"}]})
    principal = Principal(key_name="k", tenant=TenantId("t"), digest=b"", models=None)
    try:
        call = read_call(Endpoint.CHAT, body, {}, request_id=new_request_id(), principal=principal, catalog=catalog)
    except InvalidRequest:
        return None
    return call.model


def test_the_log_counts_into_the_metric_it_is_given(metrics: Metrics) -> None:
    assert isinstance(metrics.log_dropped, Counter)
    assert dropped(metrics) == 0
