"""``forebay demo``: what the gateway does, shown against the bare engine on this machine. Every figure is measured."""

import asyncio
import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp
import click

from gateway.auth import new_admin_key, new_key
from gateway.cli import ports
from gateway.cli.common import Fault, program
from gateway.cli.fetching import fetch_model
from gateway.settings import environment

_MODEL = "smollm2"
_SLOTS = 4
_CONTEXT = 1024
_START_TIMEOUT_S = 90.0
_BURST = 16
_LONG = 300  # tokens: some seconds on one thread


class Server:
    """A running server that speaks the OpenAI API. ``pid`` is its process."""

    def __init__(self, url: str, key: str, pid: int) -> None:
        self.url = url
        self.pid = pid
        self._session = aiohttp.ClientSession(
            base_url=url,
            headers={"authorization": f"Bearer {key}"},
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=90),
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._session.close()

    async def get(self, path: str) -> tuple[int, Any]:
        """Return status and JSON of a GET; status 0 if nobody answers."""
        return await self._ask("GET", path, None)

    async def post(self, path: str, body: object = None) -> tuple[int, Any]:
        """Return status and JSON of a POST; status 0 if nobody answers."""
        return await self._ask("POST", path, body)

    async def _ask(self, method: str, path: str, body: object) -> tuple[int, Any]:
        try:
            async with self._session.request(method, path, json=body) as response:
                text = await response.text()
        except (aiohttp.ClientError, TimeoutError, OSError):
            return 0, None
        with contextlib.suppress(ValueError):
            return response.status, json.loads(text)
        return response.status, None

    async def answers(self, question: str, *, max_tokens: int, model: str = _MODEL) -> bool:
        """Return whether a plain chat request was answered, with text in the answer."""
        status, body = await self.post("/v1/chat/completions", chat(question, max_tokens=max_tokens, model=model))
        return status == 200 and bool(body and body["choices"][0]["message"]["content"])

    async def stream(self, question: str, *, max_tokens: int) -> AsyncIterator[str]:
        """Yield the text of a streamed answer, piece by piece."""
        body = {**chat(question, max_tokens=max_tokens), "stream": True}
        async with self._session.post("/v1/chat/completions", json=body) as response:
            async for line in response.content:
                data = line.decode().strip().removeprefix("data: ")
                if data.startswith("{"):
                    choices = json.loads(data).get("choices") or [{}]
                    if text := choices[0].get("delta", {}).get("content"):
                        yield text


def chat(question: str, *, max_tokens: int, model: str = _MODEL) -> dict[str, Any]:
    """Return the body of a chat request."""
    return {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,  # llama.cpp: go on to max_tokens, so that both sides do the same work
    }


@click.command()
def demo() -> None:
    """Tour in about two minutes what Forebay adds to a bare engine; figures are measured here and now.

    Uses free ports and a temporary folder: it can run beside a running gateway.

    \b
    Example:
      forebay demo
    """
    model = fetch_model(_MODEL, environment())
    asyncio.run(_tour(model))


async def _tour(model: Path) -> None:
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="forebay-demo-") as folder:
        click.echo("Starting Forebay with two SmolLM2 workers, and one llama.cpp server alone to compare with ...\n")
        async with _gateway(model, Path(folder)) as (gateway, admin):
            for number, (title, chapter) in enumerate(_CHAPTERS, start=1):
                click.echo(f"{number}. {title}")
                async with _bare(model, Path(folder)) as bare:
                    await chapter(bare, gateway, admin)
                click.echo("")
    click.echo(f"That was the tour, in {time.monotonic() - started:.0f} s. Now yours: {program()} run")


def _compare(before: str, after: str) -> None:
    click.echo(f"   before  llama.cpp alone: {before}")
    click.echo(f"   after   with Forebay:    {after}")


