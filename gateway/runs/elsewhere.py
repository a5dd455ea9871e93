"""Runs that are not alive at this gateway, as the database tells of them: ended ones, and those that another has."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import NamedTuple

import msgspec

from core.clock import Clock
from core.ids import TenantId
from core.workflows import RunEvent, RunRecord
from gateway.runs.following import Following, Read
from gateway.runs.history import HAPPENING, History
from semantic_vars.calls import Workflow
from storage.sql.database import StorageUnavailable
from storage.sql.workflows import Workflows

MOST_BYTES = 64 << 20
"""Of events of which the histories are kept; the last one that was looked at is, whatever its size."""
KEPT_S = 60.0
_POLL_S = 0.5


class Seen(NamedTuple):
    """A run and its history, as far as they are in the database: all of it is durable."""

    record: RunRecord
    told: History

    async def durable(self) -> None:
        """See ``LiveRun``."""


class _Kept:
    def __init__(self, record: RunRecord) -> None:
        self.record = record
        self.told = History(msgspec.json.decode(record.graph, type=Workflow))
        self.num_bytes = 0
        self.looked_at = 0.0


class _Watch:
    def __init__(self, following: Following) -> None:
        self.following = following
        self.num_followers = 0
        self.task: asyncio.Task[None] | None = None


class Elsewhere:
    """Finds runs. What was read of one is kept for a minute, so that who looks again costs only what has happened
    since; and all who follow one share the reading. ``read`` returns events of a run."""

    def __init__(self, store: Workflows, read: Read, clock: Clock) -> None:
        self._store = store
        self._read = read
        self._clock = clock
        self._kept: dict[str, _Kept] = {}  # what was looked at last comes last
        self._watches: dict[str, _Watch] = {}

    async def look(self, run: str) -> Seen | None:
        """Return a run as it is now; None where there is none (any more). Raises ``StorageUnavailable``.

        The history goes on as the run does, and is not to be changed.
        """
        if (kept := self._kept.get(run)) is None:
            if (record := await self._store.run(run)) is None:
                return None
            kept = self._kept.setdefault(run, _Kept(record))
        if not await self._go_on(kept):
            self._kept.pop(run, None)
            return None
        kept.looked_at = self._clock.monotonic()
        self._kept.pop(run, None)
        self._kept[run] = kept
        self._make_room()
        return Seen(kept.record, kept.told)

    async def _go_on(self, kept: _Kept) -> bool:
        while (news := await self._store.news(kept.record.id, kept.told.number)) is not None:
            for event in news.events:
                if event.number == kept.told.number + 1:  # another who looks may have taken it
                    kept.told.add(HAPPENING.decode(event.body))
                    kept.num_bytes += len(event.body)
            if not news.has_more:
                kept.record = msgspec.structs.replace(news.record, graph=kept.record.graph)
                return True
        return False

    def _make_room(self) -> None:
        num_bytes = sum(kept.num_bytes + len(kept.record.graph) for kept in self._kept.values())
        for run in list(self._kept)[:-1]:
            if num_bytes <= MOST_BYTES:
                return
            kept = self._kept.pop(run)
            num_bytes -= kept.num_bytes + len(kept.record.graph)

    async def close(self) -> None:
        """Have all who follow come to an end."""
        tasks = [watch.task for watch in self._watches.values() if watch.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def sweep(self) -> None:
        """Let go of what nobody has looked at for a while."""
        oldest = self._clock.monotonic() - KEPT_S
        self._kept = {run: kept for run, kept in self._kept.items() if kept.looked_at >= oldest}

    def forget(self, tenant: TenantId, end_user: str | None) -> None:
        """Let go of all runs of a tenant, or of one of its end users."""
        for run, kept in list(self._kept.items()):
            if kept.record.tenant == tenant and end_user in {None, kept.record.end_user}:
                del self._kept[run]

    async def follow(self, seen: Seen, after: int) -> AsyncGenerator[RunEvent | bytes, None]:
        """Yield what has happened to a run behind a number, and what happens until it ends, half a second late."""
        run = seen.record.id
        if (watch := self._watches.get(run)) is None:
            last = seen.told.number
            watch = self._watches[run] = _Watch(Following(run, self._read, last))
            watch.task = asyncio.get_running_loop().create_task(self._watch(run, watch, last))
        watch.num_followers += 1
        try:
            async with aclosing(watch.following.follow(after)) as events:
                async for event in events:
                    yield event
        finally:
            watch.num_followers -= 1
            if not watch.num_followers and watch.task is not None:
                watch.task.cancel()
                self._unwatch(run, watch)

    def _unwatch(self, run: str, watch: _Watch) -> None:
        if self._watches.get(run) is watch:
            del self._watches[run]

    async def _watch(self, run: str, watch: _Watch, number: int) -> None:
        try:
            while True:
                try:
                    news = await self._store.news(run, number)
                except StorageUnavailable:  # whoever looks is told; who follows waits
                    await asyncio.sleep(_POLL_S)
                    continue
                if news is None:
                    return
                if news.events:
                    watch.following.tell(news.events)
                    number = news.events[-1].number
                elif news.record.state == "running":
                    await asyncio.sleep(_POLL_S)
                else:
                    return
        finally:
            watch.following.end()
            self._unwatch(run, watch)
