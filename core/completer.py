"""The one seam through which every call to a model goes: chat requests now, workflow calls and replays later."""

from collections.abc import AsyncIterator
from typing import Protocol

import msgspec

from core.chat import Call, Usage
from core.errors import ForebayError
from core.ids import ModelName, WorkerId


class Served(msgspec.Struct, frozen=True):
    """Who answers a call, known once its first byte is there. ``queue_s``, ``engine_s``: seconds waited so far."""

    model: ModelName
    worker: WorkerId
    attempts: int
    queue_s: float
    engine_s: float


class Answer(Protocol):
    """One call on its way. Whoever asked for it closes it."""

    @property
    def usage(self) -> Usage:
        """What has been metered so far: the engine's own count where it gave one, our count of chunks otherwise."""

    @property
    def error(self) -> ForebayError | None:
        """Why the answer ended early; None while it runs and after a complete answer."""

    async def first_byte(self) -> Served:
        """Wait until an answer is sure to follow, or raise the ``ForebayError`` that stands in its place.

        Of a streamed answer the first event is there; a whole answer is there altogether.
        """

    def chunks(self) -> AsyncIterator[bytes]:
        """Yield the answer's bytes as they come: one body, or whole SSE frames. Raises ``ForebayError`` if cut."""

    def close(self) -> None:
        """Let go of the answer; if it still runs, its worker is told to stop at once."""


class Completer(Protocol):
    """Answers calls."""

    def submit(self, call: Call) -> Answer:
        """Queue the call and return at once. Never raises: what goes wrong is told by the answer."""
