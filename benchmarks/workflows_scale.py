"""What workflows cost where there is much of them: 10,000 calls under way, a map over 100,000 elements, 1,000 watchers.

Claim: a call of a workflow costs at most 1 ms of CPU beside what the call itself costs, with 10,000 of them under way,
in the executor alone and in the whole service of runs, which makes every step durable; a map over 100,000 elements
takes memory in proportion to them, less than 1 GiB; and each of 1,000 watchers of a run gets all of its events soon.

Method: (alone) the executor, no I/O: a map of which 10,000 calls are always under way; the oldest is answered, and what
follows is taken. (service) 40 runs of maps in one service of runs with its log in SQLite, and in the place of engines a
worker that answers the oldest of 10,000 calls for each that comes. CPU time of the process, threads of the database
included, by the number of calls; the median of rounds with its 95 % bootstrap interval. (map) a process of its own for
each length of list: the growth of its peak of resident memory over that before the run, with answers of 200 letters;
then the time to look at the run that has ended, and to look again (the median of 21 times). (watchers) a real gateway
with SQLite in a process of its own; 1,000 connections follow one run, whose open variables are set one after the
other; delay is from before the request that sets one to the arrival of its event at each watcher. They share the
machine with the gateway.

    python -m benchmarks.workflows_scale             all of it, about 6 minutes
    python -m benchmarks.workflows_scale --quick     fewer rounds, within 2 minutes
"""

import argparse
import asyncio
import json
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import msgspec
import psutil

from benchmarks.loopback.cache import ROOT
from benchmarks.loopback.processes import Failed
from benchmarks.loopback.stats import Interval, interval, p99
from benchmarks.reporting import beginning, exit_status, say, write_results
from core.clock import SystemClock
from core.ids import TenantId
from core.tenancy import Key, Tenant
from core.workflows import RunRecord
from gateway.auth import Principal
from gateway.runs.live import LiveRun
from gateway.runs.service import Runs
from semantic_vars.budget import Spent
from semantic_vars.calls import Call, Workflow
from semantic_vars.events import Done, Effect, Prefill, Start, Work
from semantic_vars.executor import Executor
from storage.sql.database import Database, sqlite_url
from storage.sql.schema import upgrade
from storage.sql.workflows import Workflows
from tests.fakes.engine import FakeEngine
from tests.fakes.gateway import GatewayProcess, attached

CONCURRENT = 10_000
CALL_MS = 1.0
RUNS = 40
WIDTHS = (25_000, 100_000)
GROWTH_MB = 1024.0
PROPORTION = 1.25  # of the growth for each element of the longest list to that of the shortest
LOOK_AGAIN_MS = 20.0
LOOKS = 21
WATCHERS = 1_000
TICKS_PER_S = 2.0
DELAY_S = 1.0
FULL_ROUNDS, QUICK_ROUNDS = 7, 2
FULL_TICKS, QUICK_TICKS = 60, 15
ALONE_CALLS = 30_000
CALLS_PER_RUN = 1_000
ANSWER = "x" * 193
OWNER = Principal.of(Key("k", "key", TenantId("t"), b"k"), Tenant(id=TenantId("t")))


class Crowd:
    """A worker with whom so many calls are under way: for each that comes it answers the one that has waited longest.

    When there were so many and none comes any more, it answers the others. An async context manager.
    """

    prefills = False

    def __init__(self, num: int, answer: Callable[[Start], str]) -> None:
        self.most_under_way = 0
        self._num = num
        self._answer = answer
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._num_come = 0
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "Crowd":
        self._task = asyncio.create_task(self._finish())
        return self

    async def __aexit__(self, *error: object) -> None:
        assert self._task is not None
        self._task.cancel()

    async def do(self, run: RunRecord, start: Start, on_text: Callable[[str], None]) -> Done:
        """See ``Doing``."""
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        self._num_come += 1
        self.most_under_way = max(self.most_under_way, len(self._waiting))
        if len(self._waiting) >= self._num:
            self._waiting.popleft().set_result(None)
        await turn
        return Done(start.call, start.epoch, self._answer(start), Spent(20, 0.0))

    async def prefill(self, run: RunRecord, ahead: Prefill) -> None:
        """Nothing is computed ahead."""

    async def _finish(self) -> None:
        num_come = 0
        while True:
            await asyncio.sleep(0.02)
            if num_come == self._num_come and self.most_under_way >= self._num:
                for _ in range(min(1_000, len(self._waiting))):
                    self._waiting.popleft().set_result(None)
            num_come = self._num_come

    def most(self, work: Work) -> Spent:
        """Return 20 tokens."""
        return Spent(20, 0.0)

    def seconds(self, call: Call) -> float:
        """Return one."""
        return 1.0


