"""`python -m engines.fake_server`: prints one JSON line when it listens, and leaves within a second of SIGTERM."""

import asyncio
import gc
import os
import signal
import subprocess
import sys

import msgspec
import uvloop
from aiohttp import web

from engines.fake_server.app import Engine
from engines.fake_server.settings import Settings, parse_args

_GRACE_S = 0.2
_SLEEPER = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(3600)"


async def serve(settings: Settings, child_pid: int | None) -> None:
    """Serve until SIGTERM or SIGINT, or until stdin closes if that was asked for."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    if settings.ignore_sigterm:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_signal_handler(signal.SIGINT, stop.set)
    if settings.exit_on_stdin_eof:
        # Its owner is gone, maybe killed: nobody is left who would want a graceful end.
        loop.add_reader(sys.stdin.fileno(), _exit_at_eof)
    runner = web.AppRunner(
        Engine(settings, child_pid).application(),
        handle_signals=False,
        access_log=None,
        handler_cancellation=True,
        shutdown_timeout=_GRACE_S,
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, settings.host, settings.port, backlog=4096).start()
        ready = {"ready": True, "port": runner.addresses[0][1]}
        sys.stdout.write(msgspec.json.encode(ready).decode() + "\n")
        sys.stdout.flush()
        await stop.wait()
    finally:
        await runner.cleanup()


def _exit_at_eof() -> None:
    if not os.read(sys.stdin.fileno(), 4096):
        os._exit(0)


def _spawn_child() -> "subprocess.Popen[bytes]":
    # It holds none of our pipes: whoever reads them sees their end when this process ends.
    nowhere = subprocess.DEVNULL
    return subprocess.Popen([sys.executable, "-c", _SLEEPER], stdin=nowhere, stdout=nowhere, stderr=nowhere)


def main() -> int:
    """Run one engine; returns its exit status."""
    settings = parse_args(sys.argv[1:])
    if settings.exit_at_start is not None:
        sys.stderr.write("fake_server: exits at start, as it was told to\n")
        return settings.exit_at_start
    child = _spawn_child() if settings.spawn_child else None
    gc.freeze()
    uvloop.run(serve(settings, child.pid if child else None))
    return 0


if __name__ == "__main__":
    sys.exit(main())
