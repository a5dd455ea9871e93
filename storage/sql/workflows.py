"""Runs of workflows, event by event: what is in here happened, and what is not may happen again."""

from collections.abc import Sequence
from typing import Any

import msgspec
from sqlalchemy import RowMapping, Select, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from core.workflows import RunEvent, RunRecord, RunState
from storage.sql.database import Database
from storage.sql.paging import MAX_PAGE, bounded, precedes
from storage.sql.tables import run_events, runs


class Change(msgspec.Struct, frozen=True):
    """Events of a run, the next ones, and the state in which they leave it."""

    run: str
    events: tuple[RunEvent, ...]
    state: RunState
    at: float


class Workflows:
    """Keeps runs and their events. Every method is one transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def accept(self, record: RunRecord) -> RunRecord:
        """Keep a new run and return it; or the one that the tenant has submitted under the same idempotency key."""
        known = select(runs).where(runs.c.tenant == record.tenant, runs.c.idempotency == record.idempotency)
        columns = msgspec.structs.asdict(record)

        async def work(connection: AsyncConnection) -> RunRecord:
            add = self._database.insert(runs).values(columns).on_conflict_do_nothing()
            if (await connection.execute(add)).rowcount:
                return record
            return _record((await connection.execute(known)).mappings().one())

        return await self._database.write(work)

    async def write(self, changes: Sequence[Change]) -> None:
        """Keep what has happened to some runs: all of it, or after an error nothing. Raises ``Conflict`` where another
        has written an event of the same number: the run has another owner."""
        rows = [msgspec.structs.asdict(event) for change in changes for event in change.events]

        async def work(connection: AsyncConnection) -> None:
            if rows:
                await connection.execute(insert(run_events), rows)
            for change in changes:
                values = {"state": change.state, "updated_at": change.at}
                await connection.execute(update(runs).where(runs.c.id == change.run).values(values))

        await self._database.write(work)

    async def run(self, run: str) -> RunRecord | None:
        """Return a run; None where there is none (any more)."""
        return next(iter(await self._runs(select(runs).where(runs.c.id == run))), None)

    async def events(self, run: str, after: int = 0, limit: int = MAX_PAGE) -> tuple[RunEvent, ...]:
        """Return the events of a run in their order, from the one behind number ``after``."""
        query = select(run_events).where(run_events.c.run == run, run_events.c.number > after)
        query = query.order_by(run_events.c.number).limit(bounded(limit))

        async def work(connection: AsyncConnection) -> tuple[RunEvent, ...]:
            return tuple(RunEvent(*row) for row in await connection.execute(query))

        return await self._database.read(work)

    async def claim(self, owner: str, now: float, until: float) -> tuple[RunRecord, ...]:
        """Return the runs that have not ended and are the owner's from now on: its own, and those that nobody's lease
        holds any more, the oldest first."""
        is_open = (runs.c.state == "running") & ((runs.c.owner == owner) | (runs.c.leased_until < now))
        values = {"owner": owner, "leased_until": until}

        async def work(connection: AsyncConnection) -> tuple[RunRecord, ...]:
            taken = await connection.execute(update(runs).where(is_open).values(values).returning(*runs.c))
            return tuple(sorted(map(_record, taken.mappings()), key=lambda run: run.created_at))

        return await self._database.write(work)

    async def reopen(self, run: str, owner: str, until: float) -> bool:
        """Make a run that has ended the owner's, and open; False where another has it open."""
        is_free = (runs.c.id == run) & ((runs.c.state != "running") | (runs.c.owner == owner))
        values = {"owner": owner, "leased_until": until, "state": "running"}

        async def work(connection: AsyncConnection) -> bool:
            return (await connection.execute(update(runs).where(is_free).values(values))).rowcount > 0

        return await self._database.write(work)

    async def search(
        self, tenant: str, *, state: RunState | None = None, after: tuple[float, str] | None = None, limit: int = 100
    ) -> tuple[RunRecord, ...]:
        """Return a tenant's runs, newest first. ``after``: time and id of the last one of the page before."""
        query = select(runs).where(runs.c.tenant == tenant)
        if state is not None:
            query = query.where(runs.c.state == state)
        if after is not None:
            query = query.where(precedes((runs.c.created_at, runs.c.id), after))
        return await self._runs(query.order_by(runs.c.created_at.desc(), runs.c.id.desc()).limit(bounded(limit)))

    async def prune(self, before: float, *, chunk: int = MAX_PAGE) -> int:
        """Forget runs that ended before a time, with their events, ``chunk`` at a time; return how many."""
        old = select(runs.c.id).where(runs.c.state != "running", runs.c.updated_at < before)
        return await self._database.delete_in_chunks(runs, old, chunk)

    async def _runs(self, query: Select[Any]) -> tuple[RunRecord, ...]:
        async def work(connection: AsyncConnection) -> tuple[RunRecord, ...]:
            return tuple(_record(row) for row in (await connection.execute(query)).mappings())

        return await self._database.read(work)


def _record(row: RowMapping) -> RunRecord:
    return RunRecord(**{str(name): value for name, value in row.items()})
