"""A dispatcher over real drivers, a scheduler that cuts when told, and a client that finds what no client may read."""

import asyncio
import json
from collections.abc import Callable
from typing import Any, NamedTuple, cast

from core.chat import Call, Endpoint
from core.clock import SystemClock
from engines.dispatcher import Bounds, Dispatcher
from engines.driver import Driver
from engines.run import Run
from routing.scheduler import Scheduler
from tests.fakes.cutting import CuttingScheduler
from tests.fakes.drivers import call

LENGTH = 24

Cuts = Callable[[int], bool]


def never(_: int) -> bool:
    return False


def after(num: int) -> Cuts:
    return lambda seen: seen == num


def every(num: int) -> Cuts:
    return lambda seen: seen % num == 0


class Told(NamedTuple):
    """What a client has read: ``faults`` are what no client may ever read."""

    text: str
    finish: str | None
    usage: dict[str, Any]
    faults: list[str]
    legs: list[str]


class Bed:
    """Workers of one model, and a scheduler that cuts when told. ``constant``: members that all frames share."""

    def __init__(self, drivers: dict[str, Driver], constant: tuple[str, ...]) -> None:
        self.drivers = drivers
        self.constant = constant
        self.scheduler = CuttingScheduler(*drivers)
        self.dispatcher = Dispatcher(cast(Scheduler, self.scheduler), SystemClock(), drivers.get, Bounds())

    async def tell(self, asked: Call, cuts: Cuts = never, *, inline: bool = True) -> Told:
        """Ask, and cut after each piece of which ``cuts`` says so; return what was told."""
        self.scheduler.cuts = cuts
        run = self.dispatcher.submit(asked, inline=inline)
        body = bytearray()

        def take(piece: bytes) -> bool:
            body.extend(piece)
            return True

        run.sink = take if inline and asked.stream else None
        try:
            async with asyncio.timeout(60):
                await run.first_byte()
                async for piece in run.chunks():
                    body.extend(piece)
        finally:
            run.close()
        return told(asked, bytes(body), run, self.constant)


def told(asked: Call, body: bytes, run: Run, constant: tuple[str, ...]) -> Told:
    legs = [leg.cause for leg in run.legs]
    if not asked.stream:
        whole = json.loads(body)
        choice = whole["choices"][0]
        text = choice["message"]["content"] if asked.endpoint is Endpoint.CHAT else choice["text"]
        return Told(text, choice["finish_reason"], whole["usage"], [], legs)
    frames = [frame.removeprefix("data: ") for frame in body.decode().split("\n\n") if frame]
    faults = [] if frames.count("[DONE]") == 1 and frames[-1] == "[DONE]" else ["not one [DONE] at the end"]
    events = [json.loads(frame) for frame in frames if frame != "[DONE]"]
    for member in constant:
        if len({event[member] for event in events}) != 1:
            faults.append(f"more than one {member}")
    choices = [choice for event in events for choice in event["choices"]]
    finishes = [choice["finish_reason"] for choice in choices if choice["finish_reason"]]
    usages = [event["usage"] for event in events if event.get("usage")]
    if len(finishes) != 1 or len(usages) != int(asked.wants_usage):
        faults.append(f"{len(finishes)} endings and {len(usages)} usages")
    if asked.endpoint is Endpoint.CHAT:
        if sum("role" in choice["delta"] for choice in choices) != 1:
            faults.append("not one role")
        text = "".join(choice["delta"].get("content") or "" for choice in choices)
    else:
        text = "".join(choice["text"] for choice in choices)
    if b'token_ids":[' in body:
        faults.append("ids that nobody has asked for")
    return Told(text, finishes[0] if finishes else None, usages[0] if usages else {}, faults, legs)


def check_equal(answer: Told, undisturbed: Told) -> None:
    """Hold an answer against the undisturbed one: the same text, the same end, the same tokens to pay."""
    counted = ("prompt_tokens", "completion_tokens", "total_tokens")
    assert answer.faults == []
    assert (answer.text, answer.finish) == (undisturbed.text, undisturbed.finish)
    assert [answer.usage[name] for name in counted] == [undisturbed.usage[name] for name in counted]


def ask(*, stream: bool = True, endpoint: Endpoint = Endpoint.CHAT, prompt: str = "Tell me.", **body: Any) -> Call:
    question: dict[str, Any] = {"prompt": prompt}
    if endpoint is Endpoint.CHAT:
        question = {"messages": [{"role": "user", "content": prompt}]}
    if stream:
        body["stream_options"] = {"include_usage": True}
    whole = {"model": "m", "temperature": 0, "max_tokens": LENGTH, "stream": stream, **question, **body}
    return call(stream=stream, wants_usage=stream, endpoint=endpoint, body=whole)
