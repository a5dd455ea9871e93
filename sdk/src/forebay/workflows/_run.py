"""Runs of workflows: what was written down is sent when something is awaited, and its values are brought back."""

import asyncio
import sys
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, aclosing, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias, TypeVar

from pydantic import TypeAdapter, ValidationError

from forebay._errors import (
    APIStatusError,
    CallCancelled,
    CallFailed,
    CallSkipped,
    ForebayError,
    GraphError,
    MalformedAnswer,
    NoValue,
    RateLimited,
    ServerError,
    TimedOut,
)
from forebay.events import Event, VarDone
from forebay.workflows._bodies import Writing
from forebay.workflows._feed import Send
from forebay.workflows._line import Line
from forebay.workflows._options import CriticalPath, RunOptions, RunStatus
from forebay.workflows._pieces import Pieces
from forebay.workflows._portal import Portal
from forebay.workflows._progress import Progress
from forebay.workflows._tending import Tending
from forebay.workflows._trace import Block, Graph
from forebay.workflows._var import Criteria, Piece, Var

T = TypeVar("T")

GraphFormat: TypeAlias = Literal["mermaid", "json", "svg"]


@dataclass(frozen=True, slots=True)
class _Batch:
    """Calls and variables that are sent together, and the key by which the gateway knows them again."""

    key: str
    calls: Sequence[Mapping[str, Any]]
    variables: Mapping[str, Any]

    @property
    def names(self) -> list[str]:
        """The variables that it makes."""
        return [*(call["id"] for call in self.calls), *self.variables]

    @property
    def body(self) -> dict[str, Any]:
        """What is posted."""
        return {"calls": self.calls, "variables": self.variables} if self.variables else {"calls": self.calls}


