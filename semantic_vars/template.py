"""Prompt templates: text with holes for variables (Parrot, section 4.1: placeholders).

``Summarize {{chunk}}`` has one hole. What fills it may be transformed: ``{{plan | json('$.steps') | join(', ')}}``.
Two opening braces that are meant as such are written ``{{"{{"}}``. A template is parsed once, and values are put in as
data afterwards: braces in a value are text.
"""

import ast
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from core.errors import InvalidRequest
from semantic_vars.transforms import Transform, transform_of
from semantic_vars.values import Value, text_of

MAX_HOLES = 1_000
_MAX_ARGUMENTS = 2_000  # bytes
_OPEN = re.compile(r"\{\{")
_BRACES = re.compile(r"\{{2,500}|\{\Z")  # one alone opens a hole together with the one behind it
_TOKEN = re.compile(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|\}\}|.""", re.DOTALL)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_STEP = re.compile(r"\s*([a-z_]+)\s*(?:\((.*)\))?\s*", re.DOTALL)

Lookup = Callable[[str], Value]
"""The value of a variable by its name."""

Note = Callable[["Template", Sequence[str]], None]
"""Is told the text of a template that was filled, divided where variables begin and end."""


class Hole(msgspec.Struct, frozen=True):
    """Where a variable's value goes, after its transforms."""

    name: str
    transforms: tuple[Transform, ...] = ()

    def value(self, lookup: Lookup) -> Value:
        """Return what stands here. Raises ``TransformError``."""
        value = lookup(self.name)
        for transform in self.transforms:
            value = transform(value)
        return value


class Template(msgspec.Struct, frozen=True):
    """Constant texts and holes, in turn."""

    parts: tuple[str | Hole, ...]

    @property
    def names(self) -> Iterator[str]:
        """The variables of its holes."""
        return (part.name for part in self.parts if isinstance(part, Hole))

    def segments(self, lookup: Lookup) -> list[str]:
        """Return the text, divided where variables begin and end. Raises ``TransformError``."""
        return [part if isinstance(part, str) else text_of(part.value(lookup)) for part in self.parts]

    def fill(self, lookup: Lookup, note: Note | None = None) -> Value:
        """Return the text, or of a template that is one hole and nothing else the value itself."""
        if len(self.parts) == 1 and isinstance(hole := self.parts[0], Hole):
            value = hole.value(lookup)
            if note is not None:
                note(self, (text_of(value),))
            return value
        segments = self.segments(lookup)
        if note is not None:
            note(self, segments)
        return "".join(segments)


def quoted(text: str) -> str:
    """Return a template that is nothing but this text, whatever stands behind it."""
    return _BRACES.sub(lambda braces: '{{"' + braces[0] + '"}}', text)


def parse(text: str) -> Template:
    """Return the template that a text is. Raises ``InvalidRequest`` that quotes what cannot be read."""
    parts: list[str | Hole] = []
    at = 0
    while found := _OPEN.search(text, at):
        _add(parts, text[at : found.start()])
        inside, at = _inside(text, found.end())
        _add(parts, _part_of(inside))
        if len(parts) > 2 * MAX_HOLES:
            raise InvalidRequest(f"a template has more than {MAX_HOLES} holes")
    _add(parts, text[at:])
    return Template(tuple(parts))


def _add(parts: list[str | Hole], part: str | Hole) -> None:
    if isinstance(part, str) and parts and isinstance(parts[-1], str):
        parts[-1] += part
    elif part:
        parts.append(part)


def _inside(text: str, start: int) -> tuple[str, int]:
    for token in _TOKEN.finditer(text, start):
        if token[0] == "}}":
            return text[start : token.start()].strip(), token.end()
    raise InvalidRequest(
        f'a hole is never closed: {text[start - 2 : start + 40]!r}; two braces as text are {{{{"{{{{"}}}}'
    )


def _part_of(inside: str) -> str | Hole:
    if inside[:1] in {"'", '"'}:
        return str(_literals(inside)[0])
    name, *steps = _split(inside)
    if not _NAME.fullmatch(name):
        raise InvalidRequest(f"{{{{{inside}}}}} does not begin with a variable's name")
    return Hole(name, tuple(_transform(step) for step in steps))


def _split(inside: str) -> list[str]:
    pieces = [""]
    for token in _TOKEN.finditer(inside):
        if token[0] == "|":
            pieces.append("")
        else:
            pieces[-1] += token[0]
    return [piece.strip() for piece in pieces]


def _transform(step: str) -> Transform:
    found = _STEP.fullmatch(step)
    if found is None:
        raise InvalidRequest(f"{step!r} is no transform; write its name, and arguments in parentheses")
    return transform_of(found[1], _literals(found[2] or ""))


def _literals(text: str) -> tuple[Any, ...]:
    if len(text) > _MAX_ARGUMENTS:
        raise InvalidRequest(f"the arguments of a transform have more than {_MAX_ARGUMENTS} characters")
    try:
        given = list(ast.literal_eval(f"({text},)")) if text.strip() else []
        is_json = msgspec.json.decode(msgspec.json.encode(given)) == given
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        is_json = False
    if not is_json:
        told = "texts in quotes, numbers, True, False, None, [lists], and {'objects': 1} with texts for keys"
        raise InvalidRequest(f"({text}) are not literal arguments: {told}")
    return tuple(given)


class Form(msgspec.Struct, frozen=True):
    """A JSON value with templates for texts, anywhere inside. ``names``: the variables that it needs."""

    shape: Any
    names: frozenset[str]

    def fill(self, lookup: Lookup, note: Note | None = None) -> Value:
        """Return the value with every hole filled; ``note`` hears of each text. Raises ``TransformError``."""
        return _filled(self.shape, lookup, note)


def form_of(value: Value) -> Form:
    """Return the form that a JSON value is, its texts taken as templates. Raises ``InvalidRequest``."""
    names: set[str] = set()

    def parsed(part: Value) -> Any:
        if isinstance(part, str):
            template = parse(part)
            names.update(template.names)
            return template
        if isinstance(part, Mapping):
            return {key: parsed(one) for key, one in part.items()}
        if isinstance(part, list | tuple):
            return [parsed(one) for one in part]
        return part

    return Form(parsed(value), frozenset(names))


def _filled(shape: Any, lookup: Lookup, note: Note | None) -> Value:
    if isinstance(shape, Template):
        return shape.fill(lookup, note)
    if isinstance(shape, dict):
        return {key: _filled(one, lookup, note) for key, one in shape.items()}
    if isinstance(shape, list):
        return [_filled(one, lookup, note) for one in shape]
    return shape
