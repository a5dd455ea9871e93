"""Whoever follows a run: what is durable in its order, and what is said in between."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from core.workflows import RunEvent

TAIL = 1_000
"""Events of a run that are kept in memory for those who follow; who is further behind reads them from the database."""
MOST_SAYINGS = 256

Read = Callable[[str, int], Awaitable[Sequence[RunEvent]]]
"""Return events of a run behind a number, a page of them."""


class Following:
    """The ways out of one run. ``tell`` wakes all; nobody who is slow holds the run up."""

    def __init__(self, run: str, read: Read, last: int = 0) -> None:
        self._run = run
        self._read = read
        self._tail: deque[RunEvent] = deque(maxlen=TAIL)
        self._last = last
        self._news: asyncio.Future[None] | None = None
        self._listeners: list[deque[bytes]] = []
        self._is_over = False

    def tell(self, events: Sequence[RunEvent]) -> None:
        """Note events that have become durable."""
        self._tail.extend(events)
        self._last = events[-1].number
        self._stir()

    def say(self, saying: bytes) -> None:
        """Tell what is not kept: pieces of text. Who lags loses them, and reads the whole when it is there."""
        for listener in self._listeners:
            if len(listener) < MOST_SAYINGS:
                listener.append(saying)
        if self._listeners:
            self._stir()

    @property
    def num_listeners(self) -> int:
        """How many follow what is said."""
        return len(self._listeners)

    def end(self) -> None:
        """Wake all for the last time."""
        self._is_over = True
        self._stir()

    def _stir(self) -> None:
        if self._news is not None and not self._news.done():
            self._news.set_result(None)
        self._news = None

    async def changed(self) -> None:
        """Wait for whatever comes next; return at once when nothing will."""
        if self._is_over:
            return
        if self._news is None:
            self._news = asyncio.get_running_loop().create_future()
        await asyncio.shield(self._news)

    async def follow(self, after: int = 0) -> AsyncIterator[RunEvent | bytes]:
        """Yield all durable events behind a number, and between them what is said from now on."""
        sayings: deque[bytes] = deque()
        self._listeners.append(sayings)
        try:
            while True:
                while sayings:  # before what is kept: the pieces of a text come before the whole
                    yield sayings.popleft()
                while after < self._last:
                    for event in await self._behind(after):
                        after = event.number
                        yield event
                if after >= self._last and not sayings:
                    if self._is_over:
                        return
                    await self.changed()
        finally:
            self._listeners.remove(sayings)

    async def _behind(self, after: int) -> Sequence[RunEvent]:
        if self._tail and self._tail[0].number <= after + 1:
            return [event for event in self._tail if event.number > after]
        return await self._read(self._run, after)
