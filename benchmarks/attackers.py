"""What attackers cost those beside them: compute bombs one kind at a time, and a thousand readers of a byte a second.

Claim: beside one client that sends bombs of one kind, twenty a second, the others' 99th percentile is at most 1.2 times
what it is alone, and every bomb is refused with a 4xx; beside a thousand slow readers it is at most 1.1 times. (S8 and
S7 of the project's list of threats.) What two kinds cost when they are sent as fast as they are refused is shown beside
it and promised nothing: hundreds of requests a second are a flood whatever is in them, and limits are there for that.

Method: the gateway has one core; engine, attackers (a process of their own, of the lowest priority) and the measured
clients share another. Sixteen clients ask for streams of a tenth of a second, each as soon as it has its answer.
Turns of a second beside each attacker alternate with quiet ones, one for every three; rounds go through the attackers
forward and backward in turn. A turn, quiet or not, in which the machine itself stood still for more than 20 ms is taken
again, and the report counts these: clocks of the real-time class on both cores tell, which no load can hold up. A ratio
is that of the 99th percentiles of all turns beside the attacker and of all quiet turns. Its interval is the 95 %
bootstrap over turns and over the answers in them: what a machine does for a second counts once, however many answers
it delays.

    python -m benchmarks.attackers             eighteen rounds, about 8 minutes
    python -m benchmarks.attackers --quick     six rounds, within 3 minutes

Ends with 1 if a target is missed.
"""

import argparse
import asyncio
import gc
import itertools
import json
import os
import random
import resource
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from aiohttp import web

from benchmarks.loopback.cache import ROOT
from benchmarks.loopback.processes import Cores, Failed
from benchmarks.loopback.stalls import Stalls, noted
from benchmarks.loopback.stats import p99
from benchmarks.reporting import beginning, exit_status, say, write_results
from tests.e2e.asking import connected, until
from tests.fakes.engine import FakeEngine
from tests.fakes.gateway import GatewayProcess, attached
from tests.fakes.replay import Replay, stream

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Hello."}]
ENGINE: dict[str, Any] = {"tokens": 12, "ttft_ms": 40, "itl_ms": 5}
CLIENTS = 16
SAMPLES = 160  # of a turn
QUIET_EVERY = 3  # turns beside an attacker
READERS = 1000
EACH_S = 0.05  # a bomb
FLOODS = {"choices_flood": "choices", "depth_flood": "depth"}  # sent without a pause
ROUNDS, QUICK_ROUNDS = 18, 6
RESAMPLES = 400
AT_MOST_BOMBS, AT_MOST_READERS = 1.2, 1.1
MOST_TAKEN_AGAIN = 5  # of one turn
ATTACKERS_KEY = "fbk_the-key-of-whoever-attacks-here"
EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"' + b"x" * 16_000 + b'"}}]}\n\n'
EVERY_S = 2.0  # 8 kB a second for each reader


def _schema(inner: dict[str, Any]) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": inner}}}


def _body(**more: Any) -> bytes:
    return json.dumps({"model": "fake", "messages": MESSAGES, **more}).encode()


def bombs() -> dict[str, bytes]:
    """Bodies of requests, each of which would cost somebody behind the gateway, or itself, far more than its sender."""
    return {
        "choices": _body(n=10**6),
        "top_logprobs": _body(logprobs=True, top_logprobs=10**6),
        "stops": _body(stop=["x"] * 10_000),
        "breakers": _body(dry_multiplier=1, dry_sequence_breakers=["x" * 40] * 10_000),
        "grammar": _body(grammar="root ::= x+\nx ::= " + " | ".join(["[a-z]"] * 32)),
        "enum": _body(**_schema({"enum": [f"v{number:05}" for number in range(2000)]})),
        "pattern": _body(**_schema({"type": "string", "pattern": "^(([a-z ]{1,6}){1,6}){1,6}$"})),
        "wide_schema": _body(**_schema({"anyOf": [{"type": "string"}] * 4000})),
        "tools": _body(tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}] * 5000),
        "depth": b'{"model":"fake","messages":' + b"[" * 1_000_000,
        "parts": b'{"model":"fake","messages":[' + b"[]," * 1_000_000 + b"1]}",
    }


