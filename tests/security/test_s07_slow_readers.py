"""S7: a crowd that reads its answers a byte at a time keeps nobody waiting and fills no memory."""

import asyncio
import itertools
import json
import resource
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress

import psutil
from aiohttp import web

from tests.e2e.asking import ask, metric, until
from tests.fakes.engine import FakeEngine
from tests.fakes.gateway import GatewayProcess, attached
from tests.fakes.replay import Replay, stream

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Hello."}]
CROWD = 1000
EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"' + b"x" * 16_000 + b'"}}]}\n\n'
EVERY_S = 2.0
UNDELIVERED = 64 * 2**10
SERVER = {"max_stream_bytes": UNDELIVERED}


async def endless_answer(request: web.Request) -> web.StreamResponse:
    """Answer 8 kB a second, thousands of times what the reader takes."""
    with suppress(ConnectionResetError):  # the reader has left, and the gateway with it
        return await stream(request, itertools.repeat(EVENT), pause_s=EVERY_S)
    return web.Response()


@contextmanager
def many_files() -> Iterator[None]:
    """Let this process, and those that it starts, open as many files as they may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@asynccontextmanager
async def slow_readers(gateway: GatewayProcess, count: int) -> AsyncIterator[list[socket.socket]]:
    """Have so many answers open, of whom each reads a byte a second."""
    raw = json.dumps({"model": "big", "messages": MESSAGES, "stream": True}).encode()
    head = (
        f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {gateway.key}\r\ncontent-length: {len(raw)}\r\n\r\n"
    )
    loop = asyncio.get_running_loop()
    readers: list[socket.socket] = []

    async def read_a_byte_a_second() -> None:
        while True:
            for reader in readers:
                with suppress(BlockingIOError):
                    assert reader.recv(1), "nobody is cut who reads"
            await asyncio.sleep(1)

    reading = None
    try:
        for _ in range(count):
            readers.append(reader := socket.socket())
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            reader.setblocking(False)
            await loop.sock_connect(reader, ("127.0.0.1", gateway.port))
            await loop.sock_sendall(reader, head.encode() + raw)
        for reader in readers:
            async with asyncio.timeout(60):
                assert await loop.sock_recv(reader, 12) == b"HTTP/1.1 200"
        reading = asyncio.create_task(read_a_byte_a_second())
        yield readers
        assert not reading.done(), reading.exception()
    finally:
        if reading is not None:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
        for reader in readers:
            reader.close()


async def latencies(gateway: GatewayProcess, count: int) -> list[float]:
    """Return how long each of so many streamed answers took, one after the other, in seconds."""
    took = []
    for _ in range(count):
        began = time.monotonic()
        answer = await ask(gateway, CHAT, {"model": "fake", "messages": MESSAGES, "stream": True})
        took.append(time.monotonic() - began)
        assert answer.status == 200
        assert answer.body.endswith(b"data: [DONE]\n\n")
    return took


@asynccontextmanager
async def crowded() -> AsyncIterator[GatewayProcess]:
    """A gateway with room for the crowd, in front of an engine for all others and one with endless answers."""
    with many_files():
        async with FakeEngine(model="fake", tokens=12) as engine, Replay("big") as replay:
            replay.says(CHAT, endless_answer)
            models = {"fake": attached(engine.url), "big": attached(replay.url, max_inflight=CROWD)}
            async with GatewayProcess(models, server=SERVER) as gateway:
                yield gateway


async def test_a_thousand_readers_of_a_byte_a_second_stall_nobody_and_fill_no_memory() -> None:
    async with crowded() as gateway:
        await latencies(gateway, 5)
        process = psutil.Process(gateway.pid)
        before = process.memory_info().rss
        async with slow_readers(gateway, CROWD):
            took = await latencies(gateway, 40)
            assert await metric(gateway, "forebay_worker_inflight_requests") == CROWD
            grown = process.memory_info().rss - before
        print(
            f"\nbeside {CROWD} slow readers the slowest of 40 answers took {max(took) * 1e3:.0f} ms; "
            f"the gateway grew by {grown / CROWD / 1024:.0f} KiB for each of them"
        )
        assert max(took) < 2
        assert grown < CROWD * (UNDELIVERED + 192 * 2**10)

        async def is_over() -> bool:
            return await metric(gateway, "forebay_worker_inflight_requests") == 0

        await until(is_over, "those who left are nobody's load any more")
        assert max(await latencies(gateway, 5)) < 2
