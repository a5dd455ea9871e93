"""Applications of many calls on a GPU: by a good client, directly and through Forebay, or handed over whole.

Claim: as that of `benchmarks.workflows`, for a model of 8 billion parameters: 25 chains end 1.4 times sooner in the
mean than by the good client; maps of 64 end 1.8 times sooner than on an engine that is tuned for latency; agents 1.3
times sooner; and chats beside maps wait as on an engine tuned for latency (1.1), while the maps end as on one tuned
for throughput (1.1).

Method: as there, without a network between (RTT 0) and without LangGraph. vLLM is started by this script, once with
few slots (`--max-num-seqs`: tuned for latency) and once with many, and a gateway is attached to it in every cell; its
prefix cache is emptied between cells. Arms run forward in one round and backward in the next, for as many rounds as
there is time. The chains are asked of both servers: where there are slots for all of them, nobody waits for anybody.
Weights may be random (`--load-format dummy`): then nothing is said of what answers say.

    python -m benchmarks.workflows_gpu --source MODEL --command '["vllm", "serve", "{source}", "--served-model-name",
        "{name}", "--host", "127.0.0.1", "--port", "{port}"]'        both servers
    python -m benchmarks.workflows_gpu --servers many ...            one of them
    python -m benchmarks.workflows_gpu --cpu                         vLLM's CPU build, tiny: does all of it work

Ends with 1 if a target is missed.
"""

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from benchmarks.dataflow import workloads
from benchmarks.dataflow.arms import ARMS
from benchmarks.dataflow.cells import Run
from benchmarks.dataflow.engines import VLLM_MODEL, Stable, Stand, Vllm
from benchmarks.dataflow.plans import Part
from benchmarks.dataflow.report import write
from benchmarks.dataflow.verdicts import base_of, judged, ratio
from benchmarks.gpu_lifecycle import machine
from benchmarks.loopback.processes import Failed
from benchmarks.reporting import RESULTS, beginning, exit_status, say

CHAINS_BESIDE = "chains, few slots"
SPARE_S = 45.0  # for the last cell's end, the engine's, and the results


@dataclass(frozen=True)
class Plan:
    """How much a kind of machine can do."""

    many: int
    few: int
    context: int
    rounds: int
    chains: partial[workloads.Workload]
    map_reduce: partial[workloads.Workload]
    multi_agent: partial[workloads.Workload]
    mixed: partial[workloads.Workload]

    def few_parts(self) -> list[Part]:
        """Return what is asked of the server with few slots."""
        few = Stand("vllm", 1, self.few)
        return [
            Part("map_reduce", self.map_reduce, few, {0: ("good-latency",)}, self.few),
            Part("mixed", self.mixed, few, {0: ("good-latency",)}, self.few),
            Part(CHAINS_BESIDE, self.chains, few, {0: ("good", "forebay")}, self.few),
        ]

    def many_parts(self) -> list[Part]:
        """Return what is asked of the server with many slots."""
        many = Stand("vllm", 1, self.many)
        arms = {"chains": ("good", "good-gateway", "g1", "forebay")}
        made = {
            "chains": self.chains,
            "map_reduce": self.map_reduce,
            "multi_agent": self.multi_agent,
            "mixed": self.mixed,
        }
        return [
            Part(name, make, many, {0: arms.get(name, (base_of(name), "forebay"))}, self.few)
            for name, make in made.items()
        ]


# Answers of random weights are texts of more than twice as many tokens: what is put together has to fit the context.
GPU = Plan(
    many=64, few=8, context=8192, rounds=4,
    chains=partial(workloads.chains, apps=25, steps=8, words=250, tokens=48),
    map_reduce=partial(workloads.map_reduce, width=64, words=350, tokens=24, last=100),
    multi_agent=partial(workloads.multi_agent, apps=8, coders=8, rounds=3, words=300, tokens=64, per_s=2.0),
    mixed=partial(
        workloads.mixed, chats=60, chats_per_s=6.0, chat_words=80, chat_tokens=48, apps=5, apps_per_s=0.5, width=48,
        words=350, tokens=24, last=100,
    ),
)  # fmt: skip
CPU = Plan(
    many=8, few=2, context=2048, rounds=1,
    chains=partial(workloads.chains, apps=5, steps=3, words=30, tokens=6),
    map_reduce=partial(workloads.map_reduce, width=10, words=30, tokens=8, last=8),
    multi_agent=partial(workloads.multi_agent, apps=2, coders=2, rounds=1, words=30, tokens=6, per_s=1.0),
    mixed=partial(
        workloads.mixed, chats=6, chats_per_s=0.5, chat_words=20, chat_tokens=8, apps=2, apps_per_s=0.2, width=6,
        words=30, tokens=8, last=8,
    ),
)  # fmt: skip


