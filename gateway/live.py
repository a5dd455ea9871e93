"""What can change while the server runs: the settings in force, and how they come to be replaced."""

import asyncio
import hashlib
import os
import signal
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path as FilePath
from types import MappingProxyType, TracebackType
from typing import Any, Self

import msgspec
import structlog

from core.chat import Timeouts
from core.ids import ModelName
from engines.tasks import Tasks
from gateway import revisions
from gateway.revisions import Change, Effective, Fault, Overlay
from gateway.settings import Declared, Settings, SettingsError, TimeoutSettings
from gateway.settings.paths import Path, Source, at_start, dotted
from routing.catalog import Catalog, Model

_log = structlog.get_logger(__name__)

Prepare = Callable[[Settings], Awaitable[Callable[[], None]]]
"""Finds out whether a change can be carried out (raises ``SettingsError`` if not), and returns what carries it out."""


class Applied(msgspec.Struct, frozen=True):
    """What a change of the settings did. ``needs_restart``: places whose new value waits for the next start."""

    revision: int
    changes: tuple[Change, ...]
    needs_restart: tuple[str, ...]
    dropped: tuple[Fault, ...]


class Live:
    """The one holder of the settings in force. Everything of it is replaced at once, between two steps of the loop.

    ``settings``, ``catalog`` and ``provenance`` belong together and are never changed in place: a request takes what it
    needs from them once. ``revision`` counts the changes of this process, ``digest`` is equal for equal settings.
    ``last_error`` says why the newest attempt came to nothing; None after one that did not.

    ``read`` returns what file and environment say now (in a thread, so it may wait for the disk) and raises
    ``SettingsError``; without it there is nothing to reload. As an async context manager it reloads when the process
    gets SIGHUP, and when the ``watched`` file has changed.
    """

    POLL_INTERVAL_S = 1.0

    def __init__(
        self, declared: Declared, *, read: Callable[[], Declared] | None = None, watched: FilePath | None = None
    ) -> None:
        self._declared = declared
        self._read = read
        self._watched = watched
        self._overlays: Mapping[str, Overlay] = MappingProxyType({})
        self._subscribers: list[Callable[[], None]] = []
        self._on_refused: list[Callable[[], None]] = []
        self._preparations: list[Prepare] = []
        self._changing = asyncio.Lock()
        self._tasks = Tasks()
        self._watcher: asyncio.Task[None] | None = None
        self._stamp: object = None
        self._created: dict[str, int] = {}
        self.revision = 0
        self.last_error: str | None = None
        self.needs_restart: tuple[str, ...] = ()
        self._take(revisions.effective(declared, {}))

    settings: Settings
    catalog: Catalog
    digest: str

    @property
    def provenance(self) -> Mapping[Path, Source]:
        """Who said each value in force, by its place."""
        return self.effective.provenance

    @property
    def declared(self) -> Declared:
        """What file and environment say, as they were read last."""
        return self._declared

    @property
    def overlays(self) -> Mapping[str, Overlay]:
        """The overlays in force, by resource."""
        return self._overlays

    @property
    def dropped(self) -> tuple[Fault, ...]:
        """Entries of overlays that the file has no room for any more."""
        return self.effective.dropped

    def on_change(self, callback: Callable[[], None]) -> None:
        """Call back after every change, in the event loop; the callback reads what it wants, and must not raise."""
        self._subscribers.append(callback)

    def on_refused(self, callback: Callable[[], None]) -> None:
        """Call back after every attempt at a change that came to nothing."""
        self._on_refused.append(callback)

    def before_change(self, prepare: Prepare) -> None:
        """Have a say in every change: see ``Prepare``."""
        self._preparations.append(prepare)

    async def reload(self) -> Applied:
        """Read the file and the environment again and apply what they say.

        Raises ``SettingsError``, with every fault, if they cannot be used: then all stays as it was.
        """
        async with self._changing:
            return await self._noting_errors(self._reload())

    async def overlay(self, overlays: Mapping[str, Overlay]) -> Applied:
        """Put these overlays, by resource, in the place of those in force. Entries that do not fit are dropped."""
        async with self._changing:
            return await self._noting_errors(self._apply(self._declared, overlays))

    def preview(self, overlays: Mapping[str, Overlay]) -> tuple[Change, ...]:
        """Return what would change if these overlays were in force."""
        return revisions.diff(self.effective, self._kept(revisions.effective(self._declared, overlays))[0])

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        if self._read is not None:
            loop = asyncio.get_running_loop()
            loop.add_signal_handler(signal.SIGHUP, self._on_signal)
            self._stamp = await asyncio.to_thread(self._stamp_now)
            self._watcher = self._tasks.create_task(self._watch())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._watcher is not None:
            asyncio.get_running_loop().remove_signal_handler(signal.SIGHUP)
            self._watcher.cancel()
        await self._tasks.__aexit__(kind, error, trace)

    async def _reload(self) -> Applied:
        if self._read is None:
            raise SettingsError("this server was started without a settings file: there is nothing to reload")
        return await self._apply(await asyncio.to_thread(self._read), self._overlays)

    async def _apply(self, declared: Declared, overlays: Mapping[str, Overlay]) -> Applied:
        new, waiting = self._kept(revisions.effective(declared, overlays))
        commits = [await prepare(new.settings) for prepare in self._preparations]
        changes = revisions.diff(self.effective, new)
        was_dropped = self.dropped
        self._declared, self._overlays, self.needs_restart = declared, overlays, waiting
        if changes or new != self.effective:
            self._take(new)
            for commit in commits:
                commit()
            for callback in self._subscribers:
                callback()
        self._tell(changes, waiting, new.dropped if new.dropped != was_dropped else ())
        return Applied(self.revision, changes, waiting, new.dropped)

    def _take(self, new: Effective) -> None:
        now = int(time.time())
        self._created = {name: self._created.get(name, now) for name in new.settings.models}
        self.effective = new
        self.settings = new.settings
        self.catalog = catalog_of(new.settings, self._created)
        self.digest = hashlib.sha256(msgspec.json.encode(revisions.tree(new), order="sorted")).hexdigest()[:12]
        self.revision += 1

    def _kept(self, new: Effective) -> tuple[Effective, tuple[str, ...]]:
        """Return what can be applied now: values that are read at the start stay, and are named if they differ."""
        settings: Any = new.settings
        waiting = []
        for path in at_start(new.settings):
            old, wanted = _at(self.settings, path), _at(settings, path)
            if old != wanted:
                waiting.append(dotted(path))
                settings = _with(settings, path, old)
        provenance = {**new.provenance}
        for text in waiting:
            provenance |= {path: source for path, source in self.provenance.items() if dotted(path).startswith(text)}
        return Effective(settings, provenance, new.dropped), tuple(waiting)

    async def _noting_errors(self, change: Awaitable[Applied]) -> Applied:
        try:
            applied = await change
        except SettingsError as error:
            self.last_error = str(error)
            for callback in self._on_refused:
                callback()
            raise
        self.last_error = None
        return applied

    def _tell(self, changes: tuple[Change, ...], waiting: tuple[str, ...], dropped: tuple[Fault, ...]) -> None:
        for fault in dropped:
            _log.warning("overlay_entry_dropped", path=fault.path, error=fault.message)
        _log.info(
            "settings_applied",
            revision=self.revision,
            changed=[change.path for change in changes],
            needs_restart=list(waiting),
        )

    def _on_signal(self) -> None:
        self._tasks.create_task(self._reload_and_tell("SIGHUP"))

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self.POLL_INTERVAL_S)
            stamp = await asyncio.to_thread(self._stamp_now)
            if stamp != self._stamp:
                self._stamp = stamp
                await self._reload_and_tell("the file has changed")

    async def _reload_and_tell(self, why: str) -> None:
        try:
            await self.reload()
        except SettingsError as error:
            _log.error("settings_refused", because=why, error=str(error), in_force="the settings from before")
        except Exception:  # noqa: BLE001 - a fault of ours must not end the server
            _log.exception("reload_failed", because=why)

    def _stamp_now(self) -> object:
        """Return what tells one state of the file from another; editors and Kubernetes replace it by another file."""
        if self._watched is None:
            return None
        try:
            found = os.stat(self._watched)
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino


def catalog_of(settings: Settings, created: Mapping[str, int]) -> Catalog:
    """Return the models that the settings declare; ``created``: since when each is on offer, Unix seconds."""
    return Catalog(
        tuple(
            Model(
                name=ModelName(name),
                aliases=model.aliases,
                fallbacks=tuple(ModelName(fallback) for fallback in model.fallbacks),
                timeouts=timeouts_of(model.timeouts or settings.timeouts),
                created=created[name],
            )
            for name, model in settings.models.items()
        )
    )


def timeouts_of(settings: TimeoutSettings) -> Timeouts:
    """Return deadlines as calls carry them."""
    return Timeouts(**settings.model_dump())


def _at(settings: Any, path: Path) -> Any:
    for name in path:
        settings = getattr(settings, name)
    return settings


def _with(section: Any, path: Path, value: Any) -> Any:
    """Return a copy of a section in which one value is another."""
    name, *rest = path
    inner = _with(getattr(section, name), tuple(rest), value) if rest else value
    return section.model_copy(update={name: inner})
