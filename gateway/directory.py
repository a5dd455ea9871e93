"""All tenants and keys, in memory: those of the settings and those of the database, fresh within half a second."""

from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Self

import structlog

from core.tenancy import Stored
from gateway.auth import Keyring
from gateway.looping import LoopingCall

_log = structlog.get_logger(__name__)


class Directory:
    """Holds the ``Keyring`` of this moment. An async context manager: inside it, the store is watched.

    ``declared`` returns what the settings say, ``snapshot`` what the store holds, and ``version`` a number that is
    another one after every change there; both raise ``OSError`` while it is away. Where both name a tenant or a key's
    secret, the settings win. Until the store has answered once, its keys are unknown and refused as unavailable rather
    than as wrong.
    """

    POLL_INTERVAL_S = 0.5

    def __init__(
        self,
        declared: Callable[[], Stored],
        version: Callable[[], Awaitable[int]],
        snapshot: Callable[[], Awaitable[Stored]],
    ) -> None:
        self._declared = declared
        self._version = version
        self._snapshot = snapshot
        self._stored: Stored | None = None
        self._is_away = False
        self._loop = LoopingCall("directory_refresh", self.refresh, self.POLL_INTERVAL_S)
        self.keyring = self._ring()

    async def __aenter__(self) -> Self:
        await self.refresh()
        self._loop.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._loop.stop()

    @property
    def is_away(self) -> bool:
        """Whether the store could not be asked the last time."""
        return self._is_away

    def redeclare(self) -> None:
        """Take what the settings say now."""
        self.keyring = self._ring()

    async def refresh(self) -> None:
        """Take over what has changed in the store; while it is away, what was known holds."""
        try:
            version = await self._version()
            if self._stored is None or version != self._stored.version:
                self._stored = await self._snapshot()
                self.keyring = self._ring()
        except OSError as error:
            if not self._is_away:
                _log.warning("directory_away", error=str(error), keys="those known so far hold")
            was_away, self._is_away = self._is_away, True
            if not was_away:
                self.keyring = self._ring()
            return
        if self._is_away:
            _log.info("directory_back")
            self._is_away = False
            self.keyring = self._ring()

    def _ring(self) -> Keyring:
        declared = self._declared()
        stored = self._stored or Stored(0, (), ())
        ours = {tenant.id for tenant in declared.tenants}
        secrets = {key.digest for key in declared.keys}
        return Keyring(
            (*declared.tenants, *(tenant for tenant in stored.tenants if tenant.id not in ours)),
            (*declared.keys, *(key for key in stored.keys if key.digest not in secrets)),
            is_complete=self._stored is not None and not self._is_away,
        )
