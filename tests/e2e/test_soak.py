"""50,000 requests, 10,000 clients that leave, 1,000 answers that break: nothing leaks, the ledger is exact (R18)."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import psutil
import pytest
import pytest_asyncio

from tests.e2e.asking import metric, until
from tests.e2e.loading import CHAT, booked, ledger_url, until_booked
from tests.fakes.engine import FakeEngine
from tests.fakes.gateway import GatewayProcess, attached

pytestmark = pytest.mark.asyncio(loop_scope="module")

ROUNDS = 5
WHOLE, STREAMED, LEFT, BROKEN = 4800, 3000, 2000, 200  # of one round
CONNECTIONS = 24
GROWTH = 1.05  # after the first round
BREAK = "please break"
AMPLE: dict[str, Any] = {
    "limits": {"rpm": 10**6, "tpm": 10**9, "parallel": 150},  # a hundred that leak are refused
    "budgets": [{"usd": 1000, "per": "day"}, {"tokens": 10**9, "per": "month"}],
}


def key_of(name: str) -> str:
    return f"fbk_a-key-of-the-soak-test-for-{name}"


NAMES = ("whole", "streamed", "left", "broken")
KEYS = [{"name": name, "tenant": "soak", "key": key_of(name), **AMPLE} for name in NAMES]


@pytest_asyncio.fixture(loop_scope="module")
async def engine() -> AsyncIterator[FakeEngine]:
    async with FakeEngine(model="fake", itl_ms=2) as running:
        await running.faults(contains=BREAK, error_after=2)
        yield running


class Requests:
    """The bytes of each kind of request, which are made once."""

    def __init__(self, gateway: GatewayProcess) -> None:
        self.port = gateway.port
        self.whole = _raw("whole", max_tokens=4)
        self.streamed = _raw("streamed", max_tokens=4, stream=True)
        self.left = _raw("left", max_tokens=2000, stream=True)
        self.broken = _raw("broken", text=BREAK, max_tokens=8, stream=True)


def _raw(name: str, text: str = "Hi.", **more: Any) -> bytes:
    options = {"stream_options": {"include_usage": True}} if more.get("stream") else {}
    body = {"model": "fake", "messages": [{"role": "user", "content": text}], "user": name, **more, **options}
    raw = json.dumps(body).encode()
    head = (
        f"POST {CHAT} HTTP/1.1\r\nhost: soak\r\nauthorization: Bearer {key_of(name)}\r\ncontent-type: application/json"
    )
    return f"{head}\r\ncontent-length: {len(raw)}\r\n\r\n".encode() + raw


async def _answer(reader: asyncio.StreamReader, *, whole: bool) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), head
    if whole:
        return await reader.readexactly(int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0]))
    return await reader.readuntil(b"\r\n0\r\n\r\n")


async def _stay(requests: Requests, request: bytes, count: int, ending: bytes) -> None:
    """Ask on one connection, again and again, and read every answer to its end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", requests.port)
    for _ in range(count):
        writer.write(request)
        body = await _answer(reader, whole=request is requests.whole)
        assert ending in body, body
    writer.close()


async def _leave(requests: Requests, count: int) -> None:
    """Ask for a long stream and hang up in the middle of it."""
    for _ in range(count):
        reader, writer = await asyncio.open_connection("127.0.0.1", requests.port)
        writer.write(requests.left)
        await reader.readuntil(b"data: ")
        writer.transport.abort()


async def _round(requests: Requests) -> None:
    async with asyncio.TaskGroup() as tasks:
        for _ in range(CONNECTIONS):
            whole, streamed, broken = WHOLE // CONNECTIONS, STREAMED // CONNECTIONS, BROKEN // 8
            tasks.create_task(_stay(requests, requests.whole, whole, b'"total_tokens":'))
            tasks.create_task(_stay(requests, requests.streamed, streamed, b"[DONE]"))
        for _ in range(8):
            tasks.create_task(_leave(requests, LEFT // 8))
            tasks.create_task(_stay(requests, requests.broken, broken, b'"error"'))


@pytest.mark.timeout(300)
async def test_fifty_thousand_requests_leave_nothing_behind_but_their_bill(engine: FakeEngine) -> None:
    models = {"fake": {**attached(engine.url, max_inflight=400), "price": {"input": 1, "output": 2}}}
    tenants = {"soak": {**AMPLE, "end_users": {"limits": {"rpm": 10**6}}}}
    async with GatewayProcess(models, keys=KEYS, tenants=tenants) as gateway:
        requests, process, sizes = Requests(gateway), psutil.Process(gateway.pid), []
        for number in range(ROUNDS):
            await _round(requests)
            await engine.until(in_flight=0)
            await until_booked(ledger_url(gateway), (number + 1) * (WHOLE + STREAMED + LEFT + BROKEN))
            sizes.append(process.memory_info().rss)

        async def is_idle() -> bool:
            (worker,) = (await gateway.admin("GET", "/admin/v1/workers"))["data"]
            idle: bool = worker["running"] == 0
            return idle and await metric(gateway, "forebay_inflight_requests") == 0

        await until(is_idle, "no slot is taken and no answer is open")
        print(f"\nRSS after each 10,000: {', '.join(f'{size / 1e6:.1f}' for size in sizes)} MB")
        assert max(sizes) < GROWTH * sizes[0]

        used = {row.key.removeprefix("file:"): row for row in await booked(ledger_url(gateway), "key") if row.key}
        wanted = dict(zip(NAMES, (WHOLE, STREAMED, LEFT, BROKEN), strict=True))
        assert {name: row.requests for name, row in used.items()} == {n: ROUNDS * c for n, c in wanted.items()}
        assert {name: row.errors for name, row in used.items()} == {
            n: ROUNDS * BROKEN * (n == "broken") for n in wanted
        }
        prompt = used["whole"].input_tokens // (ROUNDS * WHOLE)
        for name in ("whole", "streamed"):
            count = ROUNDS * wanted[name]
            assert (used[name].input_tokens, used[name].output_tokens) == (prompt * count, 4 * count)
        for name, row in used.items():
            assert row.cost == row.input_tokens * 10**6 + row.output_tokens * 2 * 10**6, name
            assert row.output_tokens >= row.requests, name
        assert await metric(gateway, "forebay_records_dropped_total") == 0
