"""The cells of one run, a round after the other, kept in a file so that a run that was cut off goes on."""

import asyncio
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import msgspec

from benchmarks.dataflow import clients, rival, submitting
from benchmarks.dataflow.arms import ARMS, GOOD, Arm, opened
from benchmarks.dataflow.clients import Target
from benchmarks.dataflow.engines import Stable, computed_by
from benchmarks.dataflow.plans import Part
from benchmarks.dataflow.seen import Seen
from benchmarks.dataflow.workloads import App, Ask, Workload, warm_up
from benchmarks.loopback.cache import ROOT, Missing
from benchmarks.loopback.processes import Failed
from benchmarks.reporting import say
from tests.fakes.gateway import GatewayFailedError

LONGEST_S = 900.0  # a cell that takes longer hangs
SOURCES = ("core", "routing", "engines", "storage", "semantic_vars", "gateway", "benchmarks/dataflow")
COLD = Workload("hello", 0, (App("hello", 0.0, (Ask("hello", ("Say hello.",), 4),), "hello", "hello"),))
"""What goes before a cell if nothing is to be learned from it."""

Place = tuple[str, int, str]  # a part, the milliseconds of a round trip, an arm


async def played(arm: Arm, workload: Workload, target: Target) -> Seen:
    """Carry a workload out as the arm does it."""
    if arm.client == "forebay":
        return await submitting.play(workload, target)
    if arm.client == "langgraph":
        return await rival.play(workload, target, arm.placing)

    def labels(app: App) -> dict[str, object]:
        return {"forebay": {"session": app.session, "program": app.name, "run": app.name}} if arm.has_labels else {}

    return await clients.play(workload, target, at_once=arm.client == "good", placing=arm.placing, labels=labels)


async def measured(part: Part, arm: Arm, rtt_ms: int, mark: str, stable: Stable, *, is_cold: bool = False) -> Seen:
    """Measure one cell, after a warm-up that is the same for all arms. Raises `Failed`, ``GatewayFailedError`` or
    ``TimeoutError`` where that cannot be."""
    stand = part.stand_for(arm)
    engines = await stable.engines(stand)
    async with opened(arm, stand, engines, rtt_ms) as target, asyncio.timeout(LONGEST_S):
        first = ARMS[GOOD] if arm.client == "langgraph" else arm  # LangGraph's process warms itself up
        if problems := (await played(first, COLD if is_cold else warm_up(stand.workers), target)).problems:
            raise Failed(problems[0])
        before = await computed_by(engines)
        seen = await played(arm, part.make(mark), target)
        after = await computed_by(engines)
        seen.computed = after - before if after is not None and before is not None else None
        return seen


@dataclass
class Run:
    """What is measured, and what has been seen: by place, a cell for each round (None: it failed, or is no part of
    that round). ``is_cold``: without the warm-up, so that a gateway learns of its workers from what is measured."""

    parts: Sequence[Part]
    store: Path | None = None
    is_cold: bool = False
    cells: dict[Place, list[Seen | None]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def of(self, part: str, rtt_ms: int, arm: str) -> list[Seen]:
        """Return the cells of a place that were measured."""
        return [seen for seen in self.cells.get((part, rtt_ms, arm), []) if seen is not None]

    def pairs(self, part: str, one: tuple[int, str], other: tuple[int, str]) -> Iterator[tuple[Seen, Seen]]:
        """Yield the cells of two places of a part, round by round, where both were measured."""
        for mine, theirs in zip(self.cells.get((part, *one), []), self.cells.get((part, *other), []), strict=False):
            if mine is not None and theirs is not None:
                yield mine, theirs

    async def measure(self, parts: Sequence[Part], rounds: int, stable: Stable, *, until: float = float("inf")) -> None:
        """Measure every cell of these parts that the store does not hold yet; none is begun after ``until``, by the
        monotonic clock."""
        kept, code = _kept(self.store), _fingerprint()
        for number in range(rounds):
            for part, rtt_ms, arm in places(parts, number):
                cells = self.cells.setdefault((part.name, rtt_ms, arm.name), [])
                if number < rounds - 1 and not part.is_repeated(rtt_ms, arm):
                    cells.append(None)
                    continue
                key = _key(number, part.name, part.stand_for(arm), rtt_ms, arm, part.make(""), code)
                told = f"round {number + 1} {part.name}, RTT {rtt_ms} ms, {arm.name}"
                if key in kept:
                    cells.append(kept[key])
                    continue
                if time.monotonic() > until:
                    self.problems += [f"no time for {told}"] if not number else []
                    continue
                cells.append(seen := await self._cell(part, arm, rtt_ms, number, stable, told))
                if self.store is not None and seen is not None:
                    with self.store.open("a") as file:
                        file.write(json.dumps({"key": key, "seen": msgspec.to_builtins(seen)}) + "\n")

    async def _cell(self, part: Part, arm: Arm, rtt_ms: int, number: int, stable: Stable, told: str) -> Seen | None:
        began = time.monotonic()
        try:
            seen = await measured(part, arm, rtt_ms, f"{number:08}", stable, is_cold=self.is_cold)
        except (Failed, Missing, GatewayFailedError, TimeoutError, aiohttp.ClientError) as error:
            self.problems.append(f"{told}: {type(error).__name__} {' '.join(str(error).split())[:200]}")
            say("\n".join([self.problems[-1], *getattr(error, "__notes__", [])]))
            return None
        computed = "" if seen.computed is None else f", {seen.computed:,.0f} prompt tokens computed"
        say(
            f"{told}: mean {seen.jct:.2f} s, all {seen.makespan:.2f} s{computed}, cell {time.monotonic() - began:.0f} s"
            + (f", PROBLEMS {seen.problems[:3]}" if seen.problems else "")
        )
        return seen


def places(parts: Sequence[Part], number: int) -> Iterator[tuple[Part, int, Arm]]:
    """Yield the places of a round: forward in one, backward in the next, so that nobody is always the first; arms that
    share a vLLM follow each other, because it takes long to start."""
    for part in parts:
        order = [(rtt_ms, ARMS[name]) for rtt_ms, names in part.arms.items() for name in names]
        if number % 2:
            order.reverse()
        if part.stand.kind == "vllm":
            first = order[0][1].tuning
            order.sort(key=lambda place: place[1].tuning != first)
        yield from ((part, rtt_ms, arm) for rtt_ms, arm in order)


def _key(*parts: object) -> str:
    return hashlib.sha256(" ".join(map(repr, parts)).encode()).hexdigest()[:32]


def _kept(store: Path | None) -> dict[str, Seen]:
    if store is None or not store.exists():
        return {}
    rows = [json.loads(line) for line in store.read_text().splitlines() if line.endswith("}")]
    return {row["key"]: msgspec.convert(row["seen"], Seen) for row in rows}


def _fingerprint() -> str:
    """Changes with the code that makes a cell what it is."""
    digest = hashlib.sha256()
    for path in sorted(path for package in SOURCES for path in (ROOT / package).rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
