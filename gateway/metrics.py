"""Prometheus metrics. Labels take their values from the settings and from fixed lists, never from a request, so that
there are few. ``docs/reference/metrics.md`` lists them all.

One process has one registry, behind its own admin port: several gateways are several targets, told apart by
Prometheus's ``instance``, and share nothing.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate, pairwise

import msgspec
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from core.chat import Usage
from core.errors import ConnectionLimit, ForebayError, LimitsUnavailable, RateLimited
from core.records import CLIENT_LEFT, CUTS, RequestRecord
from core.tenancy import PICO_PER_USD
from core.workflows import RunState

_LATENCY = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_OVERHEAD = (0.0001, 0.00025, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5)
_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
_RUN = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)
_COMMIT = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 5000.0)
_LAG = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)

_MAX_TENANTS = 50

_Numbers = Mapping[tuple[str, ...], float]


# How a leg that went on has ended: of those that were aborted, the client had left.
_OUTCOMES: Mapping[str, str] = {"done": "done", "aborted": "left", **dict.fromkeys(CUTS, "cut")}


class WorkerVitals(msgspec.Struct, frozen=True):
    """One worker, as the gauges show it. ``states``: every state there is, and whether it is the present one."""

    id: str
    states: Mapping[str, bool]
    is_healthy: bool
    is_tripped: bool
    num_running: int
    num_restarts: int


class Vitals(msgspec.Struct, frozen=True):
    """How the process and its surroundings are at one moment. None: there is no such thing here.

    ``queues``: waiting requests by model. ``redis_errors``: failed commands by operation, since the start.
    ``revision`` names the settings in force. ``budgets``: how many there are, by what is left of them. ``waste_left``:
    tokens that may be computed again for fairness' sake, by model. ``num_replicas``: gateways that schedule as one;
    ``roles``: what this one is to them, by model.
    """

    workers: tuple[WorkerVitals, ...] = ()
    queues: Mapping[str, int] = {}
    num_inflight: int = 0
    is_redis_up: bool | None = None
    redis_errors: Mapping[str, int] = {}
    is_database_up: bool | None = None
    num_records_waiting: int = 0
    revision: str = "file"
    num_traces_exported: int = 0
    num_traces_dropped: int = 0
    budgets: Mapping[str, int] = {}
    waste_left: Mapping[str, float] = {}
    num_replicas: int | None = None
    roles: Mapping[str, str] = {}


class Metrics:
    """What ``/metrics`` exposes: the traffic as it is observed, and the vitals, read when somebody looks."""

    def __init__(self) -> None:
        # They would be a second series beside each counter, for what process_start_time_seconds says.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = registry = CollectorRegistry()
        self._traffic = _Traffic()
        self._gauges = _Gauges()
        self.runs = RunCounts()
        registry.register(self._traffic)
        registry.register(self.runs)
        registry.register(self._gauges)
        ProcessCollector(registry=registry)
        self.records_dropped = Counter(
            "forebay_records_dropped", "Request records that were lost: their queue was full.", registry=registry
        )
        self._reloads = Counter(
            "forebay_config_reloads", "Attempts to take over new settings.", ("result",), registry=registry
        )
        for result in ("applied", "refused"):
            self._reloads.labels(result)
        self._lag = Histogram(
            "forebay_event_loop_lag_seconds",
            "How late the event loop woke up, sampled once a second.",
            buckets=_LAG,
            registry=registry,
        )

    def observe(self, record: RequestRecord, error: ForebayError | None = None) -> None:
        """Count one finished request, and the error that it ended with."""
        self._traffic.observe(record)
        if error is not None:
            self._traffic.observe_error(record, error)

    def observe_lag(self, seconds: float) -> None:
        """Note how much later than asked the event loop woke up."""
        self._lag.observe(max(0.0, seconds))

    def count_reload(self, *, is_applied: bool) -> None:
        """Count an attempt to take over new settings."""
        self._reloads.labels("applied" if is_applied else "refused").inc()

    def watch(self, read: Callable[[], Vitals]) -> None:
        """Call ``read`` whenever somebody looks. It has to be quick, and must not fail."""
        self._gauges.read = read


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

    __slots__ = (
        "cached", "cost", "duration", "first_byte", "input", "num_left", "output", "overhead", "per_token"
    )  # fmt: skip

    def __init__(self) -> None:
        self.duration = _Distribution(_LATENCY)
        self.first_byte = _Distribution(_LATENCY)
        self.per_token = _Distribution(_PER_TOKEN)
        self.overhead = _Distribution(_OVERHEAD)
        self.input = self.output = self.cached = self.cost = self.num_left = 0

    def observe(self, record: RequestRecord) -> None:
        self.duration.observe(record.duration_s)
        first_byte_s = record.first_byte_s
        if first_byte_s is not None:
            self.first_byte.observe(first_byte_s)
        if record.overhead_s is not None:
            self.overhead.observe(record.overhead_s)
        if (usage := record.usage) is not None:
            self.input += usage.prompt_tokens
            self.output += usage.completion_tokens
            self.cached += usage.cached_tokens
            self.cost += record.cost
            if record.stream and first_byte_s is not None and usage.completion_tokens > 1:
                self.per_token.observe((record.duration_s - first_byte_s) / (usage.completion_tokens - 1))
        if record.status == CLIENT_LEFT:
            self.num_left += 1


class _Traffic(Collector):
    """Counts requests. Not the library's own counters: their locks took 7 of a request's 10 µs here, and one event
    loop needs none."""

    def __init__(self) -> None:
        self._lines: dict[tuple[str, str], _Line] = {}
        self._codes: dict[tuple[str, str, int], int] = {}
        self._retries: dict[tuple[str, ...], int] = {}
        self._fallbacks: dict[tuple[str, ...], int] = {}
        self._errors: dict[tuple[str, ...], int] = {}
        self._rejections: dict[tuple[str, ...], int] = {}
        self._waits: dict[tuple[str, str], _Distribution] = {}
        self._tenants: dict[str, list[int]] = {}
        self._cuts: dict[tuple[str, ...], int] = {}
        self._resumes: dict[tuple[str, ...], int] = {}
        self._recomputed: dict[tuple[str, ...], int] = {}

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
        if record.first_byte_s is not None:
            wait = self._waits.get((model, record.urgency))
            if wait is None:
                wait = self._waits[model, record.urgency] = _Distribution(_LATENCY)
            wait.observe(record.queue_s)
        if record.usage is not None and record.tenant is not None:
            self._observe_tenant(record.tenant, record.usage)
        if len(record.legs) > 1:
            self._observe_legs(record)
        if record.asked_model is not None and record.asked_model != model:
            _add(self._fallbacks, (record.asked_model, model))

    def _observe_tenant(self, tenant: str, usage: Usage) -> None:
        """Add to what the tenant was given; the first tenants have a line each, as counters may not change places."""
        tokens = self._tenants.get(tenant)
        if tokens is None:
            name = tenant if len(self._tenants) < _MAX_TENANTS else "other"
            tokens = self._tenants.setdefault(name, [0, 0])
        tokens[0] += usage.prompt_tokens
        tokens[1] += usage.completion_tokens

    def _observe_legs(self, record: RequestRecord) -> None:
        """Count what cut each leg, and what came of those that followed."""
        for leg, following in pairwise(record.legs):
            if leg.cause in CUTS:
                _add(self._cuts, (leg.model, leg.cause))
            elif not following.is_resumed:
                _add(self._retries, (leg.model, leg.cause))
            if following.recomputed is not None:
                outcome = _OUTCOMES.get(following.cause, "failed")
                _add(self._resumes, (leg.model, leg.cause, outcome))
                _add(self._recomputed, (leg.model, leg.cause), following.recomputed)

    def observe_error(self, record: RequestRecord, error: ForebayError) -> None:
        # The class's code, not the error's own: that may be an engine's, and engines say what they like.
        _add(self._errors, (record.model or "other", type(error).code))
        if isinstance(error, RateLimited):
            _add(self._rejections, ((error.measure or "other").replace(" ", "_"),))
        elif isinstance(error, ConnectionLimit):
            _add(self._rejections, ("connections",))
        elif isinstance(error, LimitsUnavailable):
            _add(self._rejections, ("unavailable",))

    def collect(self) -> Iterator[Metric]:
        requests = CounterMetricFamily("forebay_requests", "Requests answered.", labels=("model", "endpoint", "code"))
        for (model, endpoint, code), count in self._codes.items():
            requests.add_metric((model, endpoint, str(code)), count)
        yield requests
        yield self._histogram("forebay_request_duration_seconds", "Arrival to last byte.", "duration")
        yield self._histogram("forebay_time_to_first_token_seconds", "Arrival to first byte.", "first_byte")
        yield self._histogram(
            "forebay_time_per_output_token_seconds",
            "Time between a stream's first and last byte, per token after the first; a request's mean counts once.",
            "per_token",
        )
        waits = HistogramMetricFamily("forebay_queue_wait_seconds", "Wait for a worker.", labels=("model", "class"))
        for names, wait in self._waits.items():
            wait.add_to(waits, names)
        yield waits
        yield self._histogram("forebay_overhead_seconds", "Time spent in Forebay itself.", "overhead")
        tokens = CounterMetricFamily(
            "forebay_tokens", "Tokens metered; cached ones are part of the input.", labels=("model", "endpoint", "type")
        )
        spend = CounterMetricFamily(
            "forebay_spend_usd", "What was used, at the settings' prices.", labels=("model", "endpoint")
        )
        left = CounterMetricFamily(
            "forebay_client_disconnects", "Clients that left early.", labels=("model", "endpoint")
        )
        for labels, line in self._lines.items():
            tokens.add_metric((*labels, "input"), line.input)
            tokens.add_metric((*labels, "output"), line.output)
            tokens.add_metric((*labels, "cached"), line.cached)
            spend.add_metric(labels, line.cost / PICO_PER_USD)
            left.add_metric(labels, line.num_left)
        yield from (tokens, spend, left)
        yield _counter("forebay_retries", "Legs tried again, by their end.", ("model", "cause"), self._retries)
        yield _counter("forebay_cuts", "Legs cut to go on later, by the reason.", ("model", "cause"), self._cuts)
        yield _counter(
            "forebay_resumes",
            "Legs that went on where one was cut or lost, by its end and by theirs.",
            ("model", "cause", "outcome"),
            self._resumes,
        )
        yield _counter(
            "forebay_recomputed_tokens",
            "Tokens computed again to go on, by the end of the leg before.",
            ("model", "cause"),
            self._recomputed,
        )
        tenants = CounterMetricFamily(
            "forebay_tenant_tokens", "Tokens that tenants were given.", labels=("tenant", "type")
        )
        for tenant, (read, written) in self._tenants.items():
            tenants.add_metric((tenant, "input"), read)
            tenants.add_metric((tenant, "output"), written)
        yield tenants
        yield _counter(
            "forebay_fallbacks", "Requests that another model answered.", ("model", "answered_by"), self._fallbacks
        )
        yield _counter("forebay_errors", "Requests that ended in an error.", ("model", "code"), self._errors)
        yield _counter(
            "forebay_limit_rejections",
            "Requests refused by a limit or a budget.",
            ("kind",),
            self._rejections,
        )

    def _histogram(self, name: str, help_text: str, field: str) -> Metric:
        family = HistogramMetricFamily(name, help_text, labels=("model", "endpoint"))
        for labels, line in self._lines.items():
            getattr(line, field).add_to(family, labels)
        return family


class RunCounts(Collector):
    """Counts runs of workflows and their calls, as those tell it that make them."""

    def __init__(self) -> None:
        self._num_watchers = 0
        self._num_accepted = 0
        self._num_open = 0
        self._ended: dict[tuple[str, ...], int] = {}
        self._started: dict[tuple[str, ...], int] = {}
        self._calls_ended: dict[tuple[str, ...], int] = {}
        self._retried: dict[tuple[str, ...], int] = {}
        self._duration = _Distribution(_RUN)
        self._commits = _Distribution(_COMMIT)

    def accepted(self) -> None:
        """Count a run that was submitted."""
        self._num_accepted += 1

    def opened(self) -> None:
        """Note that this gateway has a run under way."""
        self._num_open += 1

    def closed(self) -> None:
        """Note that it has it no more."""
        self._num_open -= 1

    def ended(self, state: RunState) -> None:
        """Count the end of a run; one that was appended to may have several."""
        _add(self._ended, (state,))

    def run_lasted(self, seconds: float) -> None:
        """Note how long a run has taken from its submission to its first end."""
        self._duration.observe(max(0.0, seconds))

    def call_started(self, kind: str) -> None:
        """Count a call that has begun, once however often it is tried."""
        _add(self._started, (kind,))

    def call_ended(self, kind: str, state: str) -> None:
        """Count a call that has its outcome."""
        _add(self._calls_ended, (kind, state))

    def call_retried(self, kind: str) -> None:
        """Count an attempt that has failed, and is followed by another."""
        _add(self._retried, (kind,))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count a stream of events as open, while inside."""
        self._num_watchers += 1
        try:
            yield
        finally:
            self._num_watchers -= 1

    def committed(self, num_events: int) -> None:
        """Note how many events were written at once."""
        self._commits.observe(num_events)

    def collect(self) -> Iterator[Metric]:
        """Return the metrics."""
        yield CounterMetricFamily("forebay_runs_accepted", "Runs of workflows that were submitted.", self._num_accepted)
        yield GaugeMetricFamily("forebay_runs_open", "Runs that this gateway has under way.", self._num_open)
        yield _counter("forebay_runs_ended", "Runs that have ended, by how.", ("state",), self._ended)
        duration = HistogramMetricFamily("forebay_run_duration_seconds", "Submission to first end of a run.", labels=())
        self._duration.add_to(duration, ())
        yield duration
        yield _counter("forebay_run_calls_started", "Calls of runs that have begun.", ("kind",), self._started)
        ended = "Calls of runs that were begun and have ended, by how."
        yield _counter("forebay_run_calls_ended", ended, ("kind", "state"), self._calls_ended)
        yield _counter("forebay_run_calls_retried", "Attempts that were followed by another.", ("kind",), self._retried)
        yield GaugeMetricFamily("forebay_run_watchers", "Streams of events that are open.", self._num_watchers)
        commits = HistogramMetricFamily(
            "forebay_run_commit_events", "Events of runs that were written in one transaction.", labels=()
        )
        self._commits.add_to(commits, ())
        yield commits


