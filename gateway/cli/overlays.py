"""Overlays on the command line: read from a file or from options, and the revisions and changes that come of them."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import click
import yaml

from gateway.cli.admin import Admin, clock, fields, listed
from gateway.cli.common import Fault, SettingsFault

F = TypeVar("F", bound=Callable[..., Any])

_file = click.argument(
    "file", metavar="[FILE]", required=False, type=click.Path(path_type=Path, dir_okay=False, allow_dash=True)
)
_set = click.option(
    "--set", "assignments", metavar="PATH=VALUE", multiple=True, help="Change one value; may be repeated."
)
_unset = click.option("--unset", "removals", metavar="PATH", multiple=True, help="Leave one value to the file again.")
_expect = click.option(
    "--expect",
    type=click.IntRange(min=0),
    metavar="NUMBER",
    help="Change nothing unless this revision is in force; 0: none.",
)
_force = click.option("--force", is_flag=True, help="Replace whatever is in force.")


def of_overlay(command: F) -> F:
    """Give a verb what says an overlay: a FILE that is all of it, or options that change the one in force."""
    return _file(_set(_unset(command)))


def of_revision(command: F) -> F:
    """Give a verb what says an overlay, and which revision it replaces."""
    return of_overlay(_expect(_force(command)))


class Change(NamedTuple):
    """An overlay to be put in force, and the state that it was made from, for ``If-Match``."""

    overlay: dict[str, Any]
    if_match: str


def change_from(
    admin: Admin,
    revisions: str,
    *,
    file: Path | None,
    assignments: Sequence[str],
    removals: Sequence[str],
    expect: int | None,
    force: bool,
) -> Change:
    """Return the change that is asked for, of the resource whose revisions are at this path.

    Options change the overlay in force and so replace that one. A FILE was made without a look at it: what it would
    replace has to be named, unless there is nothing.
    """
    if force and expect is not None:
        raise click.UsageError("Give either --expect or --force.")
    _check_given(file, assignments, removals)
    number, current = in_force(admin, revisions)
    if file is not None and number and expect is None and not force:
        raise Fault(
            f"revision {number} is in force, and FILE would replace all of it. Look at it, then give "
            f"--expect {number}; --force replaces whatever is in force"
        )
    overlay = overlay_from(file, assignments, removals, lambda: current)
    return Change(overlay, "*" if force else f'"{number if expect is None else expect}"')


def overlay_from(
    file: Path | None, assignments: Sequence[str], removals: Sequence[str], current: Callable[[], Mapping[str, Any]]
) -> dict[str, Any]:
    """Return the overlay that is asked for; ``current`` is asked for the one in force if there is no file."""
    _check_given(file, assignments, removals)
    overlay = dict(current()) if file is None else _read(file)
    for assignment in assignments:
        path, sign, text = assignment.partition("=")
        if not sign:
            raise click.BadParameter(f"{assignment!r} has no `=`", param_hint="--set")
        overlay[path.strip()] = _value(text, f"--set {path}")
    for path in removals:
        if path not in overlay:
            raise Fault(f"{path!r} is not in the overlay; there are {', '.join(overlay) or 'none'}")
        del overlay[path]
    return overlay


def _check_given(file: Path | None, assignments: Sequence[str], removals: Sequence[str]) -> None:
    if file is None and not assignments and not removals:
        raise click.UsageError("Say what to change: a FILE with the whole overlay, --set PATH=VALUE, or --unset PATH.")


def in_force(admin: Admin, revisions: str) -> tuple[int, dict[str, Any]]:
    """Return number and overlay in force of the resource whose revisions are at this path; 0 if there is none."""
    newest = admin.items(revisions, most=100)
    held = next((one for one in newest if one["state"] in {"applied", "canary"}), None)
    return (held["number"], held["overlay"]) if held else (0, {})


def revisions_table(found: list[dict[str, Any]]) -> str:
    """Return revisions as a table."""
    heading = ["NUMBER", "STATE", "BY", "AT (UTC)", "ENDS (UTC)", "NOTE", "OVERLAY"]
    return listed(heading, found, _row, none="no revisions: the settings file alone says what holds")


def revision_text(revision: Mapping[str, Any] | None) -> str:
    """Return what holds now, in a few lines."""
    if revision is None:
        return "the settings file alone says what holds"
    return fields(
        {
            "revision": f"{revision['resource']} {revision['number']}",
            "state": revision["state"],
            "ends (UTC)": clock(revision["expires_at"]),
            "note": revision["note"],
            **{path: json.dumps(value, ensure_ascii=False) for path, value in revision["overlay"].items()},
        }
    )


def changes_table(changes: list[dict[str, Any]]) -> str:
    """Return changes as a table."""

    def row(one: dict[str, Any]) -> list[object]:
        return [one["path"], json.dumps(one["before"]), json.dumps(one["after"]), one["source"]]

    return listed(["KEY", "FROM", "TO", "SOURCE"], changes, row, none="Nothing differs.")


def values_table(values: list[dict[str, Any]]) -> str:
    """Return settings in force as a table."""

    def row(one: dict[str, Any]) -> list[object]:
        return [one["path"], json.dumps(one["value"], ensure_ascii=False), one["source"]]

    return listed(["KEY", "VALUE", "SOURCE"], values, row, none="no values")


def faults_table(faults: list[dict[str, Any]]) -> str:
    """Return what is wrong with an overlay."""
    return "\n".join(f"{fault['path']}: {fault['message']}" for fault in faults)


def _read(file: Path) -> dict[str, Any]:
    try:
        with click.open_file(str(file), encoding="utf-8") as stream:
            text = stream.read()
    except (OSError, UnicodeDecodeError) as error:
        raise Fault(f"cannot read {file}: {error}") from error
    tree = _value(text, str(file))
    if not isinstance(tree, dict):
        raise SettingsFault(f"{file} has to hold settings as a settings file does, for example `queue: {{max: 200}}`")
    return dict(_flat(tree))


def _value(text: str, origin: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SettingsFault(f"{origin}: {error}") from error


def _flat(tree: Mapping[Any, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return the values of a tree by dotted path, so that what it does not name stays as it is."""
    found: list[tuple[str, Any]] = []
    for name, value in tree.items():
        path = f"{prefix}{name}"
        found += _flat(value, f"{path}.") if isinstance(value, dict) and value else [(path, value)]
    return found


def _row(one: dict[str, Any]) -> list[object]:
    return [
        one["number"],
        one["state"],
        one["author"],
        clock(one["created_at"]),
        clock(one["expires_at"]),
        one["note"],
        json.dumps(one["overlay"], ensure_ascii=False),
    ]
