"""A steady load on gateways, what came of each of its requests, and what the ledger says of them."""

import asyncio
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

from routing.budgets import day_of
from storage.sql.database import FILE_NAME, Database, sqlite_url
from storage.sql.ledger import Dimension, Ledger, Used
from tests.e2e.asking import connected, until
from tests.fakes.gateway import GatewayProcess

CHAT = "/v1/chat/completions"
FOREVER = 10**6


class Outcome(NamedTuple):
    """One request: when it ended (monotonic), how long it took in seconds, its status (0: no answer) and its tokens."""

    ended_at: float
    latency_s: float
    status: int
    tokens: int = 0


def chat(*, max_tokens: int = 4, **more: Any) -> dict[str, Any]:
    return {"model": "fake", "messages": [{"role": "user", "content": "Hi."}], "max_tokens": max_tokens, **more}


class Load:
    """Asks again and again while inside its context, on connections of its own: each asks, reads its answer to the
    end and rests for ``pause_s``. ``asked`` counts what was sent, ``seen`` holds what is over."""

    def __init__(
        self,
        gateways: GatewayProcess | Sequence[GatewayProcess],
        keys: Sequence[str] = (),
        *,
        connections: int = 6,
        pause_s: float = 0.03,
        requests: int = FOREVER,
    ) -> None:
        self._gateways = [gateways] if isinstance(gateways, GatewayProcess) else list(gateways)
        self._keys = list(keys)
        self._connections = connections
        self._pause_s = pause_s
        self._requests = requests
        self._stop = asyncio.Event()
        self._group = asyncio.TaskGroup()
        self.asked = 0
        self.seen: list[Outcome] = []

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        for number in range(self._connections):
            gateway = self._gateways[number % len(self._gateways)]
            key = self._keys[number % len(self._keys)] if self._keys else gateway.key
            self._group.create_task(self._ask_for_ever(gateway, key))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        await self._group.__aexit__(kind, error, trace)

    async def done(self) -> Self:
        """Wait until as many were asked as were wanted, and answered."""

        async def is_done() -> bool:
            return len(self.seen) >= self._requests

        await until(is_done, f"{self._requests} requests are answered")
        return self

    @property
    def statuses(self) -> dict[int, int]:
        """How often each status came."""
        statuses = [outcome.status for outcome in self.seen]
        return {status: statuses.count(status) for status in sorted(set(statuses))}

    @property
    def tokens(self) -> int:
        """All tokens that answers said were used."""
        return sum(outcome.tokens for outcome in self.seen)

    @property
    def p99_s(self) -> float:
        """Of the latency."""
        assert len(self.seen) >= 200, "too few for a 99th percentile"
        return sorted(outcome.latency_s for outcome in self.seen)[len(self.seen) * 99 // 100]

    async def _ask_for_ever(self, gateway: GatewayProcess, key: str) -> None:
        began = time.monotonic()
        try:
            async with connected(gateway, key) as client:
                while not self._stop.is_set() and self.asked < self._requests:
                    began = time.monotonic()
                    self.asked += 1
                    client.ask(CHAT, chat())
                    answer = await client.answer()
                    now = time.monotonic()
                    tokens = answer.json["usage"]["total_tokens"] if answer.status == 200 else 0
                    self.seen.append(Outcome(now, now - began, answer.status, tokens))
                    await asyncio.sleep(self._pause_s)
        except (OSError, EOFError, TimeoutError):  # the gateway is gone, or hangs
            now = time.monotonic()
            self.seen.append(Outcome(now, now - began, 0))


def ledger_url(gateway: GatewayProcess) -> str:
    """Return the address of the gateway's own SQLite file."""
    return sqlite_url(gateway.directory / "state" / FILE_NAME)


async def booked(url: str, *by: Dimension, **filters: Any) -> tuple[Used, ...]:
    """Return what the ledger says was used yesterday and today, added up."""
    today = day_of(time.time())
    async with Database(url) as database:
        return await Ledger(database).usage(by, first_day=today - 1, last_day=today, **filters)


async def until_booked(url: str, requests: int, **filters: Any) -> Used:
    """Wait until the ledger knows of this many requests, and return what it says of them."""
    found: list[Used] = []

    async def is_booked() -> bool:
        found[:] = await booked(url, **filters)
        return bool(found) and found[0].requests >= requests

    await until(is_booked, f"{requests} requests are booked")
    return found[0]
