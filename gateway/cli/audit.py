"""``forebay audit``: who did what to the gateway."""

import json
from typing import Any

import click

from gateway.cli.admin import PAST, Admin, as_json, asks, at, clock, listed, report


@click.group()
def audit() -> None:
    """See what operators changed, and tried to change.

    \b
    Example:
      forebay audit ls --since 7d
    """


@audit.command(name="ls")
@click.option("--actor", help="Only what the key of this name did.")
@click.option("--action", help="Only this action, such as create_key.")
@click.option("--target", help="Only what was done to this.")
@click.option("--since", type=PAST, help="Only after this time, or in the last: 7d.")
@click.option("--until", type=PAST, help="Only before this time.")
@click.option("--limit", "most", default=50, show_default=True, type=click.IntRange(min=1), help="How many at most.")
@asks
@as_json
def list_audit(admin: Admin, *, most: int, as_json: bool, **filters: Any) -> None:
    """List acts, newest first; OUTCOME is the HTTP status, so 4xx were refused.

    \b
    Example:
      forebay audit ls --action revoke_key
    """
    found = admin.items(at("audit"), most=most, **filters)
    heading = ["TIME (UTC)", "ACTOR", "ROLE", "ACTION", "TARGET", "OUTCOME", "DETAIL"]
    report(found, as_json=as_json, text=lambda: listed(heading, found, _row, none="no acts"))


def _detail(detail: dict[str, object]) -> str:
    said = {name: value for name, value in detail.items() if name != "request_id" and value != ""}
    return ", ".join(f"{name} {value if isinstance(value, str) else json.dumps(value)}" for name, value in said.items())


def _row(one: dict[str, Any]) -> list[object]:
    return [
        clock(one["time"]),
        one["actor"] or "(unknown)",
        one["role"],
        one["action"],
        one["target"],
        one["outcome"],
        _detail(one["detail"]),
    ]
