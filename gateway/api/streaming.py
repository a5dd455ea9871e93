"""Server-sent events of what takes long: a comment now and then, so that nobody on the way takes silence for an end."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, suppress

from fastapi.responses import StreamingResponse

KEEP_ALIVE_S = 15.0
_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


def event_stream(frames: AsyncGenerator[bytes, None]) -> StreamingResponse:
    """Return the answer that sends these frames. They are closed with it, also if the client leaves."""
    return StreamingResponse(_kept_alive(frames), headers=_HEADERS, media_type="text/event-stream")


async def _kept_alive(frames: AsyncGenerator[bytes, None]) -> AsyncIterator[bytes]:
    async with aclosing(frames):
        upcoming: asyncio.Task[bytes | None] | None = None
        try:
            while True:
                upcoming = upcoming or asyncio.ensure_future(anext(frames, None))
                done, _ = await asyncio.wait((upcoming,), timeout=KEEP_ALIVE_S)
                if not done:
                    yield b": keep-alive\n\n"
                    continue
                frame, upcoming = upcoming.result(), None
                if frame is None:
                    return
                yield frame
        finally:
            if upcoming is not None:
                upcoming.cancel()
                with suppress(asyncio.CancelledError):
                    await upcoming
