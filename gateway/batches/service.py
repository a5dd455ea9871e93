"""All batches: accepts them, sees to those that have not ended, and finds those that have."""

import asyncio
import secrets
from collections.abc import Callable
from types import TracebackType
from typing import Self

import msgspec
import structlog

from core.batches import OPEN, BatchRecord
from core.chat import Endpoint
from core.clock import Clock
from core.errors import Conflict, ConnectionLimit, UnknownId
from gateway.auth import Principal
from gateway.batches.driver import Driver
from gateway.batches.files import database, unknown_file
from gateway.looping import LoopingCall
from gateway.runs.service import LEASE_S, RENEW_S, Runs
from storage.sql.batches import Batches
from storage.sql.database import StorageUnavailable
from storage.sql.files import Files

_log = structlog.get_logger(__name__)

WINDOW_S = 86_400.0
"""How long a batch may take: OpenAI's only completion window, 24h."""
MOST_OPEN = 100
"""Batches of one tenant that have not ended."""


class BatchService:
    """The service. An async context manager: inside it, batches that were left are gone on with.

    ``owner`` names this gateway, the same after a restart, and as its runs know it.
    """

    def __init__(
        self,
        store: Batches,
        files: Files,
        runs: Runs,
        principal_of: Callable[[str], Principal],
        clock: Clock,
        *,
        owner: str,
    ) -> None:
        self._store = store
        self._files = files
        self._runs = runs
        self._principal_of = principal_of
        self._clock = clock
        self._owner = owner
        self._drivers: dict[str, Driver] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._loop = LoopingCall("batches_claimed", self._claim, RENEW_S)
        self._is_away = False

    async def __aenter__(self) -> Self:
        await self._claim()
        self._loop.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._loop.stop()
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _claim(self) -> None:
        """Renew the lease of our batches, and go on with those that nobody has any more."""
        now = self._clock.wall()
        try:
            for record in await self._store.claim(self._owner, now, now + LEASE_S):
                if record.id not in self._drivers:
                    self._drive(record)
                    _log.info("batch_goes_on", batch=record.id, state=record.state)
        except StorageUnavailable as error:
            if not self._is_away:
                _log.warning("batches_not_claimed", error=str(error))
            self._is_away = True
        else:
            self._is_away = False

    def _drive(self, record: BatchRecord) -> None:
        driver = Driver(
            record, store=self._store, files=self._files, runs=self._runs, principal_of=self._principal_of,
            clock=self._clock,
        )  # fmt: skip
        task = asyncio.get_running_loop().create_task(driver.drive(), name=record.id)
        self._drivers[record.id], self._tasks[record.id] = driver, task
        task.add_done_callback(lambda _: self._left(record.id))

    def _left(self, batch: str) -> None:
        del self._drivers[batch], self._tasks[batch]

    async def submit(
        self,
        principal: Principal,
        input_file: str,
        endpoint: Endpoint,
        *,
        metadata: dict[str, str],
        end_user: str | None = None,
        idempotency: str | None = None,
    ) -> BatchRecord:
        """Accept a batch, and return once it is durable; the same again for a key that was used before. Its rows are
        read later.

        Raises ``UnknownId`` for a file that the tenant does not have, ``EndpointNotAllowed``, ``ConnectionLimit``, and
        ``Conflict`` for a key that was used for another batch.
        """
        principal.check_endpoint(endpoint)
        with database():
            file = await self._files.file(input_file)
            if file is None or file.tenant != principal.tenant or file.purpose != "batch":
                raise unknown_file(input_file)
            if await self._store.num_open(principal.tenant) >= MOST_OPEN:
                raise ConnectionLimit(f"{MOST_OPEN} batches of this tenant have not ended", retry_after=60.0)
            now = self._clock.wall()
            record = BatchRecord(
                id=f"batch_{secrets.token_hex(16)}", tenant=principal.tenant, key=principal.key.id,
                input_file=input_file, endpoint=endpoint.value, created_at=now, expires_at=now + WINDOW_S,
                end_user=end_user or file.end_user, metadata=metadata, owner=self._owner, leased_until=now + LEASE_S,
                idempotency=idempotency,
            )  # fmt: skip
            accepted = await self._store.accept(record)
        if accepted is not record:
            if _asked(accepted) != _asked(record):
                raise Conflict("this Idempotency-Key was used for another batch")
            return self._counted(accepted)
        if record.id not in self._drivers:
            self._drive(record)
        return record

    async def find(self, principal: Principal, batch: str) -> BatchRecord:
        """Return a batch of the tenant. Raises ``UnknownId``."""
        with database():
            record = await self._store.batch(batch)
        if record is None or record.tenant != principal.tenant:
            raise UnknownId(f"there is no batch {batch[:64]!r}")
        return self._counted(record)

    async def search(
        self, principal: Principal, *, after: tuple[float, str] | None, limit: int
    ) -> tuple[BatchRecord, ...]:
        """Return the tenant's batches, newest first."""
        with database():
            found = await self._store.search(principal.tenant, after=after, limit=limit)
        return tuple(map(self._counted, found))

    def _counted(self, record: BatchRecord) -> BatchRecord:
        """Return a batch with the counts of this moment, where this gateway has them."""
        driver = self._drivers.get(record.id)
        return msgspec.structs.replace(record, **driver.counts) if driver and record.state in OPEN else record

    async def cancel(self, principal: Principal, batch: str) -> BatchRecord:
        """Have a batch cancelled, which keeps what is done; return it. Raises ``UnknownId``, and ``Conflict`` for one
        that has ended in another way."""
        record = await self.find(principal, batch)
        if record.state in {"cancelling", "cancelled"}:
            return record
        with database():
            changed = await self._store.cancel(batch, self._clock.wall())
        if changed is None:
            record = await self.find(principal, batch)
            if record.state in {"cancelling", "cancelled"}:
                return record
            raise Conflict(f"the batch {batch} is {record.state}: it cannot be cancelled any more")
        if (driver := self._drivers.get(batch)) is not None:
            driver.wake()
        return self._counted(changed)


def _asked(record: BatchRecord) -> tuple[object, ...]:
    """Return what a batch was submitted with."""
    return record.input_file, record.endpoint, record.metadata
