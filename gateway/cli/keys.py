"""``forebay keys``: the local key, new ones for a settings file, and the keys that the running gateway knows."""

import hashlib
from datetime import datetime
from typing import Any

import click

from gateway.auth import new_key
from gateway.cli.admin import (
    FUTURE,
    Admin,
    as_json,
    asks,
    at,
    clock,
    duration,
    fields,
    listed,
    report,
    tenant,
)
from gateway.cli.common import LOCAL_KEY, Fault, state_dir
from gateway.cli.terms import budgets_text, limits_text, of_rates, terms_from
from gateway.settings import environment

_id = click.argument("key_id", metavar="ID")


@click.group()
def keys() -> None:
    """Make, show, change, rotate and revoke keys of the running gateway; show the local key.

    \b
    Examples:
      forebay keys create my-app --tenant acme --expires 90d
      forebay keys show-local
    """


@keys.command()
def show_local() -> None:
    """Print the key that `forebay run` made.

    \b
    Example:
      curl localhost:8411/v1/models -H "Authorization: Bearer $(forebay keys show-local)"
    """
    path = state_dir(environment()) / LOCAL_KEY
    try:
        key = path.read_text(encoding="utf-8").strip()
    except FileNotFoundError as error:
        raise Fault(f"no key in {path} yet. `forebay run` or `forebay init` makes one.") from error
    except OSError as error:
        raise Fault(f"cannot read {path}: {error.strerror}") from error
    click.echo(key)


@keys.command()
def new() -> None:
    """Make a key for a settings file and print it with its SHA-256. It is kept nowhere, and no gateway is asked.

    \b
    Example:
      forebay keys new
    """
    key = new_key()
    digest = hashlib.sha256(key.encode()).hexdigest()
    click.echo(f"key     {key}")
    click.echo(f"sha256  {digest}")
    click.echo("\nGive the key to the application; it is not kept here. Put the hash into forebay.yaml:\n")
    click.echo(f'keys:\n  - name: my-app\n    tenant: my-team\n    sha256: "{digest}"')


@keys.command(name="ls")
@tenant
@asks
@as_json
def list_keys(admin: Admin, tenant: str | None, *, as_json: bool) -> None:
    """List the keys, without their secrets.

    \b
    Example:
      forebay keys ls --tenant acme
    """
    found = admin.items(at("keys"), tenant=tenant)
    heading = ["ID", "NAME", "TENANT", "ROLE", "STATE", "SECRET", "SOURCE", "EXPIRES (UTC)"]
    report(found, as_json=as_json, text=lambda: listed(heading, found, _row, none="no keys"))


@keys.command()
@_id
@asks
@as_json
def show(admin: Admin, key_id: str, *, as_json: bool) -> None:
    """Show one key, without its secret.

    \b
    Example:
      forebay keys show key_0123456789abcdef
    """
    found = admin.value(admin.get(at("keys", key_id)))
    report(found, as_json=as_json, text=lambda: _shown(found))


@keys.command()
@click.argument("name")
@click.option("--tenant", required=True, help="Whose key it is.")
@click.option(
    "--role",
    type=click.Choice(["viewer", "operator", "policy", "admin"]),
    help="A key for the admin port, for somebody who may do this.",
)
@click.option("--expires", type=FUTURE, help="A date, or how long it holds: 90d.")
@of_rates
@asks
@as_json
def create(
    admin: Admin,
    name: str,
    *,
    tenant: str,
    role: str | None,
    expires: datetime | None,
    as_json: bool,
    **terms: Any,
) -> None:
    """Make a key for a tenant, or, with --role, for an operator. Its secret is printed this once.

    \b
    Example:
      forebay keys create my-app --tenant acme --model smollm2 --expires 90d
    """
    asked = {"name": name, "tenant": tenant, "role": role, **terms_from(terms, {})}
    if expires is not None:
        asked["expires_at"] = expires.isoformat()
    made = admin.value(admin.post(at("keys"), asked))
    report(made, as_json=as_json, text=lambda: _with_secret(made))


@keys.command(name="set")
@_id
@click.option("--name", help="What it is called.")
@click.option("--expires", type=FUTURE, help="A date, or how long it holds from now.")
@of_rates
@asks
@as_json
def change(
    admin: Admin, key_id: str, *, name: str | None, expires: datetime | None, as_json: bool, **terms: Any
) -> None:
    """Change what a key may use; what is not given stays. `none` takes a limit, or all budgets, away.

    \b
    Example:
      forebay keys set key_0123456789abcdef --rpm 60
    """
    read = admin.get(at("keys", key_id))
    asked = terms_from(terms, admin.value(read))
    if name is not None:
        asked["name"] = name
    if expires is not None:
        asked["expires_at"] = expires.isoformat()
    changed = admin.value(admin.change("PATCH", at("keys", key_id), read, asked))
    report(changed, as_json=as_json, text=lambda: _shown(changed))


@keys.command()
@_id
@click.option("--overlap", default="24h", show_default=True, help="How long the old secret still holds.")
@asks
@as_json
def rotate(admin: Admin, key_id: str, *, overlap: str, as_json: bool) -> None:
    """Make a key of the same terms with a new secret, printed this once; the old one ends after --overlap.

    \b
    Example:
      forebay keys rotate key_0123456789abcdef --overlap 1h
    """
    try:
        overlap_s = duration(overlap)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--overlap") from error
    made = admin.value(admin.post(f"{at('keys', key_id)}:rotate", {"overlap_s": overlap_s}))
    text = f"the key {key_id} holds for {overlap} more; revoke it sooner with: forebay keys revoke {key_id}"
    report(made, as_json=as_json, text=lambda: f"{_with_secret(made)}\n{text}")


@keys.command()
@_id
@asks
@as_json
def revoke(admin: Admin, key_id: str, *, as_json: bool) -> None:
    """Refuse a key from now on, on every gateway within a second. This cannot be undone.

    \b
    Example:
      forebay keys revoke key_0123456789abcdef
    """
    revoked = admin.value(admin.post(f"{at('keys', key_id)}:revoke"))
    report(revoked, as_json=as_json, text=lambda: f"{revoked['id']}: {revoked['state']}")


def _with_secret(made: dict[str, Any]) -> str:
    return f"{_shown(made['key'])}\n\nsecret  {made['secret']}\n\nGive it to whoever needs it; it is not shown again."


def _shown(key: dict[str, Any]) -> str:
    return fields(
        {
            "key": key["id"],
            "name": key["name"],
            "tenant": key["tenant"],
            "role": key["role"],
            "source": key["source"],
            "state": key["state"],
            "models": key["models"],
            "endpoints": key["endpoints"],
            "limits": limits_text(key["limits"]),
            "budgets": budgets_text(key["budgets"]),
            "best class": key["max_class"],
            "created (UTC)": clock(key["created_at"]),
            "expires (UTC)": clock(key["expires_at"]),
            "revoked (UTC)": clock(key["revoked_at"]),
        }
    )


def _row(one: dict[str, Any]) -> list[object]:
    return [
        one["id"],
        one["name"],
        one["tenant"],
        one["role"],
        one["state"],
        f"{one['prefix']}…" if one["prefix"] else "",
        one["source"],
        clock(one["expires_at"]),
    ]
