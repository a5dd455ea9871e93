"""The verbs of ``forebay config`` that ask a running gateway: overlays over its settings file, and reading it again."""

from typing import Any

import click

from gateway.cli.admin import Admin, as_json, asks, at, report
from gateway.cli.overlays import change_from, changes_table, of_revision, revision_text, revisions_table
from gateway.revisions import Change, Effective, values


@click.command()
@asks
@as_json
def revisions(admin: Admin, *, as_json: bool) -> None:
    """List the overlays that were applied to the running gateway's settings, newest first.

    \b
    Example:
      forebay config revisions
    """
    found = admin.items(at("config", "revisions"))
    report(found, as_json=as_json, text=lambda: revisions_table(found))


@click.command()
@of_revision
@click.option("--note", default="", help="Why; kept with the revision.")
@asks
@as_json
def apply(admin: Admin, *, note: str, as_json: bool, **given: Any) -> None:
    """Lay values over the running gateway's settings file, on every gateway within a second.

    Only what the settings mark as overridable; FILE (YAML; - is standard input) is a whole overlay, --set and --unset
    change single values of the one in force. A FILE replaces the revision that you --expect.

    \b
    Example:
      forebay config apply --set log.level=debug --note "looking for a fault"
    """
    path = at("config", "revisions")
    change = change_from(admin, path, **given)
    made = admin.value(admin.post(path, {"overlay": change.overlay, "note": note}, if_match=change.if_match))
    report(made, as_json=as_json, text=lambda: revision_text(made))


@click.command()
@click.argument("number", type=click.IntRange(min=1))
@asks
@as_json
def rollback(admin: Admin, number: int, *, as_json: bool) -> None:
    """Put what revision NUMBER held in force again, as a new revision.

    \b
    Example:
      forebay config rollback 3
    """
    found = admin.value(admin.post(f"{at('config', 'revisions', str(number))}:rollback"))
    report(found, as_json=as_json, text=lambda: revision_text(found["revision"]))


@click.command()
@asks
@as_json
def reload(admin: Admin, *, as_json: bool) -> None:
    """Have the running gateway read its settings file again. If that cannot be used, all stays as it was.

    \b
    Example:
      forebay check && forebay config reload
    """
    done = admin.value(admin.post(f"{at('config')}:reload"))
    report(done, as_json=as_json, text=lambda: _told(done))


def changes_by(new: Effective, admin: Admin) -> tuple[Change, ...]:
    """Return what would change in the running gateway if its file said this. What overlays hold stays."""
    running = {value["path"]: value for value in admin.value(admin.get(at("config"))).get("values", ())}
    held = {path for path, value in running.items() if value["source"] == "overlay"}
    before = {path: value["value"] for path, value in running.items()}
    after = {value.path: value for value in values(new)}
    changes = []
    for path in (*after, *(path for path in before if path not in after)):
        wanted = after[path].value if path in after else None
        if path not in held and (path not in before or path not in after or before[path] != wanted):
            source = after[path].source if path in after else "default"
            changes.append(Change(path, before.get(path), wanted, source))
    return tuple(changes)


def _told(done: dict[str, Any]) -> str:
    parts = [changes_table(done["changes"])]
    if done["needs_restart"]:
        parts.append(f"These wait for the next start: {', '.join(done['needs_restart'])}")
    parts += [f"Dropped from the overlay: {fault['path']}: {fault['message']}" for fault in done["dropped"]]
    return "\n".join(parts)


LIVE = (revisions, apply, rollback, reload)
"""The verbs, to be joined to the group."""
