"""What operators change while the server runs: overlays over the declared settings. Pure; ``overlays.py`` keeps them.

An overlay maps dotted paths to values. It may hold what the tree of settings marks as overridable and nothing else: the
rest, launch commands and addresses among it, is the file's alone. Every path belongs to one resource, so that there is
never a question which of two overlays wins.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, Protocol

import msgspec

from core.records import Revision
from gateway.settings import Declared, Settings, SettingsError
from gateway.settings.paths import Path, Source, dotted, leaves, resolved, shown
from gateway.settings.sources import checked

CONFIG = "config"
POLICIES: Mapping[str, tuple[Path, ...]] = {
    "fairness": (
        ("fairness",), ("models", "*", "fairness"), ("tenants", "*", "weight"), ("queue",), ("retry",), ("defaults",),
    ),
}  # fmt: skip
"""The places that belong to a kind of policy, with all below them; ``*``: any name. Others belong to ``config``."""

RESOURCES = (CONFIG, *POLICIES)

Overlay = Mapping[str, object]


class RevisionStore(Protocol):
    """Where revisions are kept. All methods raise ``OSError`` while it cannot be reached."""

    async def version(self) -> int:
        """Return a number that is another one after every change of any resource."""

    async def add(self, revision: Revision) -> None:
        """Keep a new revision, whose number follows the resource's last; raises where another one was faster."""

    async def list(self, resource: str, after: int | None = None, limit: int = 100) -> tuple[Revision, ...]:
        """Return revisions, newest first, from the one before number ``after``."""

    async def revision(self, resource: str, number: int) -> Revision | None:
        """Return one, or None."""

    async def set_state(self, resource: str, number: int, state: Any, *, expires_at: float | None = None) -> None:
        """Change what a revision is."""


class Fault(msgspec.Struct, frozen=True):
    """One entry of an overlay that cannot be used; ``path`` as it was written."""

    path: str
    message: str


class Change(msgspec.Struct, frozen=True):
    """One value that differs. ``before`` and ``after`` may be shown: secrets are masked. ``source``: of ``after``."""

    path: str
    before: Any
    after: Any
    source: Source


class Value(msgspec.Struct, frozen=True):
    """One value in force, fit to be shown, and who said it."""

    path: str
    value: Any
    source: Source


class Effective(msgspec.Struct, frozen=True):
    """What holds. ``dropped``: entries of overlays that the file no longer has room for."""

    settings: Settings
    provenance: Mapping[Path, Source]
    dropped: tuple[Fault, ...] = ()


def validate(declared: Declared, resource: str, overlay: Overlay) -> tuple[Fault, ...]:
    """Return all that is wrong with an overlay of a resource; nothing if it can be applied."""
    faults, places = _placed(declared, overlay, resource)
    if faults:
        return faults
    settings, problems = checked(_laid_over(declared.tree, places))
    if settings is not None:
        return ()
    return tuple(Fault(_entry_at(problem.path, overlay, places), problem.message) for problem in problems)


def effective(declared: Declared, overlays: Mapping[str, Overlay]) -> Effective:
    """Return what file, environment and the overlays of all resources make together.

    An entry that does not fit (the file may have changed under it) is dropped and reported; the others hold.
    """
    dropped: list[Fault] = []
    places: dict[str, tuple[Path, object]] = {}
    for resource, overlay in overlays.items():
        faults, found = _placed(declared, overlay, resource)
        dropped += faults
        places |= found
    settings, _ = checked(_laid_over(declared.tree, places))
    if settings is None:
        places = _fitting(declared, places, dropped)
        settings, _ = checked(_laid_over(declared.tree, places))
    assert settings is not None  # what is declared has been found right, and each entry on top of it
    overlaid = [path for path, _ in places.values()]
    return Effective(settings, _provenance(settings, declared, overlaid), tuple(dropped))


def diff(old: Effective, new: Effective) -> tuple[Change, ...]:
    """Return every value that differs, in the order of the tree; one that is gone has ``after`` None."""
    before, after = dict(leaves(old.settings)), dict(leaves(new.settings))
    missing = object()
    return tuple(
        Change(dotted(path), _shown_at(path, before), _shown_at(path, after), new.provenance.get(path, "default"))
        for path in (*after, *(path for path in before if path not in after))
        if before.get(path, missing) != after.get(path, missing)
    )


