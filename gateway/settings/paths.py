"""Places in the tree of settings: their names, their values, and what may be done with them."""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple, get_args

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from gateway.settings.faults import SettingsError, hint
from gateway.settings.tree import Settings

Path = tuple[str, ...]
Source = Literal["default", "file", "environment", "overlay"]

MASK = "***"
"""Stands for a secret wherever settings are shown, and is taken as a value nowhere."""

_CREDENTIALS = re.compile(r"(?<=://)[^/@]+@")


class Place(NamedTuple):
    """A place of the tree, and what its marks (``tree.OVERRIDABLE``, ``tree.AT_START``) say of it."""

    path: Path
    is_overridable: bool
    is_at_start: bool


def dotted(path: Path) -> str:
    """Return a path as people write it."""
    return ".".join(path)


def leaves(node: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield every value of a tree with its path. Lists of sections are counted from 0; other lists are values."""
    if isinstance(node, BaseModel):
        for name in type(node).model_fields:
            yield from leaves(getattr(node, name), (*path, name))
    elif isinstance(node, Mapping) and node:
        for name, value in node.items():
            yield from leaves(value, (*path, str(name)))
    elif isinstance(node, list | tuple) and node and isinstance(node[0], BaseModel | Mapping):
        for index, value in enumerate(node):
            yield from leaves(value, (*path, str(index)))
    else:
        yield path, node


def shown(path: Path, value: Any) -> Any:
    """Return a value as it may be shown: plain JSON, secrets and credentials masked."""
    if isinstance(value, SecretStr) or "env" in path[:-1]:  # `launch.env` carries tokens often enough
        return MASK
    if isinstance(value, str):
        return _CREDENTIALS.sub(f"{MASK}@", value)
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, list | tuple):
        return [shown(path, item) for item in value]
    return {} if isinstance(value, Mapping) else str(value)


def resolved(text: str, settings: Settings) -> Place:
    """Return the place that a dotted path names; names of models and tenants may hold dots themselves.

    Raises ``SettingsError`` for a place that the tree does not have.
    """
    node: Any = settings
    kind: Any = Settings
    path: list[str] = []
    rest = text
    is_overridable = is_at_start = False
    while rest:
        section = section_of(kind)
        if isinstance(node, Mapping):
            name = max((key for key in node if f"{rest}.".startswith(f"{key}.")), key=len, default="")
            if not name:
                wanted = rest.partition(".")[0]
                raise SettingsError(f"there is no `{wanted}` in `{dotted(tuple(path))}`{hint(wanted, node)}")
            node = node[name]
        elif section is not None and not _is_list(kind):
            name = rest.partition(".")[0]
            field = section.model_fields.get(name)
            if field is None:
                raise SettingsError(f"unknown key `{text}`{hint(name, section.model_fields)}")
            is_overridable |= _has_mark(field, "overridable")
            is_at_start |= _has_mark(field, "at_start")
            node, kind = getattr(node, name, None), field.annotation
        else:
            raise SettingsError(f"unknown key `{text}`: `{dotted(tuple(path))}` is one value, given as a whole")
        path.append(name)
        rest = rest[len(name) + 1 :]
    return Place(tuple(path), is_overridable, is_at_start)


def section_of(annotation: Any) -> type[BaseModel] | None:
    """Return the section that an annotation such as ``dict[str, ModelSettings]`` or ``Section | None`` holds."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((section for argument in get_args(annotation) if (section := section_of(argument))), None)


def at_start(settings: Settings) -> Iterator[Path]:
    """Yield the places that are read when the server starts."""
    yield from _marked(type(settings), ())


def _marked(section: type[BaseModel], path: Path) -> Iterator[Path]:
    for name, field in section.model_fields.items():
        if _has_mark(field, "at_start"):
            yield (*path, name)
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _marked(field.annotation, (*path, name))


def _has_mark(field: FieldInfo, mark: str) -> bool:
    return isinstance(field.json_schema_extra, dict) and bool(field.json_schema_extra.get(mark))


def _is_list(annotation: Any) -> bool:
    return getattr(annotation, "__origin__", None) is tuple
