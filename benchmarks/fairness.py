"""One tenant wants every slot, six others ask short questions: who waits how long, and what fairness costs.

Claim: with VTC-PC, the short questions' p90 and p99 time to the first token is 8 times shorter than first come, first
served, 3 times shorter than VTC and half of what any other way gives; tokens a second while requests wait stay at 0.95
of first come, first served or more; and at most 8 % of the work is done twice.

Tokens are those of prompts and answers, plain and as the scheduler weighs them (1 and 2): while requests wait, first
come, first served computes the hog's answers and hardly a prompt, for it leaves the short questions, of which much is
prompt, to the end. Answers' tokens alone are shown against it and against VTC, and promised nothing.

Method: the real llama.cpp (SmolLM2-135M, 4 slots, one thread on a core of its own), started by a gateway as users start
it; gateway and clients on another core. The trace is fixed in `benchmarks/traces/hog.jsonl`; every arm replays it on a
fresh gateway and engine, once a round, forward in one round and backward in the next. Clients speak OpenAI's wire,
each tenant with a key of its own, greedy, with the exact number of tokens that the trace says; after a refusal they
come back as OpenAI's clients do. All figures are taken at the clients. Time to the first token counts from the moment
the request was first sent. Quantiles are pooled over rounds, and given from 300 samples on where they are a p99; their
ratios' intervals are 95 % bootstraps over rounds. The table of what a switch costs is of the engine alone.

    python -m benchmarks.fairness             everything, four rounds, 50 minutes; goes on where it was cut off
    python -m benchmarks.fairness --quick     a part of the trace with shorter answers, one round, within 4 minutes
    python -m benchmarks.fairness --rounds 1 --arms vtc,vtc-pc      one A/B; results go to the cache folder
"""

import argparse
import asyncio
import hashlib
import json
import os
import platform
import sys
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from benchmarks.contention import figures
from benchmarks.contention.arms import ARMS, SLOTS, Arm, opened
from benchmarks.contention.llamacpp import weights
from benchmarks.contention.replay import Answer, play
from benchmarks.contention.switching import LENGTHS, Switch, switches
from benchmarks.contention.trace import HOG, Ask, hog_trace, part_of
from benchmarks.loopback.cache import ROOT, folder
from benchmarks.loopback.processes import Cores, Failed
from benchmarks.loopback.stats import P99_SAMPLES, Interval, interval, p99
from benchmarks.reporting import RESULTS, beginning, command_of, commit, exit_status, now, say
from tests.fakes.gateway import GatewayFailedError

FULL_ROUNDS, QUICK_ROUNDS = 4, 1
QUICK_ARMS = ("fcfs", "cap", "vtc", "vtc-pc")
OURS, FIRST_COME = "vtc-pc", "fcfs"
LONGEST_S = 600.0  # a cell that takes longer hangs
SOURCES = ("core", "routing", "engines", "gateway", "benchmarks/contention")
AT_LEAST_RATE, AT_MOST_WASTE = 0.95, 0.08
P90 = partial(figures.quantile, share=0.9)
P99 = partial(figures.quantile, share=0.99)


