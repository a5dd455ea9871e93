"""``forebay top``: what the running gateway does, refreshed each second."""

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click
import msgspec
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from gateway.cli.admin import Admin
from gateway.cli.common import ADMIN_PORT, Fault

_STATE_STYLES = {"ready": "green", "starting": "yellow", "draining": "yellow", "failed": "red", "stopped": "dim"}
_SERVER_ERROR = 500


class Sample(msgspec.Struct, frozen=True):
    """What the gateway said at one moment (monotonic seconds): its metrics by name and labels, and its workers."""

    at: float
    values: Mapping[str, Mapping[frozenset[tuple[str, str]], float]]
    workers: list[dict[str, Any]]

    def total(self, name: str, **labels: str) -> float:
        """Return the sum of a metric over the series that have these labels."""
        wanted = set(labels.items())
        return sum(value for series, value in self.values.get(name, {}).items() if wanted <= series)

    def one(self, name: str) -> float | None:
        """Return a metric without labels; None where there is none."""
        return self.values.get(name, {}).get(frozenset())

    def by(self, label: str, name: str) -> set[str]:
        """Return the values that a label of the metric has."""
        return {value for series in self.values.get(name, {}) for key, value in series if key == label}


class ModelView(msgspec.Struct, frozen=True):
    """One model since the sample before. ``ttft_*``: seconds to the first token, None where no answer began; rates
    are per second, ``errors_per_s`` of answers with a status of 500 or more."""

    model: str
    requests_per_s: float
    tokens_per_s: float
    errors_per_s: float
    waiting: int
    ttft_p50_s: float | None
    ttft_p95_s: float | None
    spend_usd: float


class View(msgspec.Struct, frozen=True):
    """What one screen shows. ``*_up`` None: there is no such thing. ``workers`` are as the admin API has them."""

    version: str
    revision: str
    interval_s: float
    inflight: int
    waiting: int
    requests_per_s: float
    tokens_per_s: float
    errors_per_s: float
    rejections_per_s: float
    spend_usd: float
    redis_up: bool | None
    database_up: bool | None
    records_waiting: int
    records_dropped: int
    memory_bytes: int
    models: tuple[ModelView, ...]
    workers: list[dict[str, Any]]


@click.command()
@click.option(
    "--admin-url", default=f"http://127.0.0.1:{ADMIN_PORT}", show_default=True, help="The gateway's admin address."
)
@click.option(
    "--admin-key-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="A file with the admin key.  [default: admin.key in the state folder]",
)
@click.option(
    "--interval", default=1.0, show_default=True, type=click.FloatRange(0.1, 60), help="Seconds between looks."
)
@click.option("--once", is_flag=True, help="Look twice, print one screen and end.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, one line a look.")
def top(admin_url: str, admin_key_file: Path | None, interval: float, *, once: bool, as_json: bool) -> None:
    """Show what the running gateway does: workers, traffic, latency, spend. Ctrl-C ends it.

    \b
    Examples:
      forebay top
      forebay top --once --json
    """
    admin = Admin(admin_url, admin_key_file)
    console = Console()
    before = look(admin)
    try:
        if once or as_json:
            while True:
                time.sleep(interval)
                before, view = _next(admin, before)
                if as_json:
                    click.echo(msgspec.json.encode(view))
                else:
                    console.print(screen(view))
                if once:
                    return
        with Live(console=console, auto_refresh=False, screen=console.is_terminal) as live:
            while True:
                time.sleep(interval)
                before, view = _next(admin, before)
                live.update(screen(view), refresh=True)
    except KeyboardInterrupt:
        return


def _next(admin: Admin, before: Sample) -> tuple[Sample, View]:
    after = look(admin)
    return after, view_of(before, after)


def look(admin: Admin) -> Sample:
    """Ask the gateway how it is. Raises ``Fault``."""
    workers = admin.get("/admin/v1/workers").json()
    found = workers.get("data") if isinstance(workers, dict) else None
    if not isinstance(found, list):
        raise Fault("what answers there is not a Forebay admin API")
    return sample_of(admin.get("/metrics").text, found, time.monotonic())


def sample_of(metrics: str, workers: list[dict[str, Any]], at: float) -> Sample:
    """Read Prometheus's text format. Raises ``Fault`` for what is none."""
    values: defaultdict[str, dict[frozenset[tuple[str, str]], float]] = defaultdict(dict)
    try:
        for family in text_string_to_metric_families(metrics):
            for sample in family.samples:
                values[sample.name][frozenset(sample.labels.items())] = sample.value
    except ValueError as error:
        raise Fault(f"/metrics answers what is not Prometheus's text format: {error}") from error
    return Sample(at, values, workers)


