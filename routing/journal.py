"""What a request has been given so far. Append-only data with one writer, the runner of its current leg."""

from collections.abc import Callable

import msgspec

from core.chat import Call, Usage
from core.errors import ForebayError


def _nobody() -> None:
    """Stand in for a reader that has not come yet."""


class Journal:
    """The answer of one call as it comes into being; the client reads behind the writer at its own pace.

    ``frames`` holds whole SSE frames (or one body) in delivery order and only grows. ``error`` and ``is_complete``
    say how it ended; nothing is appended afterwards. ``on_change`` is called after every append and at the end.
    ``asides`` holds what the client never sees and a leg that goes on from here needs: token ids, or the frames of a
    whole answer that is not whole yet.
    """

    __slots__ = (
        "asides",
        "call",
        "error",
        "frames",
        "is_complete",
        "num_bytes",
        "num_delivered_bytes",
        "num_tokens",
        "on_change",
        "usage",
    )

    def __init__(self, call: Call) -> None:
        self.call = call
        self.frames: list[bytes] = []
        self.asides: list[bytes] = []
        self.num_bytes = 0
        self.num_delivered_bytes = 0
        self.num_tokens = 0
        self.usage: Usage | None = None
        self.error: ForebayError | None = None
        self.is_complete = False
        self.on_change: Callable[[], None] = _nobody

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will come."""
        return self.is_complete or self.error is not None

    @property
    def num_undelivered_bytes(self) -> int:
        """How far the client lags behind the engine."""
        return self.num_bytes - self.num_delivered_bytes

    @property
    def metered(self) -> Usage:
        """The engine's count; without one, the tokens seen here and the estimate of the prompt.

        An answer that was cut may hold a count of its beginning only: what was seen later is added.
        """
        usage = self.usage
        if usage is not None:
            if self.is_complete or usage.completion_tokens >= self.num_tokens:
                return usage
            return msgspec.structs.replace(usage, completion_tokens=self.num_tokens)
        prompt_tokens = self.call.prompt_tokens_estimate if self.frames else 0
        return Usage(prompt_tokens=prompt_tokens, completion_tokens=self.num_tokens)

    def unfollow(self) -> None:
        """Nobody is told of changes any more."""
        self.on_change = _nobody

    def append(self, frames: bytes, num_tokens: int) -> None:
        """Add frames that are on their way to the client."""
        if frames:
            self.frames.append(frames)
            self.num_bytes += len(frames)
        self.num_tokens += num_tokens
        self.on_change()

    def complete(self) -> None:
        """The answer is whole."""
        self.is_complete = True
        self.on_change()

    def fail(self, error: ForebayError) -> None:
        """The answer ends here, early. The first end counts."""
        if not self.has_ended:
            self.error = error
            self.on_change()
