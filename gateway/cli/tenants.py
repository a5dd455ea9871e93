"""``forebay tenants``: who may use the gateway, and how much."""

from typing import Any

import click

from gateway.cli.admin import Admin, as_json, asks, at, fields, listed, report
from gateway.cli.terms import budgets_text, ceilings_text, limits_text, of_end_users, of_rates, of_tenants, terms_from

_id = click.argument("tenant_id", metavar="ID")


@click.group()
def tenants() -> None:
    """List, make, change and delete tenants of the running gateway. Changes hold everywhere within a second.

    \b
    Examples:
      forebay tenants create acme --rpm 600 --budget 50usd/month
      forebay tenants ls
    """


@tenants.command(name="ls")
@asks
@as_json
def list_tenants(admin: Admin, *, as_json: bool) -> None:
    """List the tenants, those of the settings file too.

    \b
    Example:
      forebay tenants ls
    """
    found = admin.items(at("tenants"))
    heading = ["ID", "SOURCE", "STATE", "MODELS", "WEIGHT", "LIMITS", "BUDGETS"]
    report(found, as_json=as_json, text=lambda: listed(heading, found, _row, none="no tenants"))


@tenants.command()
@_id
@asks
@as_json
def show(admin: Admin, tenant_id: str, *, as_json: bool) -> None:
    """Show one tenant.

    \b
    Example:
      forebay tenants show acme
    """
    found = admin.value(admin.get(at("tenants", tenant_id)))
    report(found, as_json=as_json, text=lambda: _shown(found))


@tenants.command()
@_id
@of_rates
@of_end_users
@of_tenants
@asks
@as_json
def create(admin: Admin, tenant_id: str, *, as_json: bool, **terms: Any) -> None:
    """Make a tenant. What is not given is the settings' default.

    \b
    Example:
      forebay tenants create acme --rpm 600 --budget 50usd/month --end-user-rpm 20
    """
    made = admin.value(admin.post(at("tenants"), {"id": tenant_id, **terms_from(terms, {})}))
    text = f"made; give it a key: forebay keys create NAME --tenant {tenant_id}"
    report(made, as_json=as_json, text=lambda: f"{_shown(made)}\n\n{text}")


@tenants.command(name="set")
@_id
@of_rates
@of_end_users
@of_tenants
@click.option("--suspended/--active", "suspended", default=None, help="Whether its requests are refused.")
@asks
@as_json
def change(admin: Admin, tenant_id: str, *, suspended: bool | None, as_json: bool, **terms: Any) -> None:
    """Change what a tenant may use; what is not given stays. `none` takes a limit, or all budgets, away.

    \b
    Example:
      forebay tenants set acme --rpm none --budget 80usd/month --weight 2 --ceiling body=8MiB
    """
    read = admin.get(at("tenants", tenant_id))
    old = admin.value(read)
    new = {name: value for name, value in old.items() if name not in {"id", "source"}} | terms_from(terms, old)
    if suspended is not None:
        new["suspended"] = suspended
    changed = admin.value(admin.change("PUT", at("tenants", tenant_id), read, new))
    report(changed, as_json=as_json, text=lambda: _shown(changed))


@tenants.command(name="rm")
@_id
@click.option("--yes", is_flag=True, help="Do not ask.")
@asks
@as_json
def remove(admin: Admin, tenant_id: str, *, yes: bool, as_json: bool) -> None:
    """Delete a tenant and its keys. What it used stays in the books.

    \b
    Example:
      forebay tenants rm acme --yes
    """
    read = admin.get(at("tenants", tenant_id))
    if not yes:
        click.confirm(f"Delete the tenant {tenant_id} and all of its keys?", abort=True, err=True)
    admin.change("DELETE", at("tenants", tenant_id), read)
    report({"id": tenant_id, "deleted": True}, as_json=as_json, text=lambda: f"{tenant_id}: deleted")


@tenants.command()
@_id
@click.option("--end-user", metavar="NAME", help="Only what this one has asked.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@asks
@as_json
def erase(admin: Admin, tenant_id: str, *, end_user: str | None, yes: bool, as_json: bool) -> None:
    """Forget what a tenant, or one of its end users, has asked: its request records go, amounts stay.

    \b
    Example:
      forebay tenants erase acme --end-user ann
    """
    whose = tenant_id if end_user is None else f"{end_user} of {tenant_id}"
    if not yes:
        click.confirm(f"Erase all request records of {whose}?", abort=True, err=True)
    erased = admin.value(admin.post(f"{at('tenants', tenant_id)}:erase", {"end_user": end_user}))
    report(erased, as_json=as_json, text=lambda: f"{whose}: {erased['records']} records erased")


def _state(tenant: dict[str, Any]) -> str:
    return "suspended" if tenant["suspended"] else "active"


def _shown(tenant: dict[str, Any]) -> str:
    end_users = tenant["end_users"]
    return fields(
        {
            "tenant": tenant["id"],
            "source": tenant["source"],
            "state": _state(tenant),
            "models": tenant["models"],
            "endpoints": tenant["endpoints"],
            "limits": limits_text(tenant["limits"]),
            "budgets": budgets_text(tenant["budgets"]),
            "each end user": limits_text(end_users["limits"]),
            "their budgets": budgets_text(end_users["budgets"]),
            "best class": tenant["max_class"],
            "weight": tenant["weight"],
            "largest request": ceilings_text(tenant["ceilings"]),
        }
    )


def _row(one: dict[str, Any]) -> list[object]:
    return [
        one["id"],
        one["source"],
        _state(one),
        one["models"],
        f"{one['weight']:g}",
        limits_text(one["limits"]),
        budgets_text(one["budgets"]),
    ]
