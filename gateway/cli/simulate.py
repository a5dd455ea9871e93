"""``forebay simulate``: a trace over a fleet that need not exist, by each of several policies, on a virtual clock."""

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import click
import msgspec
import yaml

from core.ids import TenantId
from gateway.cli.charts import Chart, Line, NoMatplotlib, page, write_png
from gateway.cli.common import Fault, SettingsFault, table
from routing.fairness.policy import Fairness, Policy
from routing.simulator import formats
from routing.simulator.engine import Engine, StepTime
from routing.simulator.generator import Bursts, burstgpt_like
from routing.simulator.simulation import Fleet, Outage, Run, Simulation, Stuck, Terms, scheduler
from routing.simulator.summary import Spread, Summary, summarise
from routing.simulator.trace import BadTrace, Trace, light_and_heavy

GENERATED = "burstgpt-like"
MAX_WORKERS = 1000
_TELL_EVERY_S = 0.2


class Group(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Workers of one kind in a fleet file."""

    count: int = 1
    slots: int = Engine().slots
    kv_tokens: int = Engine().kv_tokens
    chunk: int = Engine().chunk
    keeps_prefixes: bool = True
    step: StepTime = StepTime()

    def engines(self) -> list[Engine]:
        """Return one engine per worker."""
        one = Engine(
            step=self.step,
            slots=self.slots,
            kv_tokens=self.kv_tokens,
            chunk=self.chunk,
            keeps_prefixes=self.keeps_prefixes,
        )
        return [one] * self.count


class FleetFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What ``--fleet`` reads. ``fairness``: figures of the policies; ``weights``: of tenants, 1 if not said."""

    workers: list[Group]
    outages: list[Outage] = []
    fairness: dict[str, Any] = {}
    weights: dict[str, float] = {}


@click.command()
@click.option(
    "--trace", "source", default=GENERATED, show_default=True, metavar="FILE",
    help="The requests: a trace as Azure, BurstGPT or Mooncake publish them, or JSON lines with t_s and tenant; "
    "burstgpt-like makes one up.",
)  # fmt: skip
@click.option("--requests", type=click.IntRange(1), help="Only the first N requests.  [default: all; 2000 made up]")
@click.option(
    "--speed", type=click.FloatRange(0.001), default=1.0, show_default=True, help="Replay it so many times as fast."
)
@click.option(
    "--seed", type=int, default=1, show_default=True, help="Another one draws other tenants and another made-up trace."
)
@click.option(
    "--fleet",
    "fleet_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Workers, their step times and outages, in YAML; see the guide.",
)
@click.option(
    "--workers",
    type=click.IntRange(1, MAX_WORKERS),
    default=1,
    show_default=True,
    help="Workers of one kind, without --fleet.",
)
@click.option(
    "--slots",
    type=click.IntRange(1),
    default=Engine().slots,
    show_default=True,
    help="Requests at a time on each, without --fleet.",
)
@click.option(
    "--policy", "policies", multiple=True, type=click.Choice(get_args(Policy)), default=("fcfs", "vtc", "vtc-pc"),
    show_default=True, help="One to compare; may be given several times.",
)  # fmt: skip
@click.option(
    "--stride",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Engine steps taken at once: a larger one is faster and coarser.",
)
@click.option("--html", "html_file", type=click.Path(path_type=Path, dir_okay=False), help="Write a page with charts.")
@click.option(
    "--png", "png_file", type=click.Path(path_type=Path, dir_okay=False), help="Draw the charts (matplotlib)."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def simulate(
    *, source: str, requests: int | None, speed: float, seed: int, fleet_file: Path | None, workers: int, slots: int,
    policies: tuple[Policy, ...], stride: int, html_file: Path | None, png_file: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Replay a trace of requests over a described fleet, and compare policies.

    The scheduler is the gateway's own; the engines are modelled, so that what comes out is as good as the step times
    that are given for them. Nothing is started, nothing is asked. Policies differ where requests have to wait: see
    that the fleet is too small for the trace at times. The guide docs/operate/simulate.md has the formats of traces and
    fleets, and what the columns mean.

    \b
    Examples:
      forebay simulate --workers 4 --policy fcfs --policy vtc-pc --html result.html
      forebay simulate --trace azure.csv --speed 8 --fleet fleet.yaml
    """
    trace = load_trace(source, requests, seed).faster(speed)
    described = read_fleet(fleet_file) if fleet_file else FleetFile(workers=[Group(count=workers, slots=slots)])
    fleet = fleet_of(described)
    terms = Terms(weights={TenantId(name): weight for name, weight in described.weights.items()}, stride=stride)
    classes = light_and_heavy(trace.arrivals)
    runs: dict[str, Run] = {}
    for policy in policies:
        fairness = _fairness(policy, described.fairness)
        try:
            runs[policy] = Simulation(trace, fleet, scheduler(fairness), terms).run(_progress(policy, trace))
        except Stuck as error:
            raise Fault(f"{policy}: {error}; with outages, see that workers come back.") from error
    found = {policy: summarise(run, classes) for policy, run in runs.items()}
    notes = [trace.note, f"{len(trace.arrivals)} requests in {trace.duration:.0f} s, {_fleet_in_words(fleet)}"]
    rows = latency_rows(found)
    whole = fairness_rows(found)
    if html_file:
        _write(html_file, lambda: html_file.write_text(page("A simulated run", charts(runs, classes), rows, notes)))
    if png_file:
        _write(png_file, lambda: write_png(charts(runs, classes), png_file))
    if as_json:
        click.echo(json.dumps({"notes": notes, "policies": msgspec.to_builtins(found)}, indent=2))
        return
    click.echo("\n\n".join([table(rows), table(whole), "\n".join(notes)]))


def load_trace(source: str, requests: int | None, seed: int) -> Trace:
    """Return the trace in a file, or a made-up one. Raises ``Fault``."""
    if source == GENERATED:
        return burstgpt_like(Bursts(requests=requests or Bursts().requests, seed=seed))
    try:
        with Path(source).open(encoding="utf-8-sig") as lines:
            first = lines.readline()
            lines.seek(0)
            name = formats.recognise(first)
            if name is None:
                raise Fault(f"{source} is of no format known here ({', '.join(formats.NAMES)}).")
            found = formats.read(name, lines, seed)
    except OSError as error:
        raise Fault(f"cannot read {source}: {error.strerror}. --trace takes a file, or {GENERATED}.") from error
    except (BadTrace, UnicodeDecodeError) as error:
        raise Fault(f"{source}: {error}") from error
    return found.first(requests) if requests else found


def read_fleet(path: Path) -> FleetFile:
    """Return what a fleet file says. Raises ``Fault`` if it cannot be read, ``SettingsFault`` if it is wrong."""
    try:
        said = yaml.safe_load(path.read_text(encoding="utf-8"))
        return msgspec.convert(said, FleetFile)
    except OSError as error:
        raise Fault(f"cannot read {path}: {error.strerror}") from error
    except (msgspec.ValidationError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsFault(f"{path}: {error}") from error


def fleet_of(described: FleetFile) -> Fleet:
    """Return the fleet that a file describes. Raises ``SettingsFault``."""
    for group in described.workers:
        if group.count < 1 or group.slots < 1 or group.chunk < 1 or group.kv_tokens < 1 or group.step.base <= 0:
            raise SettingsFault("count, slots, chunk, kv_tokens and step.base of workers must be above 0")
    engines = [engine for group in described.workers for engine in group.engines()]
    if not 1 <= len(engines) <= MAX_WORKERS:
        raise SettingsFault(f"a fleet has 1 to {MAX_WORKERS} workers, this one {len(engines)}")
    for outage in described.outages:
        if not 0 <= outage.worker < len(engines) or outage.lasts <= 0 or outage.at < 0:
            raise SettingsFault(f"an outage needs a worker from 0 to {len(engines) - 1}, at >= 0 and lasts > 0")
    return Fleet(engines=tuple(engines), outages=tuple(described.outages))


def latency_rows(found: Mapping[str, Summary]) -> list[list[str]]:
    """Return the table of latencies by policy and class of tenants, its heading first."""
    rows = [["POLICY", "TENANTS", "REQUESTS", "TTFT p50", "p90", "p99 s", "TBT p50", "p90", "p99 ms", "LONGEST s"]]
    for policy, summary in found.items():
        for one in summary.classes:
            rows.append(
                [policy, f"{one.name} ({one.tenants})", f"{one.requests}", *_show(one.ttft, 1, 2),
                 *_show(one.tbt, 1000, 0), f"{one.tbt.most:.2f}"]
            )  # fmt: skip
    return rows


def fairness_rows(found: Mapping[str, Summary]) -> list[list[str]]:
    """Return the table of what holds for a policy as a whole, its heading first."""
    rows = [
        ["POLICY", "MAKESPAN s", "TOK/s", "BACKLOGGED TOK/s", "JAIN", "SERVICE GAP", "PREEMPTED", "MIGRATED", "WASTE"]
    ]
    for policy, one in found.items():
        jain = "-" if one.jain is None else f"{one.jain:.3f}"
        rows.append(
            [policy, f"{one.makespan:.1f}", f"{one.tokens_per_s:.0f}", f"{one.tokens_per_s_backlogged:.0f}", jain,
             f"{one.gap:,.0f}", str(one.preemptions), str(one.migrations), f"{one.waste:.1%}"]
        )  # fmt: skip
    return rows


def charts(runs: Mapping[str, Run], classes: Mapping[TenantId, str]) -> list[Chart]:
    """Return a chart of first-token times for each class of tenants, and one of how many waited."""
    drawn = []
    for name in sorted(set(classes.values())):
        lines = []
        for policy, run in runs.items():
            waits = sorted(
                one.ttft for one in run.served if one.ttft is not None and classes[one.arrival.tenant] == name
            )
            lines.append(Line(policy, [(wait, (index + 1) / len(waits)) for index, wait in enumerate(waits)]))
        drawn.append(Chart(f"Time to first token, {name} tenants", "seconds", "share of requests", lines, is_log=True))
    waiting = [Line(policy, run.service.waiting) for policy, run in runs.items()]
    return [*drawn, Chart("Requests that wait", "seconds", "requests", waiting)]


def _show(spread: Spread, factor: float, digits: int) -> list[str]:
    return [f"{value * factor:.{digits}f}" for value in (spread.p50, spread.p90, spread.p99)]


def _fairness(policy: Policy, figures: Mapping[str, Any]) -> Fairness:
    known = set(Fairness.__struct_fields__) - {"policy"}
    if unknown := set(figures) - known:
        raise SettingsFault(f"fairness has no {min(unknown)!r}; it has {', '.join(sorted(known))}")
    try:
        fairness = msgspec.convert({**figures, "policy": policy}, Fairness)
    except msgspec.ValidationError as error:
        raise SettingsFault(f"fairness: {error}") from error
    if problem := fairness.problem():
        raise SettingsFault(f"fairness: {problem}")
    return fairness


def _fleet_in_words(fleet: Fleet) -> str:
    return f"{len(fleet.engines)} workers with {fleet.slots} slots in all, {len(fleet.outages)} outages"


def _progress(policy: str, trace: Trace) -> Callable[[int, float], None]:
    """What tells on standard error how far it is, if that is a terminal."""
    total, told = len(trace.arrivals), time.monotonic()

    def tell(done: int, now: float) -> None:
        nonlocal told
        if sys.stderr.isatty() and (done == total or time.monotonic() - told > _TELL_EVERY_S):
            told = time.monotonic()
            line = f"\r{policy}: {done * 100 // total:3} % of {total} requests, {now:,.0f} s"
            click.echo(line, err=True, nl=done == total)

    return tell


def _write(path: Path, write: Callable[[], object]) -> None:
    try:
        write()
    except OSError as error:
        raise Fault(f"cannot write {path}: {error.strerror}") from error
    except NoMatplotlib as error:
        raise Fault("PNG needs matplotlib (pip install matplotlib); --html needs nothing.") from error
