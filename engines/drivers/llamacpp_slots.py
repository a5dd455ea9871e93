"""Which slot of llama.cpp runs a request, and whether it may use what the slot still holds (S5).

A slot keeps the prompt of its last request, and a prompt that begins alike is answered sooner. Nobody may learn from
that what another tenant has asked: a request uses a slot's cache only if the last one there was of the same tenant.
For that we choose the slots ourselves.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from core.ids import RequestId, TenantId
from engines.drivers.llamacpp_beginnings import num_shared

_LIKE = 0.1  # the share of a prompt that a slot has to hold already to be preferred for it; llama.cpp's own default


class Seat:
    """A request's place: the number of its slot (None: the engine chooses), and whether it may use the cache there.

    ``is_own``: what lies there is what the request itself has left. ``held``: the prompt that lies there, and whose it
    is; None if that is not sure.
    """

    __slots__ = ("held", "is_cached", "is_own", "slot")

    def __init__(
        self, slot: int | None, *, is_cached: bool, is_own: bool = False, held: tuple[TenantId, bytes] | None = None
    ) -> None:
        self.slot = slot
        self.is_cached = is_cached
        self.is_own = is_own
        self.held = held


class _Slot:
    """``owner`` is whose prompt the slot holds, None if that is not sure or nobody's; ``prompt`` is the last one's, and
    ``request`` who that was. ``is_unsettled``: that one was left in the middle, and may yet be parked."""

    __slots__ = ("is_unsettled", "num_left", "num_running", "owner", "prompt", "request", "used_at")

    def __init__(self) -> None:
        self.owner: TenantId | None = None
        self.request: RequestId | None = None
        self.prompt = b""
        self.used_at = 0
        self.num_running = 0
        self.num_left = 0
        self.is_unsettled = False

    @property
    def num_taken(self) -> int:
        return self.num_running + self.num_left


class SlotBook:
    """Who has and had each slot of one engine. With no slots known, nothing is placed and nothing is cached.

    Some requests cannot be placed (llama.cpp reads no ``id_slot`` on those routes): they run *scattered*, without the
    cache, and what they leave may lie in any slot, so that all slots count as nobody's from then on.
    """

    def __init__(self, num_slots: int = 0) -> None:
        self._slots = [_Slot() for _ in range(num_slots)]
        self._clock = 0
        self._num_scattered = 0
        self._num_scattered_left = 0
        self._entering: set[Seat] = set()
        self._news = asyncio.Event()

    @property
    def num_slots(self) -> int:
        """How many slots the engine has, as far as we know."""
        return len(self._slots)

    async def seat(
        self,
        tenant: TenantId,
        prompt: bytes,
        request: RequestId | None = None,
        *,
        brings_cache: bool = False,
        num_brought: int = 0,
    ) -> Seat:
        """Return the best seat as soon as there is one; see ``take``."""
        while (seat := self.take(tenant, prompt, request, brings_cache=brings_cache, num_brought=num_brought)) is None:
            await self._changed()
        return seat

    def take(
        self,
        tenant: TenantId,
        prompt: bytes,
        request: RequestId | None = None,
        *,
        brings_cache: bool = False,
        num_brought: int = 0,
    ) -> Seat | None:
        """Return the best seat: the one that this request has just left, a free slot of the tenant's own that holds a
        like prompt, or else one long unused; none that may yet be parked if there is another. ``brings_cache``: the
        slot is about to be given something of the tenant's, and may then use it; ``num_brought``: so many bytes of the
        prompt, and a slot that holds fewer is not preferred for what it holds.

        None where all slots are taken and the one to queue for is about to use its cache: the engine may begin with
        the later of two requests.
        """
        if not self._slots:
            return Seat(None, is_cached=False)
        fewest = min((slot.num_running, slot.num_left) for slot in self._slots)  # what was left ends soon
        free = [number for number, slot in enumerate(self._slots) if (slot.num_running, slot.num_left) == fewest]
        number = self._left_by(tenant, request, free)
        free = [number for number in free if not self._slots[number].is_unsettled] or free
        if number is None:
            number = self._like(tenant, prompt, free, num_brought)
        if number is None:
            number = min(free, key=lambda number: self._slots[number].used_at)
        if any(fewest) and any(seat.slot == number for seat in self._entering):
            return None
        slot = self._slots[number]
        is_scattered = self._num_scattered + self._num_scattered_left > 0
        # Of two requests that wait for one slot, nobody knows which the engine takes first.
        is_sure = slot.num_taken == 0 and not is_scattered
        had_left = request is not None and self.holds(number, tenant, request)
        seat = Seat(number, is_cached=is_sure and (slot.owner == tenant or brings_cache), is_own=is_sure and had_left)
        if is_sure and slot.owner is not None:
            seat.held = slot.owner, slot.prompt
        slot.owner = tenant if is_sure or (slot.owner == tenant and not is_scattered) else None
        slot.prompt = prompt
        slot.request = request
        slot.is_unsettled = False
        slot.num_running += 1
        self._clock += 1
        slot.used_at = self._clock
        if is_sure:
            self._entering.add(seat)
        return seat

    def _left_by(self, tenant: TenantId, request: RequestId | None, free: list[int]) -> int | None:
        if request is None:
            return None
        return next((number for number in free if self.holds(number, tenant, request)), None)

    @asynccontextmanager
    async def parked(self, tenant: TenantId, request: RequestId) -> AsyncIterator[int | None]:
        """Hold the slot that a request has left, so that others prefer another; None if something else may be there.

        The engine may still work on what was left. Whoever does something with what lies there asks ``holds`` after it.
        """
        for number, slot in enumerate(self._slots):
            if self.holds(number, tenant, request) and not slot.num_running:
                slot.num_running += 1
                try:
                    yield number
                finally:
                    slot.num_running -= 1
                    slot.is_unsettled = False  # whoever comes next is to take this one, and not one still to be parked
                return
        yield None

    def stopped(self, slot: int) -> None:
        """Note that the engine works no more on what was left in a slot."""
        self._slots[slot].num_left = 0

    def is_leaving(self, tenant: TenantId, request: RequestId) -> bool:
        """Return whether the engine may still work on what this request has left."""
        return any(slot.num_left and self.holds(number, tenant, request) for number, slot in enumerate(self._slots))

    def holds(self, slot: int, tenant: TenantId, request: RequestId) -> bool:
        """Return whether nothing but what this request of the tenant left can be in the slot."""
        return self._slots[slot].request == request and self._slots[slot].owner == tenant

    def _like(self, tenant: TenantId, prompt: bytes, free: list[int], num_brought: int) -> int | None:
        own = [number for number in free if self._slots[number].owner == tenant]
        if not own:
            return None
        shared, number = max((num_shared(prompt, self._slots[number].prompt), number) for number in own)
        return number if shared >= max(num_brought, _LIKE * len(prompt)) else None

    def entered(self, seat: Seat) -> None:
        """Note that the engine works on the request, or is about to and finds nothing that matters in its slot."""
        if seat in self._entering:
            self._entering.remove(seat)
            self._news.set()

    def leave(self, seat: Seat, *, has_ended: bool) -> None:
        """Note the end of a request; one that has not ended by itself keeps its slot until ``observe`` frees it."""
        self.entered(seat)
        if seat.slot is None:
            return
        slot = self._slots[seat.slot]
        slot.num_running -= 1
        slot.num_left += not has_ended
        slot.is_unsettled = not has_ended

    @asynccontextmanager
    async def scattered(self) -> AsyncIterator[None]:
        """Let a request run that cannot be placed: entered once no slot's cache is about to be used."""
        if not self._slots:
            yield
            return
        self._num_scattered += 1  # from here on nobody is given a cache
        is_sent = has_ended = False
        try:
            while self._entering:
                await self._changed()
            for slot in self._slots:
                slot.owner = None
            is_sent = True
            yield
            has_ended = True
        finally:
            self._num_scattered -= 1
            self._num_scattered_left += is_sent and not has_ended

    def settled(self) -> None:
        """Note that all that was cut is over and what is to be parked is being parked: no slot has to be avoided."""
        for slot in self._slots:
            slot.is_unsettled = False

    async def _changed(self) -> None:
        self._news.clear()
        await self._news.wait()

    def observe(self, busy: Iterable[int]) -> None:
        """Take what the engine says of its slots: those that it works on. What was left is over where it does not, or
        where it may work on something else and works on no more than it should.
        """
        working = set(busy)
        num_live = self._num_scattered + sum(slot.num_running for slot in self._slots)
        is_all_live = len(working) <= num_live
        for number, slot in enumerate(self._slots):
            if number not in working or (is_all_live and (slot.num_running or self._num_scattered)):
                slot.num_left = 0
        if is_all_live:
            self._num_scattered_left = 0
