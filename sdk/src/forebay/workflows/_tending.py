"""What this process does for a run in the background: it runs tools for it, and tells its progress."""

import asyncio
from collections.abc import Coroutine, Mapping
from contextlib import aclosing, suppress
from typing import Any, TypeVar, cast

from forebay._errors import Conflict, ForebayError, NotFound
from forebay.events import CallWaiting, Event, RunAppended, VarCancelled, VarDone, VarFailed
from forebay.workflows._line import Line
from forebay.workflows._progress import Progress
from forebay.workflows._trace import ClientTool

T = TypeVar("T")


class Tending:
    """Follows a run from its start. ``raised``: what tools raised, by the path of the call."""

    def __init__(self, line: Line, tools: Mapping[str, ClientTool], progress: Progress | None) -> None:
        self.raised: dict[str, Exception] = {}
        self._line = line
        self._tools = tools
        self._progress = progress
        self._task: asyncio.Task[None] | None = None
        self._working: dict[str, asyncio.Task[None]] = {}
        self._more = asyncio.Event()
        self._num_ended = -1  # how often calls had been appended before the run ended
        self._end_told = asyncio.Event()

    def begin(self) -> None:
        """Note that calls have been sent; begin if there is something to do."""
        self._more.set()
        if self._task is None and (self._tools or self._progress is not None):
            self._task = asyncio.create_task(self._follow(), name="forebay_run")

    async def end(self) -> None:
        """Stop; tools that still run are cancelled."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def ended(self) -> None:
        """Wait until the run has ended, if tools of this process belong to it."""
        if self._tools and self._task is not None:
            await self.beside(self._wait_for_end())

    async def beside(self, work: Coroutine[Any, Any, T]) -> T:
        """Return what the work gives. Raises what ended the following, if the work may need tools to be run."""
        if self._task is None or not self._tools:
            return await work
        task = asyncio.ensure_future(work)
        try:
            await asyncio.wait((task, self._task), return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                self._task.result()
            return await task
        finally:
            task.cancel()

    async def _wait_for_end(self) -> None:
        while self._num_ended < self._line.num_appended:
            self._end_told.clear()
            await self._end_told.wait()

    async def _follow(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                await self._attend_all(group)
        except* ForebayError as errors:
            raise _first(errors) from None
        finally:
            if self._progress is not None:
                self._progress.close()

    async def _attend_all(self, group: asyncio.TaskGroup) -> None:
        after = num_seen = 0
        while True:
            async with aclosing(self._line.events(num_seen=num_seen, after=after)) as stream:
                async for told in stream:
                    after = told.number or after
                    num_seen += isinstance(told.event, RunAppended)
                    if self._progress is not None:
                        self._progress.on(told.event)
                    self._attend(told.event, group)
            self._num_ended = num_seen
            self._end_told.set()
            while num_seen >= self._line.num_appended:
                self._more.clear()
                await self._more.wait()

    def _attend(self, event: Event, group: asyncio.TaskGroup) -> None:
        match event:
            case CallWaiting(variable=path, tool=name) if name in self._tools:
                self._working[path] = group.create_task(self._work(event))
            case VarFailed(variable=path) | VarCancelled(variable=path) if path in self._working:
                self._working.pop(path).cancel()
            case VarDone(variable=path):
                self._working.pop(path, None)
            case _:
                pass

    async def _work(self, waiting: CallWaiting) -> None:
        # A call may end while its tool runs, as of a body that lost its race: then it is not there any more.
        with suppress(Conflict, NotFound):
            try:
                value = await self._tools[waiting.tool].run(waiting.arguments)
            except Exception as error:  # noqa: BLE001 - whatever a tool raises, its call has failed
                self._working.pop(waiting.variable, None)  # that it fails will be our own doing
                self.raised[waiting.call] = error
                await self._line.fail(waiting.variable, f"{type(error).__name__}: {error}")
            else:
                await self._line.put(waiting.variable, value)


def _first(errors: BaseExceptionGroup[ForebayError]) -> ForebayError:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return cast("ForebayError", error)
