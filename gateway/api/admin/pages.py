"""Lists in pages: ``{data, next}``, where ``next`` is the cursor of the page after this one, or null."""

import base64
import binascii
from collections.abc import Callable, Sequence
from typing import Annotated, Generic, TypeVar

import msgspec
from fastapi import Query

from core.errors import InvalidRequest
from gateway.api.admin.shapes import Shape

MAX_LIMIT = 200


Item = TypeVar("Item")
Key = TypeVar("Key")
Value = TypeVar("Value")

Limit = Annotated[int, Query(ge=1, le=MAX_LIMIT, description="How many at most.")]
After = Annotated[str | None, Query(max_length=1024, description="`next` of the page before.")]


class Page(Shape, Generic[Item]):
    """Some of a list, and where it goes on."""

    data: list[Item]
    next: str | None = None


def cursor_of(key: object) -> str:
    """Return the opaque form of the place after which a page begins."""
    return base64.urlsafe_b64encode(msgspec.json.encode(key)).decode().rstrip("=")


def place_of(cursor: str | None, kind: type[Key]) -> Key | None:
    """Return the place that a cursor stands for; None without one. Raises ``InvalidRequest`` for what is none."""
    if cursor is None:
        return None
    try:
        padded = cursor.encode("ascii") + b"=" * (-len(cursor) % 4)
        place = msgspec.json.decode(base64.b64decode(padded, altchars=b"-_", validate=True), type=kind)
        if not all(_can_be_asked(part) for part in (place if isinstance(place, list | tuple) else (place,))):
            raise ValueError("no key of ours has this in it")
        return place
    except (ValueError, binascii.Error) as error:  # msgspec's errors are ValueErrors
        raise InvalidRequest(
            "`after` is no cursor of this list: give `next` of the page before as it came", param="after"
        ) from error


def _can_be_asked(part: object) -> bool:
    """Whether every database takes the value in a query."""
    return "\0" not in part if isinstance(part, str) else not isinstance(part, int) or abs(part) < 2**31


def page_found(
    rows: Sequence[Value], limit: int, key: Callable[[Value], object], shown: Callable[[Value], Item]
) -> Page[Item]:
    """Return the page that ``rows`` make: in the order of ``key``, and one more than ``limit`` where there are more."""
    page = rows[:limit]
    following = cursor_of(key(page[-1])) if len(rows) > limit else None
    return Page(data=[shown(row) for row in page], next=following)


def page_of(
    items: Sequence[Value], key: Callable[[Value], str], after: str | None, limit: int
) -> tuple[list[Value], str | None]:
    """Return one page of what is in memory, in the order of ``key``, and the cursor of the next."""
    place = place_of(after, str)
    rest = sorted((item for item in items if place is None or key(item) > place), key=key)
    page = rest[:limit]
    return page, cursor_of(key(page[-1])) if len(rest) > limit else None
