"""What it costs to operate: limits, budgets, prices, a ledger and a request log, in SQLite, Redis and PostgreSQL.

Claim: with all of it on, a request costs at most 1.3 times the CPU that the gateway of `benchmarks.overhead` takes,
which has keys, metering, metrics and a request log in SQLite and nothing else; and gateway processes that share Redis
and PostgreSQL answer at least 0.8 of their number times what one answers.

Method: as in `benchmarks.overhead`: one core for the gateway, another for the load generator and the pretend engine;
Redis and PostgreSQL run beside the latter, or on cores of their own where there are enough, and their CPU is not the
gateway's. Every arm lives beside that gateway, is loaded in turn with it for a second or two, and stands for the ratio.
CPU is counted until what was put off (booking, twice a second) is done. Each process of the scaling part has a core of
its own, and so has its load where there are enough; what this machine has too few cores for is not measured, and the
report says so.

    python -m benchmarks.operates             seven rounds, about 25 minutes
    python -m benchmarks.operates --quick     two rounds, within 4 minutes
"""

import argparse
import os
import re
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.loopback.arms import ARMS, FOREBAY, Arm
from benchmarks.loopback.processes import Cores, Failed, gateway, upstream
from benchmarks.loopback.scenarios import Figures, Plan, measure
from benchmarks.loopback.stats import Interval, interval
from benchmarks.loopback.tools import tool
from benchmarks.loopback.traffic import Load, begin, check, finish
from benchmarks.reporting import beginning, exit_status, say, write_results
from tests.fakes.postgres import Postgres
from tests.fakes.redis import RedisServer

FULL = Plan(warm=2, turns=0, turn=0.5, closed=1.5, open=0, rate=50, streams=0, burst=0, pairs=14, others=2)
QUICK = Plan(warm=1, turns=0, turn=0.3, closed=0.8, open=0, rate=50, streams=0, burst=0, pairs=6, others=1)
FULL_ROUNDS, QUICK_ROUNDS = 7, 2
AT_MOST = 1.3  # times the CPU per request without
AT_LEAST = 0.8  # of linear
PROCESSES = (1, 2, 4)
SCALING_S = 3.0

_AMPLE = """\
    limits: {rpm: 1000000, tpm: 1000000000, parallel: 4000}
    budgets: [{usd: 100000, per: month}, {tokens: 1000000000, per: day}]
"""
_OPERATED = f"""\
tenants:
  bench:
{_AMPLE}
"""
_KEY = 'keys: [{name: bench, tenant: bench, key: {key}, models: ["*"]}]\n'
_OPERATED_KEY = f"""\
keys:
  - name: bench
    tenant: bench
    key: {{key}}
{_AMPLE}
"""


@dataclass(frozen=True)
class Servers:
    """Where Redis and PostgreSQL are to be found."""

    redis: RedisServer
    postgres: Postgres


def plain() -> Arm:
    """The gateway as `benchmarks.overhead` measures it."""
    forebay = next(arm for arm in ARMS if arm.name == "forebay")
    return replace(forebay, name="plain", note="keys, metering, metrics and a request log in SQLite, as in `overhead`")


def arms(servers: Servers) -> list[Arm]:
    """What is compared with it; databases are new."""
    sqlite = _operated("sqlite", "limits and budgets of tenant and key, prices, ledger and request log in SQLite")
    redis = f"redis: {{url: '{servers.redis.url}'}}\n"
    shared = _operated("redis", f"{sqlite.note}; counts in Redis", redis)
    postgres = f"database: {{url: '{servers.postgres.new_database()}'}}\n"
    everything = _operated("postgres", f"{shared.note}; PostgreSQL in the place of SQLite", redis + postgres)
    return [sqlite, shared, everything]


def _operated(name: str, note: str, more: str = "") -> Arm:
    text = FOREBAY.replace(_KEY, _OPERATED_KEY).replace(
        "mock-model:\n", "mock-model:\n    price: {input: 1, output: 2}\n"
    )
    assert _OPERATED_KEY in text, "the settings of `loopback.arms` have changed"
    return replace(plain(), name=name, note=note, files={"forebay.yaml": text + _OPERATED + more})


