"""A worker's process as the gateway sees it: started under a guard, ended with all that descends from it."""

import asyncio
import os
import re
import socket
import sys
from collections.abc import Mapping
from contextlib import closing, suppress
from pathlib import Path
from urllib.parse import quote

import msgspec
import psutil

from core.ids import WorkerId
from engines.engine import Command

GUARD = Path(__file__).with_name("guard.py")
LOOPBACK = "127.0.0.1"

# Between SIGTERM and SIGKILL for what is left of a worker that died, or whose gateway did. Engine processes exit
# within tens of milliseconds, or hang; the promise is that two seconds after a gateway's death nothing is left.
GRACE_S = 0.7
# The kernel ends a killed process at once, unless a device driver holds it; freeing a large GPU context takes seconds.
KILL_WAIT_S = 15.0
# A guard starts in 30 ms on an idle machine.
GUARD_START_S = 20.0
PORT_WAIT_S = 5.0
LOG_BYTES = 10 * 1024 * 1024
# Enough for some thousand lines; a tail is read whole.
TAIL_BYTES = 512 * 1024

# Marks every process of one start, so that they are found even if their guard was killed.
MARK = "FOREBAY_WORKER_MARK"


class ProcessError(Exception):
    """A process could not be started, or not be ended; the message is for the operator."""


class Ports:
    """Hands out loopback ports from ``first`` upward, in turn, so that one comes back only after ``count`` starts.

    An engine listens many seconds after it has been given its port; until then a name in the kernel's abstract
    namespace, which goes with this process, keeps other gateways on the machine away (on Linux; elsewhere luck does).
    """

    def __init__(self, first: int, count: int = 1000) -> None:
        self._first = first
        self._count = count
        self._next = 0
        self._claims: dict[int, socket.socket | None] = {}

    def take(self) -> int:
        """Return a port that nobody uses and that no closed connection lingers on. Raises ``ProcessError``."""
        for _ in range(self._count):
            port = self._first + self._next
            self._next = (self._next + 1) % self._count
            if port in self._claims or not _can_bind(port, reuse=False):
                continue
            try:
                self._claims[port] = _claim(port)
            except OSError:
                continue  # another gateway's
            return port
        last = self._first + self._count - 1
        raise ProcessError(f"no free port between {self._first} and {last}")

    def release(self, port: int) -> None:
        """Give a port back."""
        claim = self._claims.pop(port, None)
        if claim is not None:
            claim.close()

    async def wait_until_free(self, port: int) -> bool:
        """Wait until nobody listens on ``port``, some seconds at most; False if somebody still does then."""
        for _ in range(int(PORT_WAIT_S / 0.05)):
            if _can_bind(port, reuse=True):
                return True
            await asyncio.sleep(0.05)
        return False


def _claim(port: int) -> socket.socket | None:
    """Return what says on this machine that the port is ours; raise ``OSError`` if another gateway has said so."""
    if sys.platform != "linux":
        return None
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        claim.bind(f"\0forebay-worker-port-{port}")
    except OSError:
        claim.close()
        raise
    return claim


def _can_bind(port: int, *, reuse: bool) -> bool:
    # Without SO_REUSEADDR a port with connections in TIME_WAIT counts as taken, with it only a listening one.
    with closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as probe:
        if reuse:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
        return True


class WorkerLog:
    """What a worker printed, over all its starts: ``<directory>/<id>.log``, readable by its owner alone."""

    def __init__(self, directory: Path, worker: WorkerId) -> None:
        self.path = directory / (quote(worker, safe="") + ".log")  # ids hold model names, which hold slashes

    def open(self, header: str) -> int:
        """Append a line of our own and return the file's descriptor, which the caller closes."""
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(self.path, flags, 0o600)
        os.fchmod(fd, 0o600)
        os.write(fd, f"--- {header}\n".encode())
        return fd

    def tail(self, num_lines: int) -> list[str]:
        """Return the newest lines, the older file's included; reads at most ``TAIL_BYTES`` of each."""
        lines = _tail(self.path)
        if len(lines) < num_lines:
            lines = _tail(self.path.with_name(self.path.name + ".1")) + lines
        return lines[-num_lines:] if num_lines > 0 else []

    def last_words(self, num_lines: int) -> list[str]:
        """Return the newest lines that are not empty, of the present start alone."""
        lines = [line for line in _tail(self.path) if line.strip()]
        for index in range(len(lines) - 1, -1, -1):
            if lines[index].startswith("--- "):
                lines = lines[index + 1 :]
                break
        return lines[-num_lines:]


