"""What one gateway process is put through, and what of it becomes a figure."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.loopback.arms import Arm
from benchmarks.loopback.processes import Cores, Failed, Target, Upstream, gateway, upstream
from benchmarks.loopback.traffic import Load, Seen, check, drive

STREAMS = 16
EVENTS = 64
FIRST_MS = 20.0
GAP_MS = 10.0
STREAM_MS = FIRST_MS + (EVENTS - 1) * GAP_MS
BASELINE_STREAMS_S = STREAM_MS / 1e3  # every connection gets one stream in
MOST_FAILED = 0.001  # of what was sent
MOST_ASTRAY = 0.005  # sent and not seen upstream, or seen and not sent
SETTLE_S = 2.0
PAIR_S = 0.7

Figures = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long each scenario lasts, in seconds; 0 leaves it out."""

    warm: float
    turns: int  # direct and gateway take this many turns on one connection
    turn: float
    closed: float
    open: float
    rate: float  # open loop, a second
    streams: float
    burst: float  # streams whose events the upstream writes as fast as it can
    pairs: int  # how often the arm and the reference beside it take turns with requests at 64 connections
    others: int  # in how many of these they also take turns on one connection, and with streams


@dataclass(frozen=True)
class Cost:
    """What a load took: the gateway's CPU time, and what reached the upstream."""

    cpu_s: float
    use: float  # of one core while the load ran
    requests: int
    events: int


class Bench:
    """One gateway process, the upstream behind it, and the core that loads them."""

    def __init__(self, target: Target, engine: Upstream, cores: Cores) -> None:
        self._target = target
        self._engine = engine
        self._cores = cores
        self._direct = Target(engine.port, target.tmp, {})

    def direct(self, load: Load) -> Seen:
        """Puts `load` straight on the upstream."""
        return drive(self._direct, load, self._cores)

    def run(self, load: Load) -> tuple[Seen, Cost]:
        """Puts `load` on the gateway.

        Raises `Failed` when answers failed, or when the upstream did not see what was sent (a cache, a retry). The
        CPU time includes what the gateway does for these requests after it answered them.
        """
        counts, cpu, began = self._engine.counts(), self._target.cpu_s(), time.monotonic()
        seen = drive(self._target, load, self._cores)
        use = (self._target.cpu_s() - cpu) / (time.monotonic() - began)
        self._settle()
        cpu = self._target.cpu_s() - cpu
        after = self._engine.counts()
        kind = "streams" if load.stream else "answers"
        reached = after[kind] - counts[kind]
        if seen.failed > MOST_FAILED * seen.sent or not seen.good:
            raise Failed(f"{seen.failed} of {seen.sent} requests failed ({load})")
        if abs(reached - seen.sent) > MOST_ASTRAY * seen.sent:
            raise Failed(f"{seen.sent} requests were sent and {reached} reached the upstream ({load})")
        return seen, Cost(cpu, use, reached, after["events"] - counts["events"])

    def _settle(self) -> None:
        """Waits until the gateway rests: at most `SETTLE_S`, and no less than it may put work off."""
        time.sleep(self._target.afterwork_s)
        end = time.monotonic() + SETTLE_S
        while self._target.pid and time.monotonic() < end:
            cpu = self._target.cpu_s()
            time.sleep(0.1)
            if self._target.cpu_s() - cpu < 0.005:
                return

    def one_connection(self, plan: Plan) -> Figures:
        """Added median: one request at a time, direct and through the gateway in turns."""
        direct: list[float] = []
        through: list[float] = []
        for _ in range(plan.turns):
            direct += self.direct(Load(1, plan.turn * 0.7, warm=0.05)).latency_ms()
            through += self.run(Load(1, plan.turn, warm=0.05))[0].latency_ms()
        return _added(direct, through)

    def closed(self, connections: int, seconds: float) -> Figures:
        """Throughput and CPU time per request, each connection waiting for its answer."""
        seen, cost = self.run(Load(connections, seconds, warm=0.1))
        return {
            "per_s": seen.per_second(),
            "cpu_ms": cost.cpu_s * 1e3 / cost.requests,
            "use": cost.use,
            "p50_ms": statistics.median(seen.latency_ms()),
        }

    def open(self, plan: Plan) -> tuple[Figures, list[float]]:
        """Added median at a fixed rate, from the due time, and all latencies through the gateway."""
        direct = self.direct(Load(64, plan.open / 2, warm=0.2, rate=plan.rate)).latency_ms()
        through = self.run(Load(64, plan.open, warm=0.2, rate=plan.rate))[0].latency_ms()
        return _added(direct, through), [round(value, 3) for value in through]

    def streams(self, seconds: float) -> Figures:
        """Added time to the first event and CPU time per event, of paced streams whose starts are spread evenly."""
        self._engine.pace(first_ms=FIRST_MS, gap_ms=GAP_MS, events=EVENTS)
        baseline = Load(STREAMS, BASELINE_STREAMS_S, stagger_ms=STREAM_MS / STREAMS, stream=True)
        direct = self.direct(baseline).first_ms()
        load = Load(STREAMS, seconds, stagger_ms=STREAM_MS / STREAMS, stream=True)
        seen, cost = self.run(load)
        direct += self.direct(baseline).first_ms()
        return {
            **_added(direct, seen.first_ms()),
            "cpu_us": cost.cpu_s * 1e6 / cost.events,
            "events": statistics.fmean(r.events for r in seen.good),
            "samples": len(seen.good),
        }

    def stream_cpu_us(self, seconds: float) -> float:
        """CPU time per event of paced streams."""
        self._engine.pace(first_ms=FIRST_MS, gap_ms=GAP_MS, events=EVENTS)
        _, cost = self.run(Load(STREAMS, seconds, stagger_ms=STREAM_MS / STREAMS, stream=True))
        return cost.cpu_s * 1e6 / cost.events

    def burst(self, seconds: float) -> Figures:
        """Events a second when the upstream does not wait between them."""
        self._engine.pace(first_ms=0, gap_ms=0, events=EVENTS)
        seen, cost = self.run(Load(STREAMS, seconds, warm=0.1, stream=True))
        return {
            "events_per_s": seen.events_per_second(),
            "cpu_us": cost.cpu_s * 1e6 / cost.events,
            "events": statistics.fmean(r.events for r in seen.good),
        }


