"""The request log: one row per finished request, found by people, forgotten after a while."""

from functools import lru_cache
from typing import Any

import msgspec
from sqlalchemy import Select, select
from sqlalchemy.ext.asyncio import AsyncConnection

from core.records import RequestRecord
from storage.sql.database import Database
from storage.sql.paging import MAX_PAGE, bounded, precedes
from storage.sql.tables import booked_batches, keys, requests
from storage.sql.types import line, storable

DAY_S = 86_400
KEPT_BATCHES_S = DAY_S
"""No gateway tries to book a batch for longer, unless the database is away."""
KEPT_REVOKED_KEYS_S = 30 * DAY_S


class Requests:
    """Finds records, and forgets old ones. They are written by ``Ledger.book``."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def request(self, request: str) -> RequestRecord | None:
        """Return the newest record of an id, which clients may send twice; None where there is none (any more)."""
        query = select(requests.c.record).where(requests.c.id == request).order_by(requests.c.time.desc()).limit(1)
        return next(iter(await self._found(query)), None)

    async def search(
        self,
        *,
        tenant: str | None = None,
        key: str | None = None,
        model: str | None = None,
        min_status: int | None = None,
        max_status: int | None = None,
        error: str | None = None,
        since: float | None = None,
        until: float | None = None,
        after: tuple[float, str] | None = None,
        limit: int = 100,
    ) -> tuple[RequestRecord, ...]:
        """Return the records that fit, newest first. ``since`` is included, ``until`` is not.

        ``after``: time and id of the last record of the page before. Time and tenant are found by an index; for the
        other conditions the rows in between are read.
        """
        query = select(requests.c.record).order_by(requests.c.time.desc(), requests.c.id.desc()).limit(bounded(limit))
        for column, wanted in (("tenant", tenant), ("key", key), ("model", model), ("error", error)):
            if wanted is not None:
                query = query.where(requests.c[column] == wanted)
        if min_status is not None:
            query = query.where(requests.c.status >= min_status)
        if max_status is not None:
            query = query.where(requests.c.status <= max_status)
        if since is not None:
            query = query.where(requests.c.time >= since)
        if until is not None:
            query = query.where(requests.c.time < until)
        if after is not None:
            query = query.where(precedes((requests.c.time, requests.c.id), after))
        return await self._found(query)

    async def prune(self, before: float, *, now: float, chunk: int = MAX_PAGE) -> int:
        """Forget records from before a time, and what else has had its time: marks of booked batches after a day,
        revoked keys after thirty. Return how many records went.

        Deletes ``chunk`` rows in a transaction, so that others are never kept waiting for long; loads none.
        """
        old_batches = select(booked_batches.c.id).where(booked_batches.c.booked_at < now - KEPT_BATCHES_S)
        await self._database.delete_in_chunks(booked_batches, old_batches, chunk)
        old_keys = select(keys.c.id).where(keys.c.revoked_at < now - KEPT_REVOKED_KEYS_S)
        await self._database.delete_in_chunks(keys, old_keys, chunk)
        old_requests = select(requests.c.number).where(requests.c.time < before)
        return await self._database.delete_in_chunks(requests, old_requests, chunk)

    async def _found(self, query: Select[Any]) -> tuple[RequestRecord, ...]:
        async def work(connection: AsyncConnection) -> tuple[RequestRecord, ...]:
            return tuple(_RECORD.decode(row.record) for row in await connection.execute(query))

        return await self._database.read(work)


def row_of(record: RequestRecord) -> tuple[Any, ...]:
    """Return a record as ``INSERT`` wants it."""
    try:
        whole = msgspec.json.encode(record)
    except UnicodeEncodeError:  # half of a surrogate pair
        texts = {name: storable(value) for name, value in msgspec.structs.asdict(record).items() if type(value) is str}
        record = msgspec.structs.replace(record, **texts)
        whole = msgspec.json.encode(record)
    # Id, tenant, key and model were checked when they came, or are our own.
    return (
        record.id,
        record.time,
        record.tenant,
        record.key,
        line(record.end_user),
        record.model,
        record.status,
        line(record.error),
        whole,
    )


_COLUMNS = "id, time, tenant, key, end_user, model, status, error, record"

# Written out, because SQLAlchemy's processing of parameters costs some 30 µs a row, and every request is a row.
INSERT_FOR_POSTGRES = f"INSERT INTO requests ({_COLUMNS}) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)"  # noqa: S608
"""The statement that takes one row of ``row_of`` at a time."""


@lru_cache(maxsize=8)
def insert_for_sqlite(num_rows: int) -> str:
    """Return the statement that takes so many rows of ``row_of`` at once, one behind the other."""
    return f"INSERT INTO requests ({_COLUMNS}) VALUES " + ", ".join(["(?, ?, ?, ?, ?, ?, ?, ?, ?)"] * num_rows)  # noqa: S608


_RECORD = msgspec.json.Decoder(RequestRecord)
