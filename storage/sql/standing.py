"""A connection that stays open for one small read that is made again and again.

Through SQLAlchemy and its pool such a read costs 2.5 ms of processor time on a machine that is otherwise idle, most of
it in wake-ups of threads (SQLite) and in round trips (PostgreSQL); straight through the driver it costs 0.6 ms.
"""

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, Protocol, Self

import aiosqlite
import asyncpg
from sqlalchemy import URL


class Standing(Protocol):
    """An open connection of one driver, used by one task at a time."""

    async def rows(self, query: str) -> list[tuple[Any, ...]]:
        """Return all rows of a read. Raises what the driver raises."""
        ...

    async def close(self) -> None:
        """Close it, whatever state it is in."""
        ...


class StandingSqlite:
    """A connection to a SQLite file, with the one thread that waits for the disk."""

    def __init__(self, connection: aiosqlite.Connection) -> None:
        self._connection = connection

    @classmethod
    async def open(cls, url: URL, timeout_s: float) -> Self:
        """Open the file; raises ``sqlite3.Error``."""
        return cls(await aiosqlite.connect(url.database or "", timeout=timeout_s, isolation_level=None))

    async def rows(self, query: str) -> list[tuple[Any, ...]]:
        """Return all rows of a read."""
        return [tuple(row) for row in await self._connection.execute_fetchall(query)]

    async def close(self) -> None:
        """End the thread; a read that is under way is interrupted."""
        with suppress(sqlite3.Error, ValueError):  # it has been closed
            await self._connection.interrupt()
        await self._connection.close()


class StandingPostgres:
    """A connection to a PostgreSQL server."""

    def __init__(self, connection: "asyncpg.Connection[asyncpg.Record]") -> None:
        self._connection = connection

    @classmethod
    async def open(cls, url: URL, timeout_s: float, arguments: dict[str, Any]) -> Self:
        """Connect; raises what asyncpg raises."""
        plain = url.set(drivername="postgresql").difference_update_query(["sslmode"])
        dsn = plain.render_as_string(hide_password=False)
        return cls(await asyncpg.connect(dsn, **arguments, command_timeout=timeout_s))

    async def rows(self, query: str) -> list[tuple[Any, ...]]:
        """Return all rows of a read; the statement stays prepared."""
        return [tuple(row) for row in await self._connection.fetch(query)]

    async def close(self) -> None:
        """Cut it: a polite end would wait for a server that says nothing."""
        self._connection.terminate()
        await asyncio.sleep(0)


class Poller:
    """Keeps one standing connection; opens it when it is first needed, and anew after a read that failed."""

    def __init__(self, connect: Callable[[], Awaitable[Standing]]) -> None:
        self._connect = connect
        self._standing: Standing | None = None
        self._turn = asyncio.Lock()

    async def rows(self, query: str) -> list[tuple[Any, ...]]:
        """Return all rows of a read, when those who asked before have theirs. Raises what the driver raises."""
        async with self._turn:
            try:
                if self._standing is None:
                    self._standing = await self._connect()
                return await self._standing.rows(query)
            except BaseException:
                await self.close()
                raise

    async def close(self) -> None:
        """Close the connection, if there is one."""
        standing, self._standing = self._standing, None
        if standing is not None:
            await standing.close()
