"""How far a run is, in one line of a terminal."""

import time
from collections.abc import Callable
from typing import TextIO

from forebay.events import (
    CallRetried,
    CallStarted,
    Event,
    RunAppended,
    RunCancelled,
    RunDone,
    RunFailed,
    RunSkipped,
    RunStarted,
    VarCancelled,
    VarDone,
    VarFailed,
    VarSkipped,
)

_ENDS = {RunDone: "done", RunFailed: "failed", RunSkipped: "skipped", RunCancelled: "cancelled"}


class Progress:
    """Writes the line anew with each event, and ends it with the run. ``clock`` gives seconds."""

    def __init__(self, title: str, out: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._title = title
        self._out = out
        self._clock = clock
        self._begun = clock()
        self._calls: set[str] = set()
        self._ended: set[str] = set()
        self._running: set[str] = set()
        self._num_failed = 0
        self._width = 0

    def on(self, event: Event) -> None:
        """Take an event."""
        match event:
            case RunStarted(calls=calls) | RunAppended(calls=calls):
                self._calls.update(calls)
            case CallStarted(call=call) | CallRetried(call=call):
                self._calls.add(call)
                self._running.add(call)
            case VarDone(variable=name) | VarSkipped(variable=name) | VarCancelled(variable=name):
                self._end(name)
            case VarFailed(variable=name):
                self._num_failed += 1
                self._end(name)
            case RunDone() | RunFailed() | RunSkipped() | RunCancelled():
                self._write(f", {_ENDS[type(event)]}")
                self.close()
                return
            case _:
                return
        self._write("")

    def close(self) -> None:
        """End the line, if there is one."""
        if self._width:
            self._out.write("\n")
            self._width = 0

    def _end(self, name: str) -> None:
        self._running.discard(name)
        if name in self._calls:
            self._ended.add(name)

    def _write(self, end: str) -> None:
        failed = f", {self._num_failed} failed" if self._num_failed else ""
        seconds = self._clock() - self._begun
        counts = f"{len(self._ended)}/{len(self._calls)} calls, {len(self._running)} running{failed}"
        line = f"{self._title}: {counts}, {seconds:.1f} s{end}"
        self._out.write(f"\r{line.ljust(self._width)}")
        self._out.flush()
        self._width = len(line)
