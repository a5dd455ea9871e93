"""Files of tenants: kept, found, read and forgotten."""

import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

from core.batches import FileRecord, Purpose
from core.clock import Clock
from core.errors import DatabaseUnavailable, UnknownId
from gateway.auth import Principal
from storage.sql.database import StorageUnavailable
from storage.sql.files import Files


class FileService:
    """The service. All of it raises ``DatabaseUnavailable`` while that is away; another tenant's ids are unknown."""

    def __init__(self, store: Files, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    async def keep(
        self, principal: Principal, name: str, purpose: Purpose, content: bytes, *, end_user: str | None
    ) -> FileRecord:
        """Keep a file, and return once it is durable."""
        record = FileRecord(
            id=f"file-{secrets.token_hex(16)}", tenant=principal.tenant, name=name, purpose=purpose, size=len(content),
            created_at=self._clock.wall(), end_user=end_user,
        )  # fmt: skip
        with database():
            await self._store.keep(record, content)
        return record

    async def find(self, principal: Principal, file: str) -> FileRecord:
        """Return a file of the tenant. Raises ``UnknownId``."""
        with database():
            record = await self._store.file(file)
        if record is None or record.tenant != principal.tenant:
            raise unknown_file(file)
        return record

    async def search(
        self,
        principal: Principal,
        *,
        purpose: Purpose | None,
        after: tuple[float, str] | None,
        limit: int,
        oldest_first: bool,
    ) -> tuple[FileRecord, ...]:
        """Return the tenant's files, newest first unless ``oldest_first``."""
        with database():
            return await self._store.search(
                principal.tenant, purpose=purpose, after=after, limit=limit, oldest_first=oldest_first
            )

    async def content(self, record: FileRecord) -> AsyncIterator[bytes]:
        """Yield the bytes of a file, piece by piece. Raises ``UnknownId`` if it is forgotten meanwhile."""
        number = size = 0
        while size < record.size:
            with database():
                part = await self._store.part(record.id, number)
            if part is None:
                raise unknown_file(record.id)
            number, size = number + 1, size + len(part)
            yield part

    async def delete(self, principal: Principal, file: str) -> None:
        """Forget a file of the tenant. Raises ``UnknownId``."""
        await self.find(principal, file)
        with database():
            await self._store.delete(file)


def unknown_file(file: str) -> UnknownId:
    """Return the error for an id that is no file of the caller's."""
    return UnknownId(f"there is no file {file[:64]!r}")


@contextmanager
def database() -> Iterator[None]:
    """Tell callers in their own words that the database is away."""
    try:
        yield
    except StorageUnavailable as error:
        raise DatabaseUnavailable(str(error), retry_after=2.0) from None