@dataclass(frozen=True)
class Places:
    """On which cores so many gateways run, the load of each, what they share, and the pretend engine."""

    gateways: list[int]
    loads: list[int]
    servers: set[int]
    engine: int

    @classmethod
    def of(cls, usable: Sequence[int], count: int) -> "Places":
        """A core for each if there are enough; else gateways have one each and the last one has all the rest."""
        rest = list(usable[count:])
        if len(rest) < count + 3:
            return cls(list(usable[:count]), rest[-1:] * count, {rest[-1]}, rest[-1])
        return cls(list(usable[:count]), rest[:count], set(rest[count:-1]), rest[-1])


def usable_cores() -> list[int]:
    """The cores that this process may use; of those that are two threads of one core, the second comes late."""

    def thread(core: int) -> int:
        siblings = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list").read_text()
        return [int(number) for number in re.findall(r"\d+", siblings)].index(core)

    return sorted(os.sched_getaffinity(0), key=lambda core: (thread(core), core))


@contextmanager
def servers_on(cores: set[int]) -> Iterator[Servers]:
    """Redis and PostgreSQL on these cores, gone when the block ends."""
    usable = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    with RedisServer() as redis, Postgres() as postgres:
        os.sched_setaffinity(0, usable)
        yield Servers(redis, postgres)


def scaling(arm: Arm, places: Places) -> float:
    """Answers a second of that many gateway processes."""
    load = Load(32, SCALING_S, warm=0.3)
    with ExitStack() as stack:
        engine = stack.enter_context(upstream(Cores(places.gateways[0], places.engine)))
        running = []
        for number, own in enumerate(map(Cores, places.gateways, places.loads)):
            target = stack.enter_context(gateway(replace(arm, name=f"{arm.name}-{number}"), engine, own))
            check(target, guarded=True)
            running.append((target, own))
        warm = Load(8, 1.0)
        for target, own in running:
            finish(begin(target, warm, own), warm)
        seen = [finish(generator, load) for generator in [begin(target, load, own) for target, own in running]]
    if any(part.failed for part in seen):
        raise Failed(f"{sum(part.failed for part in seen)} requests failed with {len(running)} processes")
    return sum(part.per_second() for part in seen)


@dataclass
class Report:
    """The figures of all rounds, and what could not be had."""

    cpu: dict[str, list[Figures]]
    rates: dict[int, list[float]]
    problems: list[str]

    def ratio(self, name: str, figure: str) -> Interval | None:
        """A figure of an arm over that of the plain gateway beside it."""
        values = [figures[figure] for figures in self.cpu.get(name, [])]
        return interval(values) if values else None

    def efficiency(self, count: int) -> Interval | None:
        """What this many processes answer, over as many times what one does."""
        pairs = zip(self.rates.get(count, []), self.rates.get(1, []), strict=False)
        values = [rate / one / count for rate, one in pairs]
        return interval(values) if values else None


def run(plan: Plan, rounds: int) -> tuple[Report, list[Arm]]:
    """Measures everything, arms forward in even rounds and backward in odd."""
    usable, cores = usable_cores(), Cores.of_machine()
    report = Report({}, {}, [])
    described: list[Arm] = []
    counts = [count for count in PROCESSES if max(count, 2) < len(usable)]
    with servers_on(Places.of(usable, max(counts)).servers if counts else {cores.load}) as servers:
        os.sched_setaffinity(0, {cores.load})
        for number in range(rounds):
            described = arms(servers)
            for arm in described if number % 2 == 0 else reversed(described):
                began = time.monotonic()
                try:
                    cell = measure(arm, plan, cores, beside=plain())
                except Failed as error:
                    report.problems.append(f"round {number + 1} {arm.name}: {error}")
                    say(f"round {number + 1} {arm.name}: FAILED {error}")
                    continue
                figures = {**cell.figures["paired"], "per_s": cell.figures["sixty_four"]["per_s"]}
                figures["cpu_ms"] = cell.figures["sixty_four"]["cpu_ms"]
                figures["after_mb"] = cell.figures["process"]["after_mb"]
                report.cpu.setdefault(arm.name, []).append(figures)
                say(f"round {number + 1} {arm.name}: {figures['cpu']:.2f} × plain, {time.monotonic() - began:.0f} s")
            for count in counts:
                rate = scaling(described[-1], Places.of(usable, count))
                report.rates.setdefault(count, []).append(rate)
                say(f"round {number + 1}: {count} process(es), {rate:,.0f} req/s")
    return report, described


