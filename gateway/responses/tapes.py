"""What a response has said so far, for who reads along: also for who comes in the middle."""

import asyncio

import msgspec

from gateway.responses.asked import OUTPUT
from gateway.runs.following import MOST_SAYINGS
from gateway.runs.live import LiveRun


class _Said(msgspec.Struct):
    event: str
    variable: str | None = None
    call: str | None = None
    text: str = ""


_SAID = msgspec.json.Decoder(_Said)


class Tape:
    """The text of one run's answer, as it comes. It stops where it may have missed a piece: what it holds is always the
    beginning of the answer. ``is_new``: nothing has been said yet; else it waits until the call begins (again).
    """

    def __init__(self, *, is_new: bool) -> None:
        self._pieces: list[str] = []
        self.length = 0
        self.is_over = False
        self._records = is_new
        self._num_at_once = 0
        self._news: asyncio.Future[None] | None = None

    async def record(self, live: LiveRun) -> None:
        """Listen until the run ends, or is another gateway's."""
        try:
            async for told in live.following.follow(live.told.number):
                if isinstance(told, bytes):
                    self._hear(_SAID.decode(told))
                self._stir()
        finally:
            self.is_over = True
            self._stir()

    def since(self, start: int) -> str:
        """Return the text from a character on."""
        pieces: list[str] = []
        at = self.length
        for piece in reversed(self._pieces):
            if at <= start:
                break
            at -= len(piece)
            pieces.append(piece)
        return "".join(reversed(pieces))[max(0, start - at) :]

    async def changed(self) -> None:
        """Wait for whatever comes next; return at once when nothing will."""
        if self.is_over:
            return
        if self._news is None:
            self._news = asyncio.get_running_loop().create_future()
        await asyncio.shield(self._news)

    def _hear(self, said: _Said) -> None:
        if said.event == "call.started" and said.call == OUTPUT:
            self._pieces, self.length, self._records = [], 0, True
        elif said.event == "variable.delta" and said.variable == OUTPUT and self._records:
            self._pieces.append(said.text)
            self.length += len(said.text)
        if not self._num_at_once:
            asyncio.get_running_loop().call_soon(self._breathe)
        self._num_at_once += 1
        if self._num_at_once >= MOST_SAYINGS:  # as many as are kept for who lags: the next ones may be lost
            self._records = False

    def _breathe(self) -> None:
        self._num_at_once = 0

    def _stir(self) -> None:
        if self._news is not None and not self._news.done():
            self._news.set_result(None)
        self._news = None
