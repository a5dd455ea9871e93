"""Forebay as the owner of a real vLLM: start, work, drain, restart, kill and stop it, and look for what is left over.

Claim: no stream is cut by a drain; a request that has no byte yet survives the death of the engine under it; and after
every end of vLLM, however violent, no process of it is left and its GPU memory is free again.

Method: a gateway (`python -m gateway serve`) launches vLLM from a settings file, as an operator would. A process is
vLLM's if it is in the session that the worker leads, or has a token of this run in its environment. Memory is
nvidia-smi's figure for the GPU, against the figure before the first start; nothing else may use the GPU meanwhile. With
random weights (`--load-format dummy`) nothing is said of answers but their number of tokens. One run is one history of
five starts: what is shown is that it holds, and how long things took once.

    python -m benchmarks.gpu_lifecycle --source MODEL                         `vllm serve` of this Python or of PATH
    python -m benchmarks.gpu_lifecycle --source MODEL --command '["python3", "-m",
        "vllm.entrypoints.openai.api_server", "--model", "{source}", "--served-model-name", "{name}",
        "--host", "127.0.0.1", "--port", "{port}"]' --python-path DIR         a vLLM of another environment
    python -m benchmarks.gpu_lifecycle --cpu                                  vLLM's CPU build, without memory

Ends with 1 if a target is missed.
"""

import argparse
import asyncio
import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp
import psutil
import yaml

from benchmarks.loopback.cache import ROOT
from benchmarks.loopback.processes import Failed
from benchmarks.reporting import RESULTS, command_of, exit_status, now, say

TOKEN = "FOREBAY_LIFECYCLE_RUN"  # in the environment of every process of vLLM
MODEL = "m"
WORKER = f"{MODEL}-0"
CONCURRENT = 64
QUEUED = 16
SLACK_MIB = 64  # a driver's own books move by some MiB
GONE_WITHIN_S = 15.0  # after a SIGKILL of the gateway; a CUDA context takes seconds to be torn down
FREED_WITHIN_S = 30.0


@dataclass(frozen=True)
class Scale:
    """How much a kind of machine can do: slots of vLLM, tokens of one answer in each step."""

    context: int
    slots: int
    short: int
    drained: int
    long: int
    start_timeout_s: float


GPU = Scale(context=8192, slots=64, short=128, drained=600, long=7000, start_timeout_s=300)
CPU = Scale(context=2048, slots=8, short=16, drained=150, long=1800, start_timeout_s=600)


@dataclass
class End:
    """What was left after one end of vLLM: processes and MiB on the GPU above the baseline, and after how long."""

    name: str
    num_processes: int
    gone_s: float
    port_is_free: bool
    memory_mib: int | None = None
    freed_s: float | None = None


@dataclass
class Verdict:
    """A target, and what came of it."""

    name: str
    want: str
    measured: str
    held: bool

    def line(self) -> str:
        """As it is printed."""
        return f"target {self.name}: want {self.want}, measured {self.measured}, {'held' if self.held else 'missed'}"


@dataclass
class Report:
    """All that was seen, in the order in which it happened."""

    steps: list[tuple[str, str]] = field(default_factory=list)
    starts_s: list[float] = field(default_factory=list)
    ends: list[End] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)

    def step(self, name: str, what: str) -> None:
        """Note and say what a step has shown."""
        self.steps.append((name, what))
        say(f"{name}: {what}")

    def judge(self, name: str, want: str, measured: str, held: bool) -> None:
        """Note a target."""
        self.verdicts.append(Verdict(name, want, measured, held))