class _Gauges(Collector):
    """Shows what is read when somebody looks."""

    def __init__(self) -> None:
        self.read: Callable[[], Vitals] = Vitals
        self._version = _version()

    def collect(self) -> Iterator[Metric]:
        vitals = self.read()
        yield from _workers(vitals.workers)
        queues: _Numbers = {(model,): count for model, count in vitals.queues.items()}
        yield _gauge("forebay_queue_depth", "Requests that wait.", ("model",), queues)
        yield GaugeMetricFamily("forebay_inflight_requests", "Answers that are not complete.", vitals.num_inflight)
        yield _presence("forebay_redis_up", "1 while Redis answers; absent without one.", vitals.is_redis_up)
        errors: _Numbers = {(operation,): count for operation, count in vitals.redis_errors.items()}
        yield _counter("forebay_redis_errors", "Redis commands that failed.", ("op",), errors)
        yield _presence("forebay_database_up", "1 while the database answers.", vitals.is_database_up)
        yield GaugeMetricFamily(
            "forebay_records_waiting", "Request records not written yet.", vitals.num_records_waiting
        )
        budgets: _Numbers = {(state,): count for state, count in vitals.budgets.items()}
        yield _gauge("forebay_budgets", "Budgets of tenants and keys, by what is left of them.", ("state",), budgets)
        left: _Numbers = {(model,): tokens for model, tokens in vitals.waste_left.items()}
        yield _gauge("forebay_waste_budget_tokens", "Tokens that preemption may have computed again.", ("model",), left)
        if vitals.num_replicas is not None:
            yield GaugeMetricFamily("forebay_replicas", "Gateways that schedule as one.", vitals.num_replicas)
            roles: _Numbers = {(model, role): 1 for model, role in vitals.roles.items()}
            yield _gauge("forebay_scheduling_role", "Who decides for a shared model.", ("model", "role"), roles)
        yield _gauge("forebay_config_info", "The settings in force.", ("revision",), {(vitals.revision,): 1})
        yield _gauge("forebay_build_info", "What runs.", ("version",), {(self._version,): 1})
        yield CounterMetricFamily(
            "forebay_traces_exported",
            "Requests, runs and calls of runs whose spans the collector took.",
            vitals.num_traces_exported,
        )
        yield CounterMetricFamily(
            "forebay_traces_dropped",
            "Of these, those lost: the queue was full, or the collector did not take them.",
            vitals.num_traces_dropped,
        )


