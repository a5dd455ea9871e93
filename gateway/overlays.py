"""The verbs of revisions: what operators change at run time, kept in the database and followed by every replica."""

import asyncio
from collections.abc import Mapping
from types import TracebackType
from typing import Self

import structlog

from core.clock import Clock
from core.errors import InvalidRequest, PreconditionFailed
from core.records import Revision
from gateway import revisions
from gateway.live import Live
from gateway.looping import LoopingCall
from gateway.revisions import RESOURCES, Change, Fault, Overlay, RevisionStore
from gateway.settings import SettingsError

_log = structlog.get_logger(__name__)

_NEWEST = 100


class OverlayRefused(InvalidRequest):
    """An overlay has faults; nothing has been changed."""

    code = "invalid_overlay"

    def __init__(self, faults: tuple[Fault, ...]) -> None:
        super().__init__("; ".join(fault.message for fault in faults), param=faults[0].path)
        self.faults = faults


class Overlays:
    """Changes settings by revisions of a resource (``revisions.RESOURCES``); unknown ones raise ``KeyError``.

    An async context manager: inside it, the revisions in force are followed, also those that another replica makes,
    within ``POLL_INTERVAL_S`` and a database's answer. While the store is away, what is in force stays. Verbs that
    write raise ``OSError`` then, and whatever the store raises where two operators act at the same time.
    """

    POLL_INTERVAL_S = 0.5

    def __init__(self, store: RevisionStore, live: Live, clock: Clock) -> None:
        self._store = store
        self._live = live
        self._clock = clock
        self._version: int | None = None
        self._next_end: float | None = None
        self._in_force: dict[str, Revision] = {}
        self._following = asyncio.Lock()
        self._is_away = False
        self._loop = LoopingCall("revisions", self._follow_quietly, self.POLL_INTERVAL_S)

    async def __aenter__(self) -> Self:
        await self._follow_quietly()
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

    def get(self, resource: str) -> Revision | None:
        """Return the revision in force; None while the file alone says what holds."""
        return self._in_force.get(_known(resource))

    def validate(self, resource: str, overlay: Overlay) -> tuple[Fault, ...]:
        """Return all that is wrong with an overlay."""
        return revisions.validate(self._live.declared, _known(resource), overlay)

    def diff(self, resource: str, overlay: Overlay) -> tuple[Change, ...]:
        """Return what would change if this overlay were in force. Raises ``OverlayRefused``."""
        self._check(resource, overlay)
        return self._live.preview({**self._live.overlays, resource: overlay})

    async def history(self, resource: str, after: int | None = None, limit: int = 100) -> tuple[Revision, ...]:
        """Return revisions, newest first, from the one before number ``after``."""
        return await self._store.list(_known(resource), after, limit)

    async def apply(
        self, resource: str, overlay: Overlay, *, author: str, expected: int | None, note: str = ""
    ) -> Revision:
        """Put an overlay in force for good, in the place of revision ``expected``, whatever that is if it is None.

        0 stands for the file alone. Raises ``OverlayRefused``, and ``PreconditionFailed`` if another one is in force.
        """
        self._check(resource, overlay)
        return await self._add(resource, overlay, author=author, expected=expected, note=note, ends_at=None)

    async def canary(
        self, resource: str, overlay: Overlay, *, author: str, expected: int | None, lasts_s: float, note: str = ""
    ) -> Revision:
        """Put an overlay in force for a time. Unless it is kept before its end, what held before holds again.

        ``expected`` and errors are those of ``apply``.
        """
        self._check(resource, overlay)
        ends_at = self._clock.wall() + lasts_s
        return await self._add(resource, overlay, author=author, expected=expected, note=note, ends_at=ends_at)

    async def keep(self, resource: str) -> Revision:
        """Have the canary in force stay for good. Raises ``InvalidRequest`` if there is none."""
        canary = revisions.in_force(await self._newest(resource), self._clock.wall())
        if canary is None or canary.state != "canary":
            raise InvalidRequest(f"no canary of {resource!r} is in force; it may have ended")
        await self._store.set_state(resource, canary.number, "applied")
        await self._retire(resource, canary.number)
        await self.follow()
        return await self._reread(canary)

    async def rollback(self, resource: str, number: int | None = None, *, author: str) -> Revision | None:
        """Return to revision ``number``, or to what held before the one in force. Returns what is in force then.

        A canary that is rolled back ends at once. All else is a new revision with what an older one held. Raises
        ``InvalidRequest`` if there is nothing to return to.
        """
        newest = await self._newest(resource)
        current = revisions.in_force(newest, self._clock.wall())
        if number is None and current is None:
            raise InvalidRequest(f"{resource!r} has no revision in force: the file alone says what holds")
        if number is None and current is not None and current.state == "canary":
            await self._store.set_state(resource, current.number, "rolled_back")
            await self.follow()
            return self.get(resource)
        if number is None:
            target = next(
                (old for old in newest if current and old.number < current.number and old.state == "replaced"), None
            )
            overlay: Overlay = target.overlay if target is not None else {}
        else:
            target = await self._store.revision(resource, number)
            if target is None:
                raise InvalidRequest(f"{resource!r} has no revision {number}", param="number")
            overlay = target.overlay
        self._check(resource, overlay)
        note = f"back to revision {target.number}" if target is not None else "back to the file"
        added = await self._add(resource, overlay, author=author, expected=None, note=note, ends_at=None)
        if current is not None:
            await self._store.set_state(resource, current.number, "rolled_back")
        return added

    async def follow(self) -> None:
        """Take over what is in force in the store now. Raises ``OSError`` while it cannot be reached."""
        async with self._following:
            version = await self._store.version()
            now = self._clock.wall()
            if version == self._version and (self._next_end is None or now < self._next_end):
                return
            found: dict[str, Revision] = {}
            for resource in RESOURCES:
                newest = await self._newest(resource)
                await self._end_canaries(newest, now)
                if (revision := revisions.in_force(newest, now)) is not None:
                    found[resource] = revision
            self._in_force = found
            self._next_end = min((one.expires_at for one in found.values() if one.expires_at is not None), default=None)
            await self._put_in_force({resource: revision.overlay for resource, revision in found.items()})
            self._version = version

    async def _put_in_force(self, overlays: Mapping[str, Overlay]) -> None:
        if overlays == self._live.overlays:
            return
        try:
            await self._live.overlay(overlays)
        except SettingsError as error:
            _log.error("overlays_refused", error=str(error), in_force="the settings from before")

    async def _end_canaries(self, newest: tuple[Revision, ...], now: float) -> None:
        """Say in the store that canaries have ended; every replica does, and once is enough."""
        for revision in newest:
            if revision.state == "canary" and revision.expires_at is not None and revision.expires_at <= now:
                _log.info("canary_ended", resource=revision.resource, number=revision.number)
                await self._store.set_state(revision.resource, revision.number, "rolled_back")

    async def _add(
        self,
        resource: str,
        overlay: Overlay,
        *,
        author: str,
        expected: int | None,
        note: str,
        ends_at: float | None,
    ) -> Revision:
        newest = await self._newest(resource)  # who adds one after this takes the number that we would take
        held = number_of(revisions.in_force(newest, self._clock.wall()))
        if expected is not None and expected != held:
            raise PreconditionFailed(f"{in_words(held)} is in force for {resource!r}, not {in_words(expected)}")
        revision = Revision(
            resource=resource,
            number=newest[0].number + 1 if newest else 1,
            overlay=dict(overlay),
            author=author,
            created_at=self._clock.wall(),
            note=note,
            state="applied" if ends_at is None else "canary",
            expires_at=ends_at,
        )
        await self._store.add(revision)
        if ends_at is None:
            await self._retire(resource, revision.number)
        await self.follow()
        return revision

    async def _retire(self, resource: str, number: int) -> None:
        """Mark what held before a revision as replaced. A crash before it changes nothing: the newest one wins."""
        for old in await self._newest(resource):
            if old.number < number and old.state in ("applied", "canary"):
                await self._store.set_state(resource, old.number, "replaced")

    async def _newest(self, resource: str) -> tuple[Revision, ...]:
        return await self._store.list(_known(resource), None, _NEWEST)

    async def _reread(self, revision: Revision) -> Revision:
        return await self._store.revision(revision.resource, revision.number) or revision

    def _check(self, resource: str, overlay: Overlay) -> None:
        if faults := self.validate(resource, overlay):
            raise OverlayRefused(faults)

    async def _follow_quietly(self) -> None:
        try:
            await self.follow()
        except OSError as error:
            if not self._is_away:
                _log.warning("revisions_away", error=str(error), in_force="what was known")
            self._is_away = True
            return
        except Exception:  # noqa: BLE001 - what is in force holds
            _log.exception("revisions_failed")
            return
        self._is_away = False


def number_of(revision: Revision | None) -> int:
    """Return the number of the revision in force; 0 where there is none."""
    return 0 if revision is None else revision.number


def in_words(number: int) -> str:
    """Return what a number of ``number_of`` stands for."""
    return f"revision {number}" if number else "the settings file alone"


def _known(resource: str) -> str:
    if resource not in RESOURCES:
        raise KeyError(resource)
    return resource