def paired(arm: Bench, reference: Bench, plan: Plan) -> Figures:
    """What the arm costs as a multiple of a reference that lives at the same time and is loaded in turn with it.

    A shared machine may be half as fast a minute later: turns of a second or two meet both at the same speed.
    """
    cpu, chunk = [], []
    added: dict[Bench, list[float]] = {arm: [], reference: []}
    for number in range(plan.pairs):
        order = (arm, reference) if number % 2 == 0 else (reference, arm)
        costs = {bench: bench.closed(64, PAIR_S)["cpu_ms"] for bench in order}
        cpu.append(costs[arm] / costs[reference])
        if number >= plan.others:
            continue
        direct = arm.direct(Load(1, plan.turn * 0.7, warm=0.05)).latency_ms()
        for bench in order:
            through = bench.run(Load(1, plan.turn, warm=0.05))[0].latency_ms()
            added[bench].append(_added(direct, through)["added_ms"])
        chunks = {bench: bench.stream_cpu_us(2 * STREAM_MS / 1e3) for bench in order}
        chunk.append(chunks[arm] / chunks[reference])
    return {
        "cpu": statistics.median(cpu),
        "added": statistics.median(added[arm]) / statistics.median(added[reference]),
        "chunk": statistics.median(chunk),
    }


def _added(direct: Sequence[float], through: Sequence[float]) -> Figures:
    p50, base = statistics.median(through), statistics.median(direct)
    return {"p50_ms": p50, "direct_ms": base, "added_ms": p50 - base}


@dataclass
class Cell:
    """The figures of one arm in one round, by scenario; a scenario that was left out is not in it."""

    figures: dict[str, Figures]
    open_ms: list[float]


def measure(arm: Arm, plan: Plan, cores: Cores, beside: Arm | None = None) -> Cell:
    """Starts a fresh upstream and gateway, checks a completion, and runs every scenario of `plan` on them.

    With a reference `beside`, that one is started too, on the same core, and takes turns with the arm at the end.
    """
    cell = Cell({}, [])
    figures = cell.figures
    with upstream(cores) as engine, gateway(arm, engine, cores) as target:
        bench = Bench(target, engine, cores)
        check(target, guarded=bool(arm.key_prefix))
        figures["process"] = {"start_s": target.start_s, "idle_mb": target.rss_mb()}
        bench.run(Load(8, plan.warm))
        if plan.turns:
            figures["one"] = bench.one_connection(plan)
        figures["eight"] = bench.closed(8, plan.closed)
        figures["sixty_four"] = bench.closed(64, plan.closed)
        if plan.open:
            figures["open"], cell.open_ms = bench.open(plan)
        if plan.streams:
            figures["streams"] = bench.streams(plan.streams)
        if plan.burst:
            figures["burst"] = bench.burst(plan.burst)
        figures["process"]["after_mb"] = target.rss_mb()
        if beside is not None and plan.pairs:
            with gateway(beside, engine, cores) as other:
                reference = Bench(other, engine, cores)
                reference.run(Load(8, plan.warm))
                figures["paired"] = paired(bench, reference, plan)
    return cell


def profile(arm: Arm, load: Load, cores: Cores, path: Path) -> Seen:
    """Runs `load` on `arm` under cProfile, which leaves its figures at `path`; start and check are in them."""
    with upstream(cores) as engine, gateway(arm, engine, cores, profile=path) as target:
        check(target, guarded=False)
        return drive(target, load, cores)
