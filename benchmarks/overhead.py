"""What a gateway adds: Forebay beside the thinnest Python pass-through, LiteLLM's proxy and two Rust routers.

Claim: with key check, metering, metrics and request log on, Forebay costs at most 1.7 times the CPU per request of a
raw ASGI pass-through, adds at most 1.5 times its median latency, saturates at 30 times LiteLLM's rate or more, adds at
most 1 ms to the first event of a stream, and costs at most 1.5 times the pass-through's CPU per event.

Method: one core for the gateway (its whole process tree), another for the load generator and the pretend engine, all
on the loopback interface. Every arm runs once a round in a fresh process, forward in one round and backward in the
next; a checked completion and a warm-up come first. Added latency is against turns straight to the engine inside the
same cell, so the arm `direct` shows the rig's own error. Figures are medians over rounds with 95 % bootstrap intervals
over rounds (of three rounds: their range). Ratios to raw ASGI come from a pass-through that lives beside Forebay in
the same cell and is loaded in turn with it, a second or two each, because a shared machine changes its speed from one
minute to the next; the other ratios are taken inside a round.

    python -m benchmarks.overhead             everything, about 20 minutes; goes on where it was cut off
    python -m benchmarks.overhead --quick     the arms that targets name, within 4 minutes (less what it must install)
    python -m benchmarks.overhead --quick --rounds 1 --arms raw_asgi,forebay      one A/B
    python -m benchmarks.overhead --profile   where Forebay's CPU time goes, by function
"""

import argparse
import hashlib
import json
import os
import platform
import pstats
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from benchmarks.loopback.arms import ARMS, Arm
from benchmarks.loopback.cache import ROOT, Missing, folder
from benchmarks.loopback.processes import Cores, Failed
from benchmarks.loopback.scenarios import GAP_MS, STREAM_MS, STREAMS, Cell, Plan, measure, profile
from benchmarks.loopback.stats import Interval, interval, p99
from benchmarks.loopback.tools import tool
from benchmarks.loopback.traffic import Load
from benchmarks.loopback.venvs import versions
from benchmarks.reporting import RESULTS, beginning, command_of, commit, exit_status, now, say

SOURCES = {"forebay": ("core", "routing", "engines", "gateway")}
FULL = Plan(warm=2, turns=4, turn=0.6, closed=2.5, open=6, rate=50, streams=4, burst=1.5, pairs=5, others=5)
QUICK = Plan(warm=1, turns=3, turn=0.4, closed=1.3, open=1.5, rate=50, streams=3, burst=0, pairs=3, others=3)
QUICK_ARMS = ("forebay", "litellm")  # raw ASGI is measured beside Forebay
QUICK_PLANS = {  # no target asks these for more
    "litellm": replace(QUICK, turns=0, closed=2.5, open=0, streams=0),
}
PAIRED = {"forebay": next(arm for arm in ARMS if arm.name == "raw_asgi")}  # who is measured beside whom
FULL_ROUNDS, QUICK_ROUNDS = 5, 3
FILLED = 0.9  # of its core, by a gateway that is saturated

Round = Mapping[str, Cell]


@dataclass(frozen=True)
class Target:
    """A promise: a figure of a round, and the bound that the whole of its interval has to keep."""

    name: str
    unit: str
    arms: tuple[str, ...]  # whose figure it is, and, of a ratio inside a round, over whose
    scenario: str
    figure: str
    at_most: float | None = None
    at_least: float | None = None
    promised: bool = True  # False: a hope, shown and never missed

    def value(self, cells: Round) -> float:
        """The figure, or the ratio of the two arms' figures, in one round."""
        first, *second = (cells[arm].figures[self.scenario][self.figure] for arm in self.arms)
        return first / second[0] if second else first

    def want(self) -> str:
        """The bound as text."""
        return f"≤ {self.at_most:g} {self.unit}" if self.at_most is not None else f"≥ {self.at_least:g} {self.unit}"

    def held(self, measured: Interval) -> bool:
        """Whether even the end of the interval nearest the bound keeps it."""
        if self.at_most is not None:
            return measured.high <= self.at_most
        return self.at_least is not None and measured.low >= self.at_least


TARGETS = (
    Target("cpu_per_request", "× raw ASGI", ("forebay",), "paired", "cpu", at_most=1.7),
    Target("added_p50", "× raw ASGI", ("forebay",), "paired", "added", at_most=1.5),
    Target("saturation", "× LiteLLM", ("forebay", "litellm"), "sixty_four", "per_s", at_least=30),
    Target("stream_ttft_added_p50", "ms", ("forebay",), "streams", "added_ms", at_most=1),
    Target("cpu_per_chunk", "× raw ASGI", ("forebay",), "paired", "chunk", at_most=1.5),
    Target("cpu_level_with_smg", "× smg", ("forebay", "smg"), "sixty_four", "cpu_ms", at_most=1, promised=False),
)