class Gateway:
    """The gateway's process, and the admin and data ports of it."""

    def __init__(self, launch: dict[str, Any], scale: Scale, directory: Path) -> None:
        self._directory = directory
        self._scale = scale
        self._token = str(launch["env"][TOKEN])
        self._sessions: set[int] = set()
        self._key, self._admin_key = f"fbk_{secrets.token_hex(16)}", f"fba_{secrets.token_hex(16)}"
        self._port, self._admin_port = free_ports(2)
        lifecycle = {"start_timeout": scale.start_timeout_s, "drain_timeout": 300, "probe_interval": 0.5}
        worker = {"engine": "vllm", "launch": launch, "lifecycle": lifecycle}
        wait_s = 2 * scale.start_timeout_s
        self._settings = {
            "version": 1,
            "state_dir": str(directory / "state"),
            "keys": [{"name": "bench", "tenant": "bench", "key": self._key}],
            "admin_key": self._admin_key,
            "server": {"port": self._port},
            "admin": {"port": self._admin_port},
            "timeouts": {"queue": wait_s, "first_token": wait_s, "idle": wait_s, "total": 2 * wait_s},
            "models": {MODEL: {"workers": [worker]}},
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None, sock_connect=10)
        )
        self.launch()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                await asyncio.to_thread(self._process.wait, 60)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        for left in self.owned():  # found missing by a target, if it comes to that
            with contextlib.suppress(psutil.Error):
                left.kill()
        if self._session is not None:
            await self._session.close()

    def launch(self) -> None:
        """Start the gateway's process."""
        path = self._directory / "forebay.yaml"
        path.write_text(yaml.safe_dump(self._settings, sort_keys=False))
        with (self._directory / "gateway.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "gateway", "serve", "-c", str(path)],
                cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def kill(self) -> None:
        """SIGKILL the gateway alone."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    @property
    def session(self) -> aiohttp.ClientSession:
        """The HTTP client."""
        assert self._session is not None
        return self._session

    async def worker(self) -> dict[str, Any]:
        """What the admin API says of the worker."""
        url = f"http://127.0.0.1:{self._admin_port}/admin/v1/workers/{WORKER}"
        async with self.session.get(url, headers={"authorization": f"Bearer {self._admin_key}"}) as answer:
            known: dict[str, Any] = await answer.json()
            return known

    async def tell(self, verb: str) -> None:
        """Start, stop, drain or restart the worker, and wait until it is so."""
        url = f"http://127.0.0.1:{self._admin_port}/admin/v1/workers/{WORKER}/{verb}"
        async with self.session.post(url, headers={"authorization": f"Bearer {self._admin_key}"}) as answer:
            if answer.status != 200:
                raise Failed(f"{verb}: {answer.status} {await answer.text()}")

    async def until_ready(self) -> float:
        """Wait until vLLM serves; return the seconds that took."""
        began = time.monotonic()
        worker: dict[str, Any] = {}
        while time.monotonic() - began < self._scale.start_timeout_s + 60:
            assert self._process is not None
            if self._process.poll() is not None:
                raise Failed(f"the gateway has exited with {self._process.returncode}\n{self.logs()}")
            with contextlib.suppress(aiohttp.ClientError):
                worker = await self.worker()
                if worker["state"] == "ready":
                    self._sessions.add(worker["pid"])
                    return time.monotonic() - began
                if worker["state"] == "failed" and worker["restarts"] == 0:
                    break
            await asyncio.sleep(0.1)
        raise Failed(f"vLLM is not ready: {worker}\n{self.logs()}")

    async def until_started_again(self, restarts: int) -> None:
        """Wait until vLLM has been started more often than that."""
        for _ in range(int(self._scale.start_timeout_s / 0.05)):
            if (await self.worker())["restarts"] > restarts:
                return
            await asyncio.sleep(0.05)
        raise Failed(f"vLLM is not started again\n{self.logs()}")

    def ask(self, body: dict[str, Any]) -> Any:
        """Send a chat request."""
        url = f"http://127.0.0.1:{self._port}/v1/chat/completions"
        return self.session.post(url, json={"model": MODEL, **body}, headers={"authorization": f"Bearer {self._key}"})

    def owned(self) -> list[psutil.Process]:
        """Every process of this run's vLLM, over all its starts."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                is_ours = os.getsid(process.pid) in self._sessions or process.environ().get(TOKEN) == self._token
                if is_ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def logs(self) -> str:
        """The ends of both logs."""
        paths = (self._directory / "gateway.log", self._directory / "state" / "logs" / f"{WORKER}.log")
        return "\n".join(
            f"--- {path.name}\n{path.read_text('utf-8', 'replace')[-6000:]}" for path in paths if path.exists()
        )


class Stream:
    """One streamed answer, read in a task."""

    def __init__(self, gateway: Gateway, number: int, num_tokens: int) -> None:
        self._wanted = num_tokens
        self._asked_at = time.monotonic()
        self.first_s: float | None = None
        self.status = 0
        self.tokens = 0
        self.errors: list[str] = []
        self.has_done = False
        self.is_broken = False
        self.has_begun = asyncio.Event()
        self.task = asyncio.create_task(self._read(gateway, number))

    async def _read(self, gateway: Gateway, number: int) -> None:
        body = {
            "messages": [{"role": "user", "content": f"{number}: tell me a story."}],
            "max_tokens": self._wanted,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        try:
            async with gateway.ask(body) as answer:
                self.status = answer.status
                async for line in answer.content:
                    if line.startswith(b"data: "):
                        self._take(line[6:].strip())
        except aiohttp.ClientError:
            self.is_broken = True
        finally:
            self.has_begun.set()

    def _take(self, data: bytes) -> None:
        if self.first_s is None:
            self.first_s = time.monotonic() - self._asked_at
            self.has_begun.set()
        if data == b"[DONE]":
            self.has_done = True
            return
        event = json.loads(data)
        if "error" in event:
            self.errors.append(str(event["error"].get("code")))
        if event.get("usage"):
            self.tokens = int(event["usage"]["completion_tokens"])

    @property
    def is_whole(self) -> bool:
        """Whether all of it came, without an error."""
        return self.status == 200 and self.has_done and not self.errors and self.tokens == self._wanted

    @property
    def is_cut_cleanly(self) -> bool:
        """Whether it ended with exactly one error event, which says that the worker was lost."""
        return self.errors == ["worker_lost"] and not self.has_done and not self.is_broken


async def begun(gateway: Gateway, numbers: Sequence[int], num_tokens: int) -> list[Stream]:
    """Streams that have each got their first event."""
    streams = [Stream(gateway, number, num_tokens) for number in numbers]
    await asyncio.gather(*(stream.has_begun.wait() for stream in streams))
    return streams


async def ended(streams: Sequence[Stream]) -> None:
    """Wait for the end of all."""
    await asyncio.gather(*(stream.task for stream in streams))


def used_mib(gpu: int | None) -> int | None:
    """MiB in use on the GPU; None without one."""
    if gpu is None:
        return None
    query = ["nvidia-smi", f"--id={gpu}", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip())


def port_of(url: str) -> int:
    """The port of a URL."""
    return int(url.rsplit(":", 1)[1])


def is_free(port: int) -> bool:
    """Whether nobody listens there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return probe.connect_ex(("127.0.0.1", port)) != 0


def free_ports(count: int) -> list[int]:
    """Loopback ports that nobody listens on."""
    with contextlib.ExitStack() as sockets:
        bound = [sockets.enter_context(socket.socket()) for _ in range(count)]
        for one in bound:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in bound]


class Lifecycle:
    """The history, step by step."""

    def __init__(self, gateway: Gateway, scale: Scale, gpu: int | None) -> None:
        self._gateway = gateway
        self._scale = scale
        self._gpu = gpu
        self._baseline = used_mib(gpu)
        self.report = Report()

    def logs(self) -> str:
        """What the gateway and vLLM printed last."""
        return self._gateway.logs()

    async def run(self) -> None:
        """Go through all steps and judge them."""
        report, gateway = self.report, self._gateway
        if self._baseline is None:
            report.step("memory", "no GPU: memory is not looked at")
        else:
            report.step("memory", f"{self._baseline} MiB in use before the first start")
        await self._ready("first start")
        await self._chat()
        await self._concurrent()
        await self._drain()
        await self._ready("restart after the drain", gateway.tell("restart"))
        await self._kill_engine()
        await self._stop()
        await self._ready("start after the stop", gateway.tell("start"))
        await self._kill_server()
        await self._kill_gateway()
        self._judge_ends()

    async def _ready(self, name: str, before: Awaitable[None] | None = None) -> None:
        if before is not None:
            await before
        took = await self._gateway.until_ready()
        self.report.starts_s.append(took)
        memory = f", {used_mib(self._gpu)} MiB in use" if self._gpu is not None else ""
        self.report.step(name, f"ready after {took:.1f} s, {len(self._gateway.owned())} processes{memory}")

    async def _chat(self) -> None:
        body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 16, "ignore_eos": True}
        async with self._gateway.ask(body) as answer:
            told = await answer.json()
            tokens = told.get("usage", {}).get("completion_tokens")
        stream = Stream(self._gateway, 0, self._scale.short)
        await stream.task
        held = answer.status == 200 and tokens == 16 and stream.is_whole
        first_ms = 1000 * (stream.first_s or 0)
        whole = f"chat {answer.status}, {tokens} tokens"
        what = f"{whole}; stream {stream.status}, {stream.tokens} tokens, first after {first_ms:.0f} ms"
        self.report.step("chat and stream", what)
        self.report.judge("answers", "chat and stream whole", what, held)

    async def _concurrent(self) -> None:
        began = time.monotonic()
        streams = [Stream(self._gateway, number, self._scale.short) for number in range(CONCURRENT)]
        await ended(streams)
        took = time.monotonic() - began
        whole = sum(stream.is_whole for stream in streams)
        rate = sum(stream.tokens for stream in streams) / took
        firsts = sorted(stream.first_s or took for stream in streams)
        what = f"{whole} of {CONCURRENT} whole"
        figures = f"{took:.1f} s, {rate:.0f} tokens/s, first event p50 {1000 * firsts[CONCURRENT // 2]:.0f} ms"
        self.report.step(f"{CONCURRENT} streams at once, {self._scale.slots} slots", f"{what}, {figures}")
        self.report.judge("concurrent", f"{CONCURRENT} whole streams", what, whole == CONCURRENT)

    async def _drain(self) -> None:
        port = port_of((await self._gateway.worker())["url"])
        streams = await begun(self._gateway, range(self._scale.slots), self._scale.drained)
        began = time.monotonic()
        await self._gateway.tell("drain")
        took = time.monotonic() - began
        end = await self._end("drain", port)
        await ended(streams)
        cut = sum(not stream.is_whole for stream in streams)
        self.report.step("drain under load", f"{took:.1f} s, {cut} of {len(streams)} streams cut; {shown(end)}")
        self.report.judge("drain", "0 streams cut", f"{cut} of {len(streams)}", cut == 0)

    async def _kill_engine(self) -> None:
        await self._kill("engine process", lambda process: "EngineCore" in process.name())

    async def _kill_server(self) -> None:
        pid = (await self._gateway.worker())["pid"]
        await self._kill("server process", lambda process: process.pid == pid)

    async def _kill(self, victim: str, is_victim: Callable[[psutil.Process], bool]) -> None:
        """SIGKILL one process of vLLM while all slots stream and more requests wait; follow it to the next start."""
        worker = await self._gateway.worker()
        doomed = self._gateway.owned()
        running = await begun(self._gateway, range(self._scale.slots), self._scale.long)
        queued = [Stream(self._gateway, number, self._scale.short) for number in range(QUEUED)]
        await asyncio.sleep(0.5)
        early = sum(stream.has_begun.is_set() for stream in queued)
        target = next(process for process in doomed if is_victim(process))
        began = time.monotonic()
        target.kill()
        end = await self._end(f"SIGKILL of the {victim}", port_of(worker["url"]), doomed)
        await self._gateway.until_started_again(worker["restarts"])
        await self._ready(f"start after the SIGKILL of the {victim}")
        back = time.monotonic() - began
        await ended([*running, *queued])
        clean = sum(stream.is_cut_cleanly for stream in running)
        whole = sum(stream.is_whole for stream in queued)
        name = victim.partition(" ")[0]
        self.report.step(
            f"SIGKILL of the {victim}",
            f"{clean} of {len(running)} running streams ended with one worker_lost; {whole} of {QUEUED} waiting ones "
            f"answered; serving again after {back:.1f} s; {shown(end)}",
        )
        self.report.judge(
            f"{name}_kill_waiting",
            f"{QUEUED} waiting requests answered",
            f"{whole}" + (f" ({early} had begun before)" if early else ""),
            whole == QUEUED and not early,
        )
        want = f"{len(running)} running streams end with one error"
        self.report.judge(f"{name}_kill_running", want, str(clean), clean == len(running))

    async def _stop(self) -> None:
        port = port_of((await self._gateway.worker())["url"])
        streams = await begun(self._gateway, range(4), self._scale.long)
        began = time.monotonic()
        await self._gateway.tell("stop")
        took = time.monotonic() - began
        end = await self._end("stop", port)
        await ended(streams)
        self.report.step("stop under load", f"{took:.1f} s; {shown(end)}")

    async def _kill_gateway(self) -> None:
        port = port_of((await self._gateway.worker())["url"])
        streams = await begun(self._gateway, range(min(QUEUED, self._scale.slots)), self._scale.long)
        self._gateway.kill()
        end = await self._end("SIGKILL of the gateway", port)
        await ended(streams)
        self.report.step("SIGKILL of the gateway", shown(end))
        self.report.judge(
            "orphans", f"no process {GONE_WITHIN_S:g} s after the gateway's SIGKILL",
            f"none after {end.gone_s:.1f} s" if not end.num_processes else f"{end.num_processes} left",
            not end.num_processes and end.gone_s <= GONE_WITHIN_S,
        )  # fmt: skip

    async def _end(self, name: str, port: int, of: list[psutil.Process] | None = None) -> End:
        """See what is left of vLLM: of all of it, or of these processes where another start follows by itself."""
        began = time.monotonic()
        left = 1
        while time.monotonic() - began < FREED_WITHIN_S:
            found = await asyncio.to_thread(self._gateway.owned)
            left = len(found if of is None else [process for process in found if process in of])
            if not left:
                break
            await asyncio.sleep(0.05)
        end = End(name, left, time.monotonic() - began, is_free(port))
        while self._baseline is not None:
            used = await asyncio.to_thread(used_mib, self._gpu)
            above = (used or 0) - self._baseline
            end.memory_mib = above if end.memory_mib is None else min(above, end.memory_mib)
            end.freed_s = time.monotonic() - began
            if above <= SLACK_MIB or end.freed_s > FREED_WITHIN_S:
                break
            await asyncio.sleep(0.1)
        self.report.ends.append(end)
        return end

    def _judge_ends(self) -> None:
        report = self.report
        ends = report.ends
        left = sum(end.num_processes for end in ends)
        report.judge("processes", f"0 left after {len(ends)} ends of vLLM", str(left), left == 0)
        taken = sum(not end.port_is_free for end in ends)
        report.judge("ports", f"free after {len(ends)} ends", f"{len(ends) - taken} free", taken == 0)
        if self._baseline is None:
            report.step("target memory", "skipped: no GPU")
        else:
            worst = max((end.memory_mib or 0 for end in ends), default=0)
            slowest = max((end.freed_s or 0 for end in ends), default=0)
            want = f"≤ {SLACK_MIB} MiB above the baseline after each of {len(ends)} ends"
            report.judge("memory", want, f"{worst} MiB at most, after {slowest:.1f} s at most", worst <= SLACK_MIB)


def shown(end: End) -> str:
    """An end in words."""
    memory = (
        f", {end.memory_mib} MiB above the baseline after {end.freed_s:.1f} s" if end.memory_mib is not None else ""
    )
    gone = f"no process after {end.gone_s:.1f} s" if not end.num_processes else f"{end.num_processes} PROCESSES LEFT"
    return f"{gone}{memory}{'' if end.port_is_free else ', PORT TAKEN'}"


def launch_of(chosen: argparse.Namespace, scale: Scale) -> dict[str, Any]:
    """The `launch` section that the flags mean."""
    env = {TOKEN: secrets.token_hex(8), "HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1", **json.loads(chosen.env)}
    launch: dict[str, Any] = {"context": scale.context, "slots": scale.slots, "env": env}
    if chosen.python_path:
        env["PYTHONPATH"] = chosen.python_path
    args = json.loads(chosen.args)
    if chosen.cpu:
        program, source = (chosen.program, chosen.source) if chosen.program and chosen.source else cpu_build()
        env |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
        args = ["--enforce-eager", "--block-size", "32", "--dtype", "bfloat16", *args]
        return {**launch, "program": program, "source": source, "args": args}
    launch |= {"source": chosen.source, "gpus": [chosen.gpu], "args": args}
    if chosen.program:
        launch["program"] = chosen.program
    if chosen.command:
        launch["command"] = json.loads(chosen.command)
        env["VLLM_API_KEY"] = "{key}"
        launch["args"] = [*args, "--max-model-len", str(scale.context), "--max-num-seqs", str(scale.slots)]
    return launch


def cpu_build() -> tuple[str, str]:
    """Program and model of the tests' CPU build, made ready if they are not."""
    prepare = [sys.executable, str(ROOT / "tests" / "vllm" / "prepare.py")]
    lines = subprocess.run(prepare, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    paths = dict(line.split("=", 1) for line in lines)
    return paths["vllm"], paths["model"]


def machine(gpu: int | None) -> str:
    """What this was measured on."""
    cores = f"{os.cpu_count()} CPU cores, load {os.getloadavg()[0]:.1f}"
    if gpu is None:
        return f"no GPU, {cores}"
    query = ["nvidia-smi", f"--id={gpu}", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    return f"{subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()}, {cores}"


def text_of(report: Report, command: str, about: str) -> str:
    """The table and the targets."""
    rows = [f"| {name} | {what} |" for name, what in report.steps]
    lines = [verdict.line() for verdict in report.verdicts]
    return "\n".join(
        ["# vLLM's life under Forebay", "", f"`{command}`", "", about, "", "| step | seen |", "| --- | --- |", *rows,
         "", "```", *lines, "```", ""]
    )  # fmt: skip


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_lifecycle", description="A real vLLM's life under Forebay.")
    parser.add_argument("--cpu", action="store_true", help="vLLM's CPU build with SmolLM2; no memory is looked at")
    parser.add_argument("--quick", action="store_true", help="no effect: one run is one history")
    parser.add_argument("--source", default="", help="the model: a folder, or a hub id")
    parser.add_argument("--gpu", type=int, default=0, help="index of the GPU (0)")
    parser.add_argument("--program", help="the `vllm` to run, in place of the one beside this Python or on PATH")
    parser.add_argument(
        "--command", help="JSON argv that starts vLLM; {source}, {name}, {port} and {key} are filled in"
    )
    parser.add_argument("--args", default="[]", help="JSON list of further arguments of vLLM")
    parser.add_argument("--env", default="{}", help="JSON object, into the environment of vLLM")
    parser.add_argument("--python-path", help="PYTHONPATH of vLLM alone")
    parser.add_argument("--limit", type=float, help="seconds after which to stop and tell what was seen (none)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the results go (benchmarks/results)")
    chosen = parser.parse_args()
    if not chosen.cpu and not chosen.source:
        parser.error("--source is needed, or --cpu")
    return chosen


@contextlib.asynccontextmanager
async def opened(chosen: argparse.Namespace, scale: Scale, directory: Path) -> AsyncIterator[Lifecycle]:
    """A gateway that has just been started."""
    gpu = None if chosen.cpu else chosen.gpu
    gateway = Gateway(launch_of(chosen, scale), scale, directory)
    lifecycle = Lifecycle(gateway, scale, gpu)
    async with gateway:
        yield lifecycle


async def bench(chosen: argparse.Namespace) -> bool:
    """Run, print and write; whether every target was held."""
    started = now()
    scale = CPU if chosen.cpu else GPU
    about = machine(None if chosen.cpu else chosen.gpu)
    failure = ""
    with tempfile.TemporaryDirectory(prefix="forebay-lifecycle-") as scratch:
        async with opened(chosen, scale, Path(scratch)) as lifecycle:
            report = lifecycle.report
            try:
                async with asyncio.timeout(chosen.limit):
                    await lifecycle.run()
            except Exception as error:  # noqa: BLE001 - what was seen until then is worth keeping
                failure = f"{type(error).__name__}: {error}"
                say(failure)
                say(lifecycle.logs())
                report.judge("completed", "all steps", failure.splitlines()[0], held=False)
    command = command_of("gpu_lifecycle")
    text = text_of(report, command, f"{started}, {about}")
    print(text)
    chosen.out.mkdir(parents=True, exist_ok=True)
    stem = chosen.out / f"gpu_lifecycle-{started[:10]}{'-cpu' if chosen.cpu else ''}"
    raw = {"command": command, "started": started, "machine": about, "scale": asdict(scale), **asdict(report)}
    stem.with_suffix(".md").write_text(text)
    stem.with_suffix(".json").write_text(json.dumps(raw, indent=1) + "\n")
    say(f"written: {stem}.md and .json")
    return all(verdict.held for verdict in report.verdicts)


def main() -> int:
    """Run; 1 if a target is missed."""
    chosen = arguments()
    return exit_status("gpu_lifecycle", lambda: asyncio.run(bench(chosen)))


if __name__ == "__main__":
    sys.exit(main())
