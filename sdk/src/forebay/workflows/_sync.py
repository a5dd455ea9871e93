"""Runs of workflows for programs without an event loop: the same run, in a thread that has one."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx

from forebay.events import Event
from forebay.workflows._bodies import Writing
from forebay.workflows._options import CriticalPath, RunOptions, RunStatus
from forebay.workflows._portal import Portal
from forebay.workflows._run import AsyncRun, GraphFormat
from forebay.workflows._trace import Block
from forebay.workflows._var import Var

T = TypeVar("T")


class Background:
    """The thread of a client, and the connections of it; both only from the first run on."""

    def __init__(self, connect: Callable[..., Any], transport: httpx.BaseTransport | None) -> None:
        self._connect = connect
        self._transport = transport
        self._lock = threading.Lock()
        self._open: tuple[Portal, Any] | None = None

    def run(self, options: RunOptions) -> tuple[Portal, AsyncRun]:
        """Return a run, and the portal to it. Raises ``TypeError`` if the client's transport cannot be awaited."""
        with self._lock:
            if self._open is None:
                if self._transport is not None and not isinstance(self._transport, httpx.AsyncBaseTransport):
                    raise TypeError("runs need a transport that is an httpx.AsyncBaseTransport too")
                self._open = Portal(), self._connect(transport=self._transport)
            portal, client = self._open
        return portal, AsyncRun(client._send, client._max_retries, options, portal)

    def close(self) -> None:
        """Close the connections and end the thread, if there are any."""
        with self._lock:
            opened, self._open = self._open, None
        if opened is not None:
            portal, client = opened
            portal.call(client.aclose())
            portal.close()


class Run(Writing):
    """A run of a workflow for programs without an event loop; otherwise the same as ``AsyncRun``."""

    def __init__(self, background: Background, options: RunOptions) -> None:
        self._portal, self._run = background.run(options)
        self._graph = self._run._graph
        self._written: AbstractContextManager[Block] | None = None

    def __enter__(self) -> Self:
        self._written = self._graph.root.written()
        self._written.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._written is not None:
            self._written.__exit__(kind, error, trace)
        self._portal.call(self._run.leave(is_well=error is None))

    @property
    def id(self) -> str | None:
        """The run's id; None before anything has been sent."""
        return self._run.id

    def submit(self) -> None:
        """Send what has been written down. Asking for a variable does it too."""
        self._portal.call(self._run.submit())

    def events(self, vars: Sequence[Var[Any]] = ()) -> Iterator[Event]:
        """Yield what happens, as ``AsyncRun.events`` does."""
        return self._portal.iterate(self._run.events(vars))

    def status(self) -> RunStatus:
        """Return where the run is."""
        return self._portal.call(self._run.status())

    def usage(self) -> Mapping[str, Any]:
        """Return what the run has used so far, as ``AsyncRun.usage`` does."""
        return self._portal.call(self._run.usage())

    def critical_path(self) -> CriticalPath | None:
        """Return the calls that determined how long the run has taken so far; None while none has ended."""
        return self._portal.call(self._run.critical_path())

    def graph(self, format: GraphFormat = "mermaid") -> str:
        """Return a drawing of the graph."""
        return self._portal.call(self._run.graph(format))

    def set(self, var: Var[T], value: T) -> None:
        """Set a variable that is open. Raises ``Conflict`` if it is set."""
        self._portal.call(self._run.set(var, value))

    def cancel(self, *vars: Var[Any]) -> None:
        """Cancel what makes these variables, and what only that needs; with none, the run."""
        self._portal.call(self._run.cancel(*vars))
