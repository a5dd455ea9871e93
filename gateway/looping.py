"""One step, again and again, beside everything else."""

import asyncio
from collections.abc import Awaitable, Callable

import structlog

_log = structlog.get_logger(__name__)


class LoopingCall:
    """Awaits ``step`` every ``interval_s`` seconds, counted from the end of the one before, in a task of its own.

    Nobody waits for the task, so nothing ends it but ``stop``: an error of the step is logged as ``NAME_failed``, with
    its trace, and the next step comes in its time. What a step should do about errors that it knows is its own affair.
    """

    def __init__(self, name: str, step: Callable[[], Awaitable[None]], interval_s: float) -> None:
        self._name = name
        self._step = step
        self._interval_s = interval_s
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin; the first step comes after one interval."""
        self._task = asyncio.get_running_loop().create_task(self._run(), name=self._name)

    async def stop(self) -> None:
        """End it, in the middle of a step if need be, and return when it has ended. Does nothing before ``start``."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            try:
                await self._step()
            except Exception:  # noqa: BLE001 - see above: the next step may well succeed
                _log.exception(f"{self._name}_failed")