def allow_many_files() -> None:
    """Let this process, and those that it starts, open as many files as they may."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


# The attackers' process


async def attack() -> None:
    """Do what standard input says, a JSON object a line, and say when it is done."""
    os.nice(19)
    allow_many_files()
    loop = asyncio.get_running_loop()
    lines = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    async with Replay("big") as engine:
        engine.says(CHAT, _endless)
        _tell({"port": engine.port})
        task: asyncio.Task[None] | None = None
        seen: dict[str, int] = {}
        while line := await lines.readline():
            order = json.loads(line)
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                task = None
            if order["do"] == "rest":
                _tell(dict(seen))
                continue
            seen.clear()
            begun = asyncio.Event()
            doing = _read_slowly(order["port"], begun) if order["do"] == "readers" else _bomb(order, seen, begun)
            task = loop.create_task(doing)
            await asyncio.wait([task, loop.create_task(begun.wait())], return_when=asyncio.FIRST_COMPLETED)
            _tell({"failed": repr(task.exception())} if task.done() else {"begun": True})


def _tell(what: dict[str, Any]) -> None:
    print(json.dumps(what), flush=True)


async def _endless(request: web.Request) -> web.StreamResponse:
    with suppress(ConnectionResetError):
        return await stream(request, itertools.repeat(EVENT), pause_s=EVERY_S)
    return web.Response()


def _request(port: int, body: bytes) -> bytes:
    head = f"POST {CHAT} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\nauthorization: Bearer {ATTACKERS_KEY}\r\n"
    return f"{head}content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


async def _bomb(order: dict[str, Any], seen: dict[str, int], begun: asyncio.Event) -> None:
    """Send one bomb after the other, on a new connection where the gateway has closed the last."""
    name = order["do"]
    raw = _request(order["port"], bombs()[FLOODS.get(name, name)])
    while True:
        reader, writer = await asyncio.open_connection("127.0.0.1", order["port"])
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                writer.write(raw)
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
                await reader.readexactly(length)
                status = head[9:12].decode()
                seen[status] = seen.get(status, 0) + 1
                begun.set()
                await asyncio.sleep(0 if name in FLOODS else EACH_S)
        writer.transport.abort()


async def _read_slowly(port: int, begun: asyncio.Event) -> None:
    """Have a thousand answers open, of each of which a byte a second is read."""
    loop = asyncio.get_running_loop()
    raw = _request(port, json.dumps({"model": "big", "messages": MESSAGES, "stream": True}).encode())
    readers: list[socket.socket] = []
    try:
        for _ in range(READERS):
            readers.append(reader := socket.socket())
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            reader.setblocking(False)
            await loop.sock_connect(reader, ("127.0.0.1", port))
            await loop.sock_sendall(reader, raw)
        for reader in readers:
            async with asyncio.timeout(60):
                assert await loop.sock_recv(reader, 12) == b"HTTP/1.1 200"
        begun.set()
        while True:
            for reader in readers:
                with suppress(BlockingIOError):
                    assert reader.recv(1), "a reader was cut"
            await asyncio.sleep(1)
    finally:
        for reader in readers:
            reader.close()


class Attackers:
    """The process of the attackers, seen from outside."""

    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self._process = process
        self.port = port

    async def begin(self, what: str, port: int) -> None:
        """Have an attack under way."""
        answer = await self._order({"do": what, "port": port})
        if "failed" in answer:
            raise Failed(f"{what}: {answer['failed']}")

    async def rest(self) -> dict[str, int]:
        """End it, and return the statuses that its requests were answered with, and how often."""
        return await self._order({"do": "rest"})

    async def _order(self, order: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        line = await asyncio.wait_for(self._process.stdout.readline(), 120)
        if not line:
            raise Failed("the attackers' process has ended")
        answer: dict[str, Any] = json.loads(line)
        return answer


@asynccontextmanager
async def attackers() -> AsyncIterator[Attackers]:
    """The attackers' process, at rest; gone when the block ends."""
    argv = [sys.executable, "-m", "benchmarks.attackers", "--attack"]
    process = await asyncio.create_subprocess_exec(
        *argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        assert process.stdout is not None
        yield Attackers(process, json.loads(await asyncio.wait_for(process.stdout.readline(), 30))["port"])
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


# Those beside them


async def turn(gateway: GatewayProcess, samples: int) -> list[float]:
    """Return how long so many streamed answers took, in seconds, of sixteen clients who never rest."""
    took: list[float] = []

    async def ask_on() -> None:
        async with connected(gateway) as client:
            while len(took) < samples:
                began = time.perf_counter()
                client.ask(CHAT, {"model": "fake", "messages": MESSAGES, "stream": True})
                answer = await client.answer()
                took.append(time.perf_counter() - began)
                if not (answer.status == 200 and answer.body.endswith(b"data: [DONE]\n\n")):
                    raise Failed(f"one of the others was answered {answer.status}: {answer.body[-200:]!r}")

    async with asyncio.TaskGroup() as group:
        for _ in range(CLIENTS):
            group.create_task(ask_on())
    return took


class Ratio(NamedTuple):
    """A ratio of 99th percentiles, and its interval."""

    middle: float
    low: float
    high: float


Turns = list[list[float]]


def ratio(beside: Turns, alone: Turns) -> Ratio:
    """The ratio of the 99th percentiles; its draws are seeded, so the same values give the same interval.

    Raises ``Failed`` where there are too few answers for a percentile.
    """
    middle = _p99(beside) / _p99(alone)
    draw = random.Random(len(beside))

    def drawn(turns: Turns) -> Turns:
        return [draw.choices(turn, k=len(turn)) for turn in draw.choices(turns, k=len(turns))]

    ratios = sorted(_p99(drawn(beside)) / _p99(drawn(alone)) for _ in range(RESAMPLES))
    cut = RESAMPLES // 40
    return Ratio(middle, ratios[cut], ratios[-1 - cut])


def _p99(turns: Turns) -> float:
    value = p99(list(itertools.chain.from_iterable(turns)))
    if value is None:
        raise Failed("there are too few answers for a 99th percentile: more rounds")
    return value


@dataclass
class Cell:
    """All turns of one attacker: the others' latencies, and what the attacker was told. ``alone``: the quiet turns of
    the run, which all attackers share. ``taken_again``: turns in which the machine stood still."""

    alone: Turns
    beside: Turns = field(default_factory=list)
    statuses: dict[str, int] = field(default_factory=dict)
    lasted_s: float = 0.0
    taken_again: int = 0

    @cached_property
    def ratio(self) -> Ratio:
        """What it costs, once all turns are there."""
        return ratio(self.beside, self.alone)

    def line(self, name: str) -> str:
        """A row of the table."""
        found = self.ratio
        alone, beside = (list(itertools.chain.from_iterable(turns)) for turns in (self.alone, self.beside))
        figures = (statistics.median(alone), statistics.median(beside), _p99(self.alone), _p99(self.beside))
        told = ", ".join(f"{count} × {status}" for status, count in self.statuses.items())
        rate = sum(self.statuses.values()) / self.lasted_s if self.statuses else 0
        cells = [
            name,
            *(f"{value * 1e3:.1f}" for value in figures),
            f"{found.middle:.2f} [{found.low:.2f}–{found.high:.2f}]",
            str(len(beside)),
            str(self.taken_again),
            f"{told or '–'}{f' ({rate:.0f}/s)' if rate else ''}",
        ]
        return "| " + " | ".join(cells) + " |"

    def verdict(self, name: str) -> tuple[str, bool]:
        """The target's line, and whether it is held."""
        found = self.ratio
        if name in FLOODS:
            return f"beside_{name}: {found.middle:.2f} × alone, nothing promised", True
        most = AT_MOST_READERS if name == "readers" else AT_MOST_BOMBS
        refused = all("400" <= status < "500" for status in self.statuses) and (name == "readers" or self.statuses)
        held = found.high <= most and bool(refused)
        want = f"want p99 ≤ {most} × alone" + ("" if name == "readers" else " and only 4xx")
        measured = f"measured {found.middle:.2f} [{found.low:.2f}–{found.high:.2f}]" + (
            "" if refused else ", not only 4xx"
        )
        return f"target beside_{name}: {want}, {measured}, {'held' if held else 'missed'}", held


@dataclass
class Measurement:
    """What turns are taken with. ``alone``: the quiet ones; ``taken_again``: how many of these were."""

    gateway: GatewayProcess
    enemy: Attackers
    stalls: Stalls
    alone: Turns
    taken_again: int = 0

    async def quiet(self) -> None:
        """Take a turn without an attacker."""
        taken, again = await self._undisturbed()
        self.alone.append(taken)
        self.taken_again += again

    async def beside(self, cell: Cell, name: str) -> None:
        """Take a turn beside one."""
        await self.enemy.begin(name, self.gateway.port)
        began = time.monotonic()
        taken, again = await self._undisturbed()
        cell.beside.append(taken)
        cell.taken_again += again
        cell.lasted_s += time.monotonic() - began
        for status, count in (await self.enemy.rest()).items():
            cell.statuses[status] = cell.statuses.get(status, 0) + count
        if name == "readers":
            await until(self._is_idle, "who has left is nobody's load any more", 30)

    async def _undisturbed(self) -> tuple[list[float], int]:
        """Return a turn during which the machine did not stand still, or the last one tried, and how many it did in."""
        again = 0
        while True:
            gc.collect()  # now, and not while answers are timed; see ``measure``
            began = time.perf_counter()
            taken = await turn(self.gateway, SAMPLES)
            if again == MOST_TAKEN_AGAIN or not await self.stalls.any_since(began):
                return taken, again
            again += 1

    async def _is_idle(self) -> bool:
        workers = (await self.gateway.admin("GET", "/admin/v1/workers"))["data"]
        return not any(worker["running"] for worker in workers)


async def measure(rounds: int, names: Sequence[str], cores: Cores) -> tuple[dict[str, Cell], int]:
    """Run all turns; return the cells, and how many quiet turns were taken again."""
    alone: Turns = []
    cells = {name: Cell(alone) for name in names}
    gc.freeze()
    gc.disable()  # a collection in this process would delay all answers, and be taken for the gateway's doing
    both = {cores.gateway, cores.load}
    async with noted(both) as stalls, attackers() as enemy, FakeEngine(model="fake", **ENGINE) as engine:
        models = {
            "fake": attached(engine.url, max_inflight=4 * CLIENTS),
            "big": attached(f"http://127.0.0.1:{enemy.port}", max_inflight=READERS),
        }
        keys = [{"name": "attacker", "tenant": "attacker", "key": ATTACKERS_KEY}]
        front = GatewayProcess(models, keys=keys, server={"max_stream_bytes": 2**16})
        os.sched_setaffinity(0, {cores.gateway})  # what is started now inherits it
        front.launch()
        os.sched_setaffinity(0, {cores.load})
        async with _ready(front) as gateway:
            measurement = Measurement(gateway, enemy, stalls, alone)
            await turn(gateway, SAMPLES)  # a warm-up
            for number in range(rounds):
                for place, name in enumerate(names if number % 2 == 0 else reversed(names)):
                    if place % QUIET_EVERY == 0:
                        await measurement.quiet()
                    await measurement.beside(cells[name], name)
                say(f"round {number + 1} of {rounds}")
    return cells, measurement.taken_again


@asynccontextmanager
async def _ready(front: GatewayProcess) -> AsyncIterator[GatewayProcess]:
    try:
        await front.until_ready()
        yield front
    finally:
        await front.aclose()


def main() -> int:
    """Measure, print and write; 0 when every target was held, 1 when not, 2 when it cannot be measured."""
    names = [*bombs(), "readers", *FLOODS]
    parser = argparse.ArgumentParser(prog="benchmarks.attackers", description="What attackers cost those beside them.")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds, within 3 minutes")
    parser.add_argument("--rounds", type=int, help=f"{ROUNDS}, with --quick {QUICK_ROUNDS}")
    parser.add_argument("--only", help=f"attackers, with commas between them: {', '.join(names)}")
    parser.add_argument("--attack", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.attack:
        asyncio.run(attack())
        return 0
    return exit_status("attackers", lambda: bench(chosen, chosen.only.split(",") if chosen.only else names))


def bench(chosen: argparse.Namespace, wanted: Sequence[str]) -> bool:
    """Measure, print and write; whether every target was held."""
    began = beginning()
    allow_many_files()  # the gateway inherits it
    rounds = chosen.rounds or (QUICK_ROUNDS if chosen.quick else ROUNDS)
    cells, taken_again = asyncio.run(measure(rounds, wanted, Cores.of_machine()))
    verdicts = [cell.verdict(name) for name, cell in cells.items()]
    heads = [
        "beside",
        "p50 alone, ms",
        "p50, ms",
        "p99 alone, ms",
        "p99, ms",
        "p99, × alone",
        "answers",
        "taken again",
        "the attacker was told",
    ]
    table = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    table += [cell.line(name) for name, cell in cells.items()]
    note = (
        f"{CLIENTS} clients, streams of {ENGINE['tokens']} tokens in a tenth of a second; "
        f"{rounds} rounds of turns of {SAMPLES} answers. `taken again`: turns in which the machine stood still; "
        f"of the {len(next(iter(cells.values())).alone)} quiet ones {taken_again}."
    )
    write_results(
        "attackers", "What attackers cost those beside them", began,
        quick=chosen.quick, table=table, lines=[line for line, _ in verdicts],
        raw={
            "alone": next(iter(cells.values())).alone,
            "attackers": {name: {"beside": cell.beside, "statuses": cell.statuses} for name, cell in cells.items()},
        }, notes=[note],
    )  # fmt: skip
    return all(held for _, held in verdicts)


if __name__ == "__main__":
    sys.exit(main())