async def _stream(bare: Server, gateway: Server, admin: Server) -> None:
    question = "Say hello in one sentence."
    click.echo("   ", nl=False)
    async for text in gateway.stream(question, max_tokens=24):
        click.echo(text.replace("\n", " "), nl=False)
    click.echo("")
    delays: dict[Server, list[float]] = {bare: [], gateway: []}
    for _ in range(7):  # interleaved, so that both see the same machine
        for server, found in delays.items():
            found.append(await _first_token_ms(server, question))
    _compare(
        f"first token after {median(delays[bare]):.0f} ms (median of 7)",
        f"first token after {median(delays[gateway]):.0f} ms, metered, with keys and limits",
    )


async def _first_token_ms(server: Server, question: str) -> float:
    began = time.monotonic()
    pieces = server.stream(question, max_tokens=2)
    async for _ in pieces:
        delay = (time.monotonic() - began) * 1000
        async for _ in pieces:
            pass
        return delay
    return float("inf")


async def _kill(bare: Server, gateway: Server, admin: Server) -> None:
    bare_answered = await _burst_and(bare, lambda: _kill_process(bare.pid))
    victim = (await _workers(admin))[0]
    answered = await _burst_and(gateway, lambda: _kill_process(int(victim["pid"])))
    await _all_ready(admin)
    _compare(
        f"{bare_answered} of {_BURST} answered, and the server is gone",
        f"{answered} of {_BURST} answered; {victim['id']} is up again",
    )


def _kill_process(pid: int) -> Awaitable[object]:
    os.kill(pid, signal.SIGKILL)
    return asyncio.sleep(0)


async def _restart(bare: Server, gateway: Server, admin: Server) -> None:
    bare_answered = await _burst_and(bare, lambda: _terminate_process(bare.pid))
    victim = (await _workers(admin))[0]
    answered = await _burst_and(gateway, lambda: admin.post(f"/admin/v1/workers/{victim['id']}/restart"))
    await _all_ready(admin)
    _compare(
        f"{bare_answered} of {_BURST} answered over a SIGTERM",
        f"{answered} of {_BURST} answered over `forebay workers restart {victim['id']}`",
    )


def _terminate_process(pid: int) -> Awaitable[object]:
    os.kill(pid, signal.SIGTERM)
    return asyncio.sleep(0)


async def _burst_and(server: Server, act: Callable[[], Awaitable[object]]) -> int:
    """Send a burst of plain requests, act while they are in flight, and return how many were answered."""
    asked = [asyncio.create_task(server.answers(f"Count from {n}.", max_tokens=48)) for n in range(_BURST)]
    await asyncio.sleep(0.7)
    await act()
    return sum(await asyncio.gather(*asked))


async def _cancel(bare: Server, gateway: Server, admin: Server) -> None:
    monitor = asyncio.create_task(_watch_slots(bare))  # what dashboards do; it keeps llama.cpp from noticing
    bare_ms = await _next_answer_after_cancel(bare, num_requests=_SLOTS)
    monitor.cancel()
    ms = await _next_answer_after_cancel(gateway, num_requests=2 * _SLOTS)
    _compare(
        f"all slots busy, clients leave: the next request is answered after {bare_ms:,.0f} ms",
        f"the same: answered after {ms:,.0f} ms",
    )


async def _watch_slots(server: Server) -> None:
    while True:
        await server.get("/slots")
        await asyncio.sleep(0.1)


async def _next_answer_after_cancel(server: Server, *, num_requests: int) -> float:
    """Fill all slots with long plain requests, leave, and time the next short one."""
    asked = [
        asyncio.create_task(server.answers(f"Tell story number {n}.", max_tokens=_LONG)) for n in range(num_requests)
    ]
    await asyncio.sleep(1.5)
    for task in asked:
        task.cancel()
    began = time.monotonic()
    await asyncio.gather(*asked, return_exceptions=True)
    await server.answers("Hello?", max_tokens=1)
    return (time.monotonic() - began) * 1000


async def _wrong_name(bare: Server, gateway: Server, admin: Server) -> None:
    body = chat("Hello?", max_tokens=4, model="gpt-5")
    status, _ = await bare.post("/v1/chat/completions", body)
    forebay_status, answer = await gateway.post("/v1/chat/completions", body)
    message = ((answer or {}).get("error") or {}).get("message", "no message")
    _compare(
        f"status {status}, " + ("as if it were that model" if status == 200 else "an error"),
        f"status {forebay_status}: {message}",
    )


