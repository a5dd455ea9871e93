"""A call of a run while it is made: what the parts that make it have to know of it, and what they tell of it.

Between a run and the requests that its calls come to stand parts to which this is nothing, so it goes around them: a
call's task has it in its context.
"""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Literal

from core.chat import Usage
from gateway.runs.history import Made, Used

Kind = Literal["llm", "embed", "tool"]
"""Calls that take an engine or a tool."""


class Underway:
    """One call, over all its attempts. ``began`` is Unix time; ``parent``: the ``traceparent`` of the call's span, or
    of one that is not traced. ``on_used`` is told what each request has used."""

    __slots__ = ("_on_used", "_used", "attempts", "began", "engine_s", "kind", "parent", "queue_s")

    def __init__(self, kind: Kind, began: float, *, parent: bytes, on_used: Callable[[Used], None]) -> None:
        self.kind = kind
        self.began = began
        self.parent = parent
        self.attempts = 0
        self.queue_s = 0.0
        self.engine_s = 0.0
        self._used = Used()
        self._on_used = on_used

    def waited(self, seconds: float) -> None:
        """Note a wait for a limit or for a worker."""
        self.queue_s += seconds

    def worked(self, usage: Usage, engine_s: float) -> None:
        """Note a request that has ended: what it has used, and how long engines were at it."""
        more = Used(1, usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens)
        self.engine_s += engine_s
        self._used = self._used.plus(more)
        self._on_used(more)

    @property
    def made(self) -> Made:
        """What is kept of it."""
        return Made(self.began, self.attempts, round(self.queue_s, 3), round(self.engine_s, 3), self._used)


UNDERWAY: ContextVar[Underway | None] = ContextVar("forebay_call_of_run", default=None)
"""The call that this task makes; None outside of runs."""
