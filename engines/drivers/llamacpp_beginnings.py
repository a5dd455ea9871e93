"""Beginnings of prompts in files, from which any slot of llama.cpp can go on: Parrot's context fork, by copies.

Slots share nothing: what ten prompts begin with is computed in each slot that they come to, and is gone with that
slot's next prompt. Where a tenant's prompts have been seen to begin alike (behind a system prompt, behind the task of a
team of agents, in the turns of a chat), what a slot holds of one is saved before another overwrites it, and put into
whichever slot is to run the tenant's next prompt that begins so. A prompt like no other is never saved. For 786 tokens
of a small model that takes 13-25 ms, and 4-12 ms to put it back; to compute them takes seconds on a CPU's core.
"""

import asyncio
from collections import deque
from collections.abc import Coroutine, Iterable
from typing import Any

from core.errors import ForebayError, WorkerLost
from core.ids import TenantId
from engines.drivers.wire import Wire

WORTH = 256  # bytes of a prompt, some sixty tokens: fewer are computed sooner than put back
_CLOSING = 8  # bytes at the end of an encoded prompt that are no part of its text
_MOST_BYTES = 1 << 30
_RECENT = 64  # prompts that are compared with one that is about to go
_RECENT_BYTES = 8 << 20
_TIMEOUT_S = 10.0


class Beginning:
    """The tenant's prompt that a file holds. ``is_over``: it was saved, or was not. ``is_lost``: the file is not for
    others, or theirs already."""

    __slots__ = ("file", "is_lost", "is_over", "num_using", "prompt", "tenant")

    def __init__(self, tenant: TenantId, prompt: bytes, file: str) -> None:
        self.tenant = tenant
        self.prompt = prompt
        self.file = file
        self.num_using = 0
        self.is_lost = False
        self.is_over = asyncio.Event()


class Beginnings:
    """What is saved in so many files, ``most_bytes`` in all; the one that nobody has used for longest makes room.

    What the engine was asked to do with a file is seen through, whoever leaves meanwhile: it must not be given to
    another tenant before. One that the engine has not answered for is never used again.
    """

    def __init__(self, wire: Wire, files: Iterable[str], *, most_bytes: int = _MOST_BYTES) -> None:
        self._wire = wire
        self._free = list(files)
        self._kept: dict[str, Beginning] = {}  # by file, the one unused for longest first
        self._sizes: dict[str, int] = {}  # a file keeps its memory when what it held is forgotten
        self._most_bytes = most_bytes
        self._recent: deque[tuple[TenantId, bytes]] = deque()
        self._recent_bytes = 0
        self._asking: set[asyncio.Task[bool]] = set()
        self.num_files = len(self._free)

    def like(self, tenant: TenantId, prompt: bytes) -> tuple[Beginning | None, int]:
        """Return the tenant's beginning that shares most with the prompt, and how many bytes; None if few."""
        best, most = None, WORTH - 1
        for kept in self._kept.values():
            if kept.tenant == tenant and (shared := num_shared(prompt, kept.prompt)) > most:
                best, most = kept, shared
        return (best, most) if best is not None else (None, 0)

    def saw(self, tenant: TenantId, prompt: bytes) -> None:
        """Note that the tenant has asked this."""
        if not self.num_files:
            return
        self._recent.append((tenant, prompt))
        self._recent_bytes += len(prompt)
        while len(self._recent) > _RECENT or self._recent_bytes > _RECENT_BYTES:
            self._recent_bytes -= len(self._recent.popleft()[1])

    def is_worth_keeping(self, tenant: TenantId, held: bytes) -> bool:
        """Return whether others of the tenant's prompts have begun as this one, and further than anything kept."""
        alike = (num_shared(held, prompt) for whose, prompt in self._recent if whose == tenant and prompt is not held)
        most = max(alike, default=0)
        return most >= WORTH and most >= self.like(tenant, held)[1] + WORTH

    async def keep(self, tenant: TenantId, prompt: bytes, slot: int) -> None:
        """Save a slot that holds this prompt of the tenant, if there is a file for it."""
        for kept in [kept for kept in self._kept.values() if kept.tenant == tenant and not parts(prompt, kept.prompt)]:
            if kept.is_over.is_set() and not kept.num_using:  # what it holds is in this one too
                del self._kept[kept.file]
                self._free.append(kept.file)
        if (file := self._file()) is None:
            return
        beginning = self._kept[file] = Beginning(tenant, prompt, file)
        await self._seen_through(self._save(beginning, slot))

    async def put(self, beginning: Beginning, slot: int) -> bool:
        """Put a beginning into a slot that runs nothing. If False, nobody knows what lies there."""
        return await self._seen_through(self._restore(beginning, slot))

    async def close(self) -> None:
        """Stop waiting for the engine."""
        for task in self._asking:
            task.cancel()
        await asyncio.gather(*self._asking, return_exceptions=True)

    def _file(self) -> str | None:
        has_room = sum(self._sizes.values()) + max(self._sizes.values(), default=0) <= self._most_bytes
        for index, file in enumerate(self._free):
            if file in self._sizes or has_room:
                return self._free.pop(index)
        idle = (kept.file for kept in self._kept.values() if kept.is_over.is_set() and not kept.num_using)
        oldest = next(idle, None)
        if oldest is not None:
            del self._kept[oldest]
        return oldest

    async def _save(self, beginning: Beginning, slot: int) -> bool:
        try:
            saved = await self._ask(beginning, slot, "save")
            self._sizes[beginning.file] = int(saved.get("n_written") or 0)
            return self._is_good(beginning, saved.get("n_saved"))
        finally:
            beginning.is_over.set()

    async def _restore(self, beginning: Beginning, slot: int) -> bool:
        await beginning.is_over.wait()
        if self._kept.get(beginning.file) is not beginning:
            return False
        self._kept[beginning.file] = self._kept.pop(beginning.file)
        restored = await self._ask(beginning, slot, "restore")
        return self._is_good(beginning, restored.get("n_restored"))

    async def _ask(self, beginning: Beginning, slot: int, action: str) -> dict[str, Any]:
        beginning.num_using += 1
        path, body = f"/slots/{slot}?action={action}", {"filename": beginning.file}
        try:
            return dict(await self._wire.ask(path, body, timeout_s=_TIMEOUT_S))
        except WorkerLost:
            beginning.is_lost = True  # it may be done yet
        except ForebayError:
            pass
        finally:
            beginning.num_using -= 1
        return {}

    def _is_good(self, beginning: Beginning, num_tokens: int | None) -> bool:
        """Forget a beginning with which the engine did not do as asked; its file is free when nobody uses it."""
        if not num_tokens:
            self._kept.pop(beginning.file, None)
        if self._kept.get(beginning.file) is not beginning and not beginning.num_using and not beginning.is_lost:
            self._free.append(beginning.file)
            beginning.is_lost = True
        return bool(num_tokens)

    async def _seen_through(self, work: Coroutine[Any, Any, bool]) -> bool:
        task = asyncio.create_task(work)
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)
        return await asyncio.shield(task)


def parts(prompt: bytes, held: bytes) -> bool:
    """Return whether a prompt leaves the one that a slot holds before its end."""
    return num_shared(prompt, held) < len(held) - _CLOSING


def num_shared(one: bytes, other: bytes) -> int:
    """Return how many bytes the two have in common from their beginning."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
