"""``forebay usage``: what was used, and what it cost."""

from datetime import UTC, date, datetime
from functools import partial
from typing import Any

import click

from gateway.cli.admin import PAST, Admin, as_json, asks, at, listed, money, report

_DIMENSIONS = ("day", "tenant", "key", "end_user", "model")


@click.command()
@click.option(
    "--by", default="day", show_default=True, help=f"What to add up by, with commas: {', '.join(_DIMENSIONS)}."
)
@click.option("--since", type=PAST, help="The first day, or how long ago: 7d.  [default: 30 days up to the last]")
@click.option("--until", type=PAST, help="The last day.  [default: today]")
@click.option("--tenant", help="Only this tenant's.")
@click.option("--key", help="Only this key's, by its id.")
@click.option("--end-user", help="Only this end user's.")
@click.option("--model", help="Only this model's.")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV.")
@asks
@as_json
def usage(
    admin: Admin,
    *,
    by: str,
    since: datetime | None,
    until: datetime | None,
    as_csv: bool,
    as_json: bool,
    **filters: str | None,
) -> None:
    """Add up requests, tokens and money. Days are UTC.

    \b
    Examples:
      forebay usage --by day,model --since 7d
      forebay usage --by tenant,key --since 2026-11-01 --csv > november.csv
    """
    dimensions = [name.strip() for name in by.split(",")]
    if unknown := [name for name in dimensions if name not in _DIMENSIONS]:
        raise click.BadParameter(f"{unknown[0]!r} is not one of {', '.join(_DIMENSIONS)}", param_hint="--by")
    question: dict[str, Any] = {"by": dimensions, "since": _day(since), "until": _day(until), **filters}
    if as_csv:
        click.echo(admin.get(at("usage"), **question, format="csv").text, nl=False)
        return
    found = admin.items(at("usage"), **question)
    heading = [*(name.replace("_", " ").upper() for name in dimensions)]
    heading += ["REQUESTS", "ERRORS", "INPUT", "OUTPUT", "CACHED", "USD"]
    report(
        found, as_json=as_json, text=lambda: listed(heading, found, partial(_row, dimensions), none="nothing was used")
    )


def _day(moment: datetime | None) -> date | None:
    return None if moment is None else moment.astimezone(UTC).date()


def _row(dimensions: list[str], one: dict[str, Any]) -> list[object]:
    return [
        *(one[name] for name in dimensions),
        one["requests"],
        one["errors"],
        one["input_tokens"],
        one["output_tokens"],
        one["cached_tokens"],
        money(one["usd"]),
    ]
