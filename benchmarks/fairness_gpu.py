"""An urgent tenant against a full batch on a GPU: vLLM's own queue and priorities, and Forebay's VTC and VTC-PC.

Claim: while one tenant's long answers fill every slot of vLLM, another's short requests get their first token 10
times sooner (p99) by VTC-PC than by vLLM's priorities, which never take a slot from a running request; tokens of
answers a second stay at 0.97 of those with vLLM's priorities or more; and vLLM behind the gateway, first come, first
served, is within 2 % of vLLM alone, which serves in that order.

Method: a gateway (`python -m gateway serve`) starts vLLM from a settings file, as an operator would, but without a
key, so that the arms without Forebay go straight to the same engine. At 0 s a batch tenant asks for three times as
many long answers as vLLM has slots; from 1 s on an urgent tenant asks short questions, Poisson. Every arm is one such
history of its own prompts, with the same lengths and times; what has not ended at the end of the window is cut off.
Arms run forward in one round and backward in the next, because an engine with a full cache is slower than a new one.
Time to the first token is taken at the clients, and of a request that had none it is the time it had waited; tokens a
second are the engine's own count over the window without its first seconds. Intervals of those times are 95 %
bootstraps over eighths of the window, of rates the range of the rounds. Weights may be random (`--load-format
dummy`): then nothing is said of what answers say.

    python -m benchmarks.fairness_gpu --source MODEL --command '["vllm", "serve", "{source}", "--served-model-name",
        "{name}", "--host", "127.0.0.1", "--port", "{port}"]'        two servers: without and with CPU offload
    python -m benchmarks.fairness_gpu --servers plain ...            one of them
    python -m benchmarks.fairness_gpu --cpu                          vLLM's CPU build, tiny: does all of it work

Ends with 1 if a target is missed.
"""

import argparse
import asyncio
import json
import secrets
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.contention import figures
from benchmarks.contention.replay import Answer, Target, play
from benchmarks.contention.trace import HOG, URGENT, Ask, full_batch
from benchmarks.gpu_lifecycle import cpu_build, machine
from benchmarks.loopback.processes import Failed
from benchmarks.loopback.stats import P99_SAMPLES, Interval, interval
from benchmarks.reporting import RESULTS, command_of, commit, exit_status, now, say
from engines.drivers.metrics import gauge
from tests.fakes.gateway import GatewayProcess