@dataclass
class Run:
    """The cells of one run, one per round and arm: the answers to the whole trace."""

    arms: Sequence[Arm]
    rounds: int
    trace: Sequence[Ask]
    cores: Cores

    def __post_init__(self) -> None:
        self.cells: list[dict[str, list[Answer]]] = [{} for _ in range(self.rounds)]
        self.problems: list[str] = []

    def go(self, store: Path | None) -> None:
        """Measure every cell that ``store`` does not hold yet."""
        kept, prints = _kept(store), _fingerprint(self.trace)
        for number in range(self.rounds):
            for arm in self.arms if number % 2 == 0 else list(reversed(self.arms)):
                key = f"{number} {arm} {prints}"
                if key in kept:
                    self.cells[number][arm.name] = _answers(self.trace, kept[key])
                    continue
                began = time.monotonic()
                try:
                    answers = asyncio.run(self._cell(arm))
                except (Failed, GatewayFailedError, TimeoutError) as error:
                    self.problems.append(f"round {number + 1} {arm.name}: {type(error).__name__} {error}")
                    say(self.problems[-1])
                    continue
                self.cells[number][arm.name] = answers
                light = figures.ttfts(_light(answers))
                whole = sum(answer.is_whole for answer in answers)
                say(
                    f"round {number + 1} {arm.name}: light p50 {figures.middle(light):.2f} s, p90 {P90(light):.2f} s, "
                    f"{whole} of {len(answers)} whole, {time.monotonic() - began:.0f} s"
                )
                if store:
                    with store.open("a") as file:
                        file.write(json.dumps({"key": key, "rows": _rows(answers)}) + "\n")

    async def _cell(self, arm: Arm) -> list[Answer]:
        tenants = sorted({ask.tenant for ask in self.trace})
        async with opened(arm, tenants, self.cores.gateway) as target, asyncio.timeout(LONGEST_S):
            await play([Ask(0.0, tenants[-1], "Say hello.", 4)], target)
            return await play(self.trace, target)

    def per_round(self, arm: str, figure: Callable[[list[Answer]], float]) -> list[float]:
        """Return the figure of every round that the arm was measured in."""
        return [figure(cells[arm]) for cells in self.cells if arm in cells]

    def light(self, arm: str) -> list[list[float]]:
        """Return the light tenants' times to the first token, by round."""
        return [figures.ttfts(_light(cells[arm])) for cells in self.cells if arm in cells]

    def against(self, other: str, figure: Callable[[list[Answer]], float]) -> list[float]:
        """Return our figure over that of another arm, inside each round."""
        return [figure(cells[OURS]) / figure(cells[other]) for cells in self.cells if OURS in cells and other in cells]


def _light(answers: Sequence[Answer]) -> list[Answer]:
    return [answer for answer in answers if answer.ask.tenant != HOG]


def _heavy(answers: Sequence[Answer]) -> list[Answer]:
    return [answer for answer in answers if answer.ask.tenant == HOG]


def _cut(answers: Sequence[Answer]) -> list[Answer]:
    return [answer for answer in answers if answer.legs > 1]


def answered_rate(answers: list[Answer]) -> float:
    """All tenants' output tokens a second while requests wait."""
    return figures.rate(answers, figures.crowded(answers, SLOTS), figures.delivered)


def heavy_rate(answers: list[Answer]) -> float:
    """The hog's output tokens a second while requests wait."""
    return figures.rate(_heavy(answers), figures.crowded(answers, SLOTS), figures.delivered)


def prompted_rate(answers: list[Answer]) -> float:
    """All tenants' prompt tokens a second while requests wait."""
    return figures.rate(answers, figures.crowded(answers, SLOTS), figures.prompted)


def busy_rate(answers: list[Answer]) -> float:
    """All that the engine computes for somebody while requests wait, in tokens a second: prompts and answers."""
    return answered_rate(answers) + prompted_rate(answers)


def service_rate(answers: list[Answer]) -> float:
    """The same, weighted as the scheduler charges it: the prompt's tokens are cheaper."""
    return figures.OUTPUT_WEIGHT * answered_rate(answers) + figures.PROMPT_WEIGHT * prompted_rate(answers)


def heavy_answers(answers: list[Answer]) -> float:
    """Seconds that the hog waits for a whole answer, the median: what fairness costs it."""
    return figures.middle([(answer.end or 0.0) - answer.asked for answer in _heavy(answers)])


def makespan(answers: list[Answer]) -> float:
    """Seconds from the first request to the last answer."""
    return max((answer.end or 0.0) for answer in answers)


def evenness(answers: list[Answer]) -> float:
    """Jain's index up to the last light request."""
    return figures.evenness(answers, max(answer.asked for answer in _light(answers)))


def longest_pause(answers: list[Answer]) -> float:
    """Of the requests that were cut, the longest silence after the first token."""
    return max(figures.gaps(_cut(answers)), default=0.0)


@dataclass(frozen=True)
class Column:
    """One figure of the table, a median over rounds."""

    title: str
    value: Callable[[list[Answer]], float]
    digits: int = 2


