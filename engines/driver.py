"""What Forebay asks of an engine, whatever engine it is."""

from collections.abc import AsyncIterator, Callable
from typing import Literal, Protocol

import msgspec

from core.chat import Call, Usage

Health = Literal["ok", "loading", "unhealthy", "silent", "unreachable"]
"""``loading``: answers, not ready yet. ``unhealthy``: answers, and says it is ill. ``silent``: takes the connection and
does not answer in time; too busy for a probe, perhaps, and that is no absence. ``unreachable``: nobody there."""


class Chunk(msgspec.Struct):
    """A piece of an answer, in arrival order.

    ``raw`` goes to the client as it is (whole SSE frames, or a whole body; empty where the piece is only news of
    progress). ``num_tokens`` counts the output tokens in it; ``usage`` is all the engine has reported so far.
    ``is_progress`` is False for keep-alive comments, which say nothing of the work and reset no deadline.
    """

    raw: bytes
    num_tokens: int = 0
    usage: Usage | None = None
    is_progress: bool = True


class Load(msgspec.Struct, frozen=True):
    """What an engine says of itself: requests running and waiting, share of KV memory in use (0..1, None: unknown)."""

    running: int = 0
    waiting: int = 0
    kv_used: float | None = None


class Capabilities(msgspec.Struct, frozen=True):
    """What the start-up probe has proven. A False means "not shown", never "assumed".

    ``context_tokens`` is what one request may use, prompt and answer together (None: the engine does not tell).
    ``endpoints`` are paths that answered.
    """

    endpoints: tuple[str, ...] = ()
    context_tokens: int | None = None
    token_ids: bool = False
    token_prompts: bool = False
    continuation: bool = False
    cache_salt: bool = False
    slot_save: bool = False
    metrics: bool = False
    models: tuple[str, ...] = ()
    version: str | None = None


class Driver(Protocol):
    """Speaks to one running engine at one base URL. Safe to share between tasks; ``close`` ends its connections.

    Every method translates what goes wrong into ``core.errors``; nothing of the HTTP library passes.
    """

    def run(self, call: Call) -> AsyncIterator[Chunk]:
        """Run the call and yield its answer. Cancelling the task that iterates closes the engine's connection.

        Raises ``ConnectTimeout``, ``UpstreamError`` or ``WorkerLost``. An error that the engine hides in a 200
        stream is raised too; it is never yielded.
        """

    def reports_progress(self, call: Call) -> bool:
        """Whether ``run`` yields while a whole (non-streamed) answer is being made, so that silence means trouble."""

    async def settle(self, num_expected: Callable[[], int]) -> None:
        """Return once the engine has really stopped what was cancelled: it runs no more requests than are expected.

        Returns at once where the engine cannot be asked, and after some seconds in any case.
        """

    async def tokenize(self, body: dict[str, object]) -> dict[str, object]:
        """Return vLLM's shape ``{tokens, count, max_model_len}`` for its ``prompt`` or ``messages``."""

    async def detokenize(self, body: dict[str, object]) -> dict[str, object]:
        """Return ``{prompt}`` for ``tokens``."""

    async def count_tokens(self, body: dict[str, object]) -> dict[str, object]:
        """Return ``{input_tokens}`` for an Anthropic messages body."""

    async def health(self) -> Health:
        """Return how the engine is; never raises, and takes at most two seconds."""

    async def load(self) -> Load | None:
        """Return what the engine reports of its load; None where it reports nothing."""

    async def capabilities(self) -> Capabilities:
        """Probe a ready engine and return what it can do. Costs a few tiny requests."""

    async def close(self) -> None:
        """Close every connection."""