MODEL = "m"
WORKER = f"{MODEL}-0"
BLOCKS = 8  # parts of the window that intervals are drawn over
P50, P99 = (partial(figures.quantile, share=share) for share in (0.5, 0.99))
IDLE_WITHIN_S = 30.0
SPARE_S = 20.0  # for writing the results, and for the engine's end
COUNTERS = (
    "vllm:generation_tokens_total", "vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total",
    "vllm:external_prefix_cache_hits_total", "vllm:num_preemptions_total",
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """How much a kind of machine can do."""

    slots: int
    context: int
    hogs: int
    hog_tokens: tuple[int, int]
    hog_prompt: int
    rate: float
    seconds: float
    from_s: float  # where the count of tokens a second begins: the batch is decoding
    urgent_tokens: int
    start_s: float

    def trace(self, mark: str) -> list[Ask]:
        """Return the requests; ``mark`` keeps their prompts apart from other arms' in the engine's prefix cache."""
        asks = full_batch(
            hogs=self.hogs, hog_tokens=self.hog_tokens, hog_prompt=self.hog_prompt, rate=self.rate,
            seconds=self.seconds - 1.0, urgent_tokens=self.urgent_tokens, seed=4,
        )  # fmt: skip
        return [Ask(ask.at, ask.tenant, f"{mark} {ask.prompt}", ask.tokens) for ask in asks]


GPU = Plan(64, 8192, 192, (2000, 4000), 300, 10.0, 32.0, 4.0, 32, 300)
CPU = Plan(4, 2048, 12, (150, 300), 60, 0.8, 24.0, 4.0, 8, 600)


@dataclass(frozen=True)
class Arm:
    """One way to share the slots. Without a policy, requests go straight to vLLM."""

    name: str
    policy: str = ""
    has_priority: bool = False


ALONE, PRIORITY = Arm("vllm"), Arm("vllm-priority", has_priority=True)
FCFS, VTC, VTC_PC = Arm("fcfs", "fcfs"), Arm("vtc", "vtc"), Arm("vtc-pc", "vtc-pc")
_ROUND = (ALONE, PRIORITY, FCFS, VTC, VTC_PC)
# By server, in the order in which they run.
# vLLM 0.26 with offload dies when a request is aborted that it has queued (its issue 49118), as those of the arm
# without a gateway are at the end of the window: so that arm is the last, and once.
SERVERS: Mapping[str, tuple[Arm, ...]] = {"plain": _ROUND + _ROUND[::-1], "offload": (VTC_PC, VTC_PC, PRIORITY)}
SUFFIXES = {"plain": "", "offload": "+offload"}


@dataclass
class Seen:
    """What one arm came to. ``urgent``: times to the first token by eighth of the window; rates (one a round) and
    counts are the engine's. ``reused``: the share of what resumed requests held that the engine had kept."""

    arm: str
    urgent: list[list[float]]
    tokens_per_s: list[float]
    prompts_per_s: list[float]
    tbt_p99: float
    tbt_p999: float
    longest_pause: float
    cuts: int
    recomputed: int
    reused: float | None
    engine: dict[str, float]
    torn: list[str] = field(default_factory=list)

    @property
    def samples(self) -> list[float]:
        """All times to the first token of the urgent tenant."""
        return [value for block in self.urgent for value in block]

    def and_then(self, other: "Seen") -> "Seen":
        """Return both rounds together."""
        shares = [share for share in (self.reused, other.reused) if share is not None]
        return Seen(
            arm=self.arm,
            urgent=[one + two for one, two in zip(self.urgent, other.urgent, strict=True)],
            tokens_per_s=self.tokens_per_s + other.tokens_per_s,
            prompts_per_s=self.prompts_per_s + other.prompts_per_s,
            tbt_p99=max(self.tbt_p99, other.tbt_p99),
            tbt_p999=max(self.tbt_p999, other.tbt_p999),
            longest_pause=max(self.longest_pause, other.longest_pause),
            cuts=self.cuts + other.cuts,
            recomputed=self.recomputed + other.recomputed,
            reused=min(shares, default=None),
            engine={name: count + other.engine[name] for name, count in self.engine.items()},
            torn=self.torn + other.torn,
        )


class Server:
    """A gateway and the vLLM that it has started."""

    def __init__(self, plan: Plan, launch: Mapping[str, Any], directory: Path) -> None:
        self._plan = plan
        self._keys = {tenant: f"fbk_{secrets.token_urlsafe(32)}" for tenant in (HOG, URGENT)}
        wait_s = 2 * plan.start_s
        lifecycle = {"start_timeout": plan.start_s, "probe_interval": 1}
        worker = {"engine": "vllm", "launch": dict(launch), "lifecycle": lifecycle, "max_inflight": plan.slots}
        self.gateway = GatewayProcess(
            {MODEL: {"fairness": {"policy": "vtc"}, "workers": [worker]}},
            keys=[{"name": tenant, "tenant": tenant, "key": key} for tenant, key in self._keys.items()],
            timeouts=dict.fromkeys(("queue", "first_token", "idle", "total"), wait_s),
            directory=directory,
            start_timeout_s=plan.start_s + 60,
        )

    @property
    def seconds(self) -> float:
        """How long an arm takes, and what has to be left after it."""
        return self._plan.seconds + 5.0 + SPARE_S

    async def target(self, arm: Arm) -> Target:
        """Return where the arm's requests go; the gateway obeys the arm's policy from now on."""
        if not arm.policy:
            more = {HOG: {"priority": 10}, URGENT: {"priority": 0}} if arm.has_priority else {}
            return Target(await self._engine(), MODEL, {}, more)
        self.gateway.settings["models"][MODEL]["fairness"]["policy"] = arm.policy
        self.gateway.settings_path.write_text(json.dumps(self.gateway.settings))  # JSON is YAML, too
        await self.gateway.admin("POST", "/admin/v1/config:reload")
        return Target(self.gateway.url, MODEL, self._keys)

    async def measure(self, arm: Arm, suffix: str, number: int) -> Seen:
        """Run one arm, once the engine is idle. Its counts are those of the window less its last half second."""
        plan, target, url = self._plan, await self.target(arm), await self._engine()
        trace = plan.trace(f"{arm.name}{suffix}/{number}")
        async with aiohttp.ClientSession() as http:
            await _until_idle(http, url)
            before, cut_before = await counters(http, url), await self._cuts(http)
            answers, (rate, after) = await asyncio.gather(
                play(trace, target, until=plan.seconds), _rate(http, url, plan.from_s, plan.seconds - 0.5)
            )
            cut_after = await self._cuts(http)
        engine = {name.removeprefix("vllm:"): after[name] - before[name] for name in COUNTERS}
        heavy = [answer for answer in answers if answer.ask.tenant == HOG]
        between = figures.gaps(heavy)
        return Seen(
            arm=f"{arm.name}{suffix}",
            urgent=_blocks([answer for answer in answers if answer.ask.tenant == URGENT], plan.seconds),
            tokens_per_s=[rate],
            prompts_per_s=[_prompt_tokens(answers, plan.from_s, plan.seconds) / (plan.seconds - plan.from_s)],
            tbt_p99=figures.quantile(between, 0.99) if between else 0.0,
            tbt_p999=figures.quantile(between, 0.999) if between else 0.0,
            longest_pause=max(between, default=0.0),
            cuts=int(cut_after[0] - cut_before[0]),
            recomputed=int(cut_after[1] - cut_before[1]),
            reused=_reused(answers, engine),
            engine=engine,
            torn=_torn(answers),
        )

    async def _engine(self) -> str:
        url: str = (await self.gateway.admin("GET", f"/admin/v1/workers/{WORKER}"))["url"]
        return url

    async def _cuts(self, http: aiohttp.ClientSession) -> tuple[float, float]:
        """Return how often the gateway has cut a leg, and how many tokens were computed again."""
        text = await _text(http, self.gateway.admin_url + "/metrics", self.gateway.admin_key)
        return gauge(text, "forebay_cuts_total") or 0.0, gauge(text, "forebay_recomputed_tokens_total") or 0.0


def _blocks(urgent: Sequence[Answer], seconds: float) -> list[list[float]]:
    """Return the times to the first token by eighth of the window in which the request was sent."""
    blocks: list[list[float]] = [[] for _ in range(BLOCKS)]
    for answer in urgent:
        blocks[min(int(BLOCKS * answer.asked / seconds), BLOCKS - 1)] += figures.ttfts([answer], seconds)
    return blocks


def _reused(answers: Sequence[Answer], engine: Mapping[str, float]) -> float | None:
    """Return the share of looked-up tokens beyond every request's own prompt that the engine still had."""
    prompts = _prompt_tokens(answers, 0.0, float("inf"))
    resumed = engine["prefix_cache_queries_total"] - prompts
    hits = engine["prefix_cache_hits_total"] + engine["external_prefix_cache_hits_total"]
    return min(hits / resumed, 1.0) if resumed > 0.02 * prompts else None


def _prompt_tokens(answers: Sequence[Answer], low: float, high: float) -> float:
    """Return the tokens of the prompts whose answers began in that time, each counted once; where nobody told them,
    since the window cut the answer off, as many as of others of its tenant."""
    lengths = _lengths(answers)
    begun = [answer for answer in answers if answer.first is not None and low <= answer.first < high]
    return sum(answer.prompt_tokens or figures.middle(lengths.get(answer.ask.tenant, [])) for answer in begun)


def _lengths(answers: Sequence[Answer]) -> dict[str, list[int]]:
    known: dict[str, list[int]] = {}
    for answer in answers:
        if answer.prompt_tokens:
            known.setdefault(answer.ask.tenant, []).append(answer.prompt_tokens)
    return known


def _torn(answers: Sequence[Answer]) -> list[str]:
    """Return what was wrong with answers that ended; those that the window cut off are no fault."""
    wrong = [
        a.problem or f"{a.tokens} of {a.ask.tokens} tokens" for a in answers if a.problem or (a.end and not a.is_whole)
    ]
    return wrong[:5] + ([f"and {len(wrong) - 5} more"] if len(wrong) > 5 else [])


async def counters(http: aiohttp.ClientSession, url: str) -> dict[str, float]:
    """Read vLLM's own counts; one that it does not have is 0."""
    text = await _text(http, url + "/metrics")
    return {name: gauge(text, name) or 0.0 for name in COUNTERS}


async def _rate(http: aiohttp.ClientSession, url: str, low: float, high: float) -> tuple[float, dict[str, float]]:
    """Return the engine's output tokens a second between two times of the window that begins now, and its counts at
    the later of them."""
    began = time.monotonic()
    read: list[tuple[float, dict[str, float]]] = []
    for at in (low, high):
        await asyncio.sleep(began + at - time.monotonic())
        counts = await counters(http, url)
        read.append((time.monotonic(), counts))
    (sooner, first), (later, last) = read
    tokens = "vllm:generation_tokens_total"
    return (last[tokens] - first[tokens]) / (later - sooner), last


async def _until_idle(http: aiohttp.ClientSession, url: str) -> None:
    end = time.monotonic() + IDLE_WITHIN_S
    while time.monotonic() < end:
        text = await _text(http, url + "/metrics")
        if not (gauge(text, "vllm:num_requests_running") or gauge(text, "vllm:num_requests_waiting")):
            await asyncio.sleep(1.0)  # the gateway books what has ended
            return
        await asyncio.sleep(0.2)
    raise Failed("vLLM still runs requests whose clients have gone")


async def _text(http: aiohttp.ClientSession, url: str, key: str = "") -> str:
    async with http.get(url, headers={"authorization": f"Bearer {key}"} if key else {}) as answer:
        if answer.status != 200:
            raise Failed(f"{url}: {answer.status}")
        return await answer.text()


def launch_of(chosen: argparse.Namespace, plan: Plan) -> dict[str, Any]:
    """Return the `launch` section that the flags mean, for the server without offload."""
    env = {"HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1", **json.loads(chosen.env)}
    command, source = json.loads(chosen.command or "[]"), chosen.source
    args = json.loads(chosen.args)
    if chosen.cpu:
        program, source = cpu_build()
        env |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
        command = [program, "serve", "{source}", "--served-model-name", "{name}", "--host", "127.0.0.1"]
        command += ["--port", "{port}"]
        args = ["--enforce-eager", "--block-size", "32", "--dtype", "bfloat16", *args]
    if chosen.python_path:
        env["PYTHONPATH"] = chosen.python_path
    args += ["--max-model-len", str(plan.context), "--max-num-seqs", str(plan.slots)]
    args += ["--scheduling-policy", "priority", "--enable-prompt-tokens-details"]
    launch: dict[str, Any] = {"source": source, "context": plan.context, "slots": plan.slots, "env": env}
    return launch | {"command": command, "args": args} | ({} if chosen.cpu else {"gpus": [chosen.gpu]})


async def run(chosen: argparse.Namespace, plan: Plan, seen: list[Seen], problems: list[str]) -> None:
    """Start one server after the other and measure its arms, as long as there is time; fills the lists."""
    end = time.monotonic() + chosen.limit if chosen.limit else float("inf")
    started_s = 0.0
    for name in ("plain",) if chosen.cpu else chosen.servers.split(","):  # vLLM offloads from GPUs alone
        suffix = SUFFIXES[name]
        if time.monotonic() + started_s + plan.seconds + SPARE_S > end:
            problems.append(f"no time for the server {name!r}")
            return
        launch = launch_of(chosen, plan)
        launch["args"] += ["--kv-offloading-size", str(chosen.offload_gib)] if name == "offload" else []
        with tempfile.TemporaryDirectory(prefix="forebay-fairness-") as scratch:
            server, began = Server(plan, launch, Path(scratch)), time.monotonic()
            try:
                async with server.gateway:
                    started_s = time.monotonic() - began
                    say(f"server{suffix} ready after {started_s:.0f} s")
                    await _arms(server, name, chosen.arms, end, seen)
            except Exception as error:  # noqa: BLE001 - what was seen until then is worth keeping
                problems.append(f"server{suffix}: {type(error).__name__} {error}")
                say("\n".join([problems[-1], *getattr(error, "__notes__", [])]))


async def _arms(server: Server, which: str, names: str | None, end: float, seen: list[Seen]) -> None:
    await play([Ask(0.0, HOG, "Warm up.", 64)] * 8, await server.target(ALONE))
    for number, arm in enumerate(SERVERS[which]):
        if names and arm.name not in names.split(","):
            continue
        if time.monotonic() + server.seconds > end:
            raise Failed(f"no time for {arm.name}")
        one = await server.measure(arm, SUFFIXES[which], number)
        seen.append(one)
        samples = one.samples
        say(
            f"{one.arm}: urgent p50 {P50(samples):.3f} s, p99 {P99(samples):.3f} s ({len(samples)}), "
            f"{one.tokens_per_s[0]:,.0f} + {one.prompts_per_s[0]:,.0f} tokens/s, {one.cuts} cuts"
            + (f", TORN {one.torn}" if one.torn else "")
        )


def _by_arm(seen: Sequence[Seen]) -> dict[str, Seen]:
    """Return all rounds of each arm together."""
    arms: dict[str, Seen] = {}
    for one in seen:
        arms[one.arm] = arms[one.arm].and_then(one) if one.arm in arms else one
    return arms


def _share(ours: Seen, theirs: Seen, *, prompts: bool) -> Interval:
    """Return tokens a second of one arm over another's, round by round; of answers alone, or of prompts as well."""
    rates = [
        [rate + more if prompts else rate for rate, more in zip(one.tokens_per_s, one.prompts_per_s, strict=True)]
        for one in (ours, theirs)
    ]
    return interval([one / other for one, other in zip(*rates, strict=False)])


def verdicts(seen: Sequence[Seen], problems: Sequence[str]) -> tuple[list[str], bool]:
    """A line for each target, and whether all that could be judged were held."""
    by_name = _by_arm(seen)
    lines, kept = (
        [f"target completed: want every arm, measured {problem}, missed" for problem in problems],
        not problems,
    )

    def judge(name: str, want: str, measured: Interval | str, held: bool) -> None:
        nonlocal kept
        shown = measured if isinstance(measured, str) else measured.show()
        lines.append(f"target {name}: want {want}, measured {shown}, {'held' if held else 'missed'}")
        kept = kept and held

    for suffix in SUFFIXES.values():
        ours, theirs = by_name.get(f"{VTC_PC.name}{suffix}"), by_name.get(f"{PRIORITY.name}{suffix}")
        if ours is None or theirs is None:
            continue
        samples = min(len(ours.samples), len(theirs.samples))
        if samples < P99_SAMPLES:
            lines.append(f"target urgent_p99{suffix}: not judged: {samples} samples, and a p99 needs {P99_SAMPLES}")
            continue
        measured = figures.ratio(theirs.urgent, ours.urgent, P99)
        judge(f"urgent_p99{suffix}", "≥ 10 × better than vLLM's priorities", measured, measured.low >= 10)
    for name, arm, base, prompts, least in (
        ("tokens_per_s", VTC_PC, PRIORITY, False, 0.97),
        ("with prompts", VTC_PC, PRIORITY, True, None),
        ("", VTC_PC, ALONE, False, None),
        ("gateway_tokens_per_s", FCFS, ALONE, False, 0.98),
    ):
        ours, theirs = by_name.get(arm.name), by_name.get(base.name)
        if ours is None or theirs is None:
            continue
        share = _share(ours, theirs, prompts=prompts)
        if least is not None:
            judge(name, f"≥ {least} × {base.name} ({arm.name})", share.show(3), share.low >= least)
        else:
            lines.append(
                f"{arm.name} makes {share.show(3)} × the tokens a second of {base.name} {name}, nothing promised"
            )
    torn = [f"{one.arm}: {problem}" for one in seen for problem in one.torn]
    judge("whole", "no answer torn, in any arm", "; ".join(torn[:3]) or "none", not torn)
    return lines, kept


def table(seen: Sequence[Seen]) -> list[str]:
    """One line an arm."""
    heads = (
        "arm",
        "urgent TTFT p50, s",
        "p90",
        "p99",
        "samples",
        "answers' tokens/s",
        "prompts' tokens/s",
        "batch's TBT p99, s",
        "p99.9",
        "longest pause, s",
    )
    more = ("cuts", "computed again", "kept by the engine", "vLLM's own preemptions")
    lines = ["| " + " | ".join([*heads, *more]) + " |", "|---" * (len(heads) + len(more)) + "|"]
    for one in _by_arm(seen).values():
        samples = one.samples
        rates = ["/".join(f"{rate:,.0f}" for rate in each) for each in (one.tokens_per_s, one.prompts_per_s)]
        times = [f"{figures.quantile(samples, share):.3f}" if samples else "–" for share in (0.5, 0.9, 0.99)]
        if len(samples) < P99_SAMPLES:
            times[2] = f"({times[2]})"
        pauses = (f"{one.tbt_p99:.3f}", f"{one.tbt_p999:.3f}", f"{one.longest_pause:.2f}")
        kept = f"{100 * one.reused:.1f} %" if one.reused is not None and one.cuts else "–"
        counts = (str(one.cuts), f"{one.recomputed:,}", kept, f"{one.engine['num_preemptions_total']:.0f}")
        row = [one.arm, *times, str(len(samples)), *rates, *pauses, *counts]
        lines.append("| " + " | ".join(row) + " |")
    return lines


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.fairness_gpu", description="An urgent tenant against a full batch."
    )
    parser.add_argument("--cpu", action="store_true", help="vLLM's CPU build with SmolLM2, tiny, without offload")
    parser.add_argument("--quick", action="store_true", help="no effect: one run is as short as it can be")
    parser.add_argument("--source", default="", help="the model: a folder, or a hub id")
    parser.add_argument("--command", help="JSON argv that starts vLLM; {source}, {name} and {port} are filled in")
    parser.add_argument("--args", default="[]", help="JSON list of further arguments of vLLM")
    parser.add_argument("--env", default="{}", help="JSON object, into the environment of vLLM")
    parser.add_argument("--python-path", help="PYTHONPATH of vLLM alone")
    parser.add_argument("--gpu", type=int, default=0, help="index of the GPU (0)")
    parser.add_argument("--offload-gib", type=int, default=16, help="CPU memory of the server with offload (16)")
    parser.add_argument("--arms", help="comma-separated, of vllm, vllm-priority, fcfs, vtc, vtc-pc")
    parser.add_argument("--servers", default="plain,offload", help="comma-separated (plain,offload)")
    parser.add_argument("--limit", type=float, help="seconds after which no further server or arm is begun (none)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the results go (benchmarks/results)")
    chosen = parser.parse_args()
    if not chosen.cpu and not (chosen.source and chosen.command):
        parser.error("--source and --command are needed, or --cpu")
    if unknown := set(chosen.servers.split(",")) - set(SERVERS):
        parser.error(f"--servers knows plain and offload, not {min(unknown)!r}")
    return chosen