def _tail(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            return file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return []


class Process:
    """A running worker. ``pid`` is the worker's own; whoever has one ends it by ``stop`` or ``abandon``."""

    def __init__(self, guard: asyncio.subprocess.Process, pid: int, mark: str) -> None:
        self._guard = guard
        self._mark = mark
        self.pid = pid

    @classmethod
    async def start(
        cls, command: Command, *, log: WorkerLog, header: str, secrets: tuple[str, ...], env: Mapping[str, str]
    ) -> "Process":
        """Run ``command`` under a guard, with ``env`` below its own environment. Raises ``ProcessError``.

        A program that does not exist is an exit with status 127 and a word in the log, not an error here.
        ``secrets`` are masked in the log, the header included.
        """
        mark = os.urandom(8).hex()
        worker_env = {"PYTHONUNBUFFERED": "1", **env, **command.env, MARK: mark}
        order = {
            "argv": command.argv,
            "env": worker_env,
            "log": str(log.path),
            "log_bytes": LOG_BYTES,
            "secrets": secrets,
            "grace_s": GRACE_S,
        }
        try:
            guard = await _start_guard(log, _masked(header, secrets), env)
        except OSError as error:
            raise ProcessError(f"cannot start a process that logs to {str(log.path)!r}: {error}") from error
        try:
            async with asyncio.timeout(GUARD_START_S):
                pid = await _give_order(guard, msgspec.json.encode(order))
        except BaseException:
            _pipe_to(guard).close()  # whatever it has started ends with that
            raise
        return cls(guard, pid, mark)

    async def exited(self) -> int:
        """Wait until the worker itself has exited and return its status, 128 + signal if one ended it.

        Its descendants may live on for some moments: see ``gone``. One waiter at a time.
        """
        word = await _output_of(self._guard).readline()
        if word.startswith(b"exit "):
            return int(word[5:])
        return await self.gone()

    async def gone(self) -> int:
        """Wait until nothing of the worker's process tree is left and return its exit status."""
        code = await self._guard.wait()
        if code < 0:
            # Somebody killed the guard; the kernel killed the worker then, but nobody its descendants.
            await asyncio.to_thread(_kill_left_overs, self._mark, self.pid)
            return 128 - code
        return code

    async def stop(self, patience_s: float) -> None:
        """Ask the process group to exit, kill all of the tree after ``patience_s``, return when it is gone.

        Raises ``ProcessError`` if the kernel cannot end it.
        """
        try:
            async with asyncio.timeout(patience_s):
                self._ask_to_exit()
                await self.gone()
                return
        except TimeoutError:
            self._kill()
        try:
            async with asyncio.timeout(KILL_WAIT_S):
                await self.gone()
        except TimeoutError:
            message = f"process {self.pid} or one of its descendants survives SIGKILL; look for state D in `ps`"
            raise ProcessError(message) from None

    def abandon(self) -> None:
        """Have the tree ended without waiting for it: the guard does it, within ``GRACE_S``. Harmless after the end."""
        _pipe_to(self._guard).close()

    def _ask_to_exit(self) -> None:
        # A line and no signal: asyncio's send_signal may reap a guard that just exited, and its status is lost.
        self._tell(b"term\n")

    def _kill(self) -> None:
        # Not SIGKILL to the guard: it would die without having killed what left the worker's group.
        self._tell(b"kill\n")

    def _tell(self, word: bytes) -> None:
        pipe = _pipe_to(self._guard)
        if not pipe.is_closing():  # a guard that has just exited has closed it, and uvloop minds
            with suppress(RuntimeError, OSError):
                pipe.write(word)


async def _start_guard(log: WorkerLog, header: str, env: Mapping[str, str]) -> asyncio.subprocess.Process:
    log_fd = log.open(header)
    try:
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-I",
            "-S",
            str(GUARD),
            log.path.stem,  # read by nobody but who looks at a list of processes
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=log_fd,
            env=dict(env),
            # Ctrl-C on our terminal is for us alone: we drain first.
            start_new_session=True,
        )
    finally:
        os.close(log_fd)


async def _give_order(guard: asyncio.subprocess.Process, order: bytes) -> int:
    pipe = _pipe_to(guard)
    pipe.write(order + b"\n")
    await pipe.drain()
    word = await _output_of(guard).readline()
    if not word.startswith(b"pid "):
        raise ProcessError("the guard of the worker has died at its start; the worker's log may say why")
    return int(word[4:])


def _pipe_to(guard: asyncio.subprocess.Process) -> asyncio.StreamWriter:
    assert guard.stdin is not None
    return guard.stdin


def _output_of(guard: asyncio.subprocess.Process) -> asyncio.StreamReader:
    assert guard.stdout is not None
    return guard.stdout


def _kill_left_overs(mark: str, session: int) -> None:
    """Kill every process whose environment bears the mark, or that is in the session that the worker has led.

    vLLM's processes write a title over their environment; a process that has left the session still bears the mark.
    """
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session or process.environ().get(MARK) == mark:
                process.kill()
        except (psutil.Error, OSError):
            continue  # gone, or somebody else's


def _masked(text: str, secrets: tuple[str, ...]) -> str:
    return re.sub("|".join(re.escape(secret) for secret in secrets), "***", text) if secrets else text
