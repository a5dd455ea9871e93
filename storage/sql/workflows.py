"""Runs of workflows, event by event: what is in here happened, and what is not may happen again."""

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any

import msgspec
from sqlalchemy import Row, RowMapping, Select, delete, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from core.workflows import RunAnswer, RunEvent, RunLetter, RunRecord, RunState
from storage.sql.database import Conflict, Database
from storage.sql.paging import MAX_PAGE, bounded, precedes
from storage.sql.tables import run_events, run_letters, runs

_BRIEF = [column for column in runs.c if column is not runs.c.graph]
_CHUNK = 100
_ROWS_PER_S = 2_000.0
_BYTES_PER_S = 8e6

# Written out: SQLAlchemy's processing of parameters costs more than the rest of the write. The ids of runs are our own.
_COLUMNS = "run, number, body"
_INSERT_FOR_POSTGRES = f"INSERT INTO run_events ({_COLUMNS}) VALUES ($1, $2, $3)"  # noqa: S608


class Change(msgspec.Struct, frozen=True):
    """Events of a run, the next ones, and the state in which they leave it; and answers to letters, with which they
    are kept or not at all."""

    run: str
    events: tuple[RunEvent, ...]
    state: RunState
    at: float
    answers: tuple[RunAnswer, ...] = ()


class News(msgspec.Struct, frozen=True):
    """What a run is now, without its graph, and events that have happened to it. ``has_more``: there are others."""

    record: RunRecord
    events: tuple[RunEvent, ...]
    has_more: bool


class Workflows:
    """Keeps runs and their events, and letters to those who have them. Every method is one transaction."""

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

    async def write(self, owner: str, changes: Sequence[Change]) -> None:
        """Keep what has happened to some of an owner's runs: all of it, or after an error nothing.

        Raises ``Conflict`` where a run has another owner by now, or a letter that is answered was taken back. A large
        batch, as there is after an outage, may take longer than the database's timeout, by a second for each 2,000 rows
        or 8 MB.
        """
        rows = [(event.run, event.number, event.body) for change in changes for event in change.events]
        alike: dict[tuple[RunState, float], list[str]] = defaultdict(list)
        for change in changes:
            alike[change.state, change.at].append(change.run)

        async def work(connection: AsyncConnection) -> None:
            for (state, at), names in alike.items():
                for some in _parts(names):
                    theirs = (runs.c.id.in_(some)) & (runs.c.owner == owner)
                    done = await connection.execute(update(runs).where(theirs).values(state=state, updated_at=at))
                    if done.rowcount != len(some):
                        raise Conflict("a run has another owner")
            if self._database.is_sqlite:
                await _insert_in_sqlite(connection, rows)
            elif rows:
                await connection.exec_driver_sql(_INSERT_FOR_POSTGRES, rows)
            for change in changes:
                for answer in change.answers:
                    await _answer(connection, answer)

        more_s = len(rows) / _ROWS_PER_S + sum(len(body) for _, _, body in rows) / _BYTES_PER_S
        await self._database.write(work, timeout_s=self._database.timeout_s + more_s)

    async def run(self, run: str) -> RunRecord | None:
        """Return a run; None where there is none (any more)."""
        query = select(runs).where(runs.c.id == run)

        async def work(connection: AsyncConnection) -> RunRecord | None:
            row = (await connection.execute(query)).mappings().one_or_none()
            return _record(row) if row is not None else None

        return await self._database.read(work)

    async def events(self, run: str, after: int = 0, limit: int = MAX_PAGE) -> tuple[RunEvent, ...]:
        """Return the events of a run in their order, from the one behind number ``after``."""
        query = _events(run, after, bounded(limit))

        async def work(connection: AsyncConnection) -> tuple[RunEvent, ...]:
            return tuple(map(_event, await connection.execute(query)))

        return await self._database.read(work)

    async def news(self, run: str, after: int, limit: int = MAX_PAGE) -> News | None:
        """Return a run with its events behind number ``after``; None where there is none (any more)."""
        size = bounded(limit)
        brief, more = select(*_BRIEF).where(runs.c.id == run), _events(run, after, size)

        async def work(connection: AsyncConnection) -> News | None:
            row = (await connection.execute(brief)).mappings().one_or_none()
            if row is None:
                return None
            events = tuple(map(_event, await connection.execute(more)))
            return News(_record(row), events, len(events) == size)

        return await self._database.read(work)

    async def claim(self, owner: str, now: float, until: float, known: Collection[str] = ()) -> tuple[RunRecord, ...]:
        """Have the runs that have not ended be the owner's from now on: its own, and those that nobody's lease holds
        any more. Return those of them that are not ``known``, the oldest first."""
        is_open = (runs.c.state == "running") & ((runs.c.owner == owner) | (runs.c.leased_until < now))
        values = {"owner": owner, "leased_until": until}

        async def work(connection: AsyncConnection) -> tuple[RunRecord, ...]:
            claimed = await connection.scalars(update(runs).where(is_open).values(values).returning(runs.c.id))
            found: list[RunRecord] = []
            for some in _parts([run for run in claimed if run not in known]):
                rows = await connection.execute(select(runs).where(runs.c.id.in_(some)))
                found += map(_record, rows.mappings())
            return tuple(sorted(found, key=lambda run: run.created_at))

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
        """Return a tenant's runs without their graphs, newest first. ``after``: time and id of the last one of the page
        before."""
        query = select(*_BRIEF).where(runs.c.tenant == tenant)
        if state is not None:
            query = query.where(runs.c.state == state)
        if after is not None:
            query = query.where(precedes((runs.c.created_at, runs.c.id), after))
        query = query.order_by(runs.c.created_at.desc(), runs.c.id.desc()).limit(bounded(limit))

        async def work(connection: AsyncConnection) -> tuple[RunRecord, ...]:
            return tuple(map(_record, (await connection.execute(query)).mappings()))

        return await self._database.read(work)

    async def prune(self, before: float, *, chunk: int = MAX_PAGE) -> int:
        """Forget runs that ended before a time, with their events, ``chunk`` at a time; return how many."""
        old = select(runs.c.id).where(runs.c.state != "running", runs.c.updated_at < before)
        return await self._database.delete_in_chunks(runs, old, chunk)

    # Letters

    async def send(self, run: str, body: bytes) -> int:
        """Leave a letter for whoever has a run, and return its number. Raises ``Conflict`` where there is no such run
        (any more)."""
        add = insert(run_letters).values(run=run, body=body).returning(run_letters.c.number)

        async def work(connection: AsyncConnection) -> int:
            return int((await connection.execute(add)).scalar_one())

        return await self._database.write(work)

    async def with_letters(self) -> frozenset[str]:
        """Return the runs that have letters which are not answered. A small read, for whoever asks again and again."""
        rows = await self._database.poll("SELECT DISTINCT run FROM run_letters WHERE answer IS NULL")
        return frozenset(str(run) for (run,) in rows)

    async def letters(self, names: Collection[str]) -> tuple[RunLetter, ...]:
        """Return letters to these runs that are not answered, in their order, at most a page of them."""
        columns = run_letters.c.number, run_letters.c.run, run_letters.c.body
        query = select(*columns).where(run_letters.c.run.in_(list(names)[:MAX_PAGE]), run_letters.c.answer.is_(None))
        query = query.order_by(run_letters.c.number).limit(MAX_PAGE)

        async def work(connection: AsyncConnection) -> tuple[RunLetter, ...]:
            return tuple(RunLetter(*row) for row in await connection.execute(query))

        return await self._database.read(work)

    async def answered(self, number: int) -> tuple[RunState, bool] | None:
        """Return the state of the run that a letter is for, and whether it is answered; None where both are gone."""
        joined = run_letters.join(runs, runs.c.id == run_letters.c.run)
        query = select(runs.c.state, run_letters.c.answer.is_not(None)).select_from(joined)
        query = query.where(run_letters.c.number == number)

        async def work(connection: AsyncConnection) -> tuple[RunState, bool] | None:
            row = (await connection.execute(query)).one_or_none()
            return (row[0], bool(row[1])) if row is not None else None

        return await self._database.read(work)

    async def take_back(self, number: int) -> RunAnswer | None:
        """Take a letter away and return its answer; None if it has none, and then it will never be done."""
        query = delete(run_letters).where(run_letters.c.number == number).returning(run_letters.c.answer)

        async def work(connection: AsyncConnection) -> RunAnswer | None:
            answer = await connection.scalar(query)
            return RunAnswer(number, answer) if answer is not None else None

        return await self._database.write(work)


