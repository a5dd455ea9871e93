"""All background responses: takes them on, finds them, and tells of them while they come."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable
from types import TracebackType
from typing import Self

from core.errors import DatabaseUnavailable, UnknownId
from gateway.auth import Principal
from gateway.looping import LoopingCall
from gateway.responses.asked import Conversation, Question, conversation_of, workflow_of
from gateway.responses.background import Background, background_of
from gateway.responses.ids import run_of, unknown
from gateway.responses.links import Links
from gateway.responses.stream import Stream
from gateway.responses.tapes import Tape
from gateway.runs.live import LiveRun
from gateway.runs.service import Runs

_LOOK_S = 10.0  # as often as runs of other gateways are taken over
_POLL_S = 0.5  # a response that another gateway has is read from the database


class Responses:
    """The service. An async context manager: inside it, responses that were left are linked again with those that they
    refer to, and read along. ``alive`` returns the runs that go on here.
    """

    def __init__(self, runs: Runs, alive: Callable[[], Iterable[LiveRun]]) -> None:
        self._runs = runs
        self._alive = alive
        self._links = Links(runs)
        self._tapes: dict[str, Tape] = {}
        self._recording: set[asyncio.Task[None]] = set()
        self._known: set[str] = set()
        self._loop = LoopingCall("responses_found", self._look, _LOOK_S)

    async def __aenter__(self) -> Self:
        await self._look()
        self._loop.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._loop.stop()
        await self._links.aclose()
        for task in self._recording:
            task.cancel()
        await asyncio.gather(*self._recording, return_exceptions=True)

    async def _look(self) -> None:
        """Take on what this gateway has begun to go on with."""
        alive = {live.id: live for live in self._alive()}
        for run in alive.keys() - self._known:
            if (background := background_of(alive[run])) is not None:
                self._take(background)
        self._known = set(alive)

    def _take(self, background: Background) -> None:
        live = background.live
        if live is None or live.is_gone:
            return
        self._known.add(live.id)
        self._links.take(background)
        if background.asked.stream and live.id not in self._tapes:
            tape = self._tapes[live.id] = Tape(is_new=not background.history.number)
            task = asyncio.create_task(self._record(tape, live), name="response_tape")
            self._recording.add(task)
            task.add_done_callback(self._recording.discard)

    async def _record(self, tape: Tape, live: LiveRun) -> None:
        try:
            await tape.record(live)
        finally:
            del self._tapes[live.id]

    async def conversation(self, principal: Principal, response: str | None) -> Conversation:
        """Return what was said up to the end of a response of the tenant. Raises ``UnknownId``."""
        if response is None:
            return Conversation()
        background = await self.find(principal, response, param="previous_response_id")
        return conversation_of(response, background.asked, background.history.workflow)

    async def submit(
        self, principal: Principal, question: Question, *, end_user: str | None, idempotency: str | None
    ) -> Background:
        """Take a question on, and return its response once it is durable; it waits for those that it refers to.

        Raises ``UnknownId`` for one that is not there, and what ``Runs.submit`` raises.
        """
        for response in question.references:
            await self.find(principal, response, param="input")
        workflow = workflow_of(question)
        record = await self._runs.submit(principal, workflow, end_user=end_user, idempotency=idempotency)
        background = background_of(await self._runs.find(principal, record.id))
        assert background is not None
        self._take(background)
        return background

    async def find(self, principal: Principal, response: str, *, param: str | None = None) -> Background:
        """Return a response of the tenant. Raises ``UnknownId``; ``param``: the field that the id stands in."""
        try:
            background = background_of(await self._runs.find(principal, run_of(response)))
        except UnknownId:
            raise unknown(response, param) from None
        if background is None:
            raise unknown(response, param)
        return background

    async def cancel(self, principal: Principal, response: str) -> Background:
        """Give a response up, and return how it has ended; one that has ended stays as it is. Raises ``UnknownId``."""
        background = await self.find(principal, response)
        if background.outcome is not None:
            return background
        asked = await self._runs.ask(principal, background.record.id, lambda run: run.cancel(()))
        await asked.durable()
        return await self.find(principal, response)

    async def follow(self, principal: Principal, background: Background, after: int) -> AsyncGenerator[bytes, None]:
        """Yield a response's events behind number ``after`` as frames, until it ends."""
        stream = Stream(after)
        while not stream.is_over:
            tape = self._tapes.get(background.record.id)
            if frames := list(stream.frames(background, tape)):
                for frame in frames:
                    yield frame
                continue  # more may have come meanwhile
            live = background.live
            if tape is not None and not tape.is_over:
                await tape.changed()
            elif live is not None and not live.is_gone:
                await live.following.changed()
            else:
                await asyncio.sleep(_POLL_S)
                try:
                    background = await self.find(principal, background.id)
                except DatabaseUnavailable:
                    pass  # it has not ended for that
                except UnknownId:
                    return  # it was erased
