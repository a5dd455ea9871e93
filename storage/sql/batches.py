"""Batches of requests: what was asked, how far it is, and who sees to it."""

from collections.abc import Mapping
from typing import Any

import msgspec
from sqlalchemy import ColumnElement, RowMapping, Select, and_, func, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from core.batches import OPEN, BatchRecord, BatchRow, BatchState, RowError
from core.workflows import RunEvent
from storage.sql.database import Database, Missing
from storage.sql.files import publish
from storage.sql.paging import MAX_PAGE, bounded, precedes
from storage.sql.tables import batches, run_events, runs

_COLUMNS = tuple(column for column in batches.c if column.name != "rows")
_ROWS = dict[str, BatchRow]


class Progress(msgspec.Struct, frozen=True):
    """How far a batch is: its record, whether its run is there (still), and the run's events behind a number."""

    batch: BatchRecord
    has_run: bool
    events: tuple[RunEvent, ...]


class Batches:
    """Keeps batches. Every method is one transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def accept(self, record: BatchRecord) -> BatchRecord:
        """Keep a new batch and return it; or the one that the tenant has submitted under the same idempotency key."""
        mine = and_(batches.c.tenant == record.tenant, batches.c.idempotency == record.idempotency)
        columns = _plain(msgspec.structs.asdict(record))

        async def work(connection: AsyncConnection) -> BatchRecord:
            add = self._database.insert(batches).values(columns).on_conflict_do_nothing()
            if (await connection.execute(add)).rowcount:
                return record
            return _record((await connection.execute(select(*_COLUMNS).where(mine))).mappings().one())

        return await self._database.write(work)

    async def num_open(self, tenant: str) -> int:
        """Return how many batches of a tenant have not ended."""
        query = select(func.count()).where(batches.c.tenant == tenant, batches.c.state.in_(OPEN))

        async def work(connection: AsyncConnection) -> int:
            return await connection.scalar(query) or 0

        return await self._database.read(work)

    async def batch(self, batch: str) -> BatchRecord | None:
        """Return a batch; None where there is none (any more)."""
        return next(iter(await self._found(select(*_COLUMNS).where(batches.c.id == batch))), None)

    async def rows(self, batch: str) -> dict[str, BatchRow]:
        """Return a batch's rows by the calls that they are in the run; none where they have not been read."""
        query = select(batches.c.rows).where(batches.c.id == batch)

        async def work(connection: AsyncConnection) -> bytes | None:
            kept: bytes | None = await connection.scalar(query)
            return kept

        kept = await self._database.read(work)
        return msgspec.json.decode(kept, type=_ROWS) if kept is not None else {}

    async def progress(self, batch: str, after: int, limit: int = MAX_PAGE) -> Progress | None:
        """Return how far a batch is, with the events of its run behind number ``after``; None where there is none."""
        wanted = select(*_COLUMNS).where(batches.c.id == batch)

        async def work(connection: AsyncConnection) -> Progress | None:
            row = (await connection.execute(wanted)).mappings().first()
            if row is None:
                return None
            record = _record(row)
            has_run = await connection.scalar(select(func.count()).where(runs.c.id == record.run))
            behind = select(run_events).where(run_events.c.run == record.run, run_events.c.number > after)
            events = await connection.execute(behind.order_by(run_events.c.number).limit(bounded(limit)))
            return Progress(record, bool(has_run), tuple(RunEvent(*event) for event in events))

        return await self._database.read(work)

    async def change(
        self, batch: str, owner: str, among: tuple[BatchState, ...], values: Mapping[str, Any]
    ) -> BatchRecord | None:
        """Change fields of a batch and return it as it is then; or None, with nothing changed, where it is not the
        owner's any more, or in none of the states ``among``. ``values`` may also have ``rows``."""
        is_theirs = and_(batches.c.id == batch, batches.c.owner == owner, batches.c.state.in_(among))
        return await self._update(is_theirs, values)

    async def finish(self, batch: str, owner: str, values: Mapping[str, Any], sizes: Mapping[str, int]) -> BatchRecord:
        """Change fields of a batch that is being finalized, and show the files that it has made (``sizes``: their
        bytes), both or nothing. Raises ``Missing`` where the batch is gone, or not the owner's any more."""
        is_theirs = and_(batches.c.id == batch, batches.c.owner == owner, batches.c.state == "finalizing")
        query = update(batches).where(is_theirs).values(_plain(values)).returning(*_COLUMNS)

        async def work(connection: AsyncConnection) -> BatchRecord:
            row = (await connection.execute(query)).mappings().first()
            if row is None:
                raise Missing(f"the batch {batch} is not this gateway's to finish")
            await publish(connection, sizes)
            return _record(row)

        return await self._database.write(work)

    async def cancel(self, batch: str, at: float) -> BatchRecord | None:
        """Note that somebody wants a batch cancelled, and return it; None where it is too late for that."""
        can_be = and_(batches.c.id == batch, batches.c.state.in_(("validating", "in_progress")))
        return await self._update(can_be, {"state": "cancelling", "cancelling_at": at})

    async def _update(self, which: ColumnElement[bool], values: Mapping[str, Any]) -> BatchRecord | None:
        query = update(batches).where(which).values(_plain(values)).returning(*_COLUMNS)

        async def work(connection: AsyncConnection) -> BatchRecord | None:
            row = (await connection.execute(query)).mappings().first()
            return _record(row) if row is not None else None

        return await self._database.write(work)

    async def claim(self, owner: str, now: float, until: float) -> tuple[BatchRecord, ...]:
        """Return the batches that have not ended and are the owner's from now on, the oldest first: those whose run it
        has; and where no gateway has a run of it, its own, and those that nobody's lease holds any more."""
        has_run = select(runs.c.owner).where(runs.c.id == batches.c.run, runs.c.state == "running")
        who_has_run = has_run.correlate(batches).scalar_subquery()
        is_free = and_(who_has_run.is_(None), or_(batches.c.owner == owner, batches.c.leased_until < now))
        is_open = and_(batches.c.state.in_(OPEN), or_(who_has_run == owner, is_free))
        query = update(batches).where(is_open).values(owner=owner, leased_until=until).returning(*_COLUMNS)

        async def work(connection: AsyncConnection) -> tuple[BatchRecord, ...]:
            taken = (await connection.execute(query)).mappings()
            return tuple(sorted(map(_record, taken), key=lambda batch: batch.created_at))

        return await self._database.write(work)

    async def search(
        self, tenant: str, *, after: tuple[float, str] | None = None, limit: int = 100
    ) -> tuple[BatchRecord, ...]:
        """Return a tenant's batches, newest first. ``after``: time and id of the last one of the page before."""
        query = select(*_COLUMNS).where(batches.c.tenant == tenant)
        if after is not None:
            query = query.where(precedes((batches.c.created_at, batches.c.id), after))
        order = (batches.c.created_at.desc(), batches.c.id.desc())
        return await self._found(query.order_by(*order).limit(bounded(limit)))

    async def prune(self, before: float, *, chunk: int = MAX_PAGE) -> int:
        """Forget batches that ended before a time, ``chunk`` in a transaction; return how many."""
        old = select(batches.c.id).where(batches.c.state.not_in(OPEN), batches.c.ended_at < before)
        return await self._database.delete_in_chunks(batches, old, chunk)

    async def erase(self, tenant: str, end_user: str | None = None, *, chunk: int = MAX_PAGE) -> int:
        """Forget the batches of a tenant, or of one of its end users; return how many."""
        theirs = select(batches.c.id).where(batches.c.tenant == tenant)
        if end_user:
            theirs = theirs.where(batches.c.end_user == end_user)
        return await self._database.delete_in_chunks(batches, theirs, chunk)

    async def _found(self, query: Select[Any]) -> tuple[BatchRecord, ...]:
        async def work(connection: AsyncConnection) -> tuple[BatchRecord, ...]:
            return tuple(_record(row) for row in (await connection.execute(query)).mappings())

        return await self._database.read(work)


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values as columns hold them."""
    plain = dict(values)
    if "errors" in plain:
        plain["errors"] = msgspec.to_builtins(plain["errors"])
    if "rows" in plain:
        plain["rows"] = msgspec.json.encode(plain["rows"])
    return plain


def _record(row: RowMapping) -> BatchRecord:
    values = {str(name): value for name, value in row.items()}
    return BatchRecord(**{**values, "errors": msgspec.convert(values["errors"], tuple[RowError, ...])})
