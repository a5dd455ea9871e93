"""A file of results while it is written."""

from core.batches import FileRecord
from storage.sql.files import PART, Files

_AT_ONCE = 4 * PART


class Sheet:
    """Writes a file line by line, with a few pieces of it in memory. The file is begun with its first line, and nobody
    is shown it before it is published. ``size``: the bytes of it so far."""

    def __init__(self, files: Files, record: FileRecord) -> None:
        self._files = files
        self._record = record
        self._waiting = bytearray()
        self._next = 0
        self.size = 0

    @property
    def id(self) -> str | None:
        """The file's id; None as long as it has no line."""
        return self._record.id if self.size else None

    async def write(self, line: bytes) -> None:
        """Add a line. Raises ``Conflict`` where the file is no longer there."""
        if not self.size:
            await self._files.begin(self._record)
        self.size += len(line)
        self._waiting += line
        if len(self._waiting) >= _AT_ONCE:
            await self._flush(len(self._waiting) // PART * PART)

    async def close(self) -> None:
        """Write what is left."""
        await self._flush(len(self._waiting))

    async def _flush(self, size: int) -> None:
        self._next = await self._files.append(self._record.id, self._next, bytes(self._waiting[:size]))
        del self._waiting[:size]
