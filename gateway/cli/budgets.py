"""``forebay budgets``: what is set, used and left."""

from typing import Any

import click

from gateway.cli.admin import Admin, as_json, asks, at, clock, listed, report, tenant
from gateway.cli.terms import amount_text


@click.group()
def budgets() -> None:
    """See what tenants and keys have used of their budgets.

    \b
    Example:
      forebay budgets ls
    """


@budgets.command(name="ls")
@tenant
@asks
@as_json
def list_budgets(admin: Admin, tenant: str | None, *, as_json: bool) -> None:
    """List budgets with what is used and left of each. They are set with `forebay tenants set` and `keys set`.

    \b
    Example:
      forebay budgets ls --tenant acme
    """
    found = admin.items(at("budgets"), tenant=tenant)
    heading = ["OF", "ID", "TENANT", "BUDGET", "USED", "LEFT", "BEGINS ANEW (UTC)"]
    none = "no budgets; set one with: forebay tenants set ID --budget 5usd/day"
    report(found, as_json=as_json, text=lambda: listed(heading, found, _row, none=none))


def _row(one: dict[str, Any]) -> list[object]:
    return [
        one["subject"],
        one["id"],
        one["tenant"],
        f"{amount_text(one['limit'])}/{one['per']}",
        amount_text(one["used"]),
        amount_text(one["left"]),
        clock(one["ends_at"]) if one["ends_at"] else "never",
    ]
