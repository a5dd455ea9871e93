"""One database: a pool of connections, transactions with a hard time limit, and one error for "not reachable"."""

import asyncio
import os
import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import closing
from copy import copy
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import asyncpg
import msgspec
from sqlalchemy import URL, Connection, Delete, Select, Table, delete, event, make_url
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import (
    ArgumentError,
    DataError,
    DBAPIError,
    IntegrityError,
    ProgrammingError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from storage.sql.standing import Poller, Standing, StandingPostgres, StandingSqlite

T = TypeVar("T")
Work = Callable[[AsyncConnection], Awaitable[T]]

FILE_NAME = "forebay.db"
"""What the SQLite file is called in the state folder."""

_COMMON: dict[str, Any] = {
    "hide_parameters": True,  # in messages of errors
    "pool_use_lifo": True,  # few at work and warm: each has a cache of pages, or of prepared statements, of its own
    "json_serializer": lambda value: msgspec.json.encode(value).decode(),
    "json_deserializer": msgspec.json.decode,
}
_CLEANUP_S = 3.0
_RECYCLE_S = 1800
_POSTGRES_PARAMETERS = {"host", "port", "sslmode"}
_WRITES = "forebay_writes"


class StorageUnavailable(OSError):
    """The database cannot be reached, or did not answer in time. Nothing was changed, as far as can be known."""


class Conflict(Exception):
    """Somebody else was first: the row is there already, or is no longer the one that was read."""


class Missing(LookupError):
    """There is no such row."""


class BadUrl(ValueError):
    """The address of the database is none that can be used; the message says what would be right."""


def sqlite_url(path: Path) -> str:
    """Return the address of a SQLite file."""
    return URL.create("sqlite", database=str(path)).render_as_string(hide_password=False)


class Database:
    """A database by its address: ``sqlite:///PATH`` or ``postgresql://user:password@host/name``.

    ``pool``: how many connections there are at most; they are opened when first needed. ``timeout_s``: how long a
    transaction may take in all, connecting included. An async context manager: inside it the file, if it is one, exists
    (0600, in a folder that is made 0700); leaving it closes every connection. Raises ``BadUrl``.
    """

    def __init__(self, url: str, *, pool: int = 5, timeout_s: float = 5.0) -> None:
        self._url = _checked(url)
        self.timeout_s = timeout_s
        """What a transaction may take where nothing else is said."""
        self._is_ready: Callable[[], bool] = _always
        self._late: set[asyncio.Task[Any]] = set()
        self._poller = Poller(self._open_standing)
        self._engine = (_sqlite if self.is_sqlite else _postgres)(self._url, pool, timeout_s)

    @property
    def is_sqlite(self) -> bool:
        """Whether it is a file; else it is a PostgreSQL server."""
        return self._url.get_backend_name() == "sqlite"

    @property
    def path(self) -> Path | None:
        """The file, if it is one."""
        return Path(self._url.database or "") if self.is_sqlite else None

    @property
    def address(self) -> str:
        """The address without its password, for people."""
        return self._url.set(drivername=self._url.get_backend_name()).render_as_string(hide_password=True)

    @property
    def bare_address(self) -> str:
        """The address with no password in it, as other programs take it."""
        url = self._url.set(drivername=self._url.get_backend_name())
        return url._replace(password=None).render_as_string()

    def once(self, is_ready: Callable[[], bool]) -> Self:
        """Return the same database for those who have to wait for its tables: as if away until ``is_ready``."""
        waiting = copy(self)
        waiting._is_ready = is_ready
        return waiting

    async def __aenter__(self) -> Self:
        if (path := self.path) is not None:
            try:
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
            except OSError as error:
                raise StorageUnavailable(f"cannot open the database {path}: {error.strerror}") from error
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        closing = asyncio.create_task(self._engine.dispose())
        tasks = {closing, asyncio.create_task(self._poller.close()), *self._late}
        _, pending = await asyncio.wait(tasks, timeout=_CLEANUP_S)
        for task in pending:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def insert(self, table: Table) -> sqlite.Insert | postgresql.Insert:
        """Return an insert that can say what happens where the row exists already."""
        return sqlite.insert(table) if self.is_sqlite else postgresql.insert(table)

    async def read(self, work: Work[T], *, timeout_s: float | None = None) -> T:
        """Return what ``work`` makes of a connection, in one transaction that changes nothing. Raises
        ``StorageUnavailable``, also when it took longer than ``timeout_s`` (default: the database's own)."""
        return await self._run(partial(self._transact, work, False), timeout_s=timeout_s)

    async def write(self, work: Work[T], *, timeout_s: float | None = None) -> T:
        """Likewise, in a transaction that is committed when ``work`` returns and undone when it raises.

        In SQLite it is the only one that writes at its time. Raises ``Conflict`` when a row exists that may not.
        """
        return await self._run(partial(self._transact, work, True), timeout_s=timeout_s)

    async def poll(self, query: str) -> list[tuple[Any, ...]]:
        """Return the rows of a small read that is made again and again, over one connection that is kept for it.

        Others who poll wait for their turn. Raises ``StorageUnavailable``; the next call then connects anew.
        """
        return await self._run(lambda _: self._poller.rows(query), timeout_s=None)

    async def delete_in_chunks(self, table: Table, ids: Select[Any], chunk: int) -> int:
        """Delete the rows whose primary key the query names, ``chunk`` in a transaction; return how many there were."""
        total = 0
        while True:
            (key,) = table.primary_key.columns
            query = delete(table).where(key.in_(ids.limit(chunk)))
            deleted = await self.write(partial(_delete, query))
            total += deleted
            if deleted < chunk:
                return total

    async def overwrite(self) -> None:
        """Have nothing left of deleted rows in a SQLite file and its log; PostgreSQL sees to that by itself, later."""
        if (path := self.path) is not None:
            try:
                await asyncio.to_thread(_truncate_log, path, self.timeout_s)
            except sqlite3.Error as error:
                raise StorageUnavailable(f"{self.address} cannot be used: {error}") from error

    async def _run(self, action: Callable[[list[AsyncConnection]], Awaitable[T]], *, timeout_s: float | None) -> T:
        """Run it in a task of its own: cleaning up after a server that says nothing takes time the caller lacks."""
        if not self._is_ready():
            raise StorageUnavailable(f"{self.address} has not been reached since the start")
        used: list[AsyncConnection] = []
        task = asyncio.ensure_future(action(used))
        try:
            await asyncio.wait({task}, timeout=timeout_s or self.timeout_s)
        finally:
            if not task.done():
                self._abandon(task, used)
        if not task.done():
            raise StorageUnavailable(f"{self.address} did not answer in {timeout_s or self.timeout_s:g} s")
        try:
            return task.result()
        except IntegrityError as error:
            raise Conflict("the row exists already") from error
        except (DataError, ProgrammingError):
            raise  # our own fault
        except (DBAPIError, PoolTimeout, sqlite3.Error, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            raise StorageUnavailable(f"{self.address} cannot be used: {_first_line(error)}") from error
        except StorageUnavailable:
            raise
        except OSError as error:
            raise StorageUnavailable(f"{self.address} cannot be reached: {error}") from error

    async def _transact(self, work: Work[T], writes: bool, used: list[AsyncConnection]) -> T:
        async with self._engine.connect() as connection:
            used.append(connection)
            await connection.execution_options(**{_WRITES: writes})
            async with connection.begin():
                return await work(connection)

    async def _open_standing(self) -> Standing:
        if self.is_sqlite:
            return await StandingSqlite.open(self._url, self.timeout_s)
        return await StandingPostgres.open(self._url, self.timeout_s, _arguments(self._url, self.timeout_s))

    def _abandon(self, task: asyncio.Task[T], used: list[AsyncConnection]) -> None:
        """Let a transaction end by itself, soon: its connection is cut, so that whatever it waits for fails."""
        self._late.add(task)
        task.add_done_callback(self._forget)
        if used and not self.is_sqlite:
            connection = used[0].sync_connection
            fairy = None if connection is None or connection.closed else connection.connection
            if fairy is not None and isinstance(fairy.driver_connection, asyncpg.Connection):
                fairy.driver_connection.terminate()
        task.cancel()

    def _forget(self, task: asyncio.Task[T]) -> None:
        self._late.discard(task)
        if not task.cancelled():
            task.exception()  # nobody else will ask for it


def _checked(text: str) -> URL:
    """Return the address with the driver that we use. The message of an error holds no password."""
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        url = None
    if url is not None and url.drivername == "sqlite" and url.database and not url.query:
        return url.set(drivername="sqlite+aiosqlite")
    if url is None or url.drivername not in {"postgresql", "postgres"} or not url.database:
        raise BadUrl(
            "the database's address has to look like sqlite:///folder/forebay.db or "
            "postgresql://user:password@host:5432/name"
        )
    if unknown := sorted(set(url.query) - _POSTGRES_PARAMETERS):
        known = ", ".join(sorted(_POSTGRES_PARAMETERS))
        raise BadUrl(f"the database's address has an unknown parameter {unknown[0]!r}; known are {known}")
    return url.set(drivername="postgresql+asyncpg")


def _arguments(url: URL, timeout_s: float) -> dict[str, Any]:
    """Return what asyncpg is told beside the address."""
    arguments: dict[str, Any] = {
        "timeout": timeout_s,
        "server_settings": {
            "application_name": "forebay",
            "statement_timeout": str(int(timeout_s * 1000)),
            "idle_in_transaction_session_timeout": str(int(timeout_s * 2000)),
        },
    }
    if mode := url.query.get("sslmode"):
        arguments["ssl"] = mode
    return arguments


def _postgres(url: URL, pool: int, timeout_s: float) -> AsyncEngine:
    return create_async_engine(
        url.difference_update_query(["sslmode"]),
        pool_size=pool,
        max_overflow=0,
        pool_timeout=timeout_s,
        pool_pre_ping=True,
        pool_recycle=_RECYCLE_S,
        connect_args=_arguments(url, timeout_s),
        **_COMMON,
    )


def _sqlite(url: URL, pool: int, timeout_s: float) -> AsyncEngine:
    engine = create_async_engine(url, pool_size=pool, max_overflow=0, pool_timeout=timeout_s, **_COMMON)

    @event.listens_for(engine.sync_engine, "connect")
    def prepare(connection: Any, _record: object) -> None:
        connection.isolation_level = None  # the driver begins no transactions: the listener below does
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout = {int(timeout_s * 800)}")  # less than ours: it can say why
        cursor.execute("PRAGMA cache_size = -1024")  # KiB: what a batch touches; the system holds the rest anyway
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.execute("PRAGMA secure_delete = ON")  # what is erased is overwritten
        cursor.close()

    @event.listens_for(engine.sync_engine, "begin")
    def begin(connection: Connection) -> None:
        # A transaction that reads first and writes later cannot wait for its turn: writers take it at once.
        writes = connection.get_execution_options().get(_WRITES, False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


async def _delete(query: Delete, connection: AsyncConnection) -> int:
    return (await connection.execute(query)).rowcount


def _truncate_log(path: Path, timeout_s: float) -> None:
    """Move what is in the write-ahead log into the file, waiting for whoever still reads from it."""
    with closing(sqlite3.connect(path, timeout=timeout_s)) as connection:
        (is_busy, *_) = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    if is_busy:
        raise sqlite3.OperationalError("another process reads from its write-ahead log")


def _always() -> bool:
    return True


def _first_line(error: BaseException) -> str:
    original = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    return str(original).strip().split("\n", 1)[0] or type(original).__name__