def mapping(num: int, most: int) -> Workflow:
    """A map over so many elements, of which so many are under way at a time."""
    request = {"model": "m", "messages": [{"role": "user", "content": "Summarize in one line:\n{{item}}"}]}
    call = {"kind": "llm", "id": "part", "foreach": "{{items}}", "max_parallel": most, "request": request}
    items = {"value": [f"what element {number} is about" for number in range(num)]}
    return msgspec.convert({"calls": [call], "variables": {"items": items}}, Workflow)


def alone() -> float:
    """Milliseconds of CPU that a call costs in the executor alone."""
    executor = Executor(mapping(ALONE_CALLS, CONCURRENT), Crowd(0, lambda _: ""), parallel=CONCURRENT)
    began = time.process_time()
    under_way = deque(_starts(executor.begin(0.0)))
    assert len(under_way) == CONCURRENT
    num = 0
    while under_way:
        start = under_way.popleft()
        num += 1
        under_way.extend(_starts(executor.on(Done(start.call, start.epoch, "answer", Spent(20, 0.0)), 0.0)))
    assert num == ALONE_CALLS
    return (time.process_time() - began) / num * 1e3


def _starts(effects: Sequence[Effect]) -> list[Start]:
    return [effect for effect in effects if isinstance(effect, Start)]


@asynccontextmanager
async def service(folder: Path, crowd: Crowd) -> AsyncIterator[Runs]:
    """The service of runs as the gateway has it, but for the worker."""
    async with Database(sqlite_url(folder / "forebay.db"), timeout_s=30.0) as database:
        await upgrade(database)
        async with crowd, Runs(Workflows(database), crowd, SystemClock(), owner="here") as runs:
            yield runs


async def ended(runs: Runs, ids: Sequence[str]) -> None:
    """Wait until all that was wanted of these runs is durable; those that have ended are not looked at."""
    for one in ids:
        found = await runs.find(OWNER, one)
        if not isinstance(found, LiveRun):
            continue
        while not found.is_gone:
            await found.following.changed()
        if found.told.state != "done":
            raise Failed(f"a run has ended as {found.told.state}")


class Served(NamedTuple):
    """What calls have cost in the service, and how many were under way."""

    ms: float
    most_under_way: int
    calls_per_s: float


async def served() -> Served:
    """One round of runs in a service of their own."""
    crowd = Crowd(CONCURRENT, lambda _: "answer")
    with tempfile.TemporaryDirectory(prefix="workflows-") as folder:
        async with service(Path(folder), crowd) as runs:
            cpu, wall = time.process_time(), time.monotonic()
            given = mapping(CALLS_PER_RUN, 256)
            ids = [(await runs.submit(OWNER, given)).id for _ in range(RUNS)]
            await ended(runs, ids)
            num = RUNS * CALLS_PER_RUN
            cpu, wall = time.process_time() - cpu, time.monotonic() - wall
    return Served(cpu / num * 1e3, crowd.most_under_way, num / wall)


class Mapped(NamedTuple):
    """What a map over so many elements took."""

    num: int
    growth_mb: float
    cpu_ms: float
    look_ms: float
    look_again_ms: float


async def mapped(num: int) -> Mapped:
    """One map, in a process that has done nothing else."""
    crowd = Crowd(256, lambda start: f"{start.call[5:-1]:>6} {ANSWER}")
    with tempfile.TemporaryDirectory(prefix="workflows-") as folder:
        async with service(Path(folder), crowd) as runs:
            await ended(runs, [(await runs.submit(OWNER, mapping(1_000, 256))).id])
            before_mb = psutil.Process().memory_info().rss / 1e6
            cpu = time.process_time()
            record = await runs.submit(OWNER, mapping(num, 256))
            await ended(runs, [record.id])
            cpu_ms = (time.process_time() - cpu) / num * 1e3
            growth_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6 - before_mb
            looks: list[float] = []
            for _ in range(1 + LOOKS):
                began = time.monotonic()
                told = (await runs.find(OWNER, record.id)).told
                looks.append((time.monotonic() - began) * 1e3)
            outcome = told.outcome("part")
            if outcome is None or len(outcome.value) != num:
                raise Failed(f"the map over {num} elements has not ended")
    return Mapped(num, growth_mb, cpu_ms, looks[0], statistics.median(looks[1:]))