def verdicts(report: Report) -> tuple[list[str], bool]:
    """A line for each target, and whether all that could be measured was kept."""
    lines, kept = [], not report.problems
    for name in ("sqlite", "redis", "postgres"):
        measured = report.ratio(name, "cpu")
        held = measured is not None and measured.high <= AT_MOST
        shown = measured.show() if measured else "nothing"
        word = "held" if held else "missed"
        lines.append(f"target cpu_per_request_{name}: want ≤ {AT_MOST} × plain, measured {shown}, {word}")
        kept = kept and held
    for count in PROCESSES[1:]:
        efficiency = report.efficiency(count)
        if efficiency is None:
            lines.append(f"target scaling_{count}: not measurable here: it needs {count + 1} cores")
            continue
        held = efficiency.low >= AT_LEAST
        word = "held" if held else "missed"
        lines.append(f"target scaling_{count}: want ≥ {AT_LEAST} of linear, measured {efficiency.show()}, {word}")
        kept = kept and held
    return lines, kept


def table(report: Report) -> list[str]:
    """One line an arm."""
    titles = ("arm", "CPU per request, × plain", "added p50, × plain", "CPU per chunk, × plain")
    columns: Mapping[str, int] = {"cpu": 2, "added": 2, "chunk": 2, "cpu_ms": 3, "per_s": 0, "after_mb": 0}
    heads = [*titles, "CPU s per 1,000 at 64", "req/s at 64", "MB after"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name in report.cpu:
        cells = [(report.ratio(name, figure), digits) for figure, digits in columns.items()]
        lines.append("| " + " | ".join([name, *(cell.show(digits) if cell else "–" for cell, digits in cells)]) + " |")
    if report.rates:
        lines += ["", "| processes | req/s |", "|---|---|"]
        lines += [f"| {count} | {statistics.median(rates):,.0f} |" for count, rates in report.rates.items()]
    return lines


def main() -> int:
    """Measures, prints and writes; 0 when every target was held, 1 when not, 2 when it cannot be measured."""
    parser = argparse.ArgumentParser(prog="benchmarks.operates", description="What operating costs, on loopback.")
    parser.add_argument("--quick", action="store_true", help="two short rounds, within 4 minutes")
    parser.add_argument("--rounds", type=int, help=f"{FULL_ROUNDS}, with --quick {QUICK_ROUNDS}")
    chosen = parser.parse_args()
    return exit_status("operates", lambda: bench(chosen))


def bench(chosen: argparse.Namespace) -> bool:
    """Measures, prints and writes; whether every target was held."""
    began = beginning()
    rounds = chosen.rounds or (QUICK_ROUNDS if chosen.quick else FULL_ROUNDS)
    tool("load"), tool("upstream")
    report, described = run(QUICK if chosen.quick else FULL, rounds)
    lines, kept = verdicts(report)
    notes = [
        f"Intervals: 95 % bootstrap of the median over {rounds} round(s); ratios are of turns side by side.",
        *(f"{arm.name}: {arm.note}." for arm in [plain(), *described]),
        *(f"FAILED {problem}" for problem in report.problems),
    ]
    raw = {"cpu": report.cpu, "requests_per_s": report.rates, "problems": report.problems}
    write_results(
        "operates", "What operating costs", began,
        quick=chosen.quick, table=table(report), lines=lines, raw=raw, notes=notes,
    )  # fmt: skip
    return kept


if __name__ == "__main__":
    sys.exit(main())
