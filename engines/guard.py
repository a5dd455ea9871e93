"""The guard: a small process that owns one worker's process tree and lets nothing of it outlive the gateway.

Stand-alone: standard library only, run as ``python -I -S engines/guard.py``. The gateway speaks to it through pipes.

- stdin: first a line of JSON, the order ``{argv, env, log, log_bytes, secrets, grace_s}``; later a line ``term``
  asks the worker's process group to exit, and a line ``kill`` kills the tree at once. *End of file means that the
  gateway is gone*, however it died: the tree is then asked to exit, and killed after ``grace_s``.
- stdout: ``pid <n>`` once the worker runs, ``exit <status>`` as soon as the worker itself has exited.
- SIGTERM and SIGINT do what the line ``term`` does.

The worker leads a session of its own and is killed by the kernel if the guard dies. The guard is the subreaper of all
that descends from it, so a process that left the group, or whose parent died, is still found and killed. It exits
with the worker's status (128 + signal if a signal ended it) once no descendant is left. Elsewhere than on Linux only
the process group is reached. What the worker prints goes to ``log``, with secrets masked, in a file whose size is
bounded: at ``log_bytes`` it becomes ``<log>.1``, in place of the one before.
"""

import ctypes
import json
import os
import select
import signal
import sys
import time
from typing import NoReturn, TypedDict

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36

# SIGKILL can lose a race against a fork: while the tree is being killed, it is killed again this often.
KILL_AGAIN_MS = 20
# The gateway's pipe tells that it is gone, unless something it forked holds the pipe too: then our parent changes.
PARENT_CHECK_MS = 1000
# A line is held back until it is whole, so that no secret is cut in two; one that never ends is not.
LONGEST_LINE_BYTES = 65536
EXIT_CANNOT_RUN = 127


def prctl(option: int, argument: int) -> None:
    """Call ``prctl``; do nothing where there is none."""
    call = getattr(ctypes.CDLL(None), "prctl", None)
    if call is not None:
        call(option, argument, 0, 0, 0)


def parents() -> dict[int, int]:
    """Return every process and its parent; empty where there is no ``/proc``."""
    try:
        names = os.listdir("/proc")
    except OSError:
        return {}
    found = {}
    for name in names:
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as stat:
                    # The second field, the name in brackets, may itself hold blanks and brackets.
                    found[int(name)] = int(stat.read().rpartition(b")")[2].split()[1])
            except (OSError, IndexError):
                continue
    return found


def descendants(root: int) -> list[int]:
    """Return all processes below ``root``, parents before children. Costs one read of ``/proc``."""
    children: dict[int, list[int]] = {}
    for pid, parent in parents().items():
        children.setdefault(parent, []).append(pid)
    found = list(children.get(root, ()))
    for pid in found:
        found.extend(children.get(pid, ()))
    return found


def read_line(fd: int) -> bytes:
    """Return bytes up to the first newline and not one more, or what came before the end of the file."""
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = os.read(fd, 1)
        if not byte:
            break
        line += byte
    return bytes(line)


class Order(TypedDict):
    """What the gateway wants run, and how."""

    argv: list[str]
    env: dict[str, str]
    log: str
    log_bytes: int
    secrets: list[str]
    grace_s: float


