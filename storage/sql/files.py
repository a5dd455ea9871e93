"""Files of tenants, in pieces: so that one of any size is written and read with little memory."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from sqlalchemy import Select, delete, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from core.batches import FileRecord, Purpose
from storage.sql.database import Database
from storage.sql.paging import bounded, follows, precedes
from storage.sql.tables import file_parts, files

PART = 1 << 20
"""Bytes of every piece of a file but the last."""
_PARTS_AT_ONCE = 4
_FILES_AT_ONCE = 10  # each is many pieces

_COLUMNS = tuple(column for column in files.c if column.name != "is_whole")


class Files:
    """Keeps files. Every method is one transaction, unless it says otherwise."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def keep(self, record: FileRecord, content: bytes) -> None:
        """Keep a file, in several transactions: nobody is shown it before the last."""
        await self.begin(record)
        await self.append(record.id, 0, content)

        async def work(connection: AsyncConnection) -> None:
            await publish(connection, {record.id: len(content)})

        await self._database.write(work)

    async def begin(self, record: FileRecord) -> None:
        """Begin a file, which nobody is shown yet; what was begun of it before is thrown away."""
        columns = {**msgspec.structs.asdict(record), "is_whole": False}

        async def work(connection: AsyncConnection) -> None:
            await connection.execute(delete(files).where(files.c.id == record.id, files.c.is_whole.is_(False)))
            await connection.execute(insert(files).values(columns))

        await self._database.write(work)

    async def append(self, file: str, first: int, content: bytes) -> int:
        """Add what comes next of a file, from the piece of number ``first`` on; only the file's last piece may be
        shorter than ``PART``. Return the number of the next piece. A few pieces are a transaction. Raises ``Conflict``
        where the file is no longer there."""
        parts = [content[at : at + PART] for at in range(0, len(content), PART)]
        for at in range(0, len(parts), _PARTS_AT_ONCE):
            some = parts[at : at + _PARTS_AT_ONCE]
            await self._add([{"file": file, "number": first + at + n, "body": part} for n, part in enumerate(some)])
        return first + len(parts)

    async def _add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        async def work(connection: AsyncConnection) -> None:
            await connection.execute(insert(file_parts), rows)

        await self._database.write(work)

    async def file(self, file: str) -> FileRecord | None:
        """Return a file that is whole; None where there is none (any more)."""
        return next(iter(await self._found(_whole().where(files.c.id == file))), None)

    async def part(self, file: str, number: int) -> bytes | None:
        """Return a piece of a file, counted from 0; None behind the last."""
        query = select(file_parts.c.body).where(file_parts.c.file == file, file_parts.c.number == number)

        async def work(connection: AsyncConnection) -> bytes | None:
            body: bytes | None = await connection.scalar(query)
            return body

        return await self._database.read(work)

    async def search(
        self,
        tenant: str,
        *,
        purpose: Purpose | None = None,
        after: tuple[float, str] | None = None,
        limit: int = 100,
        oldest_first: bool = False,
    ) -> tuple[FileRecord, ...]:
        """Return a tenant's files, newest first. ``after``: time and id of the last one of the page before."""
        query = _whole().where(files.c.tenant == tenant)
        place = (files.c.created_at, files.c.id)
        if purpose is not None:
            query = query.where(files.c.purpose == purpose)
        if after is not None:
            query = query.where((follows if oldest_first else precedes)(place, after))
        order = [column.asc() if oldest_first else column.desc() for column in place]
        return await self._found(query.order_by(*order).limit(bounded(limit)))

    async def delete(self, file: str) -> bool:
        """Forget a file; False where there is none."""

        async def work(connection: AsyncConnection) -> bool:
            return (await connection.execute(delete(files).where(files.c.id == file))).rowcount > 0

        return await self._database.write(work)

    async def prune(self, before: float, *, chunk: int = _FILES_AT_ONCE) -> int:
        """Forget files that were made before a time, ``chunk`` in a transaction; return how many."""
        old = select(files.c.id).where(files.c.created_at < before)
        return await self._database.delete_in_chunks(files, old, chunk)

    async def erase(self, tenant: str, end_user: str | None = None, *, chunk: int = _FILES_AT_ONCE) -> int:
        """Forget the files of a tenant, or of one of its end users, ``chunk`` in a transaction; return how many."""
        theirs = select(files.c.id).where(files.c.tenant == tenant)
        if end_user:
            theirs = theirs.where(files.c.end_user == end_user)
        return await self._database.delete_in_chunks(files, theirs, chunk)

    async def _found(self, query: Select[Any]) -> tuple[FileRecord, ...]:
        async def work(connection: AsyncConnection) -> tuple[FileRecord, ...]:
            return tuple(FileRecord(**row) for row in (await connection.execute(query)).mappings())

        return await self._database.read(work)


async def publish(connection: AsyncConnection, sizes: Mapping[str, int]) -> None:
    """Show files that were begun, and are whole now; ``sizes``: the bytes of each."""
    for file, size in sizes.items():
        await connection.execute(update(files).where(files.c.id == file).values(is_whole=True, size=size))


def _whole() -> Select[Any]:
    return select(*_COLUMNS).where(files.c.is_whole.is_(True))