class Watcher(asyncio.Protocol):
    """A client that follows a run: the time at which each event came, by its number."""

    _ID = re.compile(rb"(?:^|\n)id: (\d+)\n")

    def __init__(self, request: bytes) -> None:
        self.came: dict[int, float] = {}
        self.num_double = 0
        self.is_begun = False
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request = request
        self._rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask for the events."""
        assert isinstance(transport, asyncio.WriteTransport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """Note what has come whole."""
        now = time.monotonic()
        self.is_begun = True
        data = self._rest + data
        end = data.rfind(b"\n\n") + 2 if b"\n\n" in data else 0
        for found in self._ID.finditer(data, 0, end):
            number = int(found[1])
            self.num_double += number in self.came
            self.came[number] = now
        self._rest = data[end:]
        if b"\r\n0\r\n\r\n" in data and not self.over.done():  # the last chunk
            self.over.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        """Nothing more will come."""
        if not self.over.done():
            self.over.set_result(None)


class Watched(NamedTuple):
    """What 1,000 watchers have seen. ``delays``: in seconds, of all events of variables at all of them."""

    num_all: int
    delays: list[float]
    cpu_ms: float  # of the gateway, for each event at each watcher


async def watched(ticks: int) -> Watched:
    """Have a run followed."""
    async with FakeEngine(model="fake") as engine, GatewayProcess({"fake": attached(engine.url)}) as gateway:
        headers = {"authorization": f"Bearer {gateway.key}"}
        async with httpx.AsyncClient(base_url=gateway.url, headers=headers, trust_env=False, timeout=60.0) as http:
            request = {"model": "fake", "messages": [{"role": "user", "content": "{{t0}}"}], "max_tokens": 16}
            names = [f"t{number}" for number in range(ticks)]
            body = {
                "calls": [{"kind": "llm", "id": "end", "request": request, "needs": names}],
                "variables": {name: {"open": True} for name in names},
            }
            run = (await http.post("/v1/workflows", json=body)).raise_for_status().json()["id"]
            watchers = await _watchers(gateway, f"/v1/workflows/{run}/events")
            process = psutil.Process(gateway.pid)
            cpu = sum(process.cpu_times()[:2])
            sent = []
            for number, name in enumerate(names):
                sent.append(time.monotonic())
                (await http.put(f"/v1/variables/{run}.{name}", json={"value": f"{number}"})).raise_for_status()
                await asyncio.sleep(max(0.0, sent[-1] + 1 / TICKS_PER_S - time.monotonic()))
            await asyncio.wait([watcher.over for watcher in watchers], timeout=60.0)
            cpu = sum(process.cpu_times()[:2]) - cpu
            last = len((await http.get(f"/v1/workflows/{run}")).raise_for_status().json()["variables"]) + 2
    wanted = set(range(1, last + 1))
    num_all = sum(watcher.came.keys() == wanted and not watcher.num_double for watcher in watchers)
    delays = [
        watcher.came[number] - began
        for watcher in watchers
        for number, began in enumerate(sent, start=2)  # the first event is the run's own
        if number in watcher.came
    ]
    return Watched(num_all, delays, cpu / (len(watchers) * ticks) * 1e3)


async def _watchers(gateway: GatewayProcess, path: str) -> list[Watcher]:
    head = f"GET {path} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {gateway.key}\r\n\r\n".encode()
    watchers: list[Watcher] = []
    for _ in range(WATCHERS):
        made = await asyncio.get_running_loop().create_connection(lambda: Watcher(head), "127.0.0.1", gateway.port)
        watchers.append(made[1])
    for _ in range(600):
        if all(watcher.is_begun for watcher in watchers):
            return watchers
        await asyncio.sleep(0.1)
    raise Failed("not all watchers were let in")


def main() -> int:
    """Measures, prints and writes; 0 when every target was held, else 1."""
    parser = argparse.ArgumentParser(prog="benchmarks.workflows_scale", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds, within 2 minutes")
    parser.add_argument("--map", type=int, help=argparse.SUPPRESS)  # the process that measures one map
    chosen = parser.parse_args()
    if chosen.map is not None:
        print(json.dumps(asyncio.run(mapped(chosen.map))))
        return 0
    return exit_status("workflows_scale", lambda: bench(chosen.quick))


def bench(quick: bool) -> bool:
    """Measures, prints and writes; whether every target was held."""
    began = beginning()
    rounds, ticks = (QUICK_ROUNDS, QUICK_TICKS) if quick else (FULL_ROUNDS, FULL_TICKS)
    alones: list[float] = []
    services: list[Served] = []
    for number in range(rounds):
        alones.append(alone())
        services.append(asyncio.run(served()))
        say(f"round {number + 1}: alone {alones[-1]:.3f} ms, service {services[-1].ms:.3f} ms a call")
    maps = [map_apart(width) for width in WIDTHS]
    seen = asyncio.run(watched(ticks))
    say(f"watchers: {seen.num_all} have all")
    calls = {"alone": interval(alones), "service": interval([one.ms for one in services])}
    table = table_of(calls, services, maps, seen)
    verdicts = verdicts_of(calls, services, maps, seen)
    raw: dict[str, Any] = {
        "alone_ms": alones,
        "service": [one._asdict() for one in services],
        "maps": [one._asdict() for one in maps],
        "watchers": {"all": seen.num_all, "cpu_ms": seen.cpu_ms, "delays_s": sorted(seen.delays)[::100]},
    }
    lines = [line for line, _ in verdicts]
    write_results("workflows_scale", "What workflows cost where there is much of them", began,
                  quick=quick, table=table, lines=lines, raw=raw)  # fmt: skip
    return all(held for _, held in verdicts)


def map_apart(num: int) -> Mapped:
    """One map in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.workflows_scale", "--map", str(num)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failed(f"a map over {num} elements: {done.stderr[-800:]}")
    found = Mapped(*json.loads(done.stdout))
    say(f"map over {num}: {found.growth_mb:.0f} MB, {found.cpu_ms:.3f} ms an element")
    return found


