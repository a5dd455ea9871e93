"""Column types that take whatever a client or an engine made up: what does not fit is made to fit, never an error.

PostgreSQL refuses U+0000, halves of surrogate pairs and large numbers, and long index entries; one such value would
otherwise hold up a whole batch for ever. The same is done to what is searched for, so that it is found.
"""

from typing import Any

from sqlalchemy import BigInteger, Integer, Text
from sqlalchemy.engine import Dialect
from sqlalchemy.types import TypeDecorator

LONGEST_TEXT = 256
LARGEST_AMOUNT = 10**18
"""A million dollars in picodollars: two of them still fit into 64 bits."""

_LARGEST_INTEGER = 2**31 - 1


class Line(TypeDecorator[str]):
    """Text of at most 256 characters; what is longer is cut."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        """Return what can be stored."""
        return line(value)


class Prose(TypeDecorator[str]):
    """Text of any length, not to be indexed."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        """Return what can be stored."""
        return None if value is None else storable(value)


class Amount(TypeDecorator[int]):
    """A count or a sum of money, of which two can be added."""

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: int | None, dialect: Dialect) -> int | None:
        """Return what can be stored."""
        return None if value is None else max(-LARGEST_AMOUNT, min(value, LARGEST_AMOUNT))

    def process_result_value(self, value: Any, dialect: Dialect) -> int | None:
        """Return an integer: sums are decimals in PostgreSQL."""
        return None if value is None else int(value)


class Small(TypeDecorator[int]):
    """A number of 32 bits."""

    impl = Integer
    cache_ok = True

    def process_bind_param(self, value: int | None, dialect: Dialect) -> int | None:
        """Return what can be stored."""
        return None if value is None else max(-_LARGEST_INTEGER, min(value, _LARGEST_INTEGER))


def line(text: str | None) -> str | None:
    """Return what a ``Line`` stores of a text."""
    if text is None or (len(text) <= LONGEST_TEXT and text.isascii() and "\0" not in text):
        return text
    return storable(text[:LONGEST_TEXT])


def storable(text: str) -> str:
    """Return a text as every database can hold it."""
    if text.isascii() and "\0" not in text:
        return text
    return text.replace("\0", "\ufffd").encode("utf-8", "replace").decode("utf-8")
