"""Streams of events, however their bytes are cut and wherever they break."""

import asyncio
import json
from contextlib import aclosing

import forebay
import httpx
import pytest
from forebay import events
from forebay.workflows._feed import Told, follow

from tests.unit.sdk.gateway import ScriptedGateway, stream


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Waiting takes no time and is written down."""
    told: list[float] = []

    async def asleep(seconds: float) -> None:
        told.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", asleep)
    return told


def frame(event: str, data: object, number: int | None = None, end: str = "\n") -> bytes:
    head = [] if number is None else [f"id: {number}"]
    return end.join([*head, f"event: {event}", f"data: {json.dumps(data, ensure_ascii=False)}", "", ""]).encode()


DONE = frame("run.done", {"run": "r"}, 3)


async def told_by(gateway: ScriptedGateway, after: int = 0) -> list[Told]:
    async with forebay.AsyncClient("http://gw:1", transport=gateway.transport) as client:
        source = follow(
            client._send, "v1/x", {"a": "b"}, 2, after=after, ends=lambda event: isinstance(event, events.RunDone)
        )
        async with aclosing(source):
            return [told async for told in source]


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
async def test_events_are_read_however_they_are_cut(size: int, end: str) -> None:
    whole = b": hello\n\n" + frame("variable.delta", {"variable": "v", "attempt": 1, "text": "ü\n"}, end=end) + DONE
    gateway = ScriptedGateway(stream(*(whole[at : at + size] for at in range(0, len(whole), size))))

    told = await told_by(gateway)

    assert [one.event for one in told] == [events.VarDelta("v", 1, "ü\n"), events.RunDone("r", None)]
    assert gateway.requests[0].url == "http://gw:1/v1/x?a=b"
    assert gateway.requests[0].headers["accept"] == "text/event-stream"


async def test_it_goes_on_behind_the_last_event_and_tells_none_twice(waits: list[float]) -> None:
    one, two = frame("variable.skipped", {"variable": "a"}, 1), frame("variable.skipped", {"variable": "b"}, 2)
    gateway = ScriptedGateway(stream(one, httpx.ReadError("cut")), stream(one, two), stream(two, DONE))

    told = await told_by(gateway)

    assert [one.number for one in told] == [1, 2, 3]
    assert [one.is_anew for one in told] == [False, True, True]
    assert [request.headers["last-event-id"] for request in gateway.requests] == ["0", "1", "2"]
    assert len(waits) == 2


async def test_a_stream_that_ends_again_and_again_before_its_end_is_broken() -> None:
    with pytest.raises(forebay.StreamBroken, match="before its end"):
        await told_by(ScriptedGateway(stream(), stream(), stream()))


async def test_an_error_within_the_stream_is_raised() -> None:
    fault = {"error": {"message": "too slow", "code": "client_idle"}}
    with pytest.raises(forebay.StreamBroken, match="too slow") as caught:
        await told_by(ScriptedGateway(stream(frame("error", fault))))

    assert caught.value.code == "client_idle"


@pytest.mark.parametrize("broken", [b"event: run.done\ndata: {\n\n", frame("run.done", {}), frame("run.done", [1])])
async def test_what_cannot_be_read_is_told_as_malformed(broken: bytes) -> None:
    with pytest.raises(forebay.MalformedAnswer, match=r"run\.done"):
        await told_by(ScriptedGateway(stream(broken)))
