"""Revisions of settings and policies: numbered states of a resource, of which the last is the one that holds."""

from typing import Any, Literal

import msgspec
from sqlalchemy import RowMapping, Select, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from core.records import Revision
from storage.sql.counters import bump, poll
from storage.sql.database import Conflict, Database, Missing
from storage.sql.paging import bounded
from storage.sql.tables import revisions

State = Literal["applied", "canary", "replaced", "rolled_back"]

_COUNTER = "revisions"


class Revisions:
    """Keeps revisions of every resource. What a revision holds never changes; its state does."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def version(self) -> int:
        """Return a number that is a higher one after every change of any resource. Reads one row."""
        return await poll(self._database, _COUNTER)

    async def add(self, revision: Revision) -> None:
        """Keep a new revision; its number has to be the one after the resource's last. Raises ``Conflict``."""
        last = select(func.max(revisions.c.number)).where(revisions.c.resource == revision.resource)
        columns = msgspec.structs.asdict(revision)

        async def work(connection: AsyncConnection) -> None:
            await bump(connection, _COUNTER)
            if revision.number != (await connection.scalar(last) or 0) + 1:
                raise Conflict(f"{revision.resource} has been changed meanwhile; look at it and try again")
            await connection.execute(insert(revisions).values(columns))

        await self._database.write(work)

    async def latest(self, resource: str) -> Revision | None:
        """Return the one with the highest number, in whatever state; None if there is none yet."""
        return next(iter(await self.list(resource, limit=1)), None)

    async def list(self, resource: str, after: int | None = None, limit: int = 100) -> tuple[Revision, ...]:
        """Return revisions, newest first, from the one before number ``after``."""
        query = select(revisions).where(revisions.c.resource == resource)
        if after is not None:
            query = query.where(revisions.c.number < after)
        return await self._found(query.order_by(revisions.c.number.desc()).limit(bounded(limit)))

    async def revision(self, resource: str, number: int) -> Revision | None:
        """Return one, or None if there is none of this number."""
        query = select(revisions).where(revisions.c.resource == resource, revisions.c.number == number)
        return next(iter(await self._found(query)), None)

    async def set_state(self, resource: str, number: int, state: State, *, expires_at: float | None = None) -> None:
        """Change what a revision is; ``expires_at`` is set too, or taken away. Raises ``Missing``."""
        change = update(revisions).where(revisions.c.resource == resource, revisions.c.number == number)

        async def work(connection: AsyncConnection) -> None:
            await bump(connection, _COUNTER)
            done = await connection.execute(change.values(state=state, expires_at=expires_at))
            if done.rowcount == 0:
                raise Missing(f"{resource} has no revision {number}")

        await self._database.write(work)

    async def _found(self, query: Select[Any]) -> tuple[Revision, ...]:
        async def work(connection: AsyncConnection) -> tuple[Revision, ...]:
            return tuple(_revision(row) for row in (await connection.execute(query)).mappings())

        return await self._database.read(work)


def _revision(row: RowMapping) -> Revision:
    return msgspec.convert({str(name): value for name, value in row.items()}, Revision)