COLUMNS = (
    Column("hog's answers p50, s", heavy_answers, 1),
    Column("answers' tokens/s while some wait", answered_rate, 1),
    Column("of these the hog's", heavy_rate, 1),
    Column("prompts' tokens/s then", prompted_rate, 1),
    Column("makespan, s", makespan, 1),
    Column("cut", lambda answers: sum(answer.legs - 1 for answer in answers), 0),
    Column("done twice, %", lambda answers: 100 * figures.waste(answers), 1),
    Column("longest pause, s", longest_pause, 1),
    Column("Jain", evenness, 3),
    Column("gap, tokens", figures.service_gap, 0),
)  # fmt: skip


def table(run: Run) -> list[str]:
    """One line an arm."""
    heads = [
        "arm",
        "light TTFT p50, s",
        "p90",
        "p99",
        "TBT p99 of the cut, s",
        *(c.title for c in COLUMNS),
        "same text",
    ]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for arm in run.arms:
        pooled = [value for values in run.light(arm.name) for value in values]
        if not pooled:
            continue
        between = [gap for cells in run.cells if arm.name in cells for gap in figures.gaps(_cut(cells[arm.name]))]
        shown = [arm.name, f"{figures.middle(pooled):.2f}", f"{P90(pooled):.2f}", _or_dash(p99(pooled))]
        shown += [_or_dash(p99(between))]
        shown += [interval(run.per_round(arm.name, column.value)).show(column.digits) for column in COLUMNS]
        same = [
            figures.same_text(cells[arm.name], cells[FIRST_COME])
            for cells in run.cells
            if arm.name in cells and FIRST_COME in cells and arm.name != FIRST_COME
        ]
        shown.append(f"{100 * figures.middle(same):.0f} %" if same else "–")
        lines.append("| " + " | ".join(shown) + " |")
    return lines


def _or_dash(value: float | None) -> str:
    return f"{value:.2f}" if value is not None else "–"


def switch_table(rows: Sequence[Switch]) -> list[str]:
    """What a switch costs, by the length of what the request holds."""
    lines = [
        "| tokens held | abort, ms | + recompute | + slot file | bounded, slot kept | kept after the abort | file, MB |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    lines += [
        f"| {row.tokens} | {row.abort:.0f} | {row.recompute:,.0f} | {row.slot_file:.0f} | {row.bounded:.0f} | "
        f"{100 * row.kept:.0f} % | {row.file_mb:.1f} |"
        for row in rows
    ]
    return lines


def verdicts(run: Run) -> tuple[list[str], bool]:
    """A line for each target, and whether all that could be judged were held."""
    lines: list[str] = []
    kept = not run.problems

    def judge(name: str, want: str, measured: Interval | None, held: bool, instead: str = "nothing") -> None:
        nonlocal kept
        shown = measured.show() if measured else instead
        lines.append(f"target {name}: want {want}, measured {shown}, {'held' if held else 'missed'}")
        kept = kept and held

    ours = run.light(OURS)
    others = {arm.name: values for arm in run.arms if arm.name != OURS and (values := run.light(arm.name))}
    for name, figure in (("p90", P90), ("p99", P99)):
        num = sum(len(values) for values in ours)
        if name == "p99" and num < P99_SAMPLES:
            lines.append(f"target light_p99: not judged: {num} samples, and a p99 needs {P99_SAMPLES}")
            continue
        if not ours or not others:
            continue
        best = min(others, key=lambda other: figure([value for values in others[other] for value in values]))
        for against, other, least in ((FIRST_COME, FIRST_COME, 8.0), ("vtc", "vtc", 3.0), ("best_other", best, 2.0)):
            if other not in others:
                continue
            measured = figures.ratio(others[other], ours, figure)
            whom = other if against == other else f"the best other ({other})"
            want = f"≥ {least:g} × better than {whom}"
            judge(f"light_{name}_vs_{against}", want, measured, measured.low >= least)
    for name, rate in (("tokens_per_s", busy_rate), ("service_per_s", service_rate)):
        if rates := run.against(FIRST_COME, rate):
            measured = interval(rates)
            judge(name, f"≥ {AT_LEAST_RATE} × {FIRST_COME}", measured, measured.low >= AT_LEAST_RATE)
    for other in (FIRST_COME, "vtc"):
        if rates := run.against(other, answered_rate):
            lines.append(f"answers_per_s: {interval(rates).show()} × {other}; see what is said of it above")
    if wasted := run.per_round(OURS, figures.waste):
        measured = interval(wasted)
        judge("waste", f"≤ {AT_MOST_WASTE}", measured, measured.high <= AT_MOST_WASTE)
    torn = [
        f"{arm}: {answer.problem or 'not all of it came'}"
        for cells in run.cells
        for arm, answers in cells.items()
        for answer in answers
        if not answer.is_whole
    ]
    judge(
        "whole", "every answer whole, in every arm", None, not torn, f"{len(torn)} not: {torn[:3]}" if torn else "all"
    )
    return lines, kept


