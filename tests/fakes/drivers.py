"""A driver that follows a script, and calls to give to drivers."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

from core.chat import Call, CallContext, Endpoint, Timeouts, Usage
from core.errors import UnsupportedParameter
from core.ids import ModelName, RequestId, TenantId
from engines.driver import Capabilities, Chunk, Continuation, Exactness, Health, Load, Piece

_numbers = itertools.count(1)
_TIMEOUTS = Timeouts()


def call(
    name: str | None = None,
    *,
    model: str = "m",
    tenant: str = "t",
    stream: bool = True,
    wants_usage: bool = False,
    endpoint: Endpoint = Endpoint.CHAT,
    timeouts: Timeouts = _TIMEOUTS,
    prompt_tokens: int = 4,
    max_tokens: int = 16,
    fallbacks: tuple[str, ...] = (),
    body: dict[str, Any] | None = None,
) -> Call:
    """Return a call; its name is unique if none is given."""
    default: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "stream": stream}
    return Call(
        id=RequestId(name or f"call{next(_numbers)}"),
        endpoint=endpoint,
        model=ModelName(model),
        context=CallContext(tenant=TenantId(tenant)),
        body=default if body is None else body,
        stream=stream,
        wants_usage=wants_usage,
        timeouts=timeouts,
        prompt_tokens_estimate=prompt_tokens,
        max_tokens=max_tokens,
        fallbacks=tuple(ModelName(fallback) for fallback in fallbacks),
    )


def text(raw: bytes = b"data: x\n\n", num_tokens: int = 1, usage: Usage | None = None) -> Chunk:
    """Return a piece of an answer."""
    return Chunk(raw, num_tokens, usage)


COMMENT = Chunk(b": ping\n\n", is_progress=False)


class Gate:
    """A place in a script where the driver waits until the test opens it."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def open(self) -> None:
        """Let the driver go on."""
        self._event.set()

    async def passed(self) -> None:
        """Wait until it is open."""
        await self._event.wait()


Step = Chunk | Gate | BaseException
Script = tuple[Step, ...]


class ScriptedDriver:
    """Fits ``engines.driver.Driver``. Each leg plays the next script, the last one again and again.

    ``num_running`` legs are under way; ``closed`` counts those whose iteration has ended, however it did.
    ``settle_gate``, where set, holds ``settle`` back; ``settle_error`` is what it raises.
    """

    def __init__(self, *scripts: Script, progress_of_whole: bool = False) -> None:
        self._scripts = list(scripts) or [(text(), text(b"data: [DONE]\n\n", 0))]
        self._progress_of_whole = progress_of_whole
        self.calls: list[Call] = []
        self.num_running = 0
        self.num_yielded = 0
        self.closed = 0
        self.settled: list[int] = []
        self.settle_gate: Gate | None = None
        self.settle_error: Exception | None = None
        self.is_closed = False
        self.state: Health = "ok"

    def plays(self, *scripts: Script) -> None:
        """Replace the scripts that are still to come."""
        self._scripts = list(scripts)

    async def run(self, call: Call) -> AsyncIterator[Chunk]:
        """Play a script."""
        script = self._scripts.pop(0) if len(self._scripts) > 1 else self._scripts[0]
        self.calls.append(call)
        self.num_running += 1
        try:
            for step in script:
                match step:
                    case Chunk():
                        self.num_yielded += 1
                        yield step
                    case Gate():
                        await step.passed()
                    case _:
                        raise step
        finally:
            self.num_running -= 1
            self.closed += 1

    def reports_progress(self, call: Call) -> bool:
        """Of streams; of whole answers if so told."""
        return call.stream or self._progress_of_whole

    async def settle(self, num_expected: Callable[[], int]) -> None:
        """Return once the gate, if there is one, is open."""
        self.settled.append(num_expected())
        if self.settle_gate is not None:
            await self.settle_gate.passed()
        if self.settle_error is not None:
            raise self.settle_error

    async def tokenize(self, body: dict[str, object]) -> dict[str, object]:
        """Return a token per byte."""
        prompt = body.get("prompt")
        if not isinstance(prompt, str):
            raise UnsupportedParameter("this engine tokenises prompts alone", param="messages")
        tokens = list(prompt.encode())
        return {"tokens": tokens, "count": len(tokens), "max_model_len": 64}

    async def detokenize(self, body: dict[str, object]) -> dict[str, object]:
        """Return the bytes as text."""
        tokens = body["tokens"]
        assert isinstance(tokens, list)
        return {"prompt": bytes(tokens).decode()}

    async def count_tokens(self, body: dict[str, object]) -> dict[str, object]:
        """Return how many messages there are."""
        messages = body["messages"]
        assert isinstance(messages, list)
        return {"input_tokens": len(messages)}

    async def health(self) -> Health:
        """Return the state that the test has set."""
        return self.state

    async def load(self) -> Load | None:
        """Return what runs."""
        return Load(running=self.num_running)

    async def capabilities(self) -> Capabilities:
        """Return what a scripted engine can do."""
        return Capabilities(endpoints=(Endpoint.CHAT,), context_tokens=64, models=("m",))

    async def close(self) -> None:
        """Remember that it was closed."""
        self.is_closed = True


class ResumableDriver(ScriptedDriver):
    """Fits ``engines.driver.Resumable`` too. ``rests`` are what is played after a cut, one for each further leg.

    ``pasts`` are what the driver was told to go on from, ``parked`` the calls whose slots it was asked to keep.
    """

    def __init__(self, *scripts: Script, rests: Iterable[tuple[Piece | Gate | BaseException, ...]] = ()) -> None:
        super().__init__(*scripts)
        self.rests = list(rests)
        self.pasts: list[Continuation] = []
        self.parked: list[Call] = []
        self.class_: Exactness = "prefix"

    def exactness(self, call: Call) -> Exactness:
        """Return what the test has set."""
        return self.class_

    async def resume(self, call: Call, past: Continuation) -> AsyncIterator[Piece]:
        """Play the next rest."""
        self.pasts.append(past)
        self.num_running += 1
        try:
            for step in self.rests.pop(0):
                match step:
                    case Piece():
                        yield step
                    case Gate():
                        await step.passed()
                    case _:
                        raise step
        finally:
            self.num_running -= 1
            self.closed += 1

    async def park(self, call: Call, num_expected: Callable[[], int]) -> None:
        """Remember the call, once it has settled."""
        await self.settle(num_expected)
        self.parked.append(call)
