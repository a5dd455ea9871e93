"""When the machine itself stood still: a clock on every core that nothing of ours can hold up.

Virtual machines share their host, and now and then get no core for a fraction of a second. Whoever measures a 99th
percentile has to know, for one such moment delays more answers than all that is measured. The clock is a process of the
real-time class, so that it sleeps too long only where its core was not there.
"""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager, suppress

from benchmarks.loopback.cache import ROOT
from benchmarks.loopback.processes import Failed

EVERY_S = 0.005
AT_LEAST_S = 0.02  # what is shorter changes no figure here
_NOTED_WITHIN_S = 0.02  # after it is over


class Stalls:
    """The moments at which a core stood still, as ``time.perf_counter`` counts."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, float]] = []

    async def any_since(self, began: float) -> bool:
        """Return whether a core has stood still since then; waits until the clocks have said so."""
        await asyncio.sleep(_NOTED_WITHIN_S)
        return any(until > began for _, until in self.seen)


@asynccontextmanager
async def noted(cores: Iterable[int]) -> AsyncIterator[Stalls]:
    """Note it on these cores. Raises ``Failed`` where processes of the real-time class are not allowed."""
    stalls = Stalls()
    async with AsyncExitStack() as stack:
        for core in cores:
            await stack.enter_async_context(_clock(core, stalls))
        yield stalls


@asynccontextmanager
async def _clock(core: int, stalls: Stalls) -> AsyncIterator[None]:
    argv = [sys.executable, "-m", "benchmarks.loopback.stalls", str(core)]
    process = await asyncio.create_subprocess_exec(
        *argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    output = process.stdout

    async def read() -> None:
        while line := await output.readline():
            since, until = map(float, line.split())
            stalls.seen.append((since, until))

    reading: asyncio.Task[None] | None = None
    try:
        if not await output.readline():
            raise Failed("a clock of the real-time class is not allowed: be root, or have CAP_SYS_NICE")
        reading = asyncio.create_task(read())
        yield
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        if reading is not None:
            await reading


def main(core: int) -> None:
    """Write two times, when it slept and when it woke, for every sleep that was too long; for ever."""
    os.sched_setaffinity(0, {core})
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    print("ready", flush=True)
    slept = time.perf_counter()
    while True:
        time.sleep(EVERY_S)
        woke = time.perf_counter()
        if woke - slept > EVERY_S + AT_LEAST_S:
            print(slept, woke, flush=True)
        slept = woke


if __name__ == "__main__":
    main(int(sys.argv[1]))