@dataclass(frozen=True)
class Column:
    """One figure of the table."""

    title: str
    scenario: str
    figure: str
    digits: int
    scale: float = 1.0


COLUMNS = (
    Column("added p50, ms", "one", "added_ms", 3),
    Column("added p50 at 50/s, ms", "open", "added_ms", 3),
    Column("CPU s per 1,000 at 64", "sixty_four", "cpu_ms", 3),
    Column("at 8", "eight", "cpu_ms", 3),
    Column("req/s at 64", "sixty_four", "per_s", 0),
    Column("core used, %", "sixty_four", "use", 0, 100),
    Column("TTFT added p50, ms", "streams", "added_ms", 3),
    Column("CPU µs per chunk", "streams", "cpu_us", 1),
    Column("events per stream", "streams", "events", 1),
    Column("unpaced chunks/s", "burst", "events_per_s", 0),
    Column("MB after", "process", "after_mb", 0),
    Column("start, s", "process", "start_s", 1),
)


class Run:
    """The cells of one run: which are wanted, which are there, and which cannot be had."""

    def __init__(self, arms: Sequence[Arm], rounds: int, quick: bool, cores: Cores) -> None:
        self.arms = arms
        self.rounds = rounds
        self.quick = quick
        self.cores = cores
        self.cells: list[dict[str, Cell]] = [{} for _ in range(rounds)]
        self.problems: dict[str, str] = {}
        self.versions: dict[str, dict[str, str]] = {}
        self.measured_at: list[str] = []

    def prepare(self) -> None:
        """Installs what arms need; one that cannot be installed is out, and the report says why."""
        for arm in self.arms:
            try:
                self.versions[arm.name] = versions(arm.programs() / "python", arm.packages)
            except Missing as error:
                self.problems[arm.name] = str(error)
                say(f"{arm.name}: {error}")

    def plan(self, arm: Arm) -> Plan:
        """What `arm` goes through."""
        return QUICK_PLANS.get(arm.name, QUICK) if self.quick else FULL

    def fingerprint(self, arm: Arm) -> str:
        """Changes with whatever would make a cell taken before incomparable: plan, arm, versions, code."""
        digest = hashlib.sha256(repr((self.plan(arm), arm, self.versions.get(arm.name), self.cores)).encode())
        code = [Path(__file__), *(ROOT / "benchmarks" / "loopback").iterdir()]
        for package in SOURCES.get(arm.name, ()):
            code += (ROOT / package).rglob("*.py")
        for path in sorted(path for path in code if path.suffix in (".py", ".c")):
            digest.update(path.read_bytes())
        return digest.hexdigest()[:16]

    def go(self, store: Path | None) -> None:
        """Measures every cell that `store` does not hold yet, arms forward in even rounds and backward in odd."""
        kept = _kept(store)
        for number in range(self.rounds):
            for arm in self.arms if number % 2 == 0 else list(reversed(self.arms)):
                if arm.name in self.problems:
                    continue
                key = f"{number} {arm.name} {self.fingerprint(arm)}"
                row = kept.get(key) or self._measured(arm, number)
                if row is None:
                    continue
                self.cells[number][arm.name] = Cell(row["figures"], row["open_ms"])
                self.measured_at.append(row["at"])
                if store and key not in kept:
                    with store.open("a") as file:
                        file.write(json.dumps({"key": key, **row}) + "\n")

    def _measured(self, arm: Arm, number: int) -> dict[str, Any] | None:
        began, at = time.monotonic(), now()
        try:
            cell = measure(arm, self.plan(arm), self.cores, PAIRED.get(arm.name))
        except Failed as error:
            self.problems[arm.name] = f"round {number + 1}: {error}"
            say(f"round {number + 1} {arm.name}: FAILED {error}")
            return None
        closed = cell.figures["sixty_four"]
        say(
            f"round {number + 1} {arm.name}: {closed['per_s']:,.0f} req/s, "
            f"{closed['cpu_ms']:.3f} CPU s per 1,000, {time.monotonic() - began:.0f} s"
        )
        return {"at": at, "load": os.getloadavg()[0], **asdict(cell)}

    def measured(self, target: Target) -> Interval | None:
        """The target's value over the rounds in which all of its arms were measured."""
        values = [target.value(cells) for cells in self.cells if all(arm in cells for arm in target.arms)]
        return interval(values) if values else None


