"""The closed set of what can be done to a value between its producer and a consumer (Parrot, section 7: transforms).

They are pure, and bounded: what comes out is limited in bytes, paths have no recursion, and patterns are RE2's, which
takes time linear in the text. There is no way to upload code.
"""

import re
from collections.abc import Callable
from typing import Any, NoReturn

import msgspec
import re2

from core.errors import InvalidRequest
from semantic_vars.jsonpath import at_path, path_of
from semantic_vars.values import Value, size_of, text_of

MAX_BYTES = 4 << 20
"""No transform's result is larger."""
MAX_ITEMS = 100_000
"""No transform makes a longer list."""
_MAX_PATTERN = 1_000
_PATTERN_MEMORY = 4 << 20
_FENCE = re.compile(r"^```[^\n]*\n(.*?)^```[ \t]*$", re.DOTALL | re.MULTILINE)


class TransformError(Exception):
    """A value is not what a transform needs; the text says which and why."""


class Transform(msgspec.Struct, frozen=True):
    """One transform with its arguments, ready to be used. Calling it raises ``TransformError``."""

    name: str
    arguments: tuple[Any, ...]

    def __call__(self, value: Value) -> Value:
        """Return the transformed value."""
        result = _USES[self.name](value, *_prepared(self.name, self.arguments))
        if size_of(result) > MAX_BYTES:
            raise TransformError(f"{self.name} makes more than {MAX_BYTES} bytes")
        return result


def transform_of(name: str, arguments: tuple[Any, ...]) -> Transform:
    """Return the transform. Raises ``InvalidRequest`` for an unknown one, or arguments that it does not take."""
    if name not in _USES:
        raise InvalidRequest(f"there is no transform {name!r}; there are {', '.join(sorted(_USES))}")
    wanted = _ARGUMENTS.get(name, ())
    if len(arguments) != len(wanted) or not all(map(isinstance, arguments, wanted)):
        told = ", ".join("any value" if one is object else _TOLD[one] for one in wanted) or "no arguments"
        raise InvalidRequest(f"the transform {name} takes {told}; it was given {list(arguments)!r}")
    if name == "split" and not arguments[0]:
        raise InvalidRequest("split needs a text to divide by")
    _prepared(name, arguments)  # a wrong path or pattern is told now
    return Transform(name, arguments)


def _prepared(name: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    prepare = _PREPARED.get(name)
    return arguments if prepare is None else (prepare(arguments[0]), *arguments[1:])


def _pattern(text: str) -> Any:
    if len(text) > _MAX_PATTERN:
        raise InvalidRequest(f"a pattern has more than {_MAX_PATTERN} characters")
    options = re2.Options()
    options.max_mem = _PATTERN_MEMORY
    options.log_errors = False
    try:
        return re2.compile(text, options)
    except re2.error as error:
        raise InvalidRequest(f"the pattern {text!r} is not one of RE2: {error}") from None


def _text(value: Value) -> str:
    if not isinstance(value, str):
        _complain("text", value)
    return value


def _list(value: Value) -> list[Value]:
    if not isinstance(value, list):
        _complain("a list", value)
    return value


def _complain(wanted: str, value: Value) -> NoReturn:
    raise TransformError(f"{wanted} is needed here, and this is {text_of(value)[:60]!r}")


def _json(value: Value, path: tuple[Any, ...]) -> Value:
    if isinstance(value, str):
        try:
            value = msgspec.json.decode(_unfenced(value))
        except (msgspec.DecodeError, RecursionError) as error:
            raise TransformError(f"the text is no JSON ({error}): {value[:60]!r}") from None
    try:
        return at_path(value, path)
    except LookupError as error:
        raise TransformError(f"{error} in {text_of(value)[:60]!r}") from None


def _unfenced(text: str) -> str:
    """Return what stands in the fence that models like to put around JSON."""
    found = _FENCE.search(text)
    return found[1] if found is not None and text.lstrip().startswith("```") else text


def _code(value: Value) -> str:
    found = _FENCE.search(_text(value))
    if found is None:
        raise TransformError(f"there is no block of code in {_text(value)[:60]!r}")
    return found[1].removesuffix("\n")


def _regex(value: Value, pattern: Any, group: int) -> str:
    found = pattern.search(_text(value))
    if found is None:
        raise TransformError(f"the pattern {pattern.pattern!r} is not in {_text(value)[:60]!r}")
    if not 0 <= group <= pattern.groups:
        raise TransformError(f"the pattern {pattern.pattern!r} has no group {group}")
    return found[group] or ""


def _choose(value: Value, table: dict[Any, Value]) -> Value:
    name = text_of(value).strip()
    if name not in table and "*" not in table:
        raise TransformError(f"{name[:60]!r} is none of {', '.join(map(str, table))}")
    return table.get(name, table.get("*"))


def _item(value: Value, index: int) -> Value:
    return _json(_list(value), (index,))


def _join(value: Value, by: str) -> str:
    if len(by) * len(_list(value)) > MAX_BYTES:
        raise TransformError(f"join makes more than {MAX_BYTES} bytes")
    return by.join(map(text_of, _list(value)))


def _few(parts: list[str]) -> list[str]:
    if len(parts) > MAX_ITEMS:
        raise TransformError(f"the text has more than {MAX_ITEMS} parts")
    return parts


def _length(value: Value) -> int:
    if not isinstance(value, str | list | dict):
        _complain("text, a list or an object", value)
    return len(value)


_USES: dict[str, Callable[..., Value]] = {
    "all": lambda value, path: all(_json(one, path) for one in _list(value)),
    "any": lambda value, path: any(_json(one, path) for one in _list(value)),
    "choose": _choose,
    "code": _code,
    "contains": lambda value, text: text in _text(value),
    "equals": lambda value, other: value == other,
    "item": _item,
    "join": _join,
    "json": _json,
    "length": _length,
    "lines": lambda value: [line for line in _few(_text(value).splitlines()) if line.strip()],
    "lower": lambda value: _text(value).lower(),
    "matches": lambda value, pattern: pattern.search(_text(value)) is not None,
    "not": lambda value: not value,
    "regex": _regex,
    "split": lambda value, by: _few(_text(value).split(by, MAX_ITEMS)),
    "strip": lambda value: _text(value).strip(),
    "text": text_of,
    "truncate": lambda value, most: _text(value)[: max(0, most)],
}
_ARGUMENTS: dict[str, tuple[type, ...]] = {
    "all": (str,),
    "any": (str,),
    "choose": (dict,),
    "contains": (str,),
    "equals": (object,),
    "item": (int,),
    "join": (str,),
    "json": (str,),
    "matches": (str,),
    "regex": (str, int),
    "split": (str,),
    "truncate": (int,),
}
_TOLD = {str: "a text", int: "a number", dict: "an object"}
_PREPARED: dict[str, Callable[[str], Any]] = {
    "all": path_of,
    "any": path_of,
    "json": path_of,
    "matches": _pattern,
    "regex": _pattern,
}
