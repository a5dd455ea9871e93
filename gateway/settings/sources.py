"""Where settings come from: a YAML file, then the environment, which wins."""

import os
import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path as FilePath
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError
from pydantic_settings import EnvSettingsSource
from pydantic_settings import SettingsError as UnreadableVariable

from gateway.settings.faults import SettingsError, hint
from gateway.settings.paths import MASK, Path, dotted, leaves, section_of
from gateway.settings.tree import Settings

PREFIX = "FOREBAY_"

_REFERENCE = re.compile(r"\$\{(file:)?([^}:]+)(?::-([^}]*))?\}")


class Declared(NamedTuple):
    """What file and environment say, found right. ``tree`` holds their values, ``environment`` the places of those
    that come from the environment, ``origin`` names the file."""

    settings: Settings
    tree: Mapping[str, Any]
    environment: frozenset[Path]
    origin: str


class Problem(NamedTuple):
    """One thing that is wrong with a tree, and where."""

    path: Path
    message: str

    def __str__(self) -> str:
        return self.message


def environment() -> Mapping[str, str]:
    """Return the process's environment; the one place that reads it."""
    return os.environ


def load(path: FilePath, env: Mapping[str, str]) -> Settings:
    """Return the settings that a file and the environment make; see ``read``."""
    return read(path, env).settings


def read(path: FilePath, env: Mapping[str, str]) -> Declared:
    """Read and check a settings file. ``${NAME}``, ``${NAME:-default}`` and ``${file:PATH}`` are filled in.

    ``FOREBAY_<SECTION>__<KEY>`` of ``env`` wins over the file: ``FOREBAY_SERVER__PORT=9000``; lists are given as JSON.
    Raises ``SettingsError``.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}. `forebay init` writes a file to start from.") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path} is not a text file in UTF-8.") from error
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SettingsError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise SettingsError(f"{path} has to hold a mapping with at least `models:`; `forebay init` writes an example.")
    return declare(tree, env, origin=str(path), overrides=_overrides(env))


def parse(tree: Mapping[str, Any], env: Mapping[str, str], *, origin: str) -> Settings:
    """Check a settings tree; ``origin`` names it in messages, ``env`` fills references. Raises ``SettingsError``."""
    return declare(tree, env, origin=origin).settings


def declare(
    tree: Mapping[str, Any], env: Mapping[str, str], *, origin: str, overrides: Mapping[str, Any] | None = None
) -> Declared:
    """Fill in a tree's references, put ``overrides`` over it, and check what comes out. Raises ``SettingsError``."""
    overrides = overrides or {}
    merged = _merged(_fill(tree, env, origin), overrides)
    settings, problems = checked(merged)
    places = frozenset(path for path, _ in leaves(overrides) if path)
    if settings is None:
        raise SettingsError("\n".join(f"{_source(problem, places, origin)}: {problem}" for problem in problems))
    return Declared(settings, merged, places, origin)


def checked(tree: Mapping[str, Any]) -> tuple[Settings | None, tuple[Problem, ...]]:
    """Return the settings that a filled-in tree means, or None and all that is wrong with it."""
    masked = tuple(
        Problem(path, f"{dotted(path)}: {MASK} stands for a secret that is not shown; give the value itself")
        for path, value in leaves(tree)
        if value == MASK
    )
    if masked:
        return None, masked
    try:
        return Settings.model_validate(tree), ()
    except ValidationError as error:
        return None, tuple(_problems(error))


class _Environment(EnvSettingsSource):
    """pydantic-settings' own reading of an environment, of one that is handed in."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self._given = {name.lower(): value for name, value in env.items()}
        super().__init__(Settings, env_prefix=PREFIX, env_nested_delimiter="__")

    def _load_env_vars(self) -> Mapping[str, str | None]:
        return self._given


def _overrides(env: Mapping[str, str]) -> dict[str, Any]:
    """Return what the environment sets. Variables without ``__`` are taken only where they name a key of the top."""
    ours = {name: value for name, value in env.items() if name.upper().startswith(PREFIX)}
    sections = list(Settings.model_fields)
    for name in ours:
        section, nested, _ = name[len(PREFIX) :].lower().partition("__")
        if nested and section not in sections:
            raise SettingsError(f"environment: unknown key `{section}` in {name}{hint(section, sections)}")
    ours.pop("FOREBAY_VERSION", None)  # of the program, where anybody sets it
    try:
        return dict(_Environment(ours)())
    except UnreadableVariable as error:
        raise SettingsError(f"environment: {error}; lists and mappings are given as JSON") from error


def _merged(under: Any, over: Any) -> Any:
    if isinstance(under, Mapping) and isinstance(over, Mapping):
        both = {name: _merged(value, over[name]) if name in over else value for name, value in under.items()}
        return both | {name: deepcopy(value) for name, value in over.items() if name not in under}
    return deepcopy(over)


def _source(problem: Problem, places: frozenset[Path], origin: str) -> str:
    return "environment" if problem.path in places else origin


def _fill(node: Any, env: Mapping[str, str], where: str) -> Any:
    if isinstance(node, Mapping):
        return {key: _fill(value, env, f"{where}: {key}") for key, value in node.items()}
    if isinstance(node, list):
        return [_fill(value, env, where) for value in node]
    if isinstance(node, str):
        return _REFERENCE.sub(lambda match: _resolve(match, env, where), node)
    return node


def _resolve(match: re.Match[str], env: Mapping[str, str], where: str) -> str:
    is_file, name, default = match.groups()
    if is_file:
        try:
            return FilePath(name).read_text(encoding="utf-8").strip()
        except OSError as error:
            raise SettingsError(f"{where}: cannot read {name}: {error.strerror}") from error
    value = env.get(name, default)
    if value is None:
        raise SettingsError(f"{where}: the environment variable {name} is not set; write ${{{name}:-}} to allow that")
    return value


def _problems(error: ValidationError) -> Iterator[Problem]:
    for fault in error.errors(include_url=False, include_input=False):
        path = tuple(str(part) for part in fault["loc"])
        place = dotted(path)
        if fault["type"] == "extra_forbidden":
            yield Problem(path, f"unknown key `{place}`{hint(path[-1], _known_keys(path[:-1]))}")
        else:
            message = fault["msg"].removeprefix("Value error, ")
            yield Problem(path, f"{place}: {message}" if place else message)


def _known_keys(path: Path) -> list[str]:
    """Return the keys that are allowed at a place of the tree."""
    section: Any = Settings
    for part in path:
        if part in section.model_fields:
            section = section_of(section.model_fields[part].annotation)
        if section is None:
            return []
    return list(section.model_fields)
