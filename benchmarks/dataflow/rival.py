"""LangGraph as a client, in an environment and a process of its own: what many applications are written with today.

Each application is a ``StateGraph`` of the same nodes and edges, its calls are ``ChatOpenAI``'s, and all of them run in
one process. Chats beside them are not part of what it is asked for.
"""

import asyncio
import contextlib
import json
import zlib
from asyncio.subprocess import PIPE
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.dataflow.clients import Placing, Target, width_of
from benchmarks.dataflow.seen import Done, Seen, digest
from benchmarks.dataflow.workloads import App, Workload, needs
from benchmarks.loopback.processes import Failed
from benchmarks.loopback.venvs import environment

REQUIREMENTS = ("langgraph==1.2.22", "langchain-openai==1.7.3", "langchain-core==1.7.2")
_SCRIPT = Path(__file__).with_name("langgraph_client.py")


def order_of(workload: Workload, target: Target, placing: Placing) -> dict[str, Any]:
    """Return what the other process is told: the graphs with their edges, and where each application's calls go: in
    turn, where there are several addresses."""
    return {
        "model": target.model, "key": target.key, "width": width_of(workload),
        "apps": [_app(app, target, placing) for app in workload.apps],
    }  # fmt: skip


def _app(app: App, target: Target, placing: Placing) -> dict[str, Any]:
    own = target.urls[zlib.crc32(app.session.encode()) % len(target.urls)]
    urls = (own,) if placing == "affinity" else target.urls
    edges = {node.name: needs(node) for node in app.nodes}
    inner = {one.name: needs(one) for node in app.nodes for one in getattr(node, "body", ())}
    return {**msgspec.to_builtins(app), "urls": urls, "needs": edges | inner}


async def play(workload: Workload, target: Target, placing: Placing) -> Seen:
    """Have LangGraph carry all applications out, each from its time on. Raises `Failed` if its process does not,
    and `Missing` if its environment cannot be made."""
    python = await asyncio.to_thread(environment, "langgraph", REQUIREMENTS)
    process = await asyncio.create_subprocess_exec(
        python / "python", str(_SCRIPT), stdin=PIPE, stdout=PIPE, stderr=PIPE
    )
    try:
        told, wrong = await process.communicate(json.dumps(order_of(workload, target, placing)).encode())
    except asyncio.CancelledError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        raise
    if process.returncode:
        raise Failed(f"LangGraph's process ended {process.returncode}: {wrong[-600:].decode('utf-8', 'replace')}")
    rows = json.loads(told)
    return Seen(
        [
            Done(row["app"], row["began"], row["ended"], digest(row["text"]) if row["text"] else "", row["problem"])
            for row in rows["apps"]
        ],
        told={"versions": rows["versions"]},
    )
