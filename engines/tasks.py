"""Tasks that have an owner."""

import asyncio
from types import TracebackType


class Tasks(asyncio.TaskGroup):
    """A task group that lets its body's own error pass as it is, where the standard one wraps it in a group.

    An error of a task still ends the body and its siblings, and is raised in a group.
    """

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for the tasks; cancel them first if the body was cancelled."""
        was_cancelled = isinstance(error, asyncio.CancelledError)
        await super().__aexit__(*((kind, error, trace) if was_cancelled else (None, None, None)))