class AsyncRun(Writing):
    """A run of a workflow. Calls that are made in its block are written down, and sent when one is awaited.

    Leaving the block sends what has not been sent, and lets the run go on; if tools of this process belong to it, it is
    waited for. Leaving it by an exception cancels the run.
    """

    def __init__(self, send: Send, max_retries: int, options: RunOptions, portal: Portal | None = None) -> None:
        self._options = options
        self._portal = portal
        self._graph = Graph(self)
        self._written: AbstractContextManager[Block] | None = None
        self._line = Line(send, max_retries)
        progress = Progress(options.app or "run", sys.stderr) if options.progress else None
        self._tending = Tending(self._line, self._graph.tools, progress)
        self._sending = asyncio.Lock()
        self._batch: _Batch | None = None
        self._refused: dict[str, APIStatusError] = {}
        self._is_cancelled = False

    async def __aenter__(self) -> Self:
        self._written = self._graph.root.written()
        self._written.__enter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._written is not None:
            self._written.__exit__(kind, error, trace)
        await self.leave(is_well=error is None)

    async def leave(self, *, is_well: bool) -> None:
        """End this process's part, as leaving the block does."""
        try:
            if is_well:
                await self.submit()
                await self._tending.ended()
            elif self.id is not None:
                with suppress(ForebayError):
                    await self._line.cancel(())
        finally:
            await self._tending.end()

    @property
    def id(self) -> str | None:
        """The run's id; None before anything has been sent."""
        return self._line.run

    # Sending

    async def submit(self) -> None:
        """Send what has been written down. Awaiting a variable does it too."""
        async with self._sending:
            while (batch := self._batch or self._take()) is not None:
                self._batch = batch  # until it has arrived: sent again it has the same key
                try:
                    await self._deliver(batch)
                except APIStatusError as error:
                    if not isinstance(error, ServerError | RateLimited | TimedOut):
                        self._batch = None
                        self._refused.update(dict.fromkeys(batch.names, error))
                    raise
                self._batch = None
                self._tending.begin()

    def _take(self) -> _Batch | None:
        calls, self._graph.root.calls = self._graph.root.calls, []
        variables, self._graph.variables = self._graph.variables, {}
        return _Batch(str(uuid.uuid4()), calls, variables) if calls or variables else None

    async def _deliver(self, batch: _Batch) -> None:
        if self.id is None:
            await self._line.submit({**self._options.fields(), **batch.body}, batch.key, self._options.resume)
        else:
            await self._line.append(batch.body, batch.key, batch.names)

    async def _sent(self, var: Var[Any] | None = None) -> str:
        """Send what is left, and return a variable's name. Raises what the gateway said of it, if it was refused."""
        name = "" if var is None else self._graph.plain(var).name
        if name not in self._refused:
            await self.submit()
        if name in self._refused:
            raise self._refused[name]
        if self.id is None:
            raise GraphError("the run has no calls yet")
        return name

    # Values; what a variable asks for

    async def value(self, var: Var[Any], criteria: Criteria) -> Any:
        """Return a variable's value, of its type."""
        name = await self._sent(var)
        told = await self._tending.beside(self._line.resolved(name, criteria))
        if told.get("state") != "done":
            raise self._no_value(name, told)
        try:
            return TypeAdapter(var.kind).validate_python(told.get("value"))
        except ValidationError as error:
            raise MalformedAnswer(f"the variable {name!r} of run {self.id} is not a {var.kind}: {error}") from error

    def _no_value(self, name: str, told: Mapping[str, Any]) -> NoValue:
        state, fault, raised = told.get("state"), told.get("error") or {}, self._tending.raised
        run, call, code = str(self.id), fault.get("call"), fault.get("code")
        if state == "skipped":
            return CallSkipped("it was skipped", run=run, variable=name, call=call, code=code)
        if raised and not self._is_cancelled and (call is None or call in raised):
            path = call or next(iter(raised))
            message = f"a tool raised {raised[path]!r}"
            failed = CallFailed(message, run=run, variable=name, call=path, code="tool_failed")
            failed.__cause__ = raised[path]
            return failed
        if state == "cancelled":
            return CallCancelled("it was cancelled", run=run, variable=name, call=call, code=code)
        return CallFailed(str(fault.get("message", "it failed")), run=run, variable=name, call=call, code=code)

    async def pieces(self, var: Var[Any]) -> AsyncIterator[Piece]:
        """Yield a variable's text as it comes."""
        name = await self._sent(var)
        pieces = Pieces(name)
        async with aclosing(self._line.events_of(name)) as stream:
            async for told in stream:
                if (piece := pieces.after(told)) is not None:
                    yield piece
                if isinstance(told.event, VarDone) and told.event.variable == name:
                    return
        await self.value(var, "latency")  # raises why there is none

    def wait(self, var: Var[Any], criteria: Criteria) -> Any:
        """Return a variable's value, in code without an event loop."""
        return self._blocking(var).call(self.value(var, criteria))

    def wait_for_pieces(self, var: Var[Any]) -> Iterator[Piece]:
        """Yield a variable's text, in code without an event loop."""
        return self._blocking(var).iterate(self.pieces(var))

    def _blocking(self, var: Var[Any]) -> Portal:
        if self._portal is None:
            raise TypeError(f"{var!r} is of an AsyncClient's run: write `await var` or `async for piece in var`")
        return self._portal

    # The run

    async def events(self, vars: Sequence[Var[Any]] = ()) -> AsyncIterator[Event]:
        """Yield what happens, from the beginning until the run has ended; with ``vars``, what concerns these alone.

        Broken connections are made anew, and it goes on behind the last event. Pieces of text are told once, so those
        of the meantime are missing; ``VarDone`` has the whole.
        """
        names = [self._graph.plain(var).name for var in vars]
        await self._sent()
        async with aclosing(self._line.events(names)) as stream:
            async for told in stream:
                yield told.event

    async def status(self) -> RunStatus:
        """Return where the run is."""
        await self._sent()
        return await self._line.status()

    async def usage(self) -> Mapping[str, Any]:
        """Return what the run has used so far: ``tokens``, of which there are ``prompt_tokens`` (``cached_tokens`` of
        them not processed anew) and ``completion_tokens``, in so many ``requests``, and ``cost`` in US dollars."""
        return (await self.status()).usage

    async def critical_path(self) -> CriticalPath | None:
        """Return the calls that determined how long the run has taken so far; None while none has ended."""
        await self._sent()
        return await self._line.critical_path()

    async def graph(self, format: GraphFormat = "mermaid") -> str:
        """Return a drawing of the graph."""
        await self._sent()
        return await self._line.graph(format)

    async def set(self, var: Var[T], value: T) -> None:
        """Set a variable that is open. Raises ``Conflict`` if it is set."""
        name = await self._sent(var)
        await self._line.put(name, TypeAdapter(var.kind).dump_python(value, mode="json"))

    async def cancel(self, *vars: Var[Any]) -> None:
        """Cancel what makes these variables, and what only that needs; with none, the run."""
        self._is_cancelled = True
        await self._sent()
        await self._line.cancel([var.name for var in vars])