def _workers(workers: tuple[WorkerVitals, ...]) -> Iterator[Metric]:
    label = ("worker",)
    yield _gauge(
        "forebay_worker_state",
        "1 for the worker's present state.",
        ("worker", "state"),
        {(worker.id, state): int(is_it) for worker in workers for state, is_it in worker.states.items()},
    )
    healthy: _Numbers = {(worker.id,): int(worker.is_healthy) for worker in workers}
    yield _gauge("forebay_worker_healthy", "1 while the worker's probes are good.", label, healthy)
    tripped: _Numbers = {(worker.id,): int(worker.is_tripped) for worker in workers}
    yield _gauge("forebay_worker_breaker_open", "1 while failures keep work away from it.", label, tripped)
    running: _Numbers = {(worker.id,): worker.num_running for worker in workers}
    yield _gauge("forebay_worker_inflight_requests", "Slots taken.", label, running)
    restarts: _Numbers = {(worker.id,): worker.num_restarts for worker in workers}
    yield _counter("forebay_worker_restarts", "Starts after the first.", label, restarts)


def _add(counts: dict[tuple[str, ...], int], key: tuple[str, ...], number: int = 1) -> None:
    counts[key] = counts.get(key, 0) + number


def _counter(name: str, help_text: str, labels: tuple[str, ...], counts: _Numbers) -> CounterMetricFamily:
    family = CounterMetricFamily(name, help_text, labels=labels)
    for values, count in counts.items():
        family.add_metric(values, count)
    return family


def _gauge(name: str, help_text: str, labels: tuple[str, ...], values: _Numbers) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, help_text, labels=labels)
    for label_values, value in values.items():
        family.add_metric(label_values, value)
    return family


def _presence(name: str, help_text: str, is_up: bool | None) -> GaugeMetricFamily:
    return _gauge(name, help_text, (), {} if is_up is None else {(): int(is_up)})


def _version() -> str:
    try:
        return version("forebay-server")
    except PackageNotFoundError:  # run from its source folder
        return "source"
