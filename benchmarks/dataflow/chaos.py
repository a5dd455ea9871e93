"""Runs whose engine is killed, whose clients leave, and some of which are cancelled: what becomes of each.

Applications of one shape are handed over twice: in peace, and then, under other prompts, with a fifth of the runs
cancelled while they run, the clients of another fifth gone in the middle of their wait (they come back later and ask
again), and one of the two engines killed with SIGKILL after half of the time that peace took. The gateway starts its
engines again by itself.
"""

import asyncio
import contextlib
import os
import random
import secrets
import signal
import time
from collections import Counter
from functools import partial
from typing import Literal

import aiohttp
import msgspec

from benchmarks.contention.llamacpp import pin, weights
from benchmarks.dataflow import submitting, workloads
from benchmarks.dataflow.arms import MODEL
from benchmarks.dataflow.clients import RequestFailed, Target, pooled, timed
from benchmarks.dataflow.engines import CONTEXT
from benchmarks.dataflow.seen import Seen
from benchmarks.dataflow.workloads import App, Workload
from benchmarks.loopback.processes import Failed
from benchmarks.reporting import say
from tests.fakes.gateway import GatewayProcess, launched_llamacpp

SHARE = 0.2
PATIENCE_S = 600.0
MAKE = partial(workloads.multi_agent, apps=10, coders=3, rounds=2, words=60, tokens=16, per_s=2.0)
QUICK = partial(workloads.multi_agent, apps=5, coders=2, rounds=1, words=40, tokens=10, per_s=2.0)

Fate = Literal["left alone", "cancelled", "left by its client"]


class Storm(msgspec.Struct):
    """What became of the runs, by what was done to them: how often they came to what."""

    peace: Seen
    storm: Seen
    ends: dict[Fate, dict[str, int]]
    kills: int


def fates(apps: tuple[App, ...], seed: int) -> dict[str, Fate]:
    """Return what is done to each application: a fifth is cancelled, another is left by its client."""
    draw = random.Random(seed)
    names = [app.name for app in apps]
    draw.shuffle(names)
    num = max(1, round(SHARE * len(names)))
    drawn: dict[str, Fate] = dict.fromkeys(names, "left alone")
    return drawn | dict.fromkeys(names[:num], "cancelled") | dict.fromkeys(names[num : 2 * num], "left by its client")


async def measured(calm: Workload, workload: Workload, core: int) -> Storm:
    """Hand ``calm`` over in peace and ``workload`` in the storm. Raises `Failed` if nothing was killed."""
    key = f"fbk_{secrets.token_urlsafe(32)}"
    gateway = GatewayProcess(
        {MODEL: launched_llamacpp(weights(), slots=4, context=CONTEXT, replicas=2)},
        keys=[{"name": "apps", "tenant": "apps", "key": key}],
        timeouts=dict.fromkeys(("queue", "first_token", "idle", "total"), PATIENCE_S),
    )
    async with gateway, asyncio.timeout(3 * PATIENCE_S):
        pin([process.pid for process in gateway.descendants()], core)
        target = Target((gateway.url,), MODEL, key)
        peace = await submitting.play(calm, target)
        say(f"chaos: in peace {peace.makespan:.1f} s" + (f", PROBLEMS {peace.problems[:3]}" if peace.problems else ""))
        killer = asyncio.create_task(_kill(gateway, peace.makespan / 2))
        try:
            storm, ends = await _storm(workload, target, peace)
        finally:
            killed = await _ended(killer)
        if not killed:
            raise Failed("all runs had ended before an engine was killed")
        counted: dict[Fate, Counter[str]] = {}
        for name, fate in fates(workload.apps, workload.seed).items():
            counted.setdefault(fate, Counter())[ends[name]] += 1
        say(f"chaos: in the storm {storm.makespan:.1f} s, {counted}")
        return Storm(peace, storm, {fate: dict(counts) for fate, counts in counted.items()}, killed)


