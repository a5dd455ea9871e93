"""Streams that change their worker while clients read them: drained, killed, and moved to a worker that has come back.

Claim: with two workers of a model, no stream is cut and no token is lost or doubled when one is drained under load,
when its engine is killed (SIGKILL), and when streams move to it again once it is back.

Method: a gateway (`python -m gateway serve`) starts both workers, as an operator would. Clients stream greedy answers
of an exact number of tokens; a stream is whole if it ended once, without an error, with as many tokens as were asked
for. How many moved is the gateway's own count. Undisturbed answers come first, twice under the same load: what share of
texts is equal then is the control for what is equal after a handover. With random weights only the counts mean
something. One run is one history.

    python -m benchmarks.handover                 two llama.cpp workers with SmolLM2 on this machine, within 4 minutes
    python -m benchmarks.handover --gpus 0,1 --source MODEL --command '["vllm", "serve", "{source}",
        "--served-model-name", "{name}", "--host", "127.0.0.1", "--port", "{port}"]'      two vLLM on two GPUs
    python -m benchmarks.handover --gpus 0 --args '["--kv-cache-memory-bytes", "18000000000",
        "--gpu-memory-utilization", "0.4"]' ...                                       both on one GPU

Ends with 1 if a target is missed.
"""

import argparse
import asyncio
import json
import secrets
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from benchmarks.contention import figures
from benchmarks.contention.llamacpp import weights
from benchmarks.contention.replay import Answer, Target, play
from benchmarks.contention.trace import Ask
from benchmarks.gpu_lifecycle import machine
from benchmarks.loopback.processes import Failed
from benchmarks.reporting import RESULTS, command_of, commit, exit_status, now, say
from engines.drivers.metrics import gauge
from tests.fakes.gateway import GatewayProcess

MODEL, TENANT = "m", "reader"
FIRST, SECOND = f"{MODEL}-0", f"{MODEL}-1"
TOPICS = ("rivers", "bridges", "lamps", "maps", "clocks", "ships", "mills", "roads")


@dataclass(frozen=True)
class Plan:
    """How much a kind of machine can do: ``slots`` of one worker, streams at a time, tokens of a short and a long
    answer. A long one lasts longer than the start of a worker."""

    slots: int
    streams: int
    short: int
    long: int
    context: int
    start_s: float


GPU = Plan(slots=64, streams=40, short=600, long=14_000, context=16384, start_s=300)
SHARED_GPU = Plan(slots=64, streams=8, short=600, long=14_000, context=16384, start_s=300)  # half the memory for each
SMALL = Plan(slots=4, streams=4, short=300, long=900, context=1024, start_s=60)


@dataclass
class Step:
    """What one step of the history has shown. ``moved``: legs that were cut or lost and gone on with, by the reason."""

    name: str
    streams: int
    whole: int
    same: float
    moved: dict[str, int]
    longest_pause: float
    recomputed: int
    seconds: float
    wrong: list[str] = field(default_factory=list)