def vllm_of(given: argparse.Namespace, plan: Plan) -> Vllm:
    """Return how vLLM is started, as the flags say."""
    env: dict[str, str] = json.loads(given.env)
    if given.python_path:
        env["PYTHONPATH"] = given.python_path
    more: list[str] = json.loads(given.args)
    if given.cpu:
        on_cpu = Vllm.on_cpu()
        return Vllm((*on_cpu.argv, *more), {**on_cpu.env, **env})
    words: list[str] = json.loads(given.command)
    argv = [word.replace("{source}", given.source).replace("{name}", VLLM_MODEL) for word in words]
    env = {"CUDA_VISIBLE_DEVICES": str(given.gpu), **env}
    return Vllm((*argv, *more, "--max-model-len", str(plan.context)), env)


async def measure(given: argparse.Namespace, plan: Plan, run: Run) -> None:
    """Measure on one server after the other, as long as there is time; what was seen until then is kept."""
    until = time.monotonic() + given.limit - SPARE_S if given.limit else float("inf")
    wanted = given.servers.split(",")
    parts: Mapping[str, list[Part]] = {"few": plan.few_parts(), "many": plan.many_parts()}
    async with Stable(None, vllm_of(given, plan)) as stable:
        for server in ("few", "many"):
            mine = [_with(part, given) for part in parts[server] if server in wanted and _is_wanted(part, given)]
            if mine:
                run.parts = [*run.parts, *mine]
                began = time.monotonic()
                await run.measure(mine, 1 if server == "few" else given.rounds or plan.rounds, stable, until=until)
                say(f"server with {server} slots: {time.monotonic() - began:.0f} s")


def _is_wanted(part: Part, given: argparse.Namespace) -> bool:
    return not given.workloads or part.name.partition(",")[0] in given.workloads.split(",")


def _with(part: Part, given: argparse.Namespace) -> Part:
    if not given.arms:
        return part
    kept = {rtt: tuple(name for name in names if name in given.arms.split(",")) for rtt, names in part.arms.items()}
    return replace(part, arms=kept)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.workflows_gpu", description="Applications of many calls.")
    parser.add_argument("--cpu", action="store_true", help="vLLM's CPU build with SmolLM2, tiny")
    parser.add_argument("--quick", action="store_true", help="no effect: one run is as short as it can be")
    parser.add_argument("--source", default="", help="the model: a folder, or a hub id")
    parser.add_argument("--command", help="JSON argv that starts vLLM; {source}, {name} and {port} are filled in")
    parser.add_argument("--args", default="[]", help="JSON list of further arguments of vLLM")
    parser.add_argument("--env", default="{}", help="JSON object, into the environment of vLLM")
    parser.add_argument("--python-path", help="PYTHONPATH of vLLM alone")
    parser.add_argument("--gpu", type=int, default=0, help="index of the GPU (0)")
    parser.add_argument("--servers", default="few,many", help="comma-separated (few,many): slots of the engine")
    parser.add_argument("--workloads", help="comma-separated, of chains, map_reduce, multi_agent, mixed")
    parser.add_argument("--arms", help="comma-separated: of those that a workload has, only these")
    parser.add_argument("--rounds", type=int, help="on the server with many slots (as many as there is time for, to 4)")
    parser.add_argument("--limit", type=float, help="seconds after which no further cell is begun (none)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the results go (benchmarks/results)")
    given = parser.parse_args()
    if not given.cpu and not (given.source and given.command):
        parser.error("--source and --command are needed, or --cpu")
    if unknown := set(given.servers.split(",")) - {"few", "many"}:
        parser.error(f"--servers knows few and many, not {min(unknown)!r}")
    if unknown := set(given.arms.split(",") if given.arms else ()) - set(ARMS):
        parser.error(f"no arm {min(unknown)!r}")
    return given


def bench(given: argparse.Namespace) -> bool:
    """Run, print and write; whether every target was held."""
    plan = CPU if given.cpu else GPU
    began, run = beginning(), Run([])
    about = machine(None if given.cpu else given.gpu)
    try:
        asyncio.run(measure(given, plan, run))
    except Failed as error:
        run.problems.append(f"{type(error).__name__} {error}")
    told = judged(run)
    beside = ratio(run, CHAINS_BESIDE, (0, "good"), (0, "forebay"))
    told.tell(f"chains on {plan.few} slots, the good client's time over ours, nothing promised", beside)
    notes = [
        f"{plan.many} slots, and {plan.few} where the engine is tuned for latency; context {plan.context}.",
        "Random weights: speed only." if "dummy" in given.args + (given.command or "") else "Real weights.",
    ]
    stem = given.out / f"workflows_gpu-{began.at[:10]}{'-cpu' if given.cpu else ''}"
    write(
        "workflows_gpu", "Applications of many calls on a GPU", began, run, machine=about, stem=stem, lines=told.lines,
        notes=notes, more={"plan": repr(plan)},
    )  # fmt: skip
    return told.held


def main() -> int:
    """Run; 1 if a target is missed."""
    given = arguments()
    return exit_status("workflows_gpu", lambda: bench(given))


if __name__ == "__main__":
    sys.exit(main())