async def _kill(gateway: GatewayProcess, after_s: float) -> int:
    """Kill a worker, and return how many were killed."""
    await asyncio.sleep(after_s)
    workers = (await gateway.admin("GET", "/admin/v1/workers"))["data"]
    os.kill(workers[0]["pid"], signal.SIGKILL)
    return 1


async def _ended(killer: "asyncio.Task[int]") -> int:
    killer.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        return await killer
    return 0


async def _storm(workload: Workload, target: Target, peace: Seen) -> tuple[Seen, dict[str, str]]:
    url, drawn = target.urls[0], fates(workload.apps, workload.seed)
    usual = {done.app: done.took for done in peace.apps}
    ends: dict[str, str] = {}

    async def carry(app: App) -> str:
        fate, soon_s = drawn[app.name], 0.4 * usual[app.name]
        async with pooled(target, 1) as http:
            run = await submitting.submitted(http, url, app, target)
            if fate != "left alone":
                waiting = asyncio.create_task(submitting.awaited(http, url, f"{run}.{app.output}"))
                await asyncio.wait([waiting], timeout=soon_s)
                waiting.cancel()
                await asyncio.gather(waiting, return_exceptions=True)
        async with pooled(target, 1) as http:  # the client's connection is gone; it comes back on another
            if fate == "cancelled":
                await _cancel(http, f"{url}{submitting.WORKFLOWS}/{run}/cancel")
            try:
                text = await asyncio.wait_for(submitting.awaited(http, url, f"{run}.{app.output}"), PATIENCE_S)
                ends[app.name] = "done"
                return text
            except TimeoutError:
                ends[app.name] = "never resolved"
            except RequestFailed as error:
                is_cancelled = '"cancelled"' in str(error)
                ends[app.name] = "cancelled" if is_cancelled else f"failed: {str(error)[:120]}"
        return ""

    seen = await timed(workload, carry, _nobody_chats)
    return seen, ends | {done.app: f"failed: {done.problem}" for done in seen.apps if done.problem}


async def _nobody_chats(*_: object) -> None:
    raise AssertionError("these workloads have no chats")


async def _cancel(http: aiohttp.ClientSession, url: str) -> None:
    async with http.post(url, data=b"{}") as response:
        if response.status != 200:
            raise RequestFailed(f"{response.status} {(await response.text())[:200]}")


def verdicts(seen: Storm) -> tuple[list[str], bool]:
    """Return a line for each target, and whether all were held."""
    kept, cancelled = Counter[str](), Counter(seen.ends.get("cancelled", {}))
    for fate in ("left alone", "left by its client"):
        kept.update(seen.ends.get(fate, {}))
    lost = {how: count for how, count in kept.items() if how != "done"}
    late = {how: count for how, count in cancelled.items() if how not in {"cancelled", "done"}}
    unresolved = kept["never resolved"] + cancelled["never resolved"]
    checks = [
        ("chaos_lost", "0 runs lost", f"{sum(lost.values())} of {kept.total()}{_which(lost)}", not lost),
        ("chaos_cancelled", "every cancelled run cancelled, or done before", f"{dict(cancelled)}", not late),
        ("chaos_resolved", "every waiter resolved", f"{unresolved} not", not unresolved),
    ]
    lines = [
        f"target {name}: want {want}, measured {measured}, {'held' if held else 'missed'}"
        for name, want, measured, held in checks
    ]
    lines.append(
        f"chaos: {seen.peace.makespan:.1f} s in peace, {seen.storm.makespan:.1f} s with {seen.kills} engine killed"
    )
    return lines, all(held for *_, held in checks)


def _which(lost: dict[str, int]) -> str:
    return f" ({'; '.join(lost)})" if lost else ""


async def peaceful_and_stormy(core: int, *, is_quick: bool) -> Storm:
    """Measure the workload of a full run, or of a quick one."""
    began = time.monotonic()
    make = QUICK if is_quick else MAKE
    seen = await measured(make("00000000"), make("00000001"), core)
    say(f"chaos: {time.monotonic() - began:.0f} s in all")
    return seen
