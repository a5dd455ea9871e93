"""Keeps the database fit: brings its tables up to date at start, and forgets what has had its time."""

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Self

import structlog

from core.clock import Clock
from engines.tasks import Tasks
from gateway.settings import SettingsError
from storage.sql import schema
from storage.sql.database import Database, StorageUnavailable
from storage.sql.requests import Requests

_log = structlog.get_logger(__name__)


class Upkeep:
    """Looks after one database. An async context manager: inside it, the tables are right, or soon will be.

    A database that cannot be reached at start keeps nobody from starting: it is tried again every other second, and
    until then ``is_ready`` is False, and for all others it is as if it were away (``Database.once``). ``retention_s``
    returns how long request records are kept.
    """

    RETRY_S = 2.0
    PRUNE_EVERY_S = 600.0

    def __init__(self, database: Database, clock: Clock, *, migrate: bool, retention_s: Callable[[], float]) -> None:
        self._database = database
        self._clock = clock
        self._migrate = migrate
        self._retention_s = retention_s
        self._tasks = Tasks()
        self._task: asyncio.Task[None] | None = None
        self.is_ready = False

    async def __aenter__(self) -> Self:
        """Bring the tables up to date. Raises ``SettingsError`` for tables that this version cannot use."""
        try:
            await self._prepare()
        except StorageUnavailable as error:
            _log.warning("database_away_at_start", error=str(error))
        await self._tasks.__aenter__()
        self._task = self._tasks.create_task(self._keep())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._task.cancel()
        await self._tasks.__aexit__(kind, error, trace)

    async def _prepare(self) -> None:
        try:
            if self._migrate:
                before, after = await schema.upgrade(self._database)
                if before != after:
                    _log.info("database_upgraded", before=before, after=after)
            elif not await schema.is_current(self._database):
                raise SettingsError("the database's tables are of an older version: run `forebay db upgrade`")
        except schema.NewerDatabase as error:
            raise SettingsError(str(error)) from error
        self.is_ready = True

    async def _keep(self) -> None:
        while not self.is_ready:
            await asyncio.sleep(self.RETRY_S)
            try:
                await self._prepare()
            except StorageUnavailable:
                continue
            except SettingsError as error:
                _log.error("database_unusable", error=str(error))
                return
        requests = Requests(self._database)
        while True:
            now = self._clock.wall()
            try:
                pruned = await requests.prune(now - self._retention_s(), now=now)
            except StorageUnavailable as error:
                _log.warning("prune_failed", error=str(error))
            except Exception:  # noqa: BLE001 - old records are a smaller evil than no gateway
                _log.exception("prune_failed")
            else:
                if pruned:
                    _log.info("records_pruned", num=pruned)
            await asyncio.sleep(self.PRUNE_EVERY_S)
