"""What was used and what it cost, from the ledger: as JSON in pages, or whole as CSV."""

import csv
import io
from collections.abc import Callable, Mapping
from datetime import UTC, date, datetime
from typing import Annotated, Literal, NamedTuple

from fastapi import APIRouter, Depends, Header, Query, Response

from core.errors import InvalidRequest
from gateway.api.admin.document import errors
from gateway.api.admin.guard import guarded
from gateway.api.admin.pages import After, Limit, Page, page_found, place_of
from gateway.api.admin.requests import Text
from gateway.api.admin.shapes import TENANT_ID, Shape, Spend, shown_usd
from gateway.services import Services
from routing.budgets import DAY_S, day_of
from storage.sql.ledger import Dimension, Used
from storage.sql.paging import MAX_PAGE

_MAX_DAYS = 400
_DEFAULT_DAYS = 30
_MAX_CSV_ROWS = 100_000
_EPOCH = date(1970, 1, 1).toordinal()
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


class UsageRow(Shape):
    """What was used. A dimension that `by` does not name is null. `usd`: what it cost."""

    day: date | None
    tenant: str | None
    key: str | None
    end_user: str | None
    model: str | None
    requests: int
    errors: int
    input_tokens: int
    output_tokens: int
    cached_tokens: int
    usd: Spend


class _Question(NamedTuple):
    by: list[Dimension]
    first_day: int
    last_day: int
    filters: Mapping[str, str | None]


_CSV: dict[int | str, dict[str, object]] = {200: {"content": {"text/csv": {"schema": {"type": "string"}}}}}


def usage_routes(services: Services) -> APIRouter:
    """Return the route of usage."""
    router = APIRouter(prefix="/admin/v1/usage", tags=["usage"], route_class=guarded(services))
    question = _question(services)

    @router.get("", response_model=Page[UsageRow], responses=_CSV | errors())
    async def list_usage(
        asked: Annotated[_Question, Depends(question)],
        form: Annotated[Literal["json", "csv"] | None, Query(alias="format")] = None,
        accept: Annotated[str, Header(max_length=1024)] = "",
        limit: Limit = 50,
        after: After = None,
    ) -> Page[UsageRow] | Response:
        """Add up what was used from day to day (UTC, both included; the last 30 by default), by the dimensions of `by`.

        With `format=csv` or `Accept: text/csv` everything comes at once, as CSV.
        """
        if form == "csv" or (form is None and accept.split(",")[0].split(";")[0].strip() == "text/csv"):
            return Response(_csv(await _everything(asked, services)), media_type="text/csv; charset=utf-8")
        place = place_of(after, list[int | str])
        if place is not None and [type(part) for part in place] != [_type_of(name) for name in asked.by]:
            raise InvalidRequest("`after` is the cursor of a list with another `by`", param="after")
        rows = await _rows(asked, place, limit + 1, services)
        return page_found(rows, limit, lambda row: _place(row, asked), _shown)

    return router


def _question(services: Services) -> Callable[..., _Question]:
    def question(
        *,
        by: Annotated[list[Dimension] | None, Query(max_length=5)] = None,
        since: Annotated[date | None, Query(description="The first day; by default 30 days up to the last.")] = None,
        until: Annotated[date | None, Query(description="The last day; by default today.")] = None,
        tenant: Annotated[str | None, Query(pattern=TENANT_ID)] = None,
        key: Text = None,
        end_user: Text = None,
        model: Text = None,
    ) -> _Question:
        last = day_of(services.clock.wall()) if until is None else until.toordinal() - _EPOCH
        first = last - _DEFAULT_DAYS + 1 if since is None else since.toordinal() - _EPOCH
        if not 0 <= last - first < _MAX_DAYS:
            raise InvalidRequest(f"`since` has to be a day before `until`, at most {_MAX_DAYS} days", param="since")
        filters = {"tenant": tenant, "key": key, "end_user": end_user, "model": model}
        return _Question(list(dict.fromkeys(by or ["day"])), first, last, filters)

    return question


def _type_of(dimension: Dimension) -> type[int | str]:
    return int if dimension == "day" else str


def _place(row: Used, asked: _Question) -> list[int | str]:
    return [getattr(row, name) for name in asked.by]


async def _rows(asked: _Question, after: list[int | str] | None, limit: int, services: Services) -> tuple[Used, ...]:
    return await services.store.ledger.usage(
        asked.by,
        first_day=asked.first_day,
        last_day=asked.last_day,
        tenant=asked.filters["tenant"],
        key=asked.filters["key"],
        end_user=asked.filters["end_user"],
        model=asked.filters["model"],
        after=after,
        limit=limit,
    )


async def _everything(asked: _Question, services: Services) -> list[Used]:
    rows: list[Used] = []
    place: list[int | str] | None = None
    while len(page := await _rows(asked, place, MAX_PAGE, services)) == MAX_PAGE:
        rows += page
        place = _place(page[-1], asked)
        if len(rows) > _MAX_CSV_ROWS:
            raise InvalidRequest(
                f"that is more than {_MAX_CSV_ROWS:,} rows; ask for fewer days, or one tenant at a time", param="since"
            )
    return [*rows, *page]


def _shown(row: Used) -> UsageRow:
    return UsageRow(
        day=None if row.day is None else datetime.fromtimestamp(row.day * DAY_S, UTC).date(),
        tenant=row.tenant,
        key=row.key,
        end_user=row.end_user,
        model=row.model,
        requests=row.requests,
        errors=row.errors,
        input_tokens=row.input_tokens,
        output_tokens=row.output_tokens,
        cached_tokens=row.cached_tokens,
        usd=shown_usd(row.cost),
    )


def _csv(rows: list[Used]) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(UsageRow.model_fields)
    for row in rows:
        writer.writerow([_cell(value) for value in _shown(row).model_dump(mode="json").values()])
    return text.getvalue()


def _cell(value: object) -> object:
    """Return what a cell holds; text that a spreadsheet would run as a formula is quoted."""
    if value is None:
        return ""
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value
