"""Server-sent events of a run, over as many connections as it takes."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeAlias

import httpx

from forebay import _wire
from forebay._errors import MalformedAnswer, StreamBroken
from forebay.events import Event, read

Send: TypeAlias = Callable[[_wire.Call], Awaitable[httpx.Response]]
"""Sends a request, and gives the first successful answer, its body unread."""


_SILENCE_S = 60.0  # the gateway says every fifteen seconds that it is there


@dataclass(frozen=True, slots=True)
class Told:
    """An event, and its number within the run if it has one; ``is_anew``: the first on a new connection."""

    event: Event
    number: int | None
    is_anew: bool = False


async def follow(
    send: Send,
    path: str,
    params: Mapping[str, str],
    max_retries: int,
    *,
    after: int = 0,
    ends: Callable[[Event], bool],
) -> AsyncGenerator[Told, None]:
    """Yield the events behind a number, until one ends it. Where a connection breaks, go on behind the last event.

    Raises ``ConnectionFailed`` or ``StreamBroken`` when connections break again and again without telling anything.
    """
    attempts = _wire.Attempts(max_retries, is_repeatable=True)
    is_anew = False
    while True:
        headers = {"accept": "text/event-stream", "last-event-id": str(after)}
        try:
            call = _wire.Call("GET", path, params=params, headers=headers, is_repeatable=True, silence=_SILENCE_S)
            response = await send(call)
            async with aclosing(_told(response)) as stream:
                async for number, event in stream:
                    if number is not None and number <= after:
                        continue
                    yield Told(event, number, is_anew)
                    if ends(event):
                        return
                    after = number or after
                    attempts, is_anew = _wire.Attempts(max_retries, is_repeatable=True), False
            delay = attempts.after_end()
        except httpx.TransportError as error:
            delay = attempts.after_error(error)
        is_anew = True
        await asyncio.sleep(delay)


async def _told(response: httpx.Response) -> AsyncGenerator[tuple[int | None, Event], None]:
    try:
        async for number, name, data in _frames(response.aiter_bytes()):
            yield number, _event(name, data)
    finally:
        await response.aclose()


async def _frames(pieces: AsyncIterator[bytes]) -> AsyncIterator[tuple[int | None, str, str]]:
    """Yield number, name and data of each event. A number is that of its own frame, not of one before."""
    rest = b""
    fields: dict[str, str] = {}
    async for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            text = line.removesuffix(b"\r").decode("utf-8", "replace")
            if text:
                name, _, value = text.partition(":")
                value = value.removeprefix(" ")
                fields[name] = f"{fields[name]}\n{value}" if name == "data" and name in fields else value
                continue
            told, fields = fields, {}
            if "data" in told:
                number = told.get("id", "")
                yield int(number) if number.isdecimal() else None, told.get("event", "message"), told["data"]


def _event(name: str, data: str) -> Event:
    try:
        content: Any = json.loads(data)
        if name == "error":
            fault = content["error"]
            raise StreamBroken(str(fault.get("message", "the stream broke")), code=fault.get("code"))
        return read(name, content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise MalformedAnswer(f"the stream holds a {name!r} that cannot be read: {data[:200]!r}") from error
