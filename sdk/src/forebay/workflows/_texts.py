"""How variables stand in plain texts, and how texts are told on the wire.

An f-string knows nothing of templates. So a variable that is put in one leaves a mark that nobody else can make: it
holds a number that this process has drawn at random and never tells. ``divide`` finds the marks again; what only looks
like one, of another process or of a model, is text.
"""

import math
import re
import secrets
from collections.abc import Mapping
from typing import Any

_NONCE = secrets.token_hex(16)
_MARK = re.compile(f"\ue000sv:{_NONCE}:([0-9]+)\ue001")
_BRACES = re.compile(r"\{{2,}")
_BRACES_AND_LAST = re.compile(r"\{{2,}|\{\Z")


def mark(number: int) -> str:
    """Return the mark of a variable."""
    return f"\ue000sv:{_NONCE}:{number}\ue001"


def divide(text: str) -> list[str | int]:
    """Return a text's constant parts and the numbers of its marks, in their order; no part is empty."""
    pieces = _MARK.split(text)  # texts and numbers take turns
    parts = [int(piece) if place % 2 else piece for place, piece in enumerate(pieces)]
    return [part for part in parts if part != ""]


def escaped(text: str, *, is_before_hole: bool = False) -> str:
    """Return a constant text as a template that means it. Two braces open a hole; so does one in front of a hole."""
    braces = _BRACES_AND_LAST if is_before_hole else _BRACES
    return braces.sub(lambda found: f'{{{{"{found[0]}"}}}}', text)


def literal(value: Any) -> str:
    """Return an argument of a transform, as the gateway reads it. Raises ``TypeError`` for what it cannot read."""
    match value:
        case bool() | int() | None:
            return repr(value)
        case str():
            if _MARK.search(value):
                raise TypeError("an argument of a transform is a constant: it cannot hold a variable")
            return repr(value)
        case float() if math.isfinite(value):
            return repr(value)
        case list() | tuple():
            return f"[{', '.join(map(literal, value))}]"
        case Mapping():
            entries = ", ".join(f"{literal(key)}: {literal(entry)}" for key, entry in value.items())
            return f"{{{entries} }}"  # two closing braces would end the hole
    raise TypeError(f"an argument of a transform is a text, a number, a truth value, a list or a table, not {value!r}")
