"""``forebay runs``: workflows of a tenant, as they run and as they ended."""

import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from gateway.cli.admin import as_json, fields, listed, money, report, span
from gateway.cli.data_port import Tenant, Told, asks_as_tenant, path_of
from gateway.cli.http import printable

_STATES = ("running", "done", "failed", "skipped", "cancelled")
_STYLES = {
    "running": "yellow",
    "waiting": "yellow",
    "done": "green",
    "failed": "red",
    "skipped": "dim",
    "cancelled": "dim",
}
_ENDS = tuple(f"run.{state}" for state in _STATES[1:])
_PAGE = 100
_REDRAW_S = 0.1

_id = click.argument("run_id", metavar="RUN")


@click.group()
def runs() -> None:
    """Look at runs of workflows, follow and cancel them. They are a tenant's own: the key is that of its application.

    \b
    Examples:
      forebay runs ls --state running
      forebay runs watch run_0123456789abcdef
    """


@runs.command(name="ls")
@click.option("--state", type=click.Choice(_STATES), help="Only those in this state.")
@click.option("--limit", "most", default=20, show_default=True, type=click.IntRange(min=1), help="How many at most.")
@asks_as_tenant
@as_json
def list_runs(tenant: Tenant, *, state: str | None, most: int, as_json: bool) -> None:
    """List runs, newest first.

    \b
    Example:
      forebay runs ls --state failed
    """
    found: list[dict[str, Any]] = []
    after: str | None = None
    while len(found) < most:
        page = tenant.value(
            tenant.get(path_of("workflows"), state=state, after=after, limit=min(_PAGE, most - len(found)))
        )
        found += page["data"]
        if not page["has_more"]:
            break
        after = found[-1]["id"]
    heading = ["BEGUN (UTC)", "RUN", "STATE", "LASTED", "APP"]
    report(found, as_json=as_json, text=lambda: listed(heading, found, _row, none="no such runs"))


@runs.command()
@_id
@asks_as_tenant
@as_json
def show(tenant: Tenant, run_id: str, *, as_json: bool) -> None:
    """Show how a run is: its variables without their values, what it used, and which calls it took so long for.

    \b
    Example:
      forebay runs show run_0123456789abcdef
    """
    found = tenant.value(tenant.get(path_of("workflows", run_id), critical_path="true"))
    report(found, as_json=as_json, text=lambda: "\n".join(_shown(found)))


@runs.command()
@_id
@asks_as_tenant
@click.pass_context
def watch(context: click.Context, tenant: Tenant, run_id: str) -> None:
    """Follow a run to its end: as a table on a terminal, else a line for each event. Ctrl-C ends the watching alone.

    The exit status is 1 if the run ends as anything but done.

    \b
    Example:
      forebay runs watch run_0123456789abcdef
    """
    watched = Watched(run_id)
    console = Console()
    events = tenant.events(path_of("workflows", run_id, "events"), _ENDS)
    try:
        if console.is_terminal:
            _draw(console, watched, events)
        else:
            for told in events:
                watched.on(told)
                if (line := line_of(told)) is not None:
                    click.echo(line)
    except KeyboardInterrupt:
        return
    context.exit(0 if watched.state == "done" else 1)


@runs.command()
@_id
@click.option("--call", "calls", multiple=True, help="Only this call, and what only it needs. May be repeated.")
@asks_as_tenant
@as_json
def cancel(tenant: Tenant, run_id: str, *, calls: tuple[str, ...], as_json: bool) -> None:
    """Cancel a run, or some of its calls. What has ended stays as it is.

    \b
    Example:
      forebay runs cancel run_0123456789abcdef --call draft
    """
    body = {"calls": list(calls)} if calls else {}
    found = tenant.value(tenant.post(path_of("workflows", run_id, "cancel"), body))
    report(found, as_json=as_json, text=lambda: f"{printable(found['id'])} is {printable(found['state'])}")


@runs.command()
@_id
@click.option(
    "--format",
    "kind",
    type=click.Choice(["mermaid", "svg", "json"]),
    default="mermaid",
    show_default=True,
    help="What to print.",
)
@asks_as_tenant
def graph(tenant: Tenant, run_id: str, *, kind: str) -> None:
    """Print a drawing of a run's graph, with the states of its calls; those of the critical path are drawn thick.

    \b
    Example:
      forebay runs graph run_0123456789abcdef --format svg > run.svg
    """
    click.echo(tenant.get(path_of("workflows", run_id, "graph"), format=kind).text.rstrip("\n"))


# What is printed


def _row(one: dict[str, Any]) -> list[object]:
    lasted_s = one["updated_at"] - one["created_at"] if one["state"] != "running" else None
    return [_clock(one["created_at"]), one["id"], one["state"], span(lasted_s), one["app"]]


