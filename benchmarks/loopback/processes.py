"""Processes under measurement: started on a core of their own, read from /proc, and taken down whole."""

import http.client
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.loopback.arms import Arm
from benchmarks.loopback.cache import ROOT, Missing, folder
from benchmarks.loopback.tools import tool

READY_S = 120
STOP_S = 10
KEPT_ENV = ("PATH", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "SSL_CERT_FILE")
TICKS = os.sysconf("SC_CLK_TCK")


class Failed(RuntimeError):
    """An arm did not start, did not answer rightly, or answered from elsewhere than the upstream."""


@dataclass(frozen=True)
class Cores:
    """Where things run: the gateway alone on one core, upstream and load generator on another."""

    gateway: int
    load: int

    @classmethod
    def of_machine(cls) -> "Cores":
        """The first two cores that this process may use."""
        usable = sorted(os.sched_getaffinity(0))
        if len(usable) < 2:
            raise Missing("two CPU cores are needed: one for the gateway, one for its load")
        return cls(usable[0], usable[1])


@dataclass(frozen=True)
class Target:
    """Something that answers completions: a gateway with its process, or the upstream itself."""

    port: int
    tmp: Path
    headers: Mapping[str, str]
    pid: int | None = None
    start_s: float = 0.0
    afterwork_s: float = 0.0

    def tree(self) -> list[psutil.Process]:
        """The gateway's process and all that descend from it."""
        if self.pid is None:
            return []
        with suppress(psutil.Error):
            top = psutil.Process(self.pid)
            return [top, *top.children(recursive=True)]
        raise Failed("the gateway died")

    def cpu_s(self) -> float:
        """User and system time of the tree so far, with that of children it has reaped."""
        return sum(_cpu_s(process.pid) for process in self.tree())

    def rss_mb(self) -> float:
        """Resident memory of the tree."""
        total = 0
        for process in self.tree():
            with suppress(psutil.Error):
                total += process.memory_info().rss
        return total / 1e6


def _cpu_s(pid: int) -> float:
    """utime + stime of a process: from its CPU clock, which counts nanoseconds where /proc counts 10 ms ticks."""
    try:
        own = time.clock_gettime((~pid << 3) | 2)  # what clock_getcpuclockid(3) makes of a pid on Linux
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return own + (int(fields[13]) + int(fields[14])) / TICKS


def get(port: int, path: str, timeout: float = 2) -> tuple[int, bytes]:
    """Status and body of a GET on the loopback interface."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on now, all different."""
    holders = [socket.socket() for _ in range(count)]
    try:
        for holder in holders:
            holder.bind(("127.0.0.1", 0))
        return [holder.getsockname()[1] for holder in holders]
    finally:
        for holder in holders:
            holder.close()


@dataclass(frozen=True)
class Upstream:
    """The running pretend engine."""

    port: int

    def pace(self, *, first_ms: float, gap_ms: float, events: int) -> None:
        """Sets the pace of the streams that begin from now on."""
        get(self.port, f"/_pace?first={first_ms * 1000:.0f}&gap={gap_ms * 1000:.0f}&events={events}")

    def counts(self) -> dict[str, int]:
        """What it has answered so far, by kind."""
        counts: dict[str, int] = json.loads(get(self.port, "/_counts")[1])
        return counts


@contextmanager
def upstream(cores: Cores) -> Iterator[Upstream]:
    """A pretend engine on the load's core, gone when the block ends."""
    port = free_ports(1)[0]
    with _running([str(tool("upstream")), str(port)], cores.load) as process:
        _await(process, port, "/health")
        yield Upstream(port)


@contextmanager
def gateway(arm: Arm, engine: Upstream, cores: Cores, *, profile: Path | None = None) -> Iterator[Target]:
    """`arm` in front of `engine`, ready, gone with all its children when the block ends.

    With `profile`, a gateway in Python runs under cProfile, which writes there as the gateway ends.
    """
    tmp = folder("scratch", arm.name)
    shutil.rmtree(tmp)
    tmp.mkdir()
    if not arm.command:
        yield Target(engine.port, tmp, {})
        return
    port, port2 = free_ports(2)
    key = arm.key_prefix + secrets.token_urlsafe(32)
    words = {"bin": arm.programs(), "port": port, "port2": port2, "mock": engine.port, "tmp": tmp, "root": ROOT}
    words["key"] = key
    for name, text in arm.files.items():
        (tmp / name).write_text(_filled(text, words))
    command = [_filled(word, words) for word in arm.command]
    if profile:
        command[1:1] = ["-m", "cProfile", "-o", str(profile)]
    env = {name: os.environ[name] for name in KEPT_ENV if name in os.environ} | {"HOME": str(tmp)}
    env |= {name: _filled(text, words) for name, text in arm.env.items()}
    began = time.monotonic()
    with _running(command, cores.gateway, env, tmp / "log", signal.SIGINT if profile else signal.SIGTERM) as process:
        try:
            _await(process, port, arm.ready)
        except Failed as error:
            raise Failed(f"{error}; end of {tmp / 'log'}: {(tmp / 'log').read_text()[-400:]!r}") from error
        headers = {"Authorization": f"Bearer {key}"} if arm.key_prefix else {}
        yield Target(port, tmp, headers, process.pid, time.monotonic() - began, arm.afterwork_s)


def _filled(text: str, words: Mapping[str, object]) -> str:
    for name, value in words.items():
        text = text.replace("{" + name + "}", str(value))
    return text


@contextmanager
def _running(
    command: list[str],
    core: int,
    env: Mapping[str, str] | None = None,
    log: Path | None = None,
    goodbye: signal.Signals = signal.SIGTERM,
) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a session of its own, pinned before it runs its first instruction."""
    with open(log or os.devnull, "ab") as out:
        try:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=env,
                stdout=out,
                stderr=out,
                start_new_session=True,
                # Safe here: this program has one thread.
                preexec_fn=lambda: os.sched_setaffinity(0, {core}),  # noqa: PLW1509
            )
        except OSError as error:
            raise Failed(str(error)) from error
    try:
        yield process
    finally:
        _end(process, goodbye)


def _end(process: subprocess.Popen[bytes], goodbye: signal.Signals) -> None:
    """Asks the process to go, then kills what is left of its session."""
    left: list[psutil.Process] = []
    with suppress(psutil.Error):
        left = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(goodbye)
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for child in left:
        with suppress(psutil.Error):
            child.kill()
    process.wait()


def _await(process: subprocess.Popen[bytes], port: int, path: str) -> None:
    """Returns once `path` answers 200."""
    end = time.monotonic() + READY_S
    while time.monotonic() < end:
        if process.poll() is not None:
            raise Failed(f"ended {process.returncode} before it was ready")
        with suppress(OSError, http.client.HTTPException):
            if get(port, path)[0] == 200:
                return
        time.sleep(0.05)
    raise Failed(f"not ready after {READY_S} s")
