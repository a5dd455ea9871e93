"""Booking of finished requests: what was spent into the ledger, what happened into the request log, in batches.

A request costs an addition and an append here; twice a second all of it goes to the database in one transaction.
While the database is away, or does not answer, what was spent adds up by subject and is kept in a file of the state
folder, so that a crash loses little more than the last half second; records wait in a bounded queue, and what does not
fit is counted and dropped.
"""

import asyncio
import random
import secrets
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec
import structlog

from core.ids import TenantId
from core.records import CLIENT_LEFT, Batch, LedgerLine, RequestRecord
from gateway.looping import LoopingCall
from routing.budgets import day_of

_log = structlog.get_logger(__name__)

_LineKey = tuple[int, str, str, str, str]
_BATCH = msgspec.json.Decoder(Batch)


class Books:
    """Where finished requests go. An async context manager: leaving it books what is left.

    ``write`` books a batch, and does nothing with one whose id it has booked; it raises ``OSError`` when the database
    is away. ``sample`` returns the part of the good requests whose records are kept. ``on_dropped`` is told how many
    records were lost.
    """

    MAX_RECORDS = 50_000
    FLUSH_INTERVAL_S = 0.5
    SPOOL_INTERVAL_S = 0.1

    def __init__(
        self,
        write: Callable[[Batch], Awaitable[None]],
        spool: Path,
        *,
        sample: Callable[[], float],
        on_dropped: Callable[[int], None],
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._write = write
        self._spool = spool
        self._sample = sample
        self._draw = draw
        self._on_dropped = on_dropped
        self._lines: dict[_LineKey, _Amounts] = {}
        self._records: deque[RequestRecord] = deque()
        self._pending: Batch | None = None
        self._is_away = False
        self._has_spool = False
        self._disk = ThreadPoolExecutor(1, "spool")
        self._loop = LoopingCall("booking", self.flush, self.FLUSH_INTERVAL_S)
        self._flushing = asyncio.Lock()

    def add(self, record: RequestRecord, *, end_user: str = "") -> None:
        """Book a finished request; never waits. ``end_user``: whose line it goes to, where they are told apart."""
        if record.tenant is not None and record.key is not None:
            key = (day_of(record.time), record.tenant, record.key, end_user, record.model or "")
            amounts = self._lines.get(key)
            if amounts is None:
                amounts = self._lines[key] = _Amounts()
            amounts.add(record)
        is_good = record.error is None and record.status < 400
        if is_good and (sample := self._sample()) < 1.0 and self._draw() >= sample:
            return
        if len(self._records) >= self.MAX_RECORDS:
            self._on_dropped(1)
        else:
            self._records.append(record)

    @property
    def num_waiting(self) -> int:
        """How many records are not written yet."""
        return len(self._records) + (len(self._pending.records) if self._pending is not None else 0)

    @property
    def is_away(self) -> bool:
        """Whether the database could not be written to the last time."""
        return self._is_away

    async def __aenter__(self) -> Self:
        self._pending = self._read_spool()
        self._loop.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._loop.stop()
        await self.flush()
        self._disk.shutdown(wait=False)

    async def flush(self) -> None:
        """Write what waits, as one batch after another. What cannot be written is kept."""
        async with self._flushing:
            while (batch := self._pending or self._next_batch()) is not None:
                self._pending = batch
                if self._has_spool:
                    await self._keep_spool()  # under the id that it is booked by, before it may have been
                error = await self._book(batch)
                if error is not None:
                    self._note_absence(error)
                    await self._keep_spool()
                    return
                self._pending = None
                self._note_return()
            await self._drop_spool()

    async def _book(self, batch: Batch) -> Exception | None:
        """Write a batch; return why it could not be. As long as the database takes its time, the spool is kept: it may
        be for ever, and so short a time is lost."""
        is_over = asyncio.Event()
        keeping = asyncio.create_task(self._keep_spool_until(is_over))
        try:
            await self._write(batch)
        except OSError as error:
            return error
        except Exception as error:  # noqa: BLE001 - a record that cannot be stored must not hold up the ledger
            _log.exception("batch_refused", num_records=len(batch.records))
            self._on_dropped(len(batch.records))
            self._pending = msgspec.structs.replace(batch, records=())
            return error
        finally:
            is_over.set()
            await keeping
        return None

    def _next_batch(self) -> Batch | None:
        """Take all that waits. A batch keeps its id however often it is tried."""
        if not self._lines and not self._records:
            return None
        lines, self._lines = self._lines, {}
        records, self._records = self._records, deque()
        return Batch(
            id=secrets.token_hex(16),
            lines=tuple(amounts.line(key) for key, amounts in lines.items()),
            records=tuple(records),
        )

    def _note_absence(self, error: Exception) -> None:
        if not self._is_away:
            _log.warning("database_away", error=str(error), booked="later")
        self._is_away = True

    def _note_return(self) -> None:
        if self._is_away:
            _log.info("database_back")
        self._is_away = False

    # The spool is a file that holds the batch that may or may not have been booked, and what has come since. A thread
    # writes it, one thing after the other: a disk may take its time, and requests must not wait for it.

    async def _keep_spool_until(self, is_over: asyncio.Event) -> None:
        while True:
            try:
                async with asyncio.timeout(self.SPOOL_INTERVAL_S):
                    await is_over.wait()
            except TimeoutError:
                await self._keep_spool()
            else:
                return

    async def _keep_spool(self) -> None:
        since = tuple(amounts.line(key) for key, amounts in self._lines.items())
        batches = [msgspec.structs.replace(self._pending, records=())] if self._pending is not None else []
        if since:
            batches.append(Batch(id=secrets.token_hex(16), lines=since, records=()))
        self._has_spool = True
        await self._on_disk(_replace, self._spool, msgspec.json.Encoder().encode_lines(batches))

    async def _drop_spool(self) -> None:
        if self._has_spool:
            self._has_spool = False
            await self._on_disk(_remove, self._spool)

    async def _on_disk(self, do: Callable[..., None], *what: object) -> None:
        """Have the thread do it after all that it was given before, also if the caller does not wait for the end."""
        try:
            await asyncio.get_running_loop().run_in_executor(self._disk, do, *what)
        except OSError as error:
            _log.warning("spool_failed", path=str(self._spool), error=str(error))

    def _read_spool(self) -> Batch | None:
        """Take back what an earlier process could not book; what it was about to write there is the same or older."""
        self._spool.with_suffix(".draft").unlink(missing_ok=True)
        try:
            batches = [_BATCH.decode(line) for line in self._spool.read_bytes().splitlines() if line]
        except FileNotFoundError:
            return None
        except (OSError, msgspec.DecodeError) as error:
            _log.warning("spool_unreadable", path=str(self._spool), error=str(error))
            return None
        self._has_spool = True
        for batch in batches[1:]:
            for line in batch.lines:
                self._amounts_of(line)
        return batches[0] if batches else None

    def _amounts_of(self, line: LedgerLine) -> None:
        key = (line.day, line.tenant, line.key, line.end_user, line.model)
        amounts = self._lines.setdefault(key, _Amounts())
        amounts.add_line(line)


def _replace(path: Path, content: bytes) -> None:
    draft = path.with_suffix(".draft")
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft.write_bytes(content)
    draft.chmod(0o600)
    draft.replace(path)


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)