def _kept(store: Path | None) -> dict[str, dict[str, Any]]:
    if store is None or not store.exists():
        return {}
    rows = [json.loads(line) for line in store.read_text().splitlines() if line.endswith("}")]
    return {row["key"]: row for row in rows}


def table(run: Run) -> list[str]:
    """One line an arm, one column a figure."""
    columns = [c for c in COLUMNS if any(c.scenario in cell.figures for r in run.cells for cell in r.values())]
    titles = ["arm", *(column.title for column in columns), "p99 at 50/s, ms"]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for arm in run.arms:
        cells = [r[arm.name] for r in run.cells if arm.name in r]
        if not cells:
            continue
        shown = [arm.name]
        for column in columns:
            values = [
                cell.figures[column.scenario][column.figure] * column.scale
                for cell in cells
                if column.scenario in cell.figures
            ]
            shown.append(interval(values).show(column.digits) if values else "–")
        tail = p99([value for cell in cells for value in cell.open_ms])
        shown.append(f"{tail:.2f}" if tail is not None else "–")
        lines.append("| " + " | ".join(shown) + " |")
    return lines


def verdicts(run: Run, picked: bool) -> tuple[list[str], bool]:
    """A line for each target, and whether all promises were kept; of hand-picked arms, only what they bear on."""
    lines, kept = [], True
    have = {arm.name for arm in run.arms}
    for target in TARGETS:
        absent = [name for name in target.arms if name not in have]
        if absent and (picked or not target.promised):
            continue
        broken = [f"{name} could not be measured" for name in target.arms if name in run.problems]
        measured = None if broken or absent else run.measured(target)
        word, held = "dream" if not target.promised else "target", bool(measured and target.held(measured))
        shown = measured.show() if measured else f"nothing ({'; '.join(broken or absent) or 'no round'})"
        lines.append(f"{word} {target.name}: want {target.want()}, measured {shown}, {'held' if held else 'missed'}")
        kept = kept and (held or not target.promised)
    return lines, kept


def about(run: Run, started: str, loads: tuple[float, float], steal: float) -> list[str]:
    """What has to be known to judge the figures."""
    plan = QUICK if run.quick else FULL
    lines = [
        f"Intervals: 95 % bootstrap of the median over {run.rounds} round(s); ratios inside a round. "
        f"p99: pooled over rounds, given from 300 samples on.",
        f"Machine: {platform.platform()}, {psutil.cpu_count()} cores, Python {platform.python_version()}; gateway on "
        f"core {run.cores.gateway}, load and upstream on core {run.cores.load}.",
        f"Load average (1 min): {loads[0]:.2f} at the start, {loads[1]:.2f} at the end; stolen CPU {steal:.1f} %. "
        f"Started {started}, cells taken {min(run.measured_at, default='–')} to {max(run.measured_at, default='–')}.",
        f"Load: prompts of 640 bytes, 256 different ones, answers of 1,024 bytes; open loop {plan.rate:g}/s; {STREAMS} "
        f"streams, {STREAM_MS:g} ms each, an event every {GAP_MS:g} ms, starts spread evenly.",
        f"Commit: {commit()}.",
    ]
    for name, use in idle_cores(run).items():
        lines.append(
            f"{name} used {use:.0%} of its core at 64 connections: its req/s is the bound of the load's core, or other "
            "work was on the machine."
        )
    for arm in run.arms:
        known = ", ".join(f"{name} {version}" for name, version in run.versions.get(arm.name, {}).items())
        problem = f" FAILED: {run.problems[arm.name]}" if arm.name in run.problems else ""
        lines.append(f"{arm.name}: {arm.note}{f' ({known})' if known else ''}.{problem}")
        if arm.command:
            lines.append(f"{arm.name} command: `{shlex.join(arm.command)}`")
    return [f"- {line}" for line in lines]


def idle_cores(run: Run) -> dict[str, float]:
    """Gateways that did not fill their core when saturated, and the share that they used."""
    used = {}
    for arm in run.arms:
        uses = [cells[arm.name].figures["sixty_four"]["use"] for cells in run.cells if arm.name in cells]
        if arm.command and uses and (use := interval(uses).middle) < FILLED:
            used[arm.name] = use
    return used