def view_of(before: Sample, after: Sample) -> View:
    """Return what happened between two samples of one gateway. One that was restarted between them starts at zero."""
    seconds = max(after.at - before.at, 1e-3)

    def rate(name: str, **labels: str) -> float:
        now = after.total(name, **labels)
        then = before.total(name, **labels)
        return (now - then if now >= then else now) / seconds

    def errors(**labels: str) -> float:
        codes = [code for code in after.by("code", "forebay_requests_total") if int(code) >= _SERVER_ERROR]
        return sum(rate("forebay_requests_total", code=code, **labels) for code in codes)

    models = sorted(after.by("model", "forebay_requests_total") | after.by("model", "forebay_queue_depth"))
    return View(
        version=next(iter(after.by("version", "forebay_build_info")), "?"),
        revision=next(iter(after.by("revision", "forebay_config_info")), "?"),
        interval_s=seconds,
        inflight=int(after.total("forebay_inflight_requests")),
        waiting=int(after.total("forebay_queue_depth")),
        requests_per_s=rate("forebay_requests_total"),
        tokens_per_s=rate("forebay_tokens_total", type="output"),
        errors_per_s=errors(),
        rejections_per_s=rate("forebay_limit_rejections_total"),
        spend_usd=after.total("forebay_spend_usd_total"),
        redis_up=_is_up(after.one("forebay_redis_up")),
        database_up=_is_up(after.one("forebay_database_up")),
        records_waiting=int(after.total("forebay_records_waiting")),
        records_dropped=int(after.total("forebay_records_dropped_total")),
        memory_bytes=int(after.total("process_resident_memory_bytes")),
        models=tuple(
            ModelView(
                model=model,
                requests_per_s=rate("forebay_requests_total", model=model),
                tokens_per_s=rate("forebay_tokens_total", model=model, type="output"),
                errors_per_s=errors(model=model),
                waiting=int(after.total("forebay_queue_depth", model=model)),
                ttft_p50_s=_quantile(0.5, before, after, model),
                ttft_p95_s=_quantile(0.95, before, after, model),
                spend_usd=after.total("forebay_spend_usd_total", model=model),
            )
            for model in models
        ),
        workers=after.workers,
    )


def _is_up(value: float | None) -> bool | None:
    return None if value is None else value > 0


def _quantile(part: float, before: Sample, after: Sample, model: str) -> float | None:
    """Return a quantile of the time to the first token of the answers that ended between the samples; where there are
    none, of all since the start. Straight lines between a bucket's bounds, as Prometheus's ``histogram_quantile``."""
    name = "forebay_time_to_first_token_seconds_bucket"
    now, then = _buckets(after, name, model), _buckets(before, name, model)
    change = {bound: count - then.get(bound, 0.0) for bound, count in now.items()}
    counts = change if change and min(change.values()) >= 0 and max(change.values()) > 0 else now
    return _interpolated(part, sorted(counts.items()))


def _buckets(sample: Sample, name: str, model: str) -> dict[float, float]:
    counts: defaultdict[float, float] = defaultdict(float)
    for series, value in sample.values.get(name, {}).items():
        labels = dict(series)
        if labels.get("model") == model:
            counts[float(labels["le"])] += value
    return counts


def _interpolated(part: float, buckets: Iterable[tuple[float, float]]) -> float | None:
    counts = list(buckets)
    if not counts or counts[-1][1] <= 0:
        return None
    rank = part * counts[-1][1]
    low, below = 0.0, 0.0
    for bound, count in counts:
        if count >= rank and count > below:
            # Of the last bucket nothing is known but where it begins.
            return low if bound == float("inf") else low + (bound - low) * (rank - below) / (count - below)
        low, below = bound, count
    return low


def screen(view: View) -> RenderableType:
    """Return one screen for a terminal of 80 columns or more."""
    return Group(_summary(view), Text(), _models(view.models), Text(), _workers(view.workers))


def _summary(view: View) -> Text:
    text = Text()
    text.append(f"forebay {view.version}", style="bold")
    text.append(f"  settings {view.revision[:12]}  memory {view.memory_bytes / 1e6:.0f} MB  ")
    text.append_text(_light("database", is_up=view.database_up)).append("  ")
    text.append_text(_light("redis", is_up=view.redis_up)).append("\n")
    text.append(f"{view.requests_per_s:.1f} req/s  {view.tokens_per_s:.0f} tok/s  ")
    text.append(f"{view.inflight} open  {view.waiting} waiting  ")
    text.append(f"{view.errors_per_s:.1f} err/s", style="red" if view.errors_per_s else "")
    text.append(f"  {view.rejections_per_s:.1f} refused/s  ${view.spend_usd:.2f}")
    if view.records_waiting or view.records_dropped:
        text.append(f"\nrequest records: {view.records_waiting} waiting, ")
        text.append(f"{view.records_dropped} dropped", style="red" if view.records_dropped else "")
    return text


def _light(name: str, *, is_up: bool | None) -> Text:
    if is_up is None:
        return Text(f"{name} -", style="dim")
    return Text(f"{name} up", style="green") if is_up else Text(f"{name} DOWN", style="bold red")


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", expand=False)
    table.add_column(columns[0], no_wrap=True, overflow="ellipsis", max_width=24)
    for column in columns[1:]:
        table.add_column(column, justify="left" if column in {"STATE", "MODEL"} else "right", no_wrap=True,
                         overflow="ellipsis", max_width=16)  # fmt: skip
    return table


def _models(models: tuple[ModelView, ...]) -> Table:
    table = _table("MODEL", "REQ/S", "TOK/S", "ERR/S", "WAIT", "TTFT50", "TTFT95", "USD")
    for model in models:
        table.add_row(
            model.model,
            f"{model.requests_per_s:.1f}",
            f"{model.tokens_per_s:.0f}",
            Text(f"{model.errors_per_s:.1f}", style="red" if model.errors_per_s else ""),
            str(model.waiting),
            _seconds(model.ttft_p50_s),
            _seconds(model.ttft_p95_s),
            f"{model.spend_usd:.2f}",
        )
    return table


def _workers(workers: list[dict[str, Any]]) -> Table:
    table = _table("WORKER", "MODEL", "STATE", "RUNNING", "RESTARTS")
    for worker in workers:
        state = str(worker.get("state", "?"))
        is_ill = state == "ready" and not worker.get("healthy", True)
        table.add_row(
            str(worker.get("id", "?")),
            str(worker.get("model", "?")),
            Text("ready, ill" if is_ill else state, style="red" if is_ill else _STATE_STYLES.get(state, "")),
            f"{worker.get('running', '-')}/{worker.get('max_inflight', '-')}",
            str(worker.get("restarts", 0)),
        )
    return table


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s"
