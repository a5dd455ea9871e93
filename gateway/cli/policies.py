"""``forebay policies``: settings that steer decisions, changed while the gateway runs, with a way back."""

from pathlib import Path
from typing import Any

import click

from gateway.cli.admin import Admin, as_json, asks, at, duration, report
from gateway.cli.overlays import (
    change_from,
    changes_table,
    faults_table,
    in_force,
    of_overlay,
    of_revision,
    overlay_from,
    revision_text,
    revisions_table,
    values_table,
)

_kind = click.argument("kind", metavar="KIND")
_note = click.option("--note", default="", help="Why; kept with the revision.")


@click.group()
def policies() -> None:
    """Look at policies, try changes, apply them and take them back. KIND is `fairness`; others come with what they
    steer.

    An overlay lies over the settings file. FILE (YAML; - is standard input) is a whole overlay; --set and --unset
    change single values of the one in force.

    \b
    Examples:
      forebay policies diff fairness --set retry.attempts=4
      forebay policies canary fairness --set retry.attempts=4 --for 10m
      forebay policies rollback fairness
    """


def _at(kind: str, verb: str = "") -> str:
    return at("policies", kind) + (f":{verb}" if verb else "")


def _overlay(admin: Admin, kind: str, file: Path | None, given: dict[str, tuple[str, ...]]) -> dict[str, Any]:
    def current() -> dict[str, Any]:
        return in_force(admin, at("policies", kind, "revisions"))[1]

    return overlay_from(file, given["assignments"], given["removals"], current)


@policies.command()
@_kind
@asks
@as_json
def get(admin: Admin, kind: str, *, as_json: bool) -> None:
    """Show a policy: its revision in force, and every value with who says it.

    \b
    Example:
      forebay policies get fairness
    """
    found = admin.value(admin.get(_at(kind)))
    report(
        found,
        as_json=as_json,
        text=lambda: f"{revision_text(found['revision'])}\n\n{values_table(found['values'])}",
    )


@policies.command()
@_kind
@asks
@as_json
def revisions(admin: Admin, kind: str, *, as_json: bool) -> None:
    """List a policy's revisions, newest first.

    \b
    Example:
      forebay policies revisions fairness
    """
    found = admin.items(at("policies", kind, "revisions"))
    report(found, as_json=as_json, text=lambda: revisions_table(found))


@policies.command()
@_kind
@of_overlay
@asks
@as_json
def validate(admin: Admin, kind: str, file: Path | None, *, as_json: bool, **given: tuple[str, ...]) -> None:
    """Tell whether an overlay could be applied; exit status 2 if not. Changes nothing.

    \b
    Example:
      forebay policies validate fairness overlay.yaml
    """
    body = {"overlay": _overlay(admin, kind, file, given)}
    verdict = admin.value(admin.post(_at(kind, "validate"), body))
    valid = bool(verdict["valid"])
    report(verdict, as_json=as_json, text=lambda: "it can be applied" if valid else faults_table(verdict["faults"]))
    if not valid:
        click.get_current_context().exit(2)


@policies.command()
@_kind
@of_overlay
@asks
@as_json
def diff(admin: Admin, kind: str, file: Path | None, *, as_json: bool, **given: tuple[str, ...]) -> None:
    """Tell what an overlay would change. Changes nothing.

    \b
    Example:
      forebay policies diff fairness --set defaults.limits.rpm=600
    """
    body = {"overlay": _overlay(admin, kind, file, given)}
    found = admin.value(admin.post(_at(kind, "diff"), body))
    report(found["changes"], as_json=as_json, text=lambda: changes_table(found["changes"]))


@policies.command()
@_kind
@of_revision
@_note
@click.option("--for", "lasts", default="10m", show_default=True, help="How long, unless it is kept.")
@asks
@as_json
def canary(admin: Admin, kind: str, *, note: str, lasts: str, as_json: bool, **given: Any) -> None:
    """Put an overlay in force for a time: what held before comes back by itself, unless `policies keep` is called.

    \b
    Example:
      forebay policies canary fairness --set retry.attempts=4 --for 10m
    """
    try:
        lasts_s = duration(lasts)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--for") from error
    change = change_from(admin, at("policies", kind, "revisions"), **given)
    body = {"overlay": change.overlay, "lasts_s": lasts_s, "note": note}
    made = admin.value(admin.post(_at(kind, "canary"), body, if_match=change.if_match))
    text = f"keep it with: forebay policies keep {kind}"
    report(made, as_json=as_json, text=lambda: f"{revision_text(made)}\n\n{text}")


@policies.command()
@_kind
@of_revision
@_note
@asks
@as_json
def apply(admin: Admin, kind: str, *, note: str, as_json: bool, **given: Any) -> None:
    """Put an overlay in force for good, on every gateway within a second.

    It replaces the one in force: the one that --set and --unset change, or, for a FILE, the one that you --expect.

    \b
    Examples:
      forebay policies apply fairness --set retry.attempts=4 --note "more retries"
      forebay policies apply fairness overlay.yaml --expect 3
    """
    change = change_from(admin, at("policies", kind, "revisions"), **given)
    body = {"overlay": change.overlay, "note": note}
    made = admin.value(admin.post(_at(kind, "apply"), body, if_match=change.if_match))
    report(made, as_json=as_json, text=lambda: revision_text(made))


@policies.command()
@_kind
@asks
@as_json
def keep(admin: Admin, kind: str, *, as_json: bool) -> None:
    """Have the canary in force stay for good.

    \b
    Example:
      forebay policies keep fairness
    """
    kept = admin.value(admin.post(_at(kind, "keep")))
    report(kept, as_json=as_json, text=lambda: revision_text(kept))


@policies.command()
@_kind
@click.option("--to", "number", type=click.IntRange(min=1), help="A revision.  [default: what held before]")
@asks
@as_json
def rollback(admin: Admin, kind: str, *, number: int | None, as_json: bool) -> None:
    """Return to what held before the revision in force, or to an older one; a canary ends at once.

    \b
    Example:
      forebay policies rollback fairness
    """
    found = admin.value(admin.post(_at(kind, "rollback"), {"number": number}))
    report(found, as_json=as_json, text=lambda: revision_text(found["revision"]))