def table_of(
    calls: dict[str, Interval], services: Sequence[Served], maps: Sequence[Mapped], seen: Watched
) -> list[str]:
    """What was measured."""
    most = min(one.most_under_way for one in services)
    rate = interval([one.calls_per_s for one in services])
    ordered = sorted(seen.delays)
    table = ["| what | measured |", "|---|---|"]
    table += [
        f"| executor alone, {CONCURRENT:,} under way: CPU a call, ms | {calls['alone'].show(3)} |",
        f"| service of runs, {most:,} under way: CPU a call, ms | {calls['service'].show(3)} |",
        f"| ... calls a second, each durable | {rate.show(0)} |",
    ]
    for one in maps:
        table += [
            f"| map over {one.num:,}: peak memory over that before, MB | {one.growth_mb:.0f} |",
            f"| ... for each element, kB | {one.growth_mb / one.num * 1e3:.2f} |",
            f"| ... CPU for each element, ms | {one.cpu_ms:.3f} |",
            f"| ... to look at it when it has ended, and again, ms | {one.look_ms:.0f}, {one.look_again_ms:.1f} |",
        ]
    table += [
        f"| {WATCHERS:,} watchers: delay p50, s | {ordered[len(ordered) // 2]:.3f} |",
        f"| ... p99 | {p99(ordered) or 0.0:.3f} |",
        f"| ... most | {ordered[-1]:.3f} |",
        f"| ... CPU of the gateway for each event at each, ms | {seen.cpu_ms:.3f} |",
    ]
    return table


def verdicts_of(
    calls: dict[str, Interval], services: Sequence[Served], maps: Sequence[Mapped], seen: Watched
) -> list[tuple[str, bool]]:
    """A line for each target, and whether it was held."""
    least, most = maps[0], maps[-1]
    proportion = (most.growth_mb / most.num) / (least.growth_mb / least.num)
    under_way = min(one.most_under_way for one in services)
    late = p99(seen.delays)
    checks = [
        ("call_alone", f"≤ {CALL_MS:g} ms", f"{calls['alone'].show(3)}", calls["alone"].high <= CALL_MS),
        ("call_service", f"≤ {CALL_MS:g} ms", f"{calls['service'].show(3)}", calls["service"].high <= CALL_MS),
        ("under_way", f"≥ {CONCURRENT:,}", f"{under_way:,}", under_way >= CONCURRENT),
        ("map_memory", f"≤ {GROWTH_MB:.0f} MB for {most.num:,}", f"{most.growth_mb:.0f}", most.growth_mb <= GROWTH_MB),
        ("map_proportion", f"≤ {PROPORTION:g} of {least.num:,}'s", f"{proportion:.2f}", proportion <= PROPORTION),
        ("look_again", f"≤ {LOOK_AGAIN_MS:g} ms", f"{most.look_again_ms:.1f}", most.look_again_ms <= LOOK_AGAIN_MS),
        ("watchers_all", f"{WATCHERS:,} of {WATCHERS:,}", f"{seen.num_all:,}", seen.num_all == WATCHERS),
        ("watchers_p99", f"≤ {DELAY_S:g} s", f"{late or 0.0:.3f}", late is not None and late <= DELAY_S),
    ]
    return [
        (f"target {name}: want {want}, measured {measured}, {'held' if held else 'missed'}", held)
        for name, want, measured, held in checks
    ]


if __name__ == "__main__":
    sys.exit(main())
