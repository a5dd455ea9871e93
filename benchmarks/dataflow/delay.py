"""The network between a client and what it talks to: every byte takes half a round trip, in either direction.

``python -m benchmarks.dataflow.delay --rtt-ms 100 --to 8411,8412`` listens on a port of its own for each of the ports,
prints them as one JSON line, and goes when its standard input closes. A connection costs a round trip before its first
byte leaves, as TCP's does. Order is kept; there is no limit to what is on the way, and no loss.
"""

import argparse
import asyncio
import contextlib
import json
import sys
from collections import deque
from collections.abc import AsyncIterator, Sequence

from benchmarks.loopback.cache import ROOT


class Line:
    """One direction: what is put in comes out ``delay_s`` later, in order; None stands for its end."""

    def __init__(self, loop: asyncio.AbstractEventLoop, delay_s: float, not_before: float) -> None:
        self._loop = loop
        self._delay_s = delay_s
        self._not_before = not_before
        self._under_way: deque[tuple[float, bytes | None]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._out: asyncio.Transport | None = None

    def connect(self, out: asyncio.Transport) -> None:
        """Let it come out there."""
        self._out = out
        self._deliver()

    def put(self, data: bytes | None) -> None:
        """Send off."""
        self._under_way.append((max(self._loop.time(), self._not_before) + self._delay_s, data))
        if self._timer is None:
            self._deliver()

    def _deliver(self) -> None:
        self._timer = None
        if self._out is None:
            return
        while self._under_way and self._under_way[0][0] <= self._loop.time():
            data = self._under_way.popleft()[1]
            if data is None:
                self._out.close()
            else:
                self._out.write(data)
        if self._under_way:
            self._timer = self._loop.call_at(self._under_way[0][0], self._deliver)


class _End(asyncio.Protocol):
    """One end of a connection: what it receives goes into ``line``, and so does its end."""

    def __init__(self, line: Line) -> None:
        self._line = line

    def data_received(self, data: bytes) -> None:
        self._line.put(data)

    def eof_received(self) -> bool:
        self._line.put(None)
        return True

    def connection_lost(self, error: Exception | None) -> None:
        self._line.put(None)


class _Accepted(_End):
    """The client's end, which is connected to ``port``."""

    def __init__(self, loop: asyncio.AbstractEventLoop, rtt_s: float, port: int) -> None:
        super().__init__(Line(loop, rtt_s / 2, loop.time() + rtt_s))
        self._loop = loop
        self._back = Line(loop, rtt_s / 2, 0.0)
        self._port = port
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._back.connect(transport)
        self._task = self._loop.create_task(self._connect(transport))

    async def _connect(self, client: asyncio.Transport) -> None:
        try:
            far, _ = await self._loop.create_connection(lambda: _End(self._back), "127.0.0.1", self._port)
        except OSError:
            client.close()
            return
        self._line.connect(far)


@contextlib.asynccontextmanager
async def listening(rtt_s: float, ports: Sequence[int]) -> AsyncIterator[list[int]]:
    """Yield a port for each of ``ports``, that much farther away; open until the block ends."""
    loop = asyncio.get_running_loop()
    async with contextlib.AsyncExitStack() as stack:
        near = []
        for port in ports:
            server = await loop.create_server(lambda port=port: _Accepted(loop, rtt_s, port), "127.0.0.1", 0)  # type: ignore[misc]
            stack.callback(server.close)
            near.append(server.sockets[0].getsockname()[1])
        yield near


@contextlib.asynccontextmanager
async def away(rtt_ms: float, ports: Sequence[int]) -> AsyncIterator[list[int]]:
    """Yield the ports by which these are reached from ``rtt_ms`` away: themselves if that is nothing, else those of a
    process of its own."""
    if not rtt_ms:
        yield list(ports)
        return
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "benchmarks.dataflow.delay", "--rtt-ms", f"{rtt_ms:g}",
        "--to", ",".join(map(str, ports)),
        cwd=ROOT, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield json.loads(await process.stdout.readline())
    finally:
        process.stdin.close()
        with contextlib.suppress(ConnectionError):
            await process.stdin.wait_closed()
        await process.wait()


async def _serve(rtt_ms: float, ports: Sequence[int]) -> None:
    loop = asyncio.get_running_loop()
    gone = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(gone), sys.stdin)
    async with listening(rtt_ms / 1e3, ports) as near:
        print(json.dumps(near), flush=True)
        await gone.read()


def main() -> None:
    """Serve until standard input closes."""
    parser = argparse.ArgumentParser(prog="benchmarks.dataflow.delay")
    parser.add_argument("--rtt-ms", type=float, required=True)
    parser.add_argument("--to", required=True, help="ports, with commas between them")
    chosen = parser.parse_args()
    asyncio.run(_serve(chosen.rtt_ms, [int(port) for port in chosen.to.split(",")]))


if __name__ == "__main__":
    main()
