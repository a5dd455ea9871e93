"""Keeps the database fit: brings its tables up to date at start, and forgets what has had its time."""

from collections.abc import Callable
from types import TracebackType
from typing import Self

import structlog

from core.clock import Clock
from gateway.looping import LoopingCall
from gateway.settings import SettingsError
from storage.sql import schema
from storage.sql.batches import Batches
from storage.sql.database import Database, StorageUnavailable
from storage.sql.files import Files
from storage.sql.requests import Requests
from storage.sql.workflows import Workflows

_log = structlog.get_logger(__name__)


class Upkeep:
    """Looks after one database. An async context manager: inside it, the tables are right, or soon will be.

    A database that cannot be reached at start keeps nobody from starting: it is tried again every other second, and
    until then ``is_ready`` is False, and for all others it is as if it were away (``Database.once``). ``retention_s``
    returns how long request records are kept, ``runs_retention_s`` how long runs, batches and files.
    """

    INTERVAL_S = 2.0
    PRUNE_EVERY_S = 600.0

    def __init__(
        self,
        database: Database,
        clock: Clock,
        *,
        migrate: bool,
        retention_s: Callable[[], float],
        runs_retention_s: Callable[[], float],
    ) -> None:
        self._database = database
        self._clock = clock
        self._migrate = migrate
        self._retention_s = retention_s
        self._runs_retention_s = runs_retention_s
        self._loop = LoopingCall("upkeep", self._keep, self.INTERVAL_S)
        self._prunes_at = 0.0
        self._fault = ""
        self.is_ready = False

    async def __aenter__(self) -> Self:
        """Bring the tables up to date. Raises ``SettingsError`` for tables that this version cannot use."""
        try:
            await self._prepare()
        except StorageUnavailable as error:
            _log.warning("database_away_at_start", error=str(error))
        self._loop.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._loop.stop()

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
        if not self.is_ready:
            await self._prepare_late()
        elif (now := self._clock.monotonic()) >= self._prunes_at:
            self._prunes_at = now + self.PRUNE_EVERY_S
            await self._prune()

    async def _prepare_late(self) -> None:
        try:
            await self._prepare()
        except StorageUnavailable:
            return
        except SettingsError as error:
            if str(error) != self._fault:
                _log.error("database_unusable", error=str(error))
            self._fault = str(error)

    async def _prune(self) -> None:
        now = self._clock.wall()
        try:
            pruned = await Requests(self._database).prune(now - self._retention_s(), now=now)
            before = now - self._runs_retention_s()
            pruned += await Workflows(self._database).prune(before)
            pruned += await Batches(self._database).prune(before) + await Files(self._database).prune(before)
        except StorageUnavailable as error:
            _log.warning("prune_failed", error=str(error))
            return
        if pruned:
            _log.info("records_pruned", num=pruned)
