"""What Forebay asks of an engine, whatever engine it is."""

from collections.abc import AsyncIterator, Callable, Sequence
from functools import lru_cache
from typing import Any, Literal, Protocol, cast, runtime_checkable

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
    ``aside`` is what the client does not see and a later leg may need (see ``Resumable``): of a stream, the lists of
    token ids that were cut out of ``raw``, in their order; of a whole answer under way, the engine's frames.
    """

    raw: bytes
    num_tokens: int = 0
    usage: Usage | None = None
    is_progress: bool = True
    aside: Sequence[bytes] = ()


Exactness = Literal["token", "prefix", "pinned"]
"""What becomes of an answer that is cut and continued. ``token``: it equals the undisturbed one; this is known
afterwards alone, by what its engine had kept. ``prefix``: what was given stays, and the rest is what the engine gives
for prompt and given tokens. ``pinned``: it cannot be continued."""


class Continuation(msgspec.Struct, frozen=True):
    """What a call has been answered by legs that were cut: ``texts`` are the pieces that were delivered, as they came,
    no more and no less.

    ``prompt_ids`` and ``ids`` are the prompt's and the text's token ids where the engine has told them; ``ids`` may say
    more than the text, where an engine holds text back; ``num_at_once`` of them came with the last piece, if that was
    told of several at once: the last of those may be the beginning of a letter that is not in the text. ``num_tokens``:
    how many the text took, where the engine has told that; the same text may be fewer when it is parted anew, and
    limits count what was made. ``usage`` is what the
    engines have told of the legs so far, None if they have not. ``num_pieces``: in how many pieces it came, also those
    without text; most engines send each token as one.
    """

    texts: Sequence[str]
    prompt_ids: list[int] | None = None
    ids: list[int] | None = None
    num_at_once: int = 0
    num_tokens: int | None = None
    usage: Usage | None = None
    num_pieces: int = 0

    @property
    def text(self) -> str:
        """All that was delivered."""
        return "".join(self.texts)


class Piece(msgspec.Struct):
    """A piece of an answer that goes on: ``text`` with the ``num_tokens`` it took, and their ``ids`` where known.

    ``ending`` says why the answer ends here, by the engine's own fields (``finish_reason``, maybe ``stop_reason``).
    ``usage`` is that of the whole answer so far: the prompt as the first leg had it, and all output tokens; a leg
    begins with that of its past and ends with all. ``prefilled`` counts the tokens that this leg processed anew before
    it could go on, and ``expected`` how many that may be, from an engine that tells it later. ``is_exact``: the engine
    had kept all that the legs before had computed, and a greedy answer goes on as the undisturbed one does, token for
    token.
    """

    text: str = ""
    num_tokens: int = 0
    ids: list[int] | None = None
    ending: dict[str, Any] | None = None
    usage: Usage | None = None
    prefilled: int | None = None
    expected: int | None = None
    is_exact: bool = False


class Load(msgspec.Struct, frozen=True):
    """What an engine says of itself: requests running and waiting, share of KV memory in use (0..1, None: unknown)."""

    running: int = 0
    waiting: int = 0
    kv_used: float | None = None


class Capabilities(msgspec.Struct, frozen=True):
    """What the start-up probe has proven. A False means "not shown", never "assumed".

    ``context_tokens`` is what one request may use, prompt and answer together (None: the engine does not tell).
    ``kv_tokens`` is what all requests together may use of its memory (None: not told, or no limit beside that).
    ``num_prefixes``: of how many prompts that begin differently its caches keep something, where they count so.
    ``endpoints`` are paths that answered. ``continuation``: an answer that was cut can be continued.
    """

    endpoints: tuple[str, ...] = ()
    context_tokens: int | None = None
    kv_tokens: int | None = None
    num_prefixes: int | None = None
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


@runtime_checkable
class Resumable(Protocol):
    """A driver that can go on with an answer which another leg has begun, on this worker or on another."""

    def exactness(self, call: Call) -> Exactness:
        """Return how well an answer to the call can be continued. Costs microseconds; asks nobody."""

    def resume(self, call: Call, past: Continuation) -> AsyncIterator[Piece]:
        """Go on after ``past`` and yield what follows, up to an ``ending``. Cancelling and errors are ``run``'s.

        The limits of the call hold for the whole answer: where ``past`` has used them up, the engine is not asked.
        """

    async def park(self, call: Call, num_expected: Callable[[], int]) -> None:
        """Return when the slot of a leg that was cut, and whose call will go on, can be another's, having kept what the
        engine still holds of it if that can be done.

        It ``settle``s first, unless the engine has a queue of its own in which the next one can as well wait for it to
        let go: we cut few legs at a time. Never raises.
        """


@runtime_checkable
class Bounded(Resumable, Protocol):
    """A ``Resumable`` whose engine may not notice that it is left, and tells its count at the end alone: an answer is
    best cut where a leg ends by itself, after ``quantum`` tokens."""

    def quantum(self, call: Call) -> int | None:
        """Return how many tokens of the answer to make at a time while others wait; None: all at once."""

    def run(self, call: Call, most: int | None = None) -> AsyncIterator[Chunk]:
        """Do as ``Driver.run``, for ``most`` tokens: if the answer is longer, yield nothing of an ending."""

    def resume(self, call: Call, past: Continuation, most: int | None = None) -> AsyncIterator[Piece]:
        """Do as ``Resumable.resume``, for ``most`` tokens: if the answer is longer, yield no ``ending``."""


def bounded(driver: Driver, call: Call) -> Bounded | None:
    """Return the driver if it is ``Bounded``, and has the call's answer made in parts."""
    kind: type = type(driver)
    if not _is_bounded(kind):
        return None
    able = cast(Bounded, driver)
    return able if able.quantum(call) is not None else None


@lru_cache(maxsize=64)
def _is_bounded(kind: type) -> bool:
    return issubclass(kind, Bounded)


def resumable(driver: Driver | None) -> Resumable | None:
    """Return the driver if it is ``Resumable`` too."""
    kind: type = type(driver)
    return cast(Resumable, driver) if _is_resumable(kind) else None


@lru_cache(maxsize=64)
def _is_resumable(kind: type) -> bool:
    return issubclass(kind, Resumable)  # takes ten microseconds: asked once a kind
