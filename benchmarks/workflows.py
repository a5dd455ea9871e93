"""Applications of many calls: carried out by their clients, by LangGraph, and handed to Forebay whole.

Claim: a workflow that is handed over costs one round trip, however many calls follow each other (95 % of what can be
gained of a chain, and no loss where there is no distance), and who knows the graph schedules better: chains that share
an engine end 1.4 times sooner in the mean, maps 1.8 times sooner than on an engine that is tuned for latency, agents
1.3 times sooner than by a client that minds the engines' caches and twice as soon as by LangGraph from 100 ms away;
prompts that begin alike cost 1.5 times fewer tokens than engines in turn; and chats beside all that wait as on an
engine tuned for latency (1.1), while the rest is done as on one tuned for throughput (1.1).

Method: the same graphs with the same texts, seeds, data flow and lengths of answers (`ignore_eos`) by every arm, in
one run, interleaved, forward in one round and backward in the next, which has the arms besides that no target names
(`repeated` in `benchmarks/dataflow/plans.py`); greedy. Engines are started by the benchmark and are the same for all;
gateways are attached to them, new in every cell. Before a cell every arm does the same few calls, of other texts, one
alone and then several at a time: a gateway that has just been started does not know yet how fast its workers are
(`--cold` leaves them out). No cache holds anything of a cell at its beginning. A client that talks to llama.cpp
directly has it with llama.cpp's own defaults and caches. Engines have one core, gateway and client the other. The
network is a proxy that holds every byte for half a round trip either way (and a new connection for one more), between
the client and what it talks to; gateway and engines stand together. Clients keep connections open. `good` is a client
as good as can be written by hand (`benchmarks/dataflow/clients.py`); what it cannot have is the knowledge of other
applications. The bound of a chain is (T + RTT + o_client) / (T + o_server); the overheads are measured with calls that
take no time.

    python -m benchmarks.workflows                     everything, goes on where it was cut off
    python -m benchmarks.workflows --quick             fake engine and llama.cpp, smaller, within 4 minutes
    python -m benchmarks.workflows --workloads chains  one of them; a full run takes its cells over
    python -m benchmarks.workflows --workloads chains --arms good,forebay --rounds 1      an A/B; nothing is kept
    python -m benchmarks.workflows --workloads multi_agent --cold    with gateways that have just been started

Results of whole workloads are kept under their names, of anything less in the cache folder. Ends with 1 if a target
is missed.
"""

import argparse
import asyncio
import os
import sys
from pathlib import Path
from typing import get_args

import msgspec
import psutil

from benchmarks.dataflow import chaos
from benchmarks.dataflow.arms import ARMS
from benchmarks.dataflow.cells import Run
from benchmarks.dataflow.engines import Kind, Stable
from benchmarks.dataflow.plans import chosen, full, quick
from benchmarks.dataflow.report import this_machine, write
from benchmarks.dataflow.verdicts import judged
from benchmarks.loopback.cache import folder
from benchmarks.loopback.processes import Cores, Failed
from benchmarks.reporting import RESULTS, beginning, exit_status
from tests.fakes.gateway import GatewayFailedError

FULL_ROUNDS, QUICK_ROUNDS = 2, 1
CHAOS = "chaos"