_CHAPTERS: tuple[tuple[str, Callable[[Server, Server, Server], Awaitable[None]]], ...] = (
    ("A streamed answer", _stream),
    (f"kill -9 of a worker with {_BURST} requests in flight", _kill),
    ("Clients that go away", _cancel),
    (f"A restart with {_BURST} requests in flight", _restart),
    ("A model that does not exist", _wrong_name),
)


async def _workers(admin: Server) -> list[dict[str, Any]]:
    _, body = await admin.get("/admin/v1/workers")
    return list((body or {}).get("data", []))


async def _all_ready(admin: Server) -> None:
    await _until(lambda: _are_ready(admin), "workers that are ready again", None)


async def _are_ready(admin: Server) -> bool:
    found = await _workers(admin)
    return bool(found) and all(worker["state"] == "ready" for worker in found)


@contextlib.asynccontextmanager
async def _gateway(model: Path, folder: Path) -> AsyncIterator[tuple[Server, Server]]:
    """Run a gateway with two workers; yield its data and admin ports."""
    port, admin_port = ports.free(2)
    key, admin_key = new_key(), new_admin_key()
    launch = {"source": str(model), "slots": _SLOTS, "context": _CONTEXT, "threads": 1}
    worker = {"engine": "llamacpp", "launch": launch, "max_inflight": _SLOTS, "replicas": 2}
    settings = {
        "state_dir": str(folder / "state"),
        "server": {"port": port, "drain_timeout": 5},
        "admin": {"port": admin_port},
        "admin_key": admin_key,
        "keys": [{"name": "demo", "tenant": "demo", "key": key}],
        "log": {"level": "warning"},
        "models": {_MODEL: {"workers": [worker]}},
    }
    path = folder / "forebay.yaml"
    path.write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML
    path.chmod(0o600)
    argv = [sys.executable, "-m", "gateway", "serve", "-c", str(path)]
    with _process(argv, folder / "gateway.log", {}) as process:
        data = Server(f"http://127.0.0.1:{port}", key, process.pid)
        admin = Server(f"http://127.0.0.1:{admin_port}", admin_key, process.pid)
        try:
            await _until(lambda: _are_ready(admin), f"the gateway; see {folder / 'gateway.log'}", process)
            yield data, admin
        finally:
            await data.close()
            await admin.close()


@contextlib.asynccontextmanager
async def _bare(model: Path, folder: Path) -> AsyncIterator[Server]:
    """Run llama.cpp's server by itself, with the same settings as a worker."""
    (port,) = ports.free(1)
    key = secrets.token_urlsafe(16)
    argv = [
        sys.executable, "-m", "engines.drivers.llamacpp_server", "--model", str(model), "--port", str(port),
        "--slots", str(_SLOTS), "--context", str(_CONTEXT), "--threads", "1", "--alias", _MODEL,
    ]  # fmt: skip
    with _process(argv, folder / "bare.log", {"FOREBAY_WORKER_KEY": key}) as process:
        server = Server(f"http://127.0.0.1:{port}", key, process.pid)
        try:
            await _until(lambda: _is_healthy(server), "llama.cpp", process)
            yield server
        finally:
            await server.close()


async def _is_healthy(server: Server) -> bool:
    status, _ = await server.get("/health")
    return status == 200


async def _until(condition: Callable[[], Awaitable[bool]], what: str, process: subprocess.Popen[bytes] | None) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while not await condition():
        if process is not None and process.poll() is not None:
            raise Fault(f"the demo's server ended with status {process.returncode} while starting: {what}")
        if time.monotonic() > deadline:
            raise Fault(f"waited {_START_TIMEOUT_S:.0f} s in vain for {what}")
        await asyncio.sleep(0.1)


@contextlib.contextmanager
def _process(argv: list[str], log: Path, extra: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program in this source tree, output to a file; end it on leaving, gently first."""
    root = Path(__file__).resolve().parents[2]
    env = {**environment(), "PYTHONPATH": str(root), **extra}
    with log.open("ab") as output:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=env)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
