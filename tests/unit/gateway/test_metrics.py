"""Metrics with bounded labels, as Prometheus wants them."""

import re
from collections.abc import Iterable, Iterator

import msgspec
import pytest
from prometheus_client import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from core.chat import Endpoint, Usage
from core.errors import (
    BudgetExceeded,
    ConnectionLimit,
    ForebayError,
    InvalidRequest,
    LimitsUnavailable,
    QueueFull,
    RateLimited,
    UpstreamRefused,
)
from core.ids import new_request_id
from core.records import LegRecord, RequestRecord
from gateway.metrics import Metrics, RunCounts, Vitals, WorkerVitals
from gateway.requests import read_call
from routing.catalog import Catalog, Model
from tests.fakes.tenancy import principal

CHAT = "/v1/chat/completions"
LABELS = {"model": "big", "endpoint": CHAT}
BUSY = Vitals(
    workers=(
        WorkerVitals(
            id="big-0",
            states={"ready": True, "failed": False},
            is_healthy=True,
            is_tripped=True,
            num_running=3,
            num_restarts=2,
        ),
    ),
    queues={"big": 7},
    num_inflight=10,
    is_redis_up=False,
    redis_errors={"reserve": 4},
    is_database_up=True,
    num_records_waiting=5,
    revision="12",
    num_traces_exported=8,
    num_traces_dropped=1,
    budgets={"free": 3, "low": 2, "used_up": 1},
    waste_left={"big": 12.5},
    num_replicas=3,
    roles={"big": "alone"},
)


def record(**more: object) -> RequestRecord:
    fields = {"time": 1.0, "id": "req_0", "endpoint": CHAT, "status": 200, "duration_s": 0.1}
    return msgspec.convert({**fields, **more}, RequestRecord)


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def num_series(metrics: Metrics) -> int:
    return sum(len(family.samples) for family in metrics.registry.collect() if family.name.startswith("forebay"))


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


def test_a_request_is_counted_by_model_endpoint_and_status(metrics: Metrics) -> None:
    metrics.observe(record(model="big", usage=Usage(5, 3, 2), first_byte_s=0.05, queue_s=0.01, overhead_s=0.001))

    assert value(metrics, "forebay_requests_total", **LABELS, code="200") == 1
    assert value(metrics, "forebay_tokens_total", **LABELS, type="input") == 5
    assert value(metrics, "forebay_tokens_total", **LABELS, type="output") == 3
    assert value(metrics, "forebay_tokens_total", **LABELS, type="cached") == 2
    assert value(metrics, "forebay_overhead_seconds_count", **LABELS) == 1


def test_what_was_spent_is_shown_in_dollars(metrics: Metrics) -> None:
    for _ in range(3):
        metrics.observe(record(model="big", usage=Usage(5, 3), cost=250_000_000_000))

    assert value(metrics, "forebay_spend_usd_total", **LABELS) == 0.75


def test_a_stream_tells_its_mean_time_per_token_after_the_first(metrics: Metrics) -> None:
    metrics.observe(record(model="big", stream=True, duration_s=1.1, first_byte_s=0.1, usage=Usage(5, 11)))

    assert value(metrics, "forebay_time_per_output_token_seconds_sum", **LABELS) == pytest.approx(0.1)
    assert value(metrics, "forebay_time_per_output_token_seconds_count", **LABELS) == 1


@pytest.mark.parametrize(
    "more",
    [{"stream": False}, {"usage": Usage(5, 1)}, {"usage": Usage(5, 0)}, {"first_byte_s": None}],
    ids=["whole", "one", "none", "no-byte"],
)
def test_an_answer_without_a_second_token_in_time_tells_none(metrics: Metrics, more: dict[str, object]) -> None:
    metrics.observe(record(**{"model": "big", "stream": True, "first_byte_s": 0.1, "usage": Usage(5, 11), **more}))

    assert value(metrics, "forebay_time_per_output_token_seconds_count", **LABELS) == 0


def test_a_leg_that_was_followed_by_another_is_a_retry_with_its_cause(metrics: Metrics) -> None:
    legs = [LegRecord(f"big-{number}", "big", 0.0, 0.1, cause) for number, cause in enumerate(("lost", "busy", "done"))]
    metrics.observe(record(model="big", attempts=3, legs=tuple(legs)))

    assert value(metrics, "forebay_retries_total", model="big", cause="lost") == 1
    assert value(metrics, "forebay_retries_total", model="big", cause="busy") == 1
    assert value(metrics, "forebay_retries_total", model="big", cause="done") is None


