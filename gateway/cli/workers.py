"""``forebay workers``: what the running gateway's workers do, by its admin API."""

import json
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import click

from gateway.cli.admin import Admin
from gateway.cli.admin import admin_key_file as _admin_key_file
from gateway.cli.admin import admin_url as _admin_url
from gateway.cli.admin import as_json as _as_json
from gateway.cli.common import Fault, table

_worker = click.argument("worker_id", metavar="ID")


@click.group()
def workers() -> None:
    """List, start, stop, drain and restart the running gateway's workers, and read their logs.

    \b
    Examples:
      forebay workers ls
      forebay workers restart smollm2-0
    """


@workers.command(name="ls")
@_admin_url
@_admin_key_file
@_as_json
def list_workers(admin_url: str, admin_key_file: Path | None, *, as_json: bool) -> None:
    """List the workers.

    \b
    Example:
      forebay workers ls --json
    """
    answer = Admin(admin_url, admin_key_file).get("/admin/v1/workers")
    body = answer.json()
    found = body.get("data") if isinstance(body, dict) else None
    if not isinstance(found, list):
        raise Fault(f"what answers at {admin_url} is not a Forebay admin API")
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        click.echo(status_table(found))


def status_table(found: list[dict[str, Any]]) -> str:
    """Return the workers' statuses as a table, with the last error of those that have one below it."""
    if not found:
        return "no workers"
    rows = [["ID", "MODEL", "ENGINE", "STATE", "HEALTHY", "SINCE", "RESTARTS", "RUNNING", "PID"]]
    rows += [_row(worker) for worker in found]
    errors = [f"{worker.get('id')}: {worker['last_error']}" for worker in found if worker.get("last_error")]
    return "\n".join([table(rows), *([""] if errors else []), *errors])


def _row(worker: dict[str, Any]) -> list[str]:
    return [
        str(worker.get("id", "?")),
        str(worker.get("model", "?")),
        str(worker.get("engine", "?")),
        str(worker.get("state", "?")),
        "yes" if worker.get("healthy") else "no",
        _age(worker.get("since")),
        str(worker.get("restarts", 0)),
        f"{worker.get('running', '-')}/{worker.get('max_inflight', '-')}",
        str(worker.get("pid") or "-"),
    ]


def _age(since: object) -> str:
    if not isinstance(since, int | float) or since <= 0:
        return "-"
    seconds = max(0, int(time.time() - since))
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"


def _act(verb: str, worker_id: str, admin_url: str, admin_key_file: Path | None, *, as_json: bool) -> None:
    answer = Admin(admin_url, admin_key_file).post(f"/admin/v1/workers/{quote(worker_id, safe='')}/{verb}")
    status = answer.json()
    if as_json:
        click.echo(json.dumps(status, indent=2))
    elif isinstance(status, dict):
        click.echo(f"{status.get('id', worker_id)}: {status.get('state', 'done')}")


def _verb(name: str, sentence: str) -> click.Command:
    @_worker
    @_admin_url
    @_admin_key_file
    @_as_json
    def act(worker_id: str, admin_url: str, admin_key_file: Path | None, *, as_json: bool) -> None:
        _act(name, worker_id, admin_url, admin_key_file, as_json=as_json)

    help_text = f"{sentence}\n\n\b\nExample:\n  forebay workers {name} smollm2-0"
    return click.command(name=name, help=help_text)(act)


workers.add_command(_verb("start", "Start a worker that is stopped or failed."))
workers.add_command(_verb("stop", "Stop a worker at once; what it runs is tried elsewhere or ends with an error."))
workers.add_command(_verb("drain", "Move what a worker runs to others, let it finish the rest, then stop it."))
workers.add_command(_verb("restart", "Drain a worker and start it again."))


@workers.command()
@_worker
@click.option("--lines", "-n", default=100, show_default=True, type=click.IntRange(1, 10_000), help="How many.")
@_admin_url
@_admin_key_file
def logs(worker_id: str, lines: int, admin_url: str, admin_key_file: Path | None) -> None:
    """Print the newest lines of a worker's log.

    \b
    Example:
      forebay workers logs smollm2-0 -n 20
    """
    path = f"/admin/v1/workers/{quote(worker_id, safe='')}/logs?lines={lines}"
    click.echo(Admin(admin_url, admin_key_file).get(path).text.rstrip("\n"))