class Log:
    """A log file with a bound on its size, and one older file beside it. What cannot be written is dropped."""

    def __init__(self, path: str, max_bytes: int, secrets: list[str]) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._secrets = [secret.encode() for secret in secrets if secret]
        self._held = b""
        self._fd = self._open()
        self._size = os.fstat(self._fd).st_size

    def _open(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def write(self, data: bytes) -> None:
        """Write all whole lines."""
        self._held += data
        end = max(self._held.rfind(b"\n"), self._held.rfind(b"\r")) + 1
        if end == 0 and len(self._held) > LONGEST_LINE_BYTES:
            end = len(self._held)
        self._emit(self._held[:end])
        self._held = self._held[end:]

    def flush(self) -> None:
        """Write what was held back, too."""
        self._emit(self._held)
        self._held = b""

    def _emit(self, data: bytes) -> None:
        for secret in self._secrets:
            data = data.replace(secret, b"***")
        try:
            if self._size + len(data) > self._max_bytes:
                self._rotate()
            self._size += os.write(self._fd, data)
        except OSError:
            return  # a full disk must not stall the worker

    def _rotate(self) -> None:
        os.replace(self._path, self._path + ".1")
        os.close(self._fd)
        self._fd = self._open()
        self._size = 0


class Guard:
    """One worker and everything that descends from it."""

    def __init__(self, order: Order, log: Log) -> None:
        self._order = order
        self._log = log
        self._grace_s = order["grace_s"]
        self._parent = os.getppid()
        self._worker = 0
        self._status: int | None = None
        self._kill_at: float | None = None
        self._has_children = True
        self._output, self._worker_output = os.pipe()
        self._woken, self._waker = os.pipe()

    def run(self) -> int:
        """Start the worker, stay until all of its tree is gone, and return its exit status."""
        self._listen_to_signals()
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        self._spawn()
        self._report(f"pid {self._worker}")
        poll = select.poll()
        for fd in (0, self._output, self._woken):
            poll.register(fd, select.POLLIN)
        while self._has_children:
            for fd, _ in poll.poll(self._patience_ms()):
                if not self._serve(fd):
                    poll.unregister(fd)
            self._reap()
            if os.getppid() != self._parent:
                self._end()
            if self._kill_at is not None and time.monotonic() >= self._kill_at:
                self._signal_all(signal.SIGKILL)
        if sys.platform != "linux":
            self._signal_group(signal.SIGKILL)  # what is left of it could not be waited for
        self._drain_output()
        return EXIT_CANNOT_RUN if self._status is None else self._status

    def _listen_to_signals(self) -> None:
        os.set_blocking(self._waker, False)
        os.set_blocking(self._output, False)
        signal.set_wakeup_fd(self._waker)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def _spawn(self) -> None:
        guard = os.getpid()
        started, starting = os.pipe()
        self._worker = os.fork()
        if self._worker == 0:
            self._become_worker(guard)
        os.close(self._worker_output)
        os.close(starting)
        # Until the worker is its own program (the pipe closes then) it would take a SIGTERM for one of ours.
        os.read(started, 1)
        os.close(started)

    def _become_worker(self, guard: int) -> NoReturn:
        argv = self._order["argv"]
        try:
            os.setsid()
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != guard:  # it died before the line above
                os._exit(EXIT_CANNOT_RUN)
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGPIPE, signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
                signal.signal(number, signal.SIG_DFL)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(self._worker_output, 1)
            os.dup2(self._worker_output, 2)
            os.execvpe(argv[0], argv, self._order["env"])  # noqa: S606  # no shell is what we want
        except OSError as error:
            os.write(2, f"cannot run {argv[0]!r}: {error.strerror}\n".encode())
        finally:
            os._exit(EXIT_CANNOT_RUN)

    def _patience_ms(self) -> int:
        if self._kill_at is None:
            return PARENT_CHECK_MS
        return max(int((self._kill_at - time.monotonic()) * 1000), KILL_AGAIN_MS)

    def _serve(self, fd: int) -> bool:
        """Act on what ``fd`` has to say; False once it will say nothing more."""
        if fd == self._output:
            return self._pump()
        if fd == self._woken:
            if {signal.SIGTERM, signal.SIGINT} & set(os.read(fd, 64)):
                self._signal_group(signal.SIGTERM)
            return True
        try:
            heard = os.read(fd, 64)
        except OSError:
            heard = b""
        if b"term" in heard:
            self._signal_group(signal.SIGTERM)
        if b"kill" in heard:
            self._kill_at = time.monotonic()
        if not heard:
            self._end()
        return bool(heard)

    def _pump(self) -> bool:
        try:
            data = os.read(self._output, LONGEST_LINE_BYTES)
        except BlockingIOError:
            return True
        self._log.write(data)
        return bool(data)

    def _drain_output(self) -> None:
        try:
            while data := os.read(self._output, LONGEST_LINE_BYTES):
                self._log.write(data)
        except BlockingIOError:
            pass  # a child of the worker still holds the other end
        self._log.flush()

    def _reap(self) -> None:
        try:
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                if pid == self._worker:
                    self._worker_exited(os.waitstatus_to_exitcode(status))
        except ChildProcessError:
            # A subreaper without children has no descendants either.
            self._has_children = False

    def _worker_exited(self, code: int) -> None:
        self._status = code if code >= 0 else 128 - code
        self._drain_output()  # before the report, whose reader wants the last lines
        self._report(f"exit {self._status}")
        self._end()

    def _end(self) -> None:
        """Ask everything to exit, and have it killed after the grace time."""
        if self._kill_at is None:
            self._kill_at = time.monotonic() + self._grace_s
            self._signal_all(signal.SIGTERM)

    def _signal_all(self, number: int) -> None:
        below = descendants(os.getpid())
        for pid in below:
            send(pid, number)
        if not below:  # no /proc
            self._signal_group(number)

    def _signal_group(self, number: int) -> None:
        # Once the worker is reaped its number could be another's group, unless there is no other way to reach it.
        if self._status is None or sys.platform != "linux":
            send(-self._worker, number)

    def _report(self, line: str) -> None:
        try:
            os.write(1, line.encode() + b"\n")
        except OSError:
            return  # the gateway is gone; its pipe says so too


def send(pid: int, number: int) -> None:
    """Send a signal to a process, or to a group by its negative number; no matter if it is gone."""
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        return


def main() -> int:
    """Read the order, guard the worker, and return its exit status."""
    line = read_line(0)
    if not line.endswith(b"\n"):
        return EXIT_CANNOT_RUN  # the gateway died before it gave the order
    order: Order = json.loads(line)
    return Guard(order, Log(order["log"], order["log_bytes"], order["secrets"])).run()


if __name__ == "__main__":
    # Without the interpreter's own shut-down, which would let a late SIGTERM change the status.
    os._exit(main())