def arguments() -> argparse.Namespace:
    """The command line."""
    names = [*dict.fromkeys(part.workload for part in full()), CHAOS]
    parser = argparse.ArgumentParser(prog="benchmarks.workflows", description="Applications of many calls, arm by arm.")
    parser.add_argument("--quick", action="store_true", help="the arms that targets name, smaller, without vLLM")
    parser.add_argument("--workloads", help=f"comma-separated, of {', '.join(names)}")
    parser.add_argument("--engine", choices=get_args(Kind), help="only what runs on this one")
    parser.add_argument("--rtts", help="comma-separated round trips in milliseconds, of those that a workload has")
    parser.add_argument("--arms", help=f"comma-separated, of {', '.join(ARMS)}: for every workload that is chosen")
    parser.add_argument("--rounds", type=int, help=f"{FULL_ROUNDS}, with --quick {QUICK_ROUNDS}")
    parser.add_argument("--cold", action="store_true", help="without the warm-up before each cell; nothing is kept")
    parser.add_argument("--fresh", action="store_true", help="drop the cells that a run that was cut off left")
    given = parser.parse_args()
    given.workloads = given.workloads.split(",") if given.workloads else names
    if unknown := set(given.workloads) - set(names):
        parser.error(f"no workload {min(unknown)!r}; there are {', '.join(names)}")
    if unknown := set(given.arms.split(",") if given.arms else ()) - set(ARMS):
        parser.error(f"no arm {min(unknown)!r}; there are {', '.join(ARMS)}")
    given.is_all = given.workloads == names
    given.is_whole = not (given.engine or given.rtts or given.arms or given.rounds or given.cold)
    return given


def store_of(given: argparse.Namespace) -> Path | None:
    """Return where cells are kept; nowhere for a quick run, a cold one and an A/B."""
    if given.quick or given.arms or given.rounds or given.cold:
        return None
    store = RESULTS / "workflows.cells.jsonl.tmp"
    store.parent.mkdir(exist_ok=True)
    if given.fresh:
        store.unlink(missing_ok=True)
    return store


async def measure(given: argparse.Namespace, run: Run, cores: Cores) -> chaos.Storm | None:
    """Measure what was chosen."""
    rounds = given.rounds or (QUICK_ROUNDS if given.quick else FULL_ROUNDS)
    async with Stable(cores.gateway) as stable:
        await run.measure(run.parts, rounds, stable)
    if CHAOS not in given.workloads or given.engine not in {None, "llamacpp"} or given.arms:
        return None
    try:
        return await chaos.peaceful_and_stormy(cores.gateway, is_quick=given.quick)
    except (Failed, GatewayFailedError, TimeoutError) as error:
        run.problems.append(f"chaos: {type(error).__name__} {' '.join(str(error).split())[:200]}")
        return None


def bench(given: argparse.Namespace) -> bool:
    """Measures, prints and writes; whether every target was held."""
    cores = Cores.of_machine()
    arms = given.arms.split(",") if given.arms else None
    rtts = {int(rtt) for rtt in given.rtts.split(",")} if given.rtts else None
    parts = chosen(quick() if given.quick else full(), given.workloads, arms=arms, engine=given.engine, rtts=rtts)
    run = Run(parts, store_of(given), given.cold)
    os.sched_setaffinity(0, {cores.load})
    began, stolen = beginning(), psutil.cpu_times().steal
    storm = asyncio.run(measure(given, run, cores))
    told = judged(run)
    lines, held = chaos.verdicts(storm) if storm is not None else ([], True)
    notes = [
        f"Engines on core {cores.gateway}, gateway and clients on core {cores.load}; "
        f"{psutil.cpu_times().steal - stolen:.1f} s of CPU stolen.",
    ]
    of = "" if given.is_all else f"-{'-'.join(given.workloads)}"
    name = f"workflows{of}-{began.at[:10]}{'-quick' if given.quick else ''}{'-cold' if given.cold else ''}"
    write(
        "workflows", "Applications of many calls", began, run, machine=this_machine(),
        stem=(RESULTS if given.is_whole else folder("picked")) / name, lines=told.lines + lines, notes=notes,
        more={"chaos": msgspec.to_builtins(storm)},
    )  # fmt: skip
    if given.is_all and given.is_whole and run.store is not None:
        run.store.unlink(missing_ok=True)
    return told.held and held


def main() -> int:
    """Run; 1 if a target is missed."""
    given = arguments()
    return exit_status("workflows", lambda: bench(given), if_cut="cut off; cells are kept, run it again to go on")


if __name__ == "__main__":
    sys.exit(main())
