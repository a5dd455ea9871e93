"""A leg that is made in parts while others wait, so that a cut comes where the engine has ended by itself."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing

from core.chat import Call
from core.errors import UpstreamBroken
from engines.driver import Bounded, Chunk
from engines.run import Run
from engines.transcript import read


async def in_parts(run: Run, driver: Bounded, call: Call, is_awaited: Callable[[], bool]) -> AsyncIterator[Chunk]:
    """Yield a leg's chunks; a new part begins as long as ``is_awaited`` says that others wait, else all the rest.

    ``run.is_in_part`` while a part is made that will end soon: a leg that is to be cut then ends with it, by
    ``CancelledError``. Raises what ``Driver.run`` raises, and ``UpstreamBroken`` if what was said is no plain text.

    After the bounded legs of a gateway that knows nothing of its engines: a quantum ends with all its tokens told, none
    made in vain, and the engine free. We bound a leg only if somebody waits when it begins.
    """
    while True:
        most = driver.quantum(call) if is_awaited() else None
        run.is_in_part = most is not None
        is_first = run.transcript is None
        chunks = driver.run(call, most) if run.transcript is None else run.transcript.go_on(driver, call, most)
        async with aclosing(chunks) as pieces:  # type: ignore[type-var] # generators
            async for chunk in pieces:
                yield chunk
        run.is_in_part = False
        frames = run.journal.frames
        if most is None or (is_first and frames and b"[DONE]" in frames[-1]):
            return
        if is_first:
            run.transcript = read(run.journal)
        if run.transcript is None:
            raise UpstreamBroken("the engine began an answer that is no plain text and cannot be continued", status=502)
        if run.transcript.has_ended:
            return
        if run.cut_for is not None:
            raise asyncio.CancelledError
