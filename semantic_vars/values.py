"""What a semantic variable can hold: JSON, and how it is told in a prompt."""

from typing import Any, TypeAlias

import msgspec

Value: TypeAlias = Any
"""A JSON value: text, a number, a truth value, null, a list or an object of such."""


def text_of(value: Value) -> str:
    """Return how a value stands in a prompt: text as it is, null as nothing, all else as JSON."""
    if isinstance(value, str):
        return value
    return "" if value is None else msgspec.json.encode(value).decode()


def size_of(value: Value) -> int:
    """Return the bytes of a value, as JSON; of text, in UTF-8."""
    return len(value.encode()) if isinstance(value, str) else len(msgspec.json.encode(value))
