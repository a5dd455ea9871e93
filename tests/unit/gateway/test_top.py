"""The live terminal: rates and quantiles between two samples, and what is drawn of them."""

import io
from typing import Any

import msgspec
import pytest
from prometheus_client import generate_latest
from rich.console import Console

from core.chat import Usage
from core.errors import RateLimited
from core.records import RequestRecord
from gateway.cli.common import Fault
from gateway.cli.top import Sample, View, sample_of, screen, view_of
from gateway.metrics import Metrics, Vitals


def worker(name: str, model: str, **more: Any) -> dict[str, Any]:
    return {"id": name, "model": model, "state": "ready", "healthy": True, "running": 0, "max_inflight": 64, **more}


WORKERS = [
    worker("smollm2-135m-instruct-with-a-long-name-0", "smollm2", running=2, max_inflight=4, restarts=0),
    worker("big-0", "big", healthy=False, restarts=3),
    worker("big-1", "big", healthy=False, state="failed", restarts=9),
]


class Gateway:
    """What a gateway would say of itself."""

    def __init__(self) -> None:
        self.metrics = Metrics()
        self.vitals = Vitals(queues={"big": 3}, num_inflight=5, is_database_up=True, revision="7")
        self.metrics.watch(lambda: self.vitals)

    def answers(self, count: int, *, first_byte_s: float = 0.03, status: int = 200, tokens: int = 10) -> None:
        record = RequestRecord(
            time=1.0, id="r", endpoint="/v1/chat/completions", status=status, duration_s=0.5, model="big",
            first_byte_s=first_byte_s if status == 200 else None, usage=Usage(5, tokens), cost=10**12,
        )  # fmt: skip
        for _ in range(count):
            self.metrics.observe(record)

    def sample(self, at: float) -> Sample:
        return sample_of(generate_latest(self.metrics.registry).decode(), WORKERS, at)


@pytest.fixture
def gateway() -> Gateway:
    return Gateway()


def drawn(view: View, width: int = 80) -> str:
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(screen(view))
    return out.getvalue()


def test_rates_come_from_two_samples(gateway: Gateway) -> None:
    gateway.answers(100)
    before = gateway.sample(10.0)
    gateway.answers(6)
    gateway.answers(2, status=503, tokens=0)
    gateway.answers(1, status=404, tokens=0)
    gateway.metrics.observe(RequestRecord(1.0, "r", "/v1/embeddings", 429, 0.1, model="big"), RateLimited("m"))
    view = view_of(before, gateway.sample(12.0))

    (big,) = view.models
    assert (view.requests_per_s, big.requests_per_s) == (5.0, 5.0)
    assert (view.tokens_per_s, big.tokens_per_s) == (30.0, 30.0)
    assert (view.errors_per_s, big.errors_per_s) == (1.0, 1.0)
    assert view.rejections_per_s == 0.5
    assert (view.spend_usd, view.inflight, view.waiting, view.revision) == (109.0, 5, 3, "7")
    assert view.memory_bytes > 10**6


def test_quantiles_are_those_of_the_answers_between_the_samples(gateway: Gateway) -> None:
    gateway.answers(1000, first_byte_s=20)
    before = gateway.sample(10.0)
    gateway.answers(50, first_byte_s=0.03)
    gateway.answers(50, first_byte_s=0.2)
    (big,) = view_of(before, gateway.sample(11.0)).models

    assert big.ttft_p50_s == pytest.approx(0.05)
    assert big.ttft_p95_s == pytest.approx(0.1 + 0.15 * 45 / 50)


def test_while_nothing_is_answered_the_quantiles_of_the_whole_time_stand(gateway: Gateway) -> None:
    gateway.answers(10, first_byte_s=0.03)
    (big,) = view_of(gateway.sample(10.0), gateway.sample(11.0)).models

    assert big.ttft_p50_s == pytest.approx(0.0375)


def test_a_gateway_that_was_started_anew_counts_from_zero(gateway: Gateway) -> None:
    gateway.answers(1000)
    before = gateway.sample(10.0)
    restarted = Gateway()
    restarted.answers(4)

    assert view_of(before, restarted.sample(12.0)).requests_per_s == 2.0


def test_the_screen_fits_eighty_columns_and_names_what_is_wrong(gateway: Gateway) -> None:
    gateway.vitals = msgspec.structs.replace(gateway.vitals, is_redis_up=False, num_records_waiting=12)
    gateway.metrics.records_dropped.inc(4)
    before = gateway.sample(10.0)
    gateway.answers(20)
    text = drawn(view_of(before, gateway.sample(11.0)))

    assert max(map(len, text.splitlines())) <= 80
    assert "database up" in text
    assert "redis DOWN" in text
    assert "20.0 req/s  200 tok/s  5 open  3 waiting" in text
    assert "12 waiting, 4 dropped" in text
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    assert rows["big"] == ["big", "20.0", "200", "0.0", "3", "38", "ms", "49", "ms", "20.00"]
    assert rows["big-0"] == ["big-0", "big", "ready,", "ill", "0/64", "3"]
    assert rows["big-1"] == ["big-1", "big", "failed", "0/64", "9"]


def test_a_gateway_without_redis_or_traffic_is_drawn_too() -> None:
    gateway = Gateway()
    text = drawn(view_of(gateway.sample(1.0), gateway.sample(2.0)))

    assert "redis -" in text
    assert "big" in text


def test_json_has_the_same_in_figures(gateway: Gateway) -> None:
    gateway.answers(1)
    view = msgspec.json.decode(msgspec.json.encode(view_of(gateway.sample(1.0), gateway.sample(2.0))))

    assert view["models"][0]["model"] == "big"
    assert view["database_up"] is True
    assert view["redis_up"] is None
    assert view["workers"] == WORKERS


def test_what_is_no_metrics_text_is_a_fault_that_says_so() -> None:
    with pytest.raises(Fault, match="text format"):
        sample_of("<html> not metrics", [], 1.0)
