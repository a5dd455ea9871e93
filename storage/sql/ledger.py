"""The ledger: what was used and what it cost, by day, tenant, key, end user and model."""

from collections.abc import Iterator, Sequence
from itertools import chain
from operator import itemgetter
from typing import Any, Literal, TypeVar

import msgspec
from sqlalchemy import ColumnElement, RowMapping, Select, bindparam, case, func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from core.clock import Clock, SystemClock
from core.ids import TenantId
from core.records import Batch, Sum
from storage.sql.database import Database
from storage.sql.paging import MAX_PAGE, bounded, follows
from storage.sql.requests import INSERT_FOR_POSTGRES, insert_for_sqlite, row_of
from storage.sql.tables import booked_batches, ledger
from storage.sql.types import LARGEST_AMOUNT

T = TypeVar("T")

Dimension = Literal["day", "tenant", "key", "end_user", "model"]
DIMENSIONS: tuple[Dimension, ...] = ("day", "tenant", "key", "end_user", "model")
AMOUNTS = ("requests", "errors", "input_tokens", "output_tokens", "cached_tokens", "cost")

_ROWS_PER_S = 2000  # far less than any database manages
_CHUNK = 100  # rows that are prepared in one go: two milliseconds in which this process does nothing else


_SUBJECT = (ledger.c.tenant, ledger.c.key, ledger.c.end_user)
_SUMS = (
    select(*_SUBJECT, func.sum(ledger.c.input_tokens + ledger.c.output_tokens), func.sum(ledger.c.cost))
    .where(ledger.c.day.between(bindparam("first_day"), bindparam("last_day")))
    .group_by(*_SUBJECT)
)


class Used(msgspec.Struct, frozen=True):
    """What was used. A dimension that was not asked for is None; ``cost`` is in picodollars."""

    day: int | None = None
    tenant: str | None = None
    key: str | None = None
    end_user: str | None = None
    model: str | None = None
    requests: int = 0
    errors: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    cost: int = 0


class Ledger:
    """Books batches and adds up."""

    def __init__(self, database: Database, clock: Clock | None = None) -> None:
        self._database = database
        self._clock = clock or SystemClock()
        # Made once: statements cost more than what they do here, and are garbage that only the collector finds.
        self._mark = database.insert(booked_batches).on_conflict_do_nothing()
        add = database.insert(ledger)
        self._add = add.on_conflict_do_update(
            index_elements=list(DIMENSIONS), set_={name: added(ledger.c[name], add.excluded[name]) for name in AMOUNTS}
        )

    async def book(self, batch: Batch) -> None:
        """Add a batch's lines and keep its records, in one transaction; a batch that is booked already changes nothing.

        A few milliseconds for each hundred rows; a large batch, as there is after an outage, may take longer than the
        database's timeout, by a second for each 2,000 rows.
        """
        # Every gateway takes rows in the same order, so that no two wait for each other.
        lines = sorted(map(msgspec.structs.asdict, batch.lines), key=itemgetter(*DIMENSIONS))
        mark = {"id": batch.id, "booked_at": self._clock.wall()}
        is_sqlite = self._database.is_sqlite

        async def work(connection: AsyncConnection) -> None:
            if (await connection.execute(self._mark, mark)).rowcount == 0:
                return
            for few in _chunks(lines):
                await connection.execute(self._add, few)
            for some in _chunks(batch.records):
                rows = [row_of(record) for record in some]
                if is_sqlite:
                    await _insert_in_sqlite(connection, rows)
                else:
                    await connection.exec_driver_sql(INSERT_FOR_POSTGRES, rows)

        num_rows = len(lines) + len(batch.records)
        await self._database.write(work, timeout_s=self._database.timeout_s + num_rows / _ROWS_PER_S)

    async def sums(self, first_day: int, last_day: int) -> tuple[Sum, ...]:
        """Return what each end user of each key used on these days, both included.

        Reads every line of the days; there is no page: budgets need all of it.
        """
        days = {"first_day": first_day, "last_day": last_day}

        async def work(connection: AsyncConnection) -> tuple[Sum, ...]:
            return tuple(
                Sum(TenantId(tenant), key, end_user, int(used), int(cost))
                for tenant, key, end_user, used, cost in await connection.execute(_SUMS, days)
            )

        return await self._database.read(work)

    async def usage(
        self,
        group_by: Sequence[Dimension] = (),
        *,
        first_day: int,
        last_day: int,
        tenant: str | None = None,
        key: str | None = None,
        end_user: str | None = None,
        model: str | None = None,
        after: Sequence[int | str] | None = None,
        limit: int = MAX_PAGE,
    ) -> tuple[Used, ...]:
        """Return what was used on these days, both included, added up by the dimensions and in their order.

        ``after``: the last row's values of these dimensions, to go on behind it. Reads every line that fits.
        """
        dimensions = [ledger.c[name] for name in group_by]
        query: Select[Any] = select(*dimensions, *(func.sum(ledger.c[name]).label(name) for name in AMOUNTS))
        query = query.where(ledger.c.day.between(first_day, last_day))
        for name, wanted in (("tenant", tenant), ("key", key), ("end_user", end_user), ("model", model)):
            if wanted is not None:
                query = query.where(ledger.c[name] == wanted)
        if dimensions:
            query = query.group_by(*dimensions).order_by(*dimensions).limit(bounded(limit))
            if after is not None:
                query = query.where(follows(dimensions, after))

        async def work(connection: AsyncConnection) -> tuple[Used, ...]:
            rows = (await connection.execute(query)).mappings()
            return tuple(_used(row, group_by) for row in rows)

        return await self._database.read(work)


async def _insert_in_sqlite(connection: AsyncConnection, rows: Sequence[tuple[Any, ...]]) -> None:
    """Insert with as few steps as can be: each gives up the interpreter, and waits for it.

    Of statements for any number of rows SQLite's driver would keep hundreds, prepared, with 50 kB each.
    """
    for size in (_CHUNK, 10, 1):
        num, rest = divmod(len(rows), size)
        if num:
            many = [tuple(chain.from_iterable(rows[at * size : (at + 1) * size])) for at in range(num)]
            await connection.exec_driver_sql(insert_for_sqlite(size), many)
        rows = rows[len(rows) - rest :]


def _chunks(rows: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(rows), _CHUNK):
        yield rows[start : start + _CHUNK]


def _used(row: RowMapping, group_by: Sequence[Dimension]) -> Used:
    columns: dict[str, Any] = {name: row[name] for name in group_by}
    for name in AMOUNTS:
        columns[name] = int(row[name] or 0)  # PostgreSQL adds integers up to decimals
    return Used(**columns)


def added(there: ColumnElement[int], more: ColumnElement[int]) -> ColumnElement[int]:
    """Return the sum, no larger than a column holds."""
    return case((there + more > LARGEST_AMOUNT, LARGEST_AMOUNT), else_=there + more)