def test_a_leg_that_was_cut_is_no_retry_and_what_it_took_to_go_on_is_counted(metrics: Metrics) -> None:
    legs = (
        LegRecord("big-0", "big", 0.0, 0.1, "preempted"),
        LegRecord("big-0", "big", 0.2, 0.1, "lost", 40),
        LegRecord("big-1", "big", 0.3, 0.1, "done", 50),
    )
    metrics.observe(record(model="big", attempts=3, legs=legs))
    metrics.observe(record(model="big", attempts=2, legs=(legs[0], LegRecord("big-0", "big", 0.2, 0.1, "aborted", 1))))
    metrics.observe(record(model="big", attempts=2, legs=(legs[0], LegRecord("big-0", "big", 0.2, 0.1, "done"))))

    assert value(metrics, "forebay_cuts_total", model="big", cause="preempted") == 3
    assert value(metrics, "forebay_retries_total", model="big", cause="preempted") is None
    assert value(metrics, "forebay_retries_total", model="big", cause="lost") is None
    assert value(metrics, "forebay_resumes_total", model="big", cause="preempted", outcome="failed") == 1
    assert value(metrics, "forebay_resumes_total", model="big", cause="preempted", outcome="left") == 1
    assert value(metrics, "forebay_resumes_total", model="big", cause="lost", outcome="done") == 1
    assert value(metrics, "forebay_recomputed_tokens_total", model="big", cause="preempted") == 41
    assert value(metrics, "forebay_recomputed_tokens_total", model="big", cause="lost") == 50


def test_waits_are_told_apart_by_class(metrics: Metrics) -> None:
    metrics.observe(record(model="big", first_byte_s=0.5, queue_s=0.3, urgency="batch"))
    metrics.observe(record(model="big", first_byte_s=0.5, queue_s=0.1))

    for urgency, waited in (("batch", 0.3), ("standard", 0.1)):
        found = value(metrics, "forebay_queue_wait_seconds_sum", **{"model": "big", "class": urgency})
        assert found == pytest.approx(waited)


def test_tenants_have_a_line_each_until_there_are_too_many(metrics: Metrics) -> None:
    for number in range(1000):
        metrics.observe(record(model="big", tenant=f"t{number}", usage=Usage(5, 3)))
    metrics.observe(record(model="big", tenant="t0", usage=Usage(5, 3)))

    assert value(metrics, "forebay_tenant_tokens_total", tenant="t0", type="input") == 10
    assert value(metrics, "forebay_tenant_tokens_total", tenant="t49", type="output") == 3
    assert value(metrics, "forebay_tenant_tokens_total", tenant="t50", type="output") is None
    assert value(metrics, "forebay_tenant_tokens_total", tenant="other", type="output") == 950 * 3


def test_an_answer_of_another_model_is_a_fallback(metrics: Metrics) -> None:
    metrics.observe(record(model="small", asked_model="big"))
    metrics.observe(record(model="big", asked_model="big"))

    assert value(metrics, "forebay_fallbacks_total", model="big", answered_by="small") == 1
    assert value(metrics, "forebay_fallbacks_total", model="big", answered_by="big") is None


def test_a_client_that_left_is_counted(metrics: Metrics) -> None:
    metrics.observe(record(model="big", status=499))

    assert value(metrics, "forebay_client_disconnects_total", **LABELS) == 1


@pytest.mark.parametrize(
    ("error", "measure", "kind"),
    [
        (RateLimited("m"), "requests", "requests"),
        (RateLimited("m"), None, "other"),
        (BudgetExceeded("m"), "money budget", "money_budget"),
        (ConnectionLimit("m"), None, "connections"),
        (LimitsUnavailable("m"), None, "unavailable"),
    ],
    ids=["requests", "other", "budget", "connections", "unavailable"],
)
def test_a_refusal_by_a_limit_is_counted_by_its_kind(
    metrics: Metrics, error: ForebayError, measure: str | None, kind: str
) -> None:
    if isinstance(error, RateLimited):
        error.measure = measure
    metrics.observe(record(model="big", status=429), error)

    assert value(metrics, "forebay_limit_rejections_total", kind=kind) == 1


