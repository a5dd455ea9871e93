"""Prometheus metrics. Labels take their values from the settings, never from a request, so that there are few."""

from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from gateway.telemetry import RequestRecord

_LATENCY = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_OVERHEAD = (0.0001, 0.00025, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5)
_CLIENT_LEFT = 499


class Metrics:
    """What ``/metrics`` exposes: the traffic, and the gauges that are set when somebody looks."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._traffic = _Traffic()
        registry.register(self._traffic)
        self.log_dropped = Counter("forebay_log_dropped", "Request log lines dropped, queue full.", registry=registry)
        self.worker_state = Gauge(
            "forebay_worker_state", "1 for the worker's present state.", ("worker", "state"), registry=registry
        )
        self.worker_running = Gauge("forebay_worker_inflight_requests", "Slots taken.", ("worker",), registry=registry)
        self.queue_depth = Gauge("forebay_queue_depth", "Requests that wait.", ("model",), registry=registry)
        self.worker_restarts = Gauge("forebay_worker_restarts", "Starts after a crash.", ("worker",), registry=registry)

    def observe(self, record: RequestRecord) -> None:
        """Count one finished request."""
        self._traffic.observe(record)


class _Distribution:
    """A histogram of one label set, in plain numbers."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def add_to(self, family: HistogramMetricFamily, labels: tuple[str, ...]) -> None:
        names = [*(str(bound) for bound in self._bounds), "+Inf"]
        family.add_metric(labels, list(zip(names, accumulate(self._counts), strict=True)), self._sum)


class _Line:
    """What is counted of one model on one endpoint."""

    __slots__ = ("cached", "duration", "first_byte", "input", "num_left", "num_retries", "output", "overhead", "queue")

    def __init__(self) -> None:
        self.duration = _Distribution(_LATENCY)
        self.first_byte = _Distribution(_LATENCY)
        self.queue = _Distribution(_LATENCY)
        self.overhead = _Distribution(_OVERHEAD)
        self.input = self.output = self.cached = self.num_retries = self.num_left = 0

    def observe(self, record: RequestRecord) -> None:
        self.duration.observe(record.duration_s)
        if record.first_byte_s is not None:
            self.first_byte.observe(record.first_byte_s)
            self.queue.observe(record.queue_s)
        if record.overhead_s is not None:
            self.overhead.observe(record.overhead_s)
        if (usage := record.usage) is not None:
            self.input += usage.prompt_tokens
            self.output += usage.completion_tokens
            self.cached += usage.cached_tokens
        if record.attempts > 1:
            self.num_retries += record.attempts - 1
        if record.status == _CLIENT_LEFT:
            self.num_left += 1


class _Traffic(Collector):
    """Counts requests. Not the library's own counters: their locks took 7 of a request's 10 µs here, and one event
    loop needs none."""

    def __init__(self) -> None:
        self._lines: dict[tuple[str, str], _Line] = {}
        self._codes: dict[tuple[str, str, int], int] = {}

    def observe(self, record: RequestRecord) -> None:
        model, endpoint = record.model, record.endpoint
        code = (model or "other", endpoint, record.status)
        self._codes[code] = self._codes.get(code, 0) + 1
        if model is None:
            return
        line = self._lines.get((model, endpoint))
        if line is None:
            line = self._lines[model, endpoint] = _Line()
        line.observe(record)

    def collect(self) -> Iterator[Metric]:
        requests = CounterMetricFamily("forebay_requests", "Requests answered.", labels=("model", "endpoint", "code"))
        for (model, endpoint, code), count in self._codes.items():
            requests.add_metric((model, endpoint, str(code)), count)
        yield requests
        yield self._histogram("forebay_request_duration_seconds", "Arrival to last byte.", "duration")
        yield self._histogram("forebay_time_to_first_token_seconds", "Arrival to first byte.", "first_byte")
        yield self._histogram("forebay_queue_wait_seconds", "Wait for a worker.", "queue")
        yield self._histogram("forebay_overhead_seconds", "Time spent in Forebay itself.", "overhead")
        tokens = CounterMetricFamily("forebay_tokens", "Tokens metered.", labels=("model", "endpoint", "type"))
        for labels, line in self._lines.items():
            tokens.add_metric((*labels, "input"), line.input)
            tokens.add_metric((*labels, "output"), line.output)
            tokens.add_metric((*labels, "cached"), line.cached)
        yield tokens
        yield self._counter("forebay_retries", "Legs after a request's first.", "num_retries")
        yield self._counter("forebay_client_disconnects", "Clients that left early.", "num_left")

    def _histogram(self, name: str, help_text: str, field: str) -> Metric:
        family = HistogramMetricFamily(name, help_text, labels=("model", "endpoint"))
        for labels, line in self._lines.items():
            getattr(line, field).add_to(family, labels)
        return family

    def _counter(self, name: str, help_text: str, field: str) -> Metric:
        family = CounterMetricFamily(name, help_text, labels=("model", "endpoint"))
        for labels, line in self._lines.items():
            family.add_metric(labels, getattr(line, field))
        return family