def write(run: Run, stem: Path, text: str, report: dict[str, Any]) -> None:
    """Table and raw figures, beside each other."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    rounds = [{name: asdict(cell) for name, cell in cells.items()} for cells in run.cells]
    raw = {**report, "versions": run.versions, "problems": run.problems, "rounds": rounds}
    stem.with_suffix(".md").write_text(text)
    stem.with_suffix(".json").write_text(json.dumps(raw, indent=1) + "\n")
    say(f"written: {stem}.md and .json")


def show_profile(arm: Arm, cores: Cores) -> None:
    """Prints where the CPU time of `arm` goes, by function: once under requests, once under streams."""
    loads = {"requests": Load(8, 5), "streams": Load(STREAMS, 5, stagger_ms=STREAM_MS / STREAMS, stream=True)}
    for kind, load in loads.items():
        path = folder("profiles") / f"{arm.name}-{kind}.prof"
        path.unlink(missing_ok=True)
        seen = profile(arm, load, cores, path)
        print(f"\n{arm.name}, {kind}: {len(seen.good)} answered under cProfile; figures: {path}")
        if not path.exists():
            raise Failed("the gateway left no profile (it has to end by itself on SIGINT)")
        pstats.Stats(str(path)).sort_stats("tottime").print_stats(40)


def arguments() -> argparse.Namespace:
    """The command line."""
    names = [arm.name for arm in ARMS]
    parser = argparse.ArgumentParser(prog="benchmarks.overhead", description="Gateway overhead on loopback.")
    parser.add_argument("--quick", action="store_true", help="only the arms that targets name, within 4 minutes")
    parser.add_argument("--arms", help=f"comma-separated, of {', '.join(names)}; results go to the cache folder")
    parser.add_argument("--rounds", type=int, help=f"{FULL_ROUNDS}, with --quick {QUICK_ROUNDS}")
    parser.add_argument("--fresh", action="store_true", help="drop the cells that a run that was cut off left")
    parser.add_argument("--profile", nargs="?", const="forebay", metavar="ARM", help="cProfile of one Python arm")
    chosen = parser.parse_args()
    for name in [*(chosen.arms.split(",") if chosen.arms else []), *([chosen.profile] if chosen.profile else [])]:
        if name not in names:
            parser.error(f"no arm {name!r}; there are {', '.join(names)}")
    return chosen


def chosen_arms(chosen: argparse.Namespace) -> list[Arm]:
    """The arms that were asked for, in the order of `ARMS`."""
    wanted = chosen.arms.split(",") if chosen.arms else QUICK_ARMS if chosen.quick else [arm.name for arm in ARMS]
    return [arm for arm in ARMS if arm.name in wanted]


def bench(chosen: argparse.Namespace, cores: Cores) -> bool:
    """Measures, prints and writes; whether every target was held."""
    rounds = chosen.rounds or (QUICK_ROUNDS if chosen.quick else FULL_ROUNDS)
    run = Run(chosen_arms(chosen), rounds, chosen.quick, cores)
    store = None if chosen.quick or chosen.arms else RESULTS / "overhead.cells.jsonl.tmp"
    if store:
        store.parent.mkdir(exist_ok=True)
        if chosen.fresh:
            store.unlink(missing_ok=True)
    run.prepare()
    os.sched_setaffinity(0, {cores.load})
    (started, load), stolen, began = beginning(), psutil.cpu_times().steal, time.monotonic()
    run.go(store)
    steal = 100 * (psutil.cpu_times().steal - stolen) / (time.monotonic() - began) / (psutil.cpu_count() or 1)
    lines, kept = verdicts(run, bool(chosen.arms))
    loads = (load, os.getloadavg()[0])
    command = command_of("overhead")
    notes = about(run, started, loads, steal)
    text = "\n".join(
        ["# Gateway overhead", "", f"`{command}`", "", *table(run), "", *notes, "", "```", *lines, "```", ""]
    )
    print(text)
    report = {"command": command, "started": started, "ended": now(), "load_average": loads, "steal_percent": steal}
    base = folder("picked") if chosen.arms else RESULTS
    mode = "-quick" if chosen.quick else ""
    write(run, base / f"overhead-{started[:10]}{mode}", text, {**report, "targets": lines})
    if store:
        store.unlink(missing_ok=True)
    return kept


def main() -> int:
    """Runs what the command line asks for; 0 when every target was held, 1 when not, 2 when it cannot be measured."""
    chosen = arguments()

    def measured() -> bool:
        cores = Cores.of_machine()
        tool("load"), tool("upstream")
        if chosen.profile:
            show_profile(next(arm for arm in ARMS if arm.name == chosen.profile), cores)
            return True
        return bench(chosen, cores)

    return exit_status("overhead", measured, if_cut="cut off; a full run goes on from here when it is started again")


if __name__ == "__main__":
    sys.exit(main())