def test_an_error_is_counted_by_its_class_and_never_by_what_an_engine_calls_it(metrics: Metrics) -> None:
    metrics.observe(record(model="big", status=503), QueueFull("m"))
    for number in range(100):
        metrics.observe(record(model="big", status=400), UpstreamRefused("m", status=400, code=f"odd_{number}"))

    assert value(metrics, "forebay_errors_total", model="big", code="queue_full") == 1
    assert value(metrics, "forebay_errors_total", model="big", code="upstream_error") == 100


def test_the_vitals_are_read_when_somebody_looks(metrics: Metrics) -> None:
    assert value(metrics, "forebay_queue_depth", model="big") is None
    metrics.watch(lambda: BUSY)

    assert value(metrics, "forebay_queue_depth", model="big") == 7
    assert value(metrics, "forebay_inflight_requests") == 10
    assert value(metrics, "forebay_worker_state", worker="big-0", state="ready") == 1
    assert value(metrics, "forebay_worker_state", worker="big-0", state="failed") == 0
    assert value(metrics, "forebay_worker_breaker_open", worker="big-0") == 1
    assert value(metrics, "forebay_worker_inflight_requests", worker="big-0") == 3
    assert value(metrics, "forebay_worker_restarts_total", worker="big-0") == 2
    assert value(metrics, "forebay_redis_up") == 0
    assert value(metrics, "forebay_redis_errors_total", op="reserve") == 4
    assert value(metrics, "forebay_database_up") == 1
    assert value(metrics, "forebay_records_waiting") == 5
    assert value(metrics, "forebay_config_info", revision="12") == 1
    assert value(metrics, "forebay_budgets", state="low") == 2
    assert value(metrics, "forebay_waste_budget_tokens", model="big") == 12.5
    assert value(metrics, "forebay_replicas") == 3
    assert value(metrics, "forebay_scheduling_role", model="big", role="alone") == 1


def test_what_there_is_not_is_neither_up_nor_down(metrics: Metrics) -> None:
    assert value(metrics, "forebay_redis_up") is None
    assert value(metrics, "forebay_replicas") is None
    assert value(metrics, "forebay_database_up") is None


def test_runs_and_their_calls_are_counted_by_kind_and_state(metrics: Metrics) -> None:
    use(metrics.runs)

    assert value(metrics, "forebay_runs_accepted_total") == 1
    assert value(metrics, "forebay_runs_open") == 1
    assert value(metrics, "forebay_runs_ended_total", state="failed") == 1
    assert value(metrics, "forebay_run_duration_seconds_sum") == 2.5
    assert value(metrics, "forebay_run_calls_started_total", kind="llm") == 1
    assert value(metrics, "forebay_run_calls_ended_total", kind="llm", state="done") == 1
    assert value(metrics, "forebay_run_calls_retried_total", kind="llm") == 1
    assert value(metrics, "forebay_run_commit_events_sum") == 12
    assert value(metrics, "forebay_run_commit_events_bucket", le="20.0") == 1
    metrics.runs.closed()
    assert value(metrics, "forebay_runs_open") == 0


def use(runs: RunCounts) -> None:
    """Count one of everything."""
    runs.accepted()
    runs.opened()
    runs.call_started("llm")
    runs.call_retried("llm")
    runs.call_ended("llm", "done")
    runs.run_lasted(2.5)
    runs.ended("failed")
    runs.committed(12)


def test_streams_of_events_are_counted_while_they_are_open(metrics: Metrics) -> None:
    with metrics.runs.watching():
        assert value(metrics, "forebay_run_watchers") == 1
    assert value(metrics, "forebay_run_watchers") == 0


def test_reloads_are_counted_from_zero(metrics: Metrics) -> None:
    assert value(metrics, "forebay_config_reloads_total", result="refused") == 0
    metrics.count_reload(is_applied=True)
    metrics.count_reload(is_applied=False)

    assert value(metrics, "forebay_config_reloads_total", result="applied") == 1
    assert value(metrics, "forebay_config_reloads_total", result="refused") == 1


def test_the_lag_of_the_event_loop_is_never_negative(metrics: Metrics) -> None:
    metrics.observe_lag(-0.001)
    metrics.observe_lag(0.3)

    assert value(metrics, "forebay_event_loop_lag_seconds_sum") == pytest.approx(0.3)


