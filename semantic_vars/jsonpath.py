"""A part of JSONPath (RFC 9535): ``$.name``, ``['name']``, ``[3]``, ``[-1]`` and ``[*]``; no filters, no recursion."""

import re

from core.errors import InvalidRequest
from semantic_vars.values import Value

_STEP = re.compile(r"""\.(?P<name>[^.\[\]'"\s]+)|\[(?P<index>-?\d{1,9})\]|\[(?P<all>\*)\]|\[(['"])(?P<key>.*?)\4\]""")

Step = str | int | None
"""A member's name, an index, or None for all elements."""


def path_of(text: str) -> tuple[Step, ...]:
    """Return the steps of a path. Raises ``InvalidRequest`` at the first that cannot be read."""
    rest = text.removeprefix("$")
    steps: list[Step] = []
    at = 0
    while at < len(rest):
        found = _STEP.match(rest, at)
        if found is None:
            raise InvalidRequest(f"the path {text!r} cannot be read from {rest[at:]!r} on; write $.name, [0] or [*]")
        steps.append(_step(found))
        at = found.end()
    return tuple(steps)


def _step(found: re.Match[str]) -> Step:
    if found["all"]:
        return None
    if found["index"]:
        return int(found["index"])
    return found["name"] or found["key"]


def at_path(value: Value, path: tuple[Step, ...]) -> Value:
    """Return what stands at the path, a list after ``[*]``. Raises ``LookupError`` that names the step."""
    for number, step in enumerate(path):
        if step is None:
            if not isinstance(value, list):
                raise LookupError("[*] is no list")
            return [at_path(one, path[number + 1 :]) for one in value]
        if isinstance(step, str):
            if not isinstance(value, dict) or step not in value:
                raise LookupError(f"there is no member {step!r}")
            value = value[step]
        else:
            if not isinstance(value, list) or not -len(value) <= step < len(value):
                raise LookupError(f"there is no element [{step}]")
            value = value[step]
    return value
