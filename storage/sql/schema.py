"""Bring a database's tables to the revision that this code knows."""

import asyncio
import sqlite3
import time
from collections.abc import Iterable
from contextlib import closing
from functools import lru_cache
from pathlib import Path
from typing import Any

from alembic.migration import MigrationContext
from alembic.operations import Operations
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import AsyncConnection

from storage.sql.database import Database, StorageUnavailable

UPGRADE_TIMEOUT_S = 600.0

_FOLDER = Path(__file__).parent / "migrations"
_LOCK = 0x464F5245424159  # any number that no other program is likely to lock
_WAL_ATTEMPTS = 50
_WAL_PAUSE_S = 0.1


class NewerDatabase(Exception):
    """The tables are of a revision that this code does not know; the message says what to do."""


class DowngradeRefused(Exception):
    """Tables only go forward; the message says what to do instead."""


def head() -> str:
    """Return the revision that this code knows."""
    found = _scripts().get_current_head()
    assert found is not None
    return found


async def current(database: Database) -> str | None:
    """Return the revision of the database's tables; None if there are none yet. Raises ``StorageUnavailable``."""
    return await database.read(lambda connection: connection.run_sync(_revision))


async def is_current(database: Database) -> bool:
    """Return whether the tables are those that this code knows. Raises ``StorageUnavailable``, ``NewerDatabase``."""
    revision = await current(database)
    refuse_newer(revision)
    return revision == head()


async def upgrade(database: Database, *, to: str | None = None) -> tuple[str | None, str]:
    """Bring the tables to revision ``to`` (default: the newest) in one transaction; return the old and new revision.

    Several processes may do so at once: one works, the others wait and find it done. Takes as long as the changes do,
    at most ten minutes. Raises ``StorageUnavailable``; ``NewerDatabase``, ``DowngradeRefused`` with nothing changed.
    """
    if (path := database.path) is not None:
        await asyncio.to_thread(_use_wal, path)
    target = to or head()

    async def work(connection: AsyncConnection) -> str | None:
        if not database.is_sqlite:
            milliseconds = int(UPGRADE_TIMEOUT_S * 1000)
            await connection.execute(text(f"SET LOCAL statement_timeout = {milliseconds}"))
            await connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
        return await connection.run_sync(_upgrade, target)

    return await database.write(work, timeout_s=UPGRADE_TIMEOUT_S), target


def refuse_newer(revision: str | None) -> None:
    """Raise ``NewerDatabase`` for a revision that this code does not know."""
    if revision is not None and revision not in _order():
        raise NewerDatabase(
            f"the database's tables are of revision {revision}, and this version of Forebay knows them up to "
            f"{head()}. Run the version that wrote them, or restore a backup from before."
        )


def refuse_downgrade(revision: str | None, target: str) -> None:
    """Raise ``DowngradeRefused`` for a target that is older than what is there."""
    if revision is not None and _order().index(target) < _order().index(revision):
        raise DowngradeRefused(
            f"the database's tables are of revision {revision} and do not go back to {target}. "
            "Restore a backup from before the upgrade: `forebay db restore FILE`."
        )


def _upgrade(connection: Connection, target: str) -> str | None:
    before = _revision(connection)
    refuse_newer(before)
    refuse_downgrade(before, target)

    def steps(revision: Any, _context: MigrationContext) -> Iterable[Any]:
        return _scripts()._upgrade_revs(target, revision)

    context = MigrationContext.configure(connection, opts={"fn": steps})
    context.run_migrations(op=Operations(context))
    return before


def _revision(connection: Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()


def _use_wal(path: Path) -> None:
    """Have readers and the writer not wait for each other. The file remembers it; changing it needs the file alone."""
    for attempt in range(_WAL_ATTEMPTS):
        try:
            with closing(sqlite3.connect(path, timeout=_WAL_PAUSE_S)) as connection:
                connection.execute("PRAGMA journal_mode = WAL")
                return
        except sqlite3.Error as error:
            if "locked" not in str(error) or attempt == _WAL_ATTEMPTS - 1:
                raise StorageUnavailable(f"the database {path} cannot be used: {error}") from error
        time.sleep(_WAL_PAUSE_S)


@lru_cache(maxsize=1)
def _scripts() -> ScriptDirectory:
    return ScriptDirectory(str(_FOLDER), version_locations=[str(_FOLDER)])


@lru_cache(maxsize=1)
def _order() -> tuple[str, ...]:
    """Return every revision, oldest first."""
    return tuple(script.revision for script in reversed(list(_scripts().walk_revisions())))