def test_the_process_is_shown(metrics: Metrics) -> None:
    assert (value(metrics, "process_resident_memory_bytes") or 0) > 0
    assert (value(metrics, "process_open_fds") or 0) > 0


def test_two_gateways_in_one_process_share_nothing() -> None:
    one, other = Metrics(), Metrics()
    one.observe(record(model="big"))
    one.records_dropped.inc()

    assert value(other, "forebay_requests_total", **LABELS, code="200") is None
    assert value(other, "forebay_records_dropped_total") == 0


def test_the_metrics_stay_as_many_under_ten_thousand_model_names(metrics: Metrics) -> None:
    catalog = Catalog((Model(name="big"),))  # type: ignore[arg-type]
    metrics.observe(record(model="big"))
    metrics.observe(record(status=404), InvalidRequest("m"))
    before = num_series(metrics)

    for number in range(10_000):
        metrics.observe(record(status=404, model=model_of(f"model-{number}", catalog)), InvalidRequest("m"))

    assert num_series(metrics) == before
    assert value(metrics, "forebay_requests_total", model="other", endpoint=CHAT, code="404") == 10_001


def model_of(name: str, catalog: Catalog) -> str | None:
    """Return what the data plane puts into the record: the model of the call, if it came to one."""
    body = msgspec.json.encode({"model": name, "messages": [{"role": "user", "content": "x"}]})
    try:
        call = read_call(Endpoint.CHAT, body, {}, request_id=new_request_id(), principal=principal(), catalog=catalog)
    except InvalidRequest:
        return None
    return call.model


# --- as `promtool check metrics` would have it


def busy_families() -> list[Metric]:
    metrics = Metrics()
    metrics.watch(lambda: BUSY)
    use(metrics.runs)
    metrics.observe(
        record(model="small", asked_model="big", stream=True, first_byte_s=0.01, overhead_s=0.001, usage=Usage(5, 3),
               tenant="acme", legs=(LegRecord("big-0", "big", 0.0, 0.1, "lost"),
                     LegRecord("small-0", "small", 0.1, 0.1, "preempted"),
                     LegRecord("small-0", "small", 0.2, 0.1, "done", 7))),
        RateLimited("m"),
    )  # fmt: skip
    return list(text_string_to_metric_families(generate_latest(metrics.registry).decode()))


def test_names_units_and_help_texts_are_as_prometheus_wants_them() -> None:
    assert list(faults(busy_families())) == []


_RESERVED = {"instance", "job", "tenant", "key", "user"}


def faults(families: Iterable[Metric]) -> Iterator[str]:
    """Yield what promtool's linter would complain of, for our own metrics."""
    for family in families:
        if not family.name.startswith("forebay_"):
            continue
        yield from name_faults(family.name)
        if not family.documentation.endswith("."):
            yield f"{family.name}: help is no sentence"
        if family.type not in {"counter", "gauge", "histogram"}:
            yield f"{family.name}: type {family.type}"
        if not family.samples:
            yield f"{family.name}: shows nothing"
        for sample in family.samples:
            if family.type == "counter" and not sample.name.endswith(("_total", "_created")):
                yield f"{sample.name}: a counter without _total"
            for label in sample.labels:
                is_bounded = label == "tenant" and family.name == "forebay_tenant_tokens"
                if not re.fullmatch(r"[a-z][a-z_]*", label) or (label in _RESERVED and not is_bounded):
                    yield f"{sample.name}: label {label}"


def name_faults(name: str) -> Iterator[str]:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or "__" in name:
        yield f"{name}: not snake case"
    if re.search(r"(milliseconds|minutes|hours|_ms|_kb|_mb|percent)$", name):
        yield f"{name}: not a base unit"
    if re.search(r"_(counter|gauge|histogram|count|sum|bucket|total)(_|$)", name):
        yield f"{name}: names its type"


def test_histograms_are_cumulative_and_end_with_their_count() -> None:
    for family in busy_families():
        if family.type != "histogram":
            continue
        buckets = [sample.value for sample in family.samples if sample.name.endswith("_bucket")]
        count = sum(sample.value for sample in family.samples if sample.name.endswith("_count"))
        assert buckets == sorted(buckets), family.name
        assert buckets[-1] == count, family.name
