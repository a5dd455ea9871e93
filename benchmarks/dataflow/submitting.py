"""The client that hands its graph over: one request to submit it, another to wait for what is wanted of it.

An application with tools of the client's own is followed by its events instead, and its tools are answered.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote

import aiohttp
import msgspec

from benchmarks.dataflow.clients import RequestFailed, Target, body_of, pooled, talk, timed, width_of
from benchmarks.dataflow.seen import Seen
from benchmarks.dataflow.workloads import App, Ask, Loop, Node, Of, Piece, Tool, Workload

WORKFLOWS = "/v1/workflows"
WAIT_S = 100


def workflow_of(app: App, target: Target) -> dict[str, Any]:
    """Return an application as it is submitted."""
    return {
        "app": app.name, "objective": app.objective, "outputs": [app.output],
        "calls": [_call(node, app, target) for node in app.nodes],
    }  # fmt: skip


def _call(node: Node, app: App, target: Target) -> dict[str, Any]:
    match node:
        case Ask():
            request = body_of(target, node.system, _template(node.prompt), node.tokens)
            return {"kind": "llm", "id": node.name, "request": request}
        case Tool():
            server = {"type": "client", "tool": node.name}
            return {"kind": "tool", "id": node.name, "server": server, "arguments": {"of": _hole(node.of)}}
        case Loop():
            return {
                "kind": "loop", "id": node.name, "state": {node.state: _hole(node.begins)},
                "calls": [_call(one, app, target) for one in node.body], "next": {node.state: _hole(node.next)},
                "until": f"{{{{{node.until} | json('$.done')}}}}", "result": _hole(node.next),
                "max_iterations": node.times + 1,
            }  # fmt: skip


def _hole(name: str) -> str:
    return f"{{{{{name}}}}}"


def _template(prompt: tuple[Piece, ...]) -> str:
    return "".join(_hole(piece.name) if isinstance(piece, Of) else piece for piece in prompt)


async def play(workload: Workload, target: Target) -> Seen:
    """Submit all applications, each at its time, and wait for their outputs; chats are asked for as everywhere."""
    url = target.urls[0]
    runs: dict[str, str] = {}
    async with pooled(target, width_of(workload)) as http:

        async def carry(app: App) -> str:
            run = await submitted(http, url, app, target)
            runs[app.name] = run
            if any(isinstance(node, Loop | Tool) for node in app.nodes):
                return await _tended(http, url, run, app)
            return await awaited(http, url, f"{run}.{app.output}")

        seen = await timed(workload, carry, lambda chat, said, start: talk(http, target, chat, said, start))
    seen.told["runs"] = runs
    return seen


async def submitted(http: aiohttp.ClientSession, url: str, app: App, target: Target) -> str:
    """Submit an application and return its run's id. Raises ``RequestFailed``."""
    payload = msgspec.json.encode(workflow_of(app, target))
    async with http.post(url + WORKFLOWS, data=payload) as response:
        if response.status != 202:
            raise RequestFailed(f"{response.status} {(await response.text())[:300]}")
        run: str = json.loads(await response.read())["id"]
        return run


async def awaited(http: aiohttp.ClientSession, url: str, variable: str) -> str:
    """Wait for a variable, and return its value. Raises ``RequestFailed`` if it gets none."""
    while True:
        async with http.get(f"{url}/v1/variables/{variable}?wait={WAIT_S}") as response:
            raw = await response.read()
        if response.status == 202:
            continue
        told = json.loads(raw)
        if response.status != 200 or told.get("state") != "done":
            raise RequestFailed(f"{response.status} {raw[:300].decode('utf-8', 'replace')}")
        return str(told["value"])


async def _tended(http: aiohttp.ClientSession, url: str, run: str, app: App) -> str:
    """Answer the run's tools until it has ended, and return its output."""
    tools = _Tools(http, url, run, app)
    output: str | None = None
    async with asyncio.TaskGroup() as tasks:
        async for name, data in _events(http, f"{url}{WORKFLOWS}/{run}/events"):
            if name == "call.waiting":
                tasks.create_task(tools.answer(data["tool"], data["variable"]))
            elif name == "variable.done" and data["variable"] == app.output:
                output = str(data["value"])
            elif name in {"run.failed", "run.cancelled", "variable.failed"}:
                raise RequestFailed(f"{name}: {data}")
    if output is None:
        raise RequestFailed("the run ended without its output")
    return output


class _Tools:
    """The tools of one run, which know how often they were used."""

    def __init__(self, http: aiohttp.ClientSession, url: str, run: str, app: App) -> None:
        self._http = http
        self._where = f"{url}/v1/variables/{run}."
        loops = [node for node in app.nodes if isinstance(node, Loop)]
        inner = [(tool, loop.times) for loop in loops for tool in loop.body if isinstance(tool, Tool)]
        outer = [(tool, 1) for tool in app.nodes if isinstance(tool, Tool)]
        self._known = {tool.name: (tool.seconds, times) for tool, times in inner + outer}
        self._used: dict[str, int] = dict.fromkeys(self._known, 0)

    async def answer(self, name: str, variable: str) -> None:
        """Use a tool, and set the variable that waits for it."""
        seconds, times = self._known[name]
        self._used[name] += 1
        is_content = self._used[name] >= times
        await asyncio.sleep(seconds)
        payload = msgspec.json.encode({"value": {"done": is_content}})
        async with self._http.put(self._where + quote(variable, safe=""), data=payload) as response:
            if response.status != 200:
                raise RequestFailed(f"{response.status} {(await response.text())[:300]}")


async def _events(http: aiohttp.ClientSession, url: str) -> AsyncIterator[tuple[str, Any]]:
    name = ""
    async with http.get(url) as response:
        if response.status != 200:
            raise RequestFailed(f"{response.status} {(await response.text())[:300]}")
        buffer = b""
        async for chunk in response.content.iter_any():
            *lines, buffer = (buffer + chunk).split(b"\n")
            for line in lines:
                if line.startswith(b"event: "):
                    name = line[7:].decode()
                elif line.startswith(b"data: "):
                    yield name, json.loads(line[6:])