async def _insert_in_sqlite(connection: AsyncConnection, rows: Sequence[tuple[str, int, bytes]]) -> None:
    """Insert with as few steps as can be: each gives up the interpreter, and waits for it."""
    for size in (_CHUNK, 10, 1):
        num, rest = divmod(len(rows), size)
        if num:
            many = [tuple(chain.from_iterable(rows[at * size : (at + 1) * size])) for at in range(num)]
            await connection.exec_driver_sql(_insert_for_sqlite(size), many)
        rows = rows[len(rows) - rest :]


@lru_cache(maxsize=3)
def _insert_for_sqlite(num_rows: int) -> str:
    return f"INSERT INTO run_events ({_COLUMNS}) VALUES " + ", ".join(["(?, ?, ?)"] * num_rows)  # noqa: S608


async def _answer(connection: AsyncConnection, answer: RunAnswer) -> None:
    letter = (run_letters.c.number == answer.number) & run_letters.c.answer.is_(None)
    if (await connection.execute(update(run_letters).where(letter).values(answer=answer.body))).rowcount == 0:
        raise Conflict("a letter was taken back")


def _events(run: str, after: int, limit: int) -> Select[Any]:
    query = select(run_events).where(run_events.c.run == run, run_events.c.number > after)
    return query.order_by(run_events.c.number).limit(limit)


def _event(row: Row[Any]) -> RunEvent:
    return RunEvent(*row)


def _record(row: RowMapping) -> RunRecord:
    columns = {str(name): value for name, value in row.items()}
    return RunRecord(**{"graph": b"", **columns})


def _parts(names: Sequence[str]) -> Iterator[Sequence[str]]:
    """A statement takes only so many values."""
    for at in range(0, len(names), MAX_PAGE):
        yield names[at : at + MAX_PAGE]
