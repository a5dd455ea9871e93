"""Copy a SQLite database while it is in use, and put a copy in its place while it is not.

PostgreSQL has tools of its own for that; ``pg_dump_command`` and ``pg_restore_command`` say how to call them.
"""

import os
import shlex
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from storage.sql.database import Database
from storage.sql.schema import refuse_newer

_PATIENCE_S = 5.0
_BUSY_S = 0.5


class BackupError(Exception):
    """A copy could not be made or put in place; nothing was changed. The message says what to do."""


def backup(path: Path, target: Path) -> None:
    """Copy the database at ``path`` into the new file ``target`` (0600), as it is at one moment; users may go on.

    Takes about a second for each few hundred megabytes. Raises ``BackupError``.
    """
    if not path.is_file():
        raise BackupError(f"there is no database at {path}")
    if target.exists():
        raise BackupError(f"{target} exists; give the name of a new file")
    with _faults(path), _draft(target) as draft:
        _copy(path, draft, journal="DELETE")


def restore(source: Path, path: Path) -> None:
    """Put a copy of the database ``source`` in the place of the one at ``path``, which may be missing or broken.

    Refuses a file that is no whole database of ours or is newer than this code (``NewerDatabase``), and refuses while
    anybody has the old one open. Raises ``BackupError``.
    """
    if not source.is_file():
        raise BackupError(f"there is no file {source}")
    with _faults(source):
        refuse_newer(_revision(source))
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _unused(path), _faults(source), _draft(path) as draft:
        _copy(source, draft, journal="WAL")
        for rest in ("-wal", "-shm"):  # of a broken one: they would be taken for the new one's
            path.with_name(path.name + rest).unlink(missing_ok=True)


def pg_dump_command(database: Database, target: Path) -> str:
    """Return the command that backs up a PostgreSQL database; it asks for the password."""
    return f"pg_dump --format=custom --file={shlex.quote(str(target))} {shlex.quote(database.bare_address)}"


def pg_restore_command(database: Database, source: Path) -> str:
    """Return the command that puts such a backup in the place of what is there; it asks for the password."""
    return (
        "pg_restore --clean --if-exists --no-owner --single-transaction "
        f"--dbname={shlex.quote(database.bare_address)} {shlex.quote(str(source))}"
    )


def _copy(source: Path, target: Path, *, journal: str) -> None:
    with closing(_opened(source, "ro")) as old, closing(_opened(target, "rw")) as new:
        old.backup(new)
        (verdict,) = new.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise BackupError(f"{source} is damaged: {verdict}")
        new.execute(f"PRAGMA journal_mode = {journal}")


def _revision(source: Path) -> str:
    with closing(_opened(source, "ro")) as connection:
        row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    if row is None:
        raise BackupError(f"{source} holds no tables of Forebay")
    return str(row[0])


def _opened(path: Path, mode: str) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode={mode}", uri=True, timeout=_PATIENCE_S)


@contextmanager
def _draft(target: Path) -> Iterator[Path]:
    """Give a new file (0600) that becomes ``target`` once the body is through, and goes if it fails."""
    draft = target.with_name(f".{target.name}.draft")
    try:
        draft.unlink(missing_ok=True)
        os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        yield draft
        draft.replace(target)
    except OSError as error:
        raise BackupError(f"cannot write {target}: {error.strerror}") from error
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def _unused(path: Path) -> Iterator[None]:
    """Hold a database that nobody else has open; leaving its write-ahead log takes having it alone."""
    if not path.is_file():
        yield
        return
    with closing(sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None)) as connection:
        try:
            connection.execute("PRAGMA journal_mode = DELETE")
            connection.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                raise BackupError(f"the database {path} is in use; stop the gateway first") from error
        except sqlite3.DatabaseError:
            pass  # broken: that is why another one is to take its place
        yield


@contextmanager
def _faults(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise BackupError(f"{path} cannot be read as a database of Forebay: {error}") from error