class _Amounts:
    """What adds up to one line of the ledger."""

    __slots__ = ("cached", "cost", "errors", "input", "output", "requests")

    def __init__(self) -> None:
        self.requests = self.errors = self.input = self.output = self.cached = self.cost = 0

    def add(self, record: RequestRecord) -> None:
        self.requests += 1
        if record.status >= 500 or (record.error is not None and record.status != CLIENT_LEFT):
            self.errors += 1
        if (usage := record.usage) is not None:
            self.input += usage.prompt_tokens
            self.output += usage.completion_tokens
            self.cached += usage.cached_tokens
        self.cost += record.cost

    def add_line(self, line: LedgerLine) -> None:
        self.requests += line.requests
        self.errors += line.errors
        self.input += line.input_tokens
        self.output += line.output_tokens
        self.cached += line.cached_tokens
        self.cost += line.cost

    def line(self, key: _LineKey) -> LedgerLine:
        day, tenant, key_id, end_user, model = key
        return LedgerLine(
            day=day,
            tenant=TenantId(tenant),
            key=key_id,
            end_user=end_user,
            model=model,
            requests=self.requests,
            errors=self.errors,
            input_tokens=self.input,
            output_tokens=self.output,
            cached_tokens=self.cached,
            cost=self.cost,
        )