def _rows(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    return [
        {
            "asked": round(a.asked, 4),
            "first": a.first and round(a.first, 4),
            "end": a.end and round(a.end, 4),
            "times": [round(at, 4) for at in a.times],
            "text": hashlib.sha256(a.text.encode()).hexdigest()[:16],
            **{
                name: getattr(a, name) for name in ("tokens", "prompt_tokens", "legs", "recomputed", "tries", "problem")
            },
        }
        for a in answers
    ]


def _answers(trace: Sequence[Ask], rows: Sequence[dict[str, Any]]) -> list[Answer]:
    return [
        Answer(**{**row, "ask": ask, "times": array("d", row["times"])}) for ask, row in zip(trace, rows, strict=True)
    ]


def _kept(store: Path | None) -> dict[str, Any]:
    if store is None or not store.exists():
        return {}
    rows = [json.loads(line) for line in store.read_text().splitlines() if line.endswith("}")]
    return {row["key"]: row["rows"] for row in rows}


def _fingerprint(trace: Sequence[Ask]) -> str:
    """Changes with whatever would make a cell taken before incomparable: trace and code."""
    digest = hashlib.sha256(repr(trace).encode())
    for path in sorted(path for package in SOURCES for path in (ROOT / package).rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def about(run: Run, started: str, loads: tuple[float, float], steal: float) -> list[str]:
    """What has to be known to judge the figures."""
    light, heavy = (sum((ask.tenant == HOG) is is_hog for ask in run.trace) for is_hog in (False, True))
    samples = max((sum(map(len, run.light(arm.name))) for arm in run.arms), default=0)
    return [
        f"- Trace: {heavy} requests of the hog, {light} of six light tenants, {sum(ask.tokens for ask in run.trace):,} "
        f"tokens wanted. {run.rounds} round(s): {samples} light samples an arm; the same requests each round.",
        f"- Machine: {platform.platform()}, {psutil.cpu_count()} cores, Python {platform.python_version()}; "
        f"engine on core {run.cores.gateway}, gateway and clients on core {run.cores.load}.",
        f"- Load average (1 min): {loads[0]:.2f} at the start, {loads[1]:.2f} at the end; stolen CPU {steal:.1f} %. "
        f"Started {started}. Commit: {commit()}.",
        "- `cut`: legs beyond the first. `done twice`: prompt tokens computed again, over all tokens of use. `Jain`: "
        "of service over the max-min fair share, up to the last light request. `gap`: the most weighted tokens "
        "(prompt 1, output 2) by which one tenant got ahead of another while both waited. `same text`: answers equal "
        f"to those of {FIRST_COME} in the same round, where nothing is cut; `engine` is the control.",
        *(f"- {arm.name}: {arm.note}." for arm in run.arms),
        *(f"- FAILED {problem}" for problem in run.problems),
    ]


def arguments() -> argparse.Namespace:
    """The command line."""
    names = [arm.name for arm in ARMS]
    parser = argparse.ArgumentParser(prog="benchmarks.fairness", description="Tenants on one llama.cpp, arm by arm.")
    parser.add_argument("--quick", action="store_true", help="the arms that targets name, a part of the trace")
    parser.add_argument("--arms", help=f"comma-separated, of {', '.join(names)}; results go to the cache folder")
    parser.add_argument("--rounds", type=int, help=f"{FULL_ROUNDS}, with --quick {QUICK_ROUNDS}")
    parser.add_argument("--fresh", action="store_true", help="drop the cells that a run that was cut off left")
    chosen = parser.parse_args()
    for name in chosen.arms.split(",") if chosen.arms else []:
        if name not in names:
            parser.error(f"no arm {name!r}; there are {', '.join(names)}")
    return chosen


def planned(chosen: argparse.Namespace, cores: Cores) -> Run:
    """What is to be measured."""
    wanted = chosen.arms.split(",") if chosen.arms else QUICK_ARMS if chosen.quick else [arm.name for arm in ARMS]
    trace = hog_trace()
    if chosen.quick:
        trace = part_of(trace, hogs=7, until=22.0, shorter=0.8)
    rounds = chosen.rounds or (QUICK_ROUNDS if chosen.quick else FULL_ROUNDS)
    return Run([arm for arm in ARMS if arm.name in wanted], rounds, trace, cores)


def bench(chosen: argparse.Namespace) -> bool:
    """Measures, prints and writes; whether every target was held."""
    run = planned(chosen, Cores.of_machine())
    weights()
    store = None if chosen.quick or chosen.arms else RESULTS / "fairness.cells.jsonl.tmp"
    if store:
        store.parent.mkdir(exist_ok=True)
        if chosen.fresh:
            store.unlink(missing_ok=True)
    os.sched_setaffinity(0, {run.cores.load})
    (started, load), stolen, began = beginning(), psutil.cpu_times().steal, time.monotonic()
    costs = asyncio.run(
        switches(LENGTHS[::2] if chosen.quick else LENGTHS, 1 if chosen.quick else 5, run.cores.gateway)
    )
    run.go(store)
    steal = 100 * (psutil.cpu_times().steal - stolen) / (time.monotonic() - began) / (psutil.cpu_count() or 1)
    lines, kept = verdicts(run)
    command = command_of("fairness")
    loads = (load, os.getloadavg()[0])
    body = [*table(run), "", "What a switch costs llama.cpp:", "", *switch_table(costs), ""]
    notes = about(run, started, loads, steal)
    text = "\n".join(["# Fairness on one engine", "", f"`{command}`", "", *body, *notes, "", "```", *lines, "```", ""])
    print(text)
    base = folder("picked") if chosen.arms else RESULTS
    stem = base / f"fairness-{started[:10]}{'-quick' if chosen.quick else ''}"
    raw = {"command": command, "started": started, "ended": now(), "load_average": loads, "steal_percent": steal}
    rounds = [{arm: _summaries(answers) for arm, answers in cells.items()} for cells in run.cells]
    found = {"targets": lines, "problems": run.problems, "switches": [_of(cost) for cost in costs], "rounds": rounds}
    stem.with_suffix(".md").write_text(text)
    stem.with_suffix(".json").write_text(json.dumps({**raw, **found}, indent=1) + "\n")
    say(f"written: {stem}.md and .json")
    if store:
        store.unlink(missing_ok=True)
    return kept


def _of(cost: Switch) -> Mapping[str, float]:
    return {name: round(float(getattr(cost, name)), 3) for name in cost.__struct_fields__}


def _summaries(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """Each answer without the time of its every piece."""
    rows = _rows(answers)
    for row, answer in zip(rows, answers, strict=True):
        row["times"] = len(answer.times)
        row["longest_pause"] = round(max(figures.gaps([answer]), default=0.0), 3)
    return rows


def main() -> int:
    """Measures, prints and writes; 0 when every target was held, 1 when not, 2 when it cannot be measured."""
    chosen = arguments()
    goes_on = "cut off; a full run goes on from here when it is started again"
    return exit_status("fairness", lambda: bench(chosen), if_cut=goes_on)


if __name__ == "__main__":
    sys.exit(main())