async def bench(chosen: argparse.Namespace) -> bool:
    """Run, print and write; whether every target was held."""
    started = now()
    plan = CPU if chosen.cpu else GPU
    about = machine(None if chosen.cpu else chosen.gpu)
    seen: list[Seen] = []
    problems: list[str] = []
    await run(chosen, plan, seen, problems)
    lines, kept = verdicts(seen, problems)
    command = command_of("fairness_gpu")
    weights = "Random weights: speed only." if "dummy" in chosen.args else "Real weights."
    low, high = plan.hog_tokens
    notes = [
        f"- {started}, {about}. Commit: {commit()}. {weights}",
        f"- {plan.slots} slots; at 0 s {plan.hogs} requests for {low:,} to {high:,} tokens; {plan.rate:g} urgent "
        f"requests a second, Poisson, for {plan.urgent_tokens} tokens; window {plan.seconds:g} s.",
        "- `kept by the engine`: of the tokens that resumed requests brought along, those that its prefix cache (or "
        "its offload) still had. A p99 in brackets is of fewer than 300 samples.",
    ]
    body = [*table(seen), "", *notes, "", "```", *lines, "```", ""]
    text = "\n".join(["# An urgent tenant against a full batch", "", f"`{command}`", "", *body])
    print(text)
    chosen.out.mkdir(parents=True, exist_ok=True)
    stem = chosen.out / f"fairness_gpu-{started[:10]}{'-cpu' if chosen.cpu else ''}"
    raw = {"command": command, "started": started, "machine": about, "plan": asdict(plan), "targets": lines}
    stem.with_suffix(".md").write_text(text)
    stem.with_suffix(".json").write_text(
        json.dumps({**raw, "problems": problems, "arms": [asdict(one) for one in seen]}, indent=1) + "\n"
    )
    say(f"written: {stem}.md and .json")
    return kept


def main() -> int:
    """Run; 1 if a target is missed."""
    chosen = arguments()
    return exit_status("fairness_gpu", lambda: asyncio.run(bench(chosen)))


if __name__ == "__main__":
    sys.exit(main())