def _shown(run: dict[str, Any]) -> Iterator[str]:
    used = run["usage"]
    yield fields(
        {
            "run": run["id"],
            "app": run["app"],
            "state": run["state"],
            "begun (UTC)": _clock(run["created_at"]),
            "calls": _counted(run["calls"]),
            "requests": used.get("requests"),
            "input tokens": used.get("prompt_tokens"),
            "of them cached": used.get("cached_tokens"),
            "output tokens": used.get("completion_tokens"),
            "tokens": used["tokens"],
            "USD": money(f"{used['cost']:.12f}"),
            "waits for": [f"{one['tool']} ({one['variable']})" for one in run["waiting"]],
        }
    )
    variables = [{"name": name, **told} for name, told in run["variables"].items()]
    yield ""
    yield listed(["VARIABLE", "STATE", "WHY"], variables, _variable, none="no variables")
    if path := run["critical_path"]:
        yield ""
        yield f"It took {span(path['seconds'])}, for these calls, one after the other:"
        yield ""
        heading = ["CALL", "KIND", "STATE", "CLIENT", "HELD", "QUEUED", "ENGINE", "OTHER", "TRIES", "CACHED"]
        yield listed(heading, [*path["calls"], {**path, "call": "in all"}], _step, none="")
        yield ""
        yield (
            f"On this way {path['round_trips_saved']} round trips of a client were saved, "
            f"and {path['prefill_saved']} tokens of prompt."
        )


def _variable(one: dict[str, Any]) -> list[object]:
    error = one.get("error")
    missing = f"{one['missing']} of {one['total']} missing" if one.get("missing") else None
    return [one["name"], one["state"], f"{error['call']}: {error['message']} ({error['code']})" if error else missing]


def _step(one: dict[str, Any]) -> list[object]:
    parts = [one[name] or None for name in ("client_s", "held_s", "queue_s", "engine_s", "other_s")]
    return [
        one["call"], one.get("kind"), one.get("state"), *(span(part) for part in parts), one.get("attempts"),
        one.get("cached_tokens"),
    ]  # fmt: skip


def _counted(calls: dict[str, int]) -> str:
    return ", ".join(f"{count} {state}" for state, count in calls.items() if count)


def _clock(unix: float) -> str:
    return datetime.fromtimestamp(unix, UTC).strftime("%Y-%m-%d %H:%M:%S")


# What is followed


class Watched:
    """What is known of a run from its events."""

    def __init__(self, run: str) -> None:
        self.run = run
        self.state = "running"
        self.tokens = 0
        self.usd = "0"
        self._states: dict[str, str] = {}
        self._running: defaultdict[str, set[str]] = defaultdict(set)
        self._within: defaultdict[str, Counter[str]] = defaultdict(Counter)

    def on(self, told: Told) -> None:
        """Take an event."""
        data = told.data
        kind, _, what = told.event.partition(".")
        if kind == "run" and what in _STATES:
            self.state = what
        elif kind == "run":
            self.state = "running"
            for call in data.get("calls", ()) if what in {"started", "appended"} else ():
                self._states.setdefault(call, "pending")
        elif told.event == "call.waiting" and data["call"] in self._states:
            self._states[data["call"]] = "waiting"
        elif told.event in {"call.started", "call.waiting"}:
            self._running[_top(data["call"])].add(data["call"])
        elif kind == "variable" and what in _STATES and data.get("call"):
            self._ended(data["call"], what)
        if usage := data.get("usage"):
            self.tokens, self.usd = usage["tokens"], f"{usage['cost']:.12f}"

    def _ended(self, call: str, state: str) -> None:
        top = _top(call)
        self._running[top].discard(call)
        if call == top:
            self._states[call] = state
        else:
            self._within[top][state] += 1

    def screen(self) -> RenderableType:
        """Return it as a screen for a terminal of 80 columns or more."""
        head = Text(f"{printable(self.run)}  ", style="bold")
        head.append(self.state, style=_STYLES.get(self.state, ""))
        head.append(f"  {self.tokens} tokens  ${money(self.usd)}", style="default")
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for column in ("CALL", "STATE", "WITHIN"):
            table.add_column(column, no_wrap=True, overflow="ellipsis")
        for call, ended in self._states.items():
            running = len(self._running[call])
            state = "running" if ended == "pending" and (running or self._within[call]) else ended
            inner = {"running": running if running and call not in self._running[call] else 0, **self._within[call]}
            table.add_row(printable(call), Text(state, style=_STYLES.get(state, "")), _counted(inner))
        return Group(head, Text(), table)


def line_of(told: Told) -> str | None:
    """Return an event as a line; None for pieces of text. Values are not told."""
    if told.event == "variable.delta":
        return None
    data = told.data
    about = data.get("variable") or data.get("call") or data.get("run") or ""
    error = data.get("error")
    why = f"  {error['call']}: {error['message']} ({error['code']})" if error else ""
    return f"{printable(told.event):<20}{printable(str(about))}{printable(why)}"


def _draw(console: Console, watched: Watched, events: Iterator[Told]) -> None:
    drawn_at = 0.0
    with Live(watched.screen(), console=console, auto_refresh=False) as live:
        for told in events:
            watched.on(told)
            if time.monotonic() - drawn_at >= _REDRAW_S or told.event in _ENDS:
                live.update(watched.screen(), refresh=True)
                drawn_at = time.monotonic()


def _top(path: str) -> str:
    """Return the call of the run itself that a path is in."""
    return path.partition("/")[0].partition("#")[0].partition("[")[0]