def values(of: Effective, resource: str | None = None) -> tuple[Value, ...]:
    """Return every value that holds, or those that belong to a resource, fit to be shown, with their source."""
    return tuple(
        Value(dotted(path), shown(path, value), of.provenance[path])
        for path, value in leaves(of.settings)
        if resource is None or owner(path) == resource
    )


def tree(of: Effective) -> dict[str, Any]:
    """Return the settings as a plain nested tree fit to be shown: secrets masked, as no file is taken back."""
    return {name: _shown_tree((name,), getattr(of.settings, name)) for name in type(of.settings).model_fields}


def in_force(revisions: Sequence[Revision], now: float) -> Revision | None:
    """Return the one of a resource's revisions, newest first, that holds: a canary until its end, else one applied."""
    for revision in revisions:
        is_live_canary = revision.state == "canary" and revision.expires_at is not None and revision.expires_at > now
        if is_live_canary or revision.state == "applied":
            return revision
    return None


def owner(path: Path) -> str:
    """Return the resource that a place belongs to."""
    return next((kind for kind, places in POLICIES.items() if any(_covers(place, path) for place in places)), CONFIG)


def _covers(place: Path, path: Path) -> bool:
    return len(place) <= len(path) and all(name in ("*", part) for name, part in zip(place, path, strict=False))


def _placed(
    declared: Declared, overlay: Overlay, resource: str
) -> tuple[tuple[Fault, ...], dict[str, tuple[Path, object]]]:
    faults: list[Fault] = []
    places: dict[str, tuple[Path, object]] = {}
    for text, value in overlay.items():
        try:
            place = resolved(text, declared.settings)
        except SettingsError as error:
            faults.append(Fault(text, str(error)))
            continue
        if not place.path or not place.is_overridable:
            faults.append(
                Fault(text, f"`{text}` cannot be changed while the server runs: change it in {declared.origin}")
            )
        elif owner(place.path) != resource:
            faults.append(
                Fault(text, f"`{text}` belongs to `{owner(place.path)}`, not to `{resource}`: change it there")
            )
        else:
            places[text] = (place.path, value)
    return tuple(faults), places


def _laid_over(declared: Mapping[str, Any], places: Mapping[str, tuple[Path, object]]) -> dict[str, Any]:
    result = deepcopy(dict(declared))
    for path, value in sorted(places.values(), key=lambda entry: len(entry[0])):  # a section before what stands in it
        node = result
        for name in path[:-1]:
            inner = node.get(name)
            if not isinstance(inner, dict):
                inner = node[name] = {}
            node = inner
        node[path[-1]] = deepcopy(value)
    return result


def _fitting(
    declared: Declared, places: Mapping[str, tuple[Path, object]], dropped: list[Fault]
) -> dict[str, tuple[Path, object]]:
    """Return the entries that hold together, taken one after another; report the others."""
    kept: dict[str, tuple[Path, object]] = {}
    for text, entry in places.items():
        settings, problems = checked(_laid_over(declared.tree, {**kept, text: entry}))
        if settings is None:
            dropped.append(Fault(text, "; ".join(problem.message for problem in problems)))
        else:
            kept[text] = entry
    return kept


def _provenance(settings: Settings, declared: Declared, overlaid: Sequence[Path]) -> dict[Path, Source]:
    in_file = {path for path, _ in leaves(declared.tree)}

    def source_of(path: Path) -> Source:
        if any(path[: len(over)] == over for over in overlaid):
            return "overlay"
        if path in declared.environment:
            return "environment"
        return "file" if path in in_file else "default"

    return {path: source_of(path) for path, _ in leaves(settings)}


def _entry_at(path: Path, overlay: Overlay, places: Mapping[str, tuple[Path, object]]) -> str:
    """Return the entry of an overlay that a problem's place stands in, or the place itself."""
    return next((text for text in overlay if path[: len(places[text][0])] == places[text][0]), dotted(path))


def _shown_at(path: Path, of: Mapping[Path, Any]) -> Any:
    return shown(path, of[path]) if path in of else None


def _shown_tree(path: Path, node: Any) -> Any:
    fields = getattr(type(node), "model_fields", None)
    if fields is not None:
        return {name: _shown_tree((*path, name), getattr(node, name)) for name in fields}
    if isinstance(node, Mapping):
        return {str(name): _shown_tree((*path, str(name)), value) for name, value in node.items()}
    if isinstance(node, list | tuple):
        return [_shown_tree((*path, str(index)), value) for index, value in enumerate(node)]
    return shown(path, node)
