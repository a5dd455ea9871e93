"""Where runs tell what they do: to the metrics, and as spans if anything is traced."""

from collections.abc import Awaitable, Callable, Sequence

from gateway.metrics import RunCounts
from gateway.tracing import Tracing
from storage.sql.workflows import Change

_Write = Callable[[Sequence[Change]], Awaitable[None]]


class Telling:
    """The ways out of all runs of a gateway. Without ``tracing`` there are no spans."""

    def __init__(self, counts: RunCounts, tracing: Tracing | None) -> None:
        self.counts = counts
        self.tracing = tracing

    def counting(self, write: _Write) -> _Write:
        """Return ``write``, with what it has written counted."""

        async def counted(changes: Sequence[Change]) -> None:
            await write(changes)
            self.counts.committed(sum(len(change.events) for change in changes))

        return counted


SILENT = Telling(RunCounts(), None)
"""Tells nobody."""
