"""The audit log: what operators did and tried to do. Rows are only ever added."""

from typing import Any

import msgspec
from sqlalchemy import RowMapping, Select, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from core.records import AuditEntry
from storage.sql.database import Database
from storage.sql.paging import bounded, precedes
from storage.sql.tables import audit


class Audit:
    """Keeps entries and finds them."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, entry: AuditEntry) -> None:
        """Keep an entry. Raises ``Conflict`` if its id is there already."""
        columns = msgspec.structs.asdict(entry)

        async def work(connection: AsyncConnection) -> None:
            await connection.execute(insert(audit).values(columns))

        await self._database.write(work)

    async def search(
        self,
        *,
        actor: str | None = None,
        action: str | None = None,
        target: str | None = None,
        since: float | None = None,
        until: float | None = None,
        after: tuple[float, str] | None = None,
        limit: int = 100,
    ) -> tuple[AuditEntry, ...]:
        """Return the entries that fit, newest first. ``since`` is included, ``until`` is not.

        ``after``: time and id of the last entry of the page before. Time is found by an index; for the other
        conditions the rows in between are read.
        """
        query: Select[Any] = select(audit).order_by(audit.c.time.desc(), audit.c.id.desc()).limit(bounded(limit))
        for column, wanted in (("actor", actor), ("action", action), ("target", target)):
            if wanted is not None:
                query = query.where(audit.c[column] == wanted)
        if since is not None:
            query = query.where(audit.c.time >= since)
        if until is not None:
            query = query.where(audit.c.time < until)
        if after is not None:
            query = query.where(precedes((audit.c.time, audit.c.id), after))

        async def work(connection: AsyncConnection) -> tuple[AuditEntry, ...]:
            return tuple(_entry(row) for row in (await connection.execute(query)).mappings())

        return await self._database.read(work)


def _entry(row: RowMapping) -> AuditEntry:
    return msgspec.convert({str(name): value for name, value in row.items()}, AuditEntry)
