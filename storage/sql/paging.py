"""Lists come in pages; a page begins behind the last row of the one before."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, literal, tuple_

MAX_PAGE = 1000
"""No answer has more rows than this, whatever was asked for."""


def bounded(limit: int) -> int:
    """Return how many rows a page may really have."""
    return max(1, min(limit, MAX_PAGE))


def follows(columns: Sequence[ColumnElement[Any]], values: Sequence[object]) -> ColumnElement[bool]:
    """Return whether a row comes after the one with these values, in ascending order of the columns."""
    return tuple_(*columns) > _place(columns, values)


def precedes(columns: Sequence[ColumnElement[Any]], values: Sequence[object]) -> ColumnElement[bool]:
    """Return whether a row comes before the one with these values, in ascending order of the columns."""
    return tuple_(*columns) < _place(columns, values)


def _place(columns: Sequence[ColumnElement[Any]], values: Sequence[object]) -> ColumnElement[Any]:
    return tuple_(*(literal(value, column.type) for column, value in zip(columns, values, strict=True)))