class History:
    """Two workers behind one gateway, and what happens to them."""

    def __init__(self, gateway: GatewayProcess, key: str, plan: Plan) -> None:
        self._gateway = gateway
        self._plan = plan
        self._target = Target(gateway.url, MODEL, {TENANT: key})
        self._texts: dict[int, str] = {}
        self.steps: list[Step] = []

    async def run(self) -> None:
        """Go through all steps."""
        plan = self._plan
        await self._until_ready(FIRST, SECOND)
        for num in (2, plan.slots, 2 * plan.slots):  # the gateway learns how fast workers are by how much they do
            await play([Ask(0.0, TENANT, f"{number}: Count.", 24) for number in range(num)], self._target)
        await self._step("undisturbed", plan.short, _nothing)
        await self._step("undisturbed again", plan.short, _nothing)
        await self._step("drain, and come back", plan.long, self._drain)
        await self._until_ready(FIRST, SECOND)
        await self._step("SIGKILL of an engine", plan.short, self._kill)

    async def _step(self, name: str, tokens: int, disturb: Callable[[], Awaitable[None]]) -> None:
        asks = [
            Ask(0.0, TENANT, f"{number}: Tell me all about {TOPICS[number % len(TOPICS)]}.", tokens)
            for number in range(self._plan.streams)
        ]
        before, began = await self._moved(), time.monotonic()
        reading = asyncio.create_task(play(asks, self._target))
        try:
            await disturb()
            answers = await reading
        finally:
            reading.cancel()
        took = time.monotonic() - began
        await asyncio.sleep(1.0)  # the gateway books what has ended
        after = await self._moved()
        moved = {why: after[why] - before.get(why, 0) for why in after if after[why] > before.get(why, 0)}
        step = Step(
            name=name,
            streams=len(answers),
            whole=sum(answer.is_whole for answer in answers),
            same=self._same(answers),
            moved=moved,
            longest_pause=max(figures.gaps(answers), default=0.0),
            recomputed=sum(answer.recomputed for answer in answers),
            seconds=took,
            wrong=[a.problem or f"{a.tokens} of {a.ask.tokens} tokens" for a in answers if not a.is_whole][:5],
        )
        self.steps.append(step)
        say(
            f"{name}: {step.whole} of {step.streams} whole, {100 * step.same:.0f} % as undisturbed, moved {moved}, "
            f"longest pause {step.longest_pause:.2f} s, {took:.0f} s{' ' + str(step.wrong) if step.wrong else ''}"
        )

    def _same(self, answers: Sequence[Answer]) -> float:
        """Return the share of answers that begin as the first undisturbed ones, as far as both go."""
        if not self._texts:
            self._texts = {number: answer.text for number, answer in enumerate(answers)}
        pairs = [(self._texts[number], answer.text) for number, answer in enumerate(answers)]
        return sum(one[: len(other)] == other[: len(one)] for one, other in pairs) / len(pairs)

    async def _drain(self) -> None:
        """Drain a worker under load and start it again, while its streams go on elsewhere."""
        await asyncio.sleep(3.0)
        began = time.monotonic()
        await self._tell(FIRST, "drain")
        await self._until(FIRST, "stopped")
        say(f"drained after {time.monotonic() - began:.1f} s")
        await self._tell(FIRST, "start")

    async def _kill(self) -> None:
        """SIGKILL the engine: vLLM's core where there is one, else the server."""
        await asyncio.sleep(2.0)
        server = psutil.Process((await self._worker(FIRST))["pid"])
        cores = [child for child in server.children(recursive=True) if "EngineCore" in child.name()]
        (cores or [server])[0].kill()

    async def _worker(self, worker: str) -> dict[str, Any]:
        known: dict[str, Any] = await self._gateway.admin("GET", f"/admin/v1/workers/{worker}")
        return known

    async def _tell(self, worker: str, verb: str) -> None:
        """Have the gateway do it; a verb may take as long as the work that it waits for."""
        url = f"{self._gateway.admin_url}/admin/v1/workers/{worker}/{verb}"
        headers = {"authorization": f"Bearer {self._gateway.admin_key}"}
        async with aiohttp.ClientSession() as http, http.post(url, headers=headers) as answer:
            if answer.status != 200:
                raise Failed(f"{verb}: {answer.status} {await answer.text()}")

    async def _until_ready(self, *workers: str) -> None:
        for worker in workers:
            await self._until(worker, "ready")

    async def _until(self, worker: str, state: str) -> None:
        seen = ""
        for _ in range(int(self._plan.start_s / 0.1)):
            if (seen := (await self._worker(worker))["state"]) == state:
                return
            await asyncio.sleep(0.1)
        raise Failed(f"{worker} is {seen}, and not {state}, after {self._plan.start_s:g} s")

    async def _moved(self) -> dict[str, int]:
        """Return how many legs have gone on so far, by why the leg before ended."""
        headers = {"authorization": f"Bearer {self._gateway.admin_key}"}
        async with (
            aiohttp.ClientSession() as http,
            http.get(self._gateway.admin_url + "/metrics", headers=headers) as got,
        ):
            text = await got.text()
        lines = [line for line in text.splitlines() if line.startswith("forebay_resumes_total{")]
        whys = {line.partition('cause="')[2].partition('"')[0] for line in lines}
        return {
            why: sum(int(gauge(line, "forebay_resumes_total") or 0) for line in lines if f'"{why}"' in line)
            for why in whys
        }


async def _nothing() -> None:
    """Disturb nobody."""


def verdicts(steps: Sequence[Step], problem: str) -> tuple[list[str], bool]:
    """A line for each target, and whether all were held."""
    lines, kept = [], not problem
    if problem:
        lines.append(f"target completed: want all steps, measured {problem}, missed")

    def judge(name: str, want: str, measured: str, held: bool) -> None:
        nonlocal kept
        lines.append(f"target {name}: want {want}, measured {measured}, {'held' if held else 'missed'}")
        kept = kept and held

    for step in steps:
        name = step.name.replace(",", "").replace(" ", "_")
        judge(f"whole_{name}", f"{step.streams} whole streams", str(step.whole), step.whole == step.streams)
    moved: dict[str, int] = {}
    for step in steps:
        for why, count in step.moved.items():
            moved[why] = moved.get(why, 0) + count
    for why, name in (("drained", "drain"), ("migrated", "migration"), ("lost", "kill")):
        if steps:
            judge(name, "streams that moved for it", str(moved.get(why, 0)), moved.get(why, 0) > 0)
    return lines, kept


def table(steps: Sequence[Step]) -> list[str]:
    """One line a step."""
    lines = ["| step | whole | as undisturbed | moved | longest pause, s | computed again | seconds |"]
    lines.append("|---|---|---|---|---|---|---|")
    lines += [
        f"| {step.name} | {step.whole} of {step.streams} | {100 * step.same:.0f} % | "
        f"{', '.join(f'{count} {why}' for why, count in step.moved.items()) or '–'} | {step.longest_pause:.2f} | "
        f"{step.recomputed:,} | {step.seconds:.0f} |"
        for step in steps
    ]
    return lines


