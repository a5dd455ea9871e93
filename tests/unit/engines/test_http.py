"""What only one of the two HTTP clients does, and which of them an engine gets."""

import asyncio

import pytest

from engines.drivers.http1 import Http1
from engines.drivers.http_remote import RemoteHttp
from engines.drivers.wire import Wire
from tests.fakes.http import WHOLE, Farewell, Kind, Talk, asked, saying, serving


async def test_bytes_that_nobody_asked_for_close_an_idle_connection() -> None:
    farewell = Farewell()

    async def speak_up(talk: Talk) -> None:
        for _ in range(10):
            await asyncio.sleep(0)
        talk.writer.write(b"HTTP/1.1 408 Timeout\r\ncontent-length: 0\r\n\r\n")
        await farewell(talk)

    async with serving(saying(WHOLE, then=speak_up), Http1) as (http, talks):
        assert await asked(http) == (200, b"hello")
        await farewell.has_come.wait()
        assert await asked(http) == (200, b"hello")
        assert len(talks) == 2


async def test_a_connection_that_was_idle_for_long_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Http1, "KEEPALIVE_S", 0.001)
    farewell = Farewell()
    async with serving(saying(WHOLE, then=farewell), Http1) as (http, talks):
        await asked(http)
        await farewell.has_come.wait()
        await asked(http)
        assert len(talks) == 2


@pytest.mark.parametrize(
    ("url", "proxies", "chosen"),
    [
        ("http://127.0.0.1:8000/v1", {"http_proxy": "http://proxy:3128"}, Http1),
        ("http://engine:8000", {}, Http1),
        ("http://engine:8000", {"http_proxy": "http://proxy:3128"}, RemoteHttp),
        ("http://engine:8000", {"http_proxy": "http://proxy:3128", "no_proxy": "engine"}, Http1),
        ("http://name:word@engine:8000", {}, RemoteHttp),
        ("https://api.example.com/v1", {}, RemoteHttp),
    ],
)
async def test_what_needs_more_than_tcp_goes_through_aiohttp(
    url: str, proxies: dict[str, str], chosen: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "no_proxy", "HTTP_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in proxies.items():
        monkeypatch.setenv(name, value)
    wire = Wire(url, None)
    assert type(wire._http) is chosen
    await wire.close()
