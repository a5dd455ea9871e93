"""Whoever does the work of runs, without an engine."""

import asyncio
from collections.abc import Callable

from core.workflows import RunRecord
from semantic_vars.budget import Spent
from semantic_vars.calls import Call
from semantic_vars.events import Done, Prefill, Request, Start, Work


class Hands:
    """Answers with the prompt in angle brackets: at once, or once a call is let go that was to be held.

    ``begun`` are the calls that were started, in order; ``say`` is how one that is held says something.
    """

    prefills = False

    def __init__(self, *held: str) -> None:
        self.begun: list[str] = []
        self.say: dict[str, Callable[[str], None]] = {}
        self._held = {call: asyncio.Event() for call in held}

    def let_go(self, call: str) -> None:
        """Answer a call that was held, now or as soon as it is started."""
        self._held[call].set()

    async def do(self, run: RunRecord, start: Start, on_text: Callable[[str], None]) -> Done:
        """See ``Doing``."""
        self.begun.append(start.call)
        self.say[start.call] = on_text
        if (held := self._held.get(start.call)) is not None:
            await held.wait()
        assert isinstance(start.work, Request)
        return Done(start.call, start.epoch, f"<{start.work.body['prompt']}>", Spent(4, 0.0))

    async def prefill(self, run: RunRecord, ahead: Prefill) -> None:
        """Nothing is computed ahead."""

    def most(self, work: Work) -> Spent:
        """Return ten tokens."""
        return Spent(10, 0.0)

    def seconds(self, call: Call) -> float:
        """Return one."""
        return 1.0