def model_of(chosen: argparse.Namespace, plan: Plan) -> Mapping[str, Any]:
    """Return the settings of the model: two workers, each an engine of its own."""
    lifecycle = {"start_timeout": plan.start_s, "probe_interval": 0.5}
    launch: dict[str, Any] = {"context": plan.context, "slots": plan.slots}
    if not chosen.source:
        launch |= {"source": str(weights()), "threads": 1}
        return {"workers": [{"engine": "llamacpp", "launch": launch, "replicas": 2, "lifecycle": lifecycle}]}
    env = {"HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1", "VLLM_API_KEY": "{key}", **json.loads(chosen.env)}
    if chosen.python_path:
        env["PYTHONPATH"] = chosen.python_path
    args = [*json.loads(chosen.args), "--max-model-len", str(plan.context), "--max-num-seqs", str(plan.slots)]
    launch |= {"source": chosen.source, "command": json.loads(chosen.command), "env": env}
    launch["args"] = [*args, "--enable-prompt-tokens-details"]
    if "," in chosen.gpus:  # on one GPU that both share neither has it to itself, which `gpus` means
        launch["gpus"] = [int(gpu) for gpu in chosen.gpus.split(",")]
    return {"workers": [{"engine": "vllm", "launch": launch, "replicas": 2, "lifecycle": lifecycle}]}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.handover", description="Streams that change their worker.")
    parser.add_argument("--quick", action="store_true", help="no effect: one run is one history")
    parser.add_argument("--source", default="", help="vLLM's model; without it, SmolLM2 and llama.cpp")
    parser.add_argument("--command", help="JSON argv that starts vLLM; {source}, {name}, {port}, {key} are filled in")
    parser.add_argument("--args", default="[]", help="JSON list of further arguments of vLLM")
    parser.add_argument("--env", default="{}", help="JSON object, into the environment of vLLM")
    parser.add_argument("--python-path", help="PYTHONPATH of vLLM alone")
    parser.add_argument("--gpus", default="0,1", help="indices of the two GPUs, or of the one for both (0,1)")
    parser.add_argument("--limit", type=float, help="seconds after which to stop and tell what was seen (none)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the results go (benchmarks/results)")
    chosen = parser.parse_args()
    if chosen.source and not chosen.command:
        parser.error("--source needs a --command")
    return chosen


async def bench(chosen: argparse.Namespace) -> bool:
    """Run, print and write; whether every target was held."""
    started = now()
    plan, key, problem = SMALL, f"fbk_{secrets.token_urlsafe(32)}", ""
    if chosen.source:
        plan = GPU if "," in chosen.gpus else SHARED_GPU
    about = machine(int(chosen.gpus.split(",")[0]) if chosen.source else None)
    wait_s = 4 * plan.start_s
    gateway = GatewayProcess(
        {MODEL: model_of(chosen, plan)},
        keys=[{"name": TENANT, "tenant": TENANT, "key": key}],
        timeouts=dict.fromkeys(("queue", "first_token", "idle", "total"), wait_s),
        start_timeout_s=plan.start_s + 60,
    )
    history = History(gateway, key, plan)
    try:
        async with asyncio.timeout(chosen.limit), gateway:
            await history.run()
    except Exception as error:  # noqa: BLE001 - what was seen until then is worth keeping
        problem = f"{type(error).__name__}: {error}".splitlines()[0]
        notes = [note for one in (error, error.__cause__) for note in getattr(one, "__notes__", [])]
        say("\n".join([f"{type(error).__name__}: {error}", *notes]))
    lines, kept = verdicts(history.steps, problem)
    command = command_of("handover")
    what = (
        f"- {started}, {about}. Commit: {commit()}. Two workers of {plan.slots} slots, {plan.streams} streams at once."
    )
    text = "\n".join(
        ["# Streams that change their worker", "", f"`{command}`", "", *table(history.steps), "", what, ""]
    )
    text += "\n".join(["```", *lines, "```", ""])
    print(text)
    chosen.out.mkdir(parents=True, exist_ok=True)
    stem = chosen.out / f"handover-{started[:10]}{'-gpu' if chosen.source else ''}"
    raw = {"command": command, "started": started, "machine": about, "plan": asdict(plan), "targets": lines}
    stem.with_suffix(".md").write_text(text)
    steps = [asdict(step) for step in history.steps]
    stem.with_suffix(".json").write_text(json.dumps({**raw, "problem": problem, "steps": steps}, indent=1) + "\n")
    say(f"written: {stem}.md and .json")
    return kept


def main() -> int:
    """Run; 1 if a target is missed."""
    chosen = arguments()
    return exit_status("handover", lambda: asyncio.run(bench(chosen)))


if __name__ == "__main__":
    sys.exit(main())
