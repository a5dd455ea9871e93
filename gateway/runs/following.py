"""Whoever follows a run: what is durable in its order, and what is said in between."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence

import msgspec

from core.workflows import RunEvent

TAIL = 1_000
"""Events of a run that are kept in memory for those who follow; who is further behind reads them from the database."""
MOST_SAYINGS = 256
MOST_TEXT = 65_536
"""Characters of a call's text that are kept for those who come later."""

Read = Callable[[str, int], Awaitable[Sequence[RunEvent]]]
"""Return events of a run behind a number, a page of them."""


class Saying(msgspec.Struct, frozen=True, tag_field="event", tag="variable.delta"):
    """A piece of text of a call under way."""

    variable: str
    attempt: int
    text: str


class _Text:
    """What a call under way has said so far; nothing once it was too much to be kept."""

    __slots__ = ("_pieces", "_room")

    def __init__(self) -> None:
        self._pieces: list[str] | None = []
        self._room = MOST_TEXT

    def add(self, piece: str) -> None:
        """Note the next piece."""
        self._room -= len(piece)
        if self._room < 0:
            self._pieces = None
        elif self._pieces is not None:
            self._pieces.append(piece)

    @property
    def whole(self) -> str:
        """All of it."""
        return "".join(self._pieces or ())


class Following:
    """The ways out of one run. ``tell`` wakes all; nobody who is slow holds the run up."""

    def __init__(self, run: str, read: Read, last: int = 0) -> None:
        self._run = run
        self._read = read
        self._tail: deque[RunEvent] = deque(maxlen=TAIL)
        self._last = last
        self._news: asyncio.Future[None] | None = None
        self._listeners: dict[int, deque[bytes]] = {}  # by identity: two that are empty are equal
        self._texts: dict[tuple[str, int], _Text] = {}
        self._is_over = False

    def tell(self, events: Sequence[RunEvent]) -> None:
        """Note events that have become durable."""
        self._tail.extend(events)
        self._last = events[-1].number
        self._stir()

    def say(self, saying: bytes) -> None:
        """Tell what is not kept. Who lags loses it, and reads the whole when it is there."""
        for listener in self._listeners.values():
            if len(listener) < MOST_SAYINGS:
                listener.append(saying)
        if self._listeners:
            self._stir()

    def say_text(self, variable: str, attempt: int, piece: str) -> None:
        """Tell a piece of text of a call under way; who comes before ``fall_silent`` gets all of them first."""
        if (text := self._texts.get((variable, attempt))) is None:
            text = self._texts[variable, attempt] = _Text()
        text.add(piece)
        if self._listeners:
            self.say(_encoded(variable, attempt, piece))

    def fall_silent(self, variable: str, attempt: int) -> None:
        """Forget what a call has said, which has ended."""
        self._texts.pop((variable, attempt), None)

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

    async def follow(self, after: int = 0) -> AsyncGenerator[RunEvent | bytes, None]:
        """Yield all durable events behind a number, up to now; then what calls under way have said so far; and then
        what happens, and in between what is said."""
        while after < self._last:
            if not (events := await self._behind(after)):
                return
            for event in events:
                after = event.number
                yield event
        sayings: deque[bytes] = deque()
        self._listeners[id(sayings)] = sayings  # at the same moment: no piece is lost or comes twice
        try:
            for saying in self._said():
                yield saying
            while True:
                while sayings:  # before what is kept: the pieces of a text come before the whole
                    yield sayings.popleft()
                while after < self._last:
                    if not (events := await self._behind(after)):
                        return
                    for event in events:
                        after = event.number
                        yield event
                if after >= self._last and not sayings:
                    if self._is_over:
                        return
                    await self.changed()
        finally:
            del self._listeners[id(sayings)]

    def _said(self) -> list[bytes]:
        texts = ((variable, attempt, text.whole) for (variable, attempt), text in self._texts.items())
        return [_encoded(variable, attempt, whole) for variable, attempt, whole in texts if whole]

    async def _behind(self, after: int) -> Sequence[RunEvent]:
        """Return the next events; none only if the run is gone from the database."""
        if self._tail and self._tail[0].number <= after + 1:
            return [self._tail[at] for at in range(after - self._last, 0)]  # numbers have no gaps
        return await self._read(self._run, after)


def _encoded(variable: str, attempt: int, text: str) -> bytes:
    return msgspec.json.encode(Saying(variable, attempt, text))
