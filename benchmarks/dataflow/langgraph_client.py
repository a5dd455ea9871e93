"""Carries out the applications that standard input tells of, with LangGraph, and tells what came of them.

Runs in an environment that has LangGraph and nothing of this project; ``rival`` starts it.
"""

import asyncio
import importlib.metadata
import itertools
import json
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypedDict

from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph  # type: ignore[import-not-found]
from pydantic import SecretStr

Json = dict[str, Any]
Step = Callable[[Json], Awaitable[Json]]
Chats = Iterator[ChatOpenAI]
RECURSION_LIMIT = 10_000


def chat_of(order: Json, url: str) -> ChatOpenAI:
    """Return the model at an address."""
    return ChatOpenAI(
        model=order["model"], base_url=url + "/v1", api_key=SecretStr(order["key"] or "none"), temperature=0,
        max_retries=2,
    )  # fmt: skip


def rendered(prompt: list[Any], state: Json) -> str:
    """Return the text of a prompt."""
    return "".join(piece if isinstance(piece, str) else state[piece["name"]] for piece in prompt)


def asks(node: Json, chats: Chats) -> Step:
    """Return the step of one call, which goes to the next of the chats."""
    body = {"max_tokens": node["tokens"], "ignore_eos": True}

    async def step(state: Json) -> Json:
        messages = [("system", node["system"])] if node["system"] else []
        messages.append(("human", rendered(node["prompt"], state)))
        answer = await next(chats).ainvoke(messages, extra_body=body)
        return {node["name"]: answer.content}

    return step


def copies(source: str, to: str) -> Step:
    """Return the step that sets one value to another."""

    async def step(state: Json) -> Json:
        return {to: state[source]}

    return step


def uses(tool: Json) -> Step:
    """Return the step of a tool, which counts how often it is used."""
    count = tool["name"] + "_used"

    async def step(state: Json) -> Json:
        await asyncio.sleep(tool["seconds"])
        return {tool["name"]: state[tool["of"]], count: state.get(count, 0) + 1}

    return step


def graph_of(app: Json, chats: Chats) -> Any:
    """Return the application's graph, compiled. A loop is a circle with an edge that is taken while it goes on."""
    inner = [one for node in app["nodes"] for one in node.get("body", ())]
    loops = [node for node in app["nodes"] if node["type"] == "loop"]
    keys: dict[str, Any] = {one["name"]: str for one in [*app["nodes"], *inner]}
    keys |= {loop["state"]: str for loop in loops}
    keys |= {one["name"] + "_used": int for one in [*app["nodes"], *inner] if one["type"] == "tool"}
    builder = StateGraph(TypedDict("State", keys))  # type: ignore[operator]
    for node in app["nodes"]:
        if node["type"] == "loop":
            _add_loop(builder, node, chats)
        else:
            builder.add_node("do_" + node["name"], asks(node, chats) if node["type"] == "ask" else uses(node))
        before = ["do_" + name for name in app["needs"][node["name"]]]
        entry = "begin_" + node["name"] if node["type"] == "loop" else "do_" + node["name"]
        builder.add_edge(START if not before else before[0] if len(before) == 1 else before, entry)
    builder.add_edge("do_" + app["output"], END)
    return builder.compile()


def _add_loop(builder: Any, loop: Json, chats: Chats) -> None:
    """Add a loop whose body is a line of nodes."""
    line = ["do_" + one["name"] for one in loop["body"]]
    builder.add_node("begin_" + loop["name"], copies(loop["begins"], loop["state"]))
    for name, one in zip(line, loop["body"], strict=True):
        builder.add_node(name, asks(one, chats) if one["type"] == "ask" else uses(one))
    builder.add_node("again_" + loop["name"], copies(loop["next"], loop["state"]))
    builder.add_node("do_" + loop["name"], copies(loop["next"], loop["name"]))
    builder.add_edge("begin_" + loop["name"], line[0])
    builder.add_edge("again_" + loop["name"], line[0])
    for name, following in itertools.pairwise(line):
        builder.add_edge(name, following)
    count = loop["until"] + "_used"

    def where(state: Json) -> str:
        return f"{'do' if state[count] >= loop['times'] else 'again'}_{loop['name']}"

    builder.add_conditional_edges(line[-1], where, ["do_" + loop["name"], "again_" + loop["name"]])


async def carry(order: Json) -> list[Json]:
    """Carry out all applications, each from its time on."""
    clients = {url: chat_of(order, url) for app in order["apps"] for url in app["urls"]}
    turns = {tuple(app["urls"]): itertools.cycle([clients[url] for url in app["urls"]]) for app in order["apps"]}
    graphs = [graph_of(app, turns[tuple(app["urls"])]) for app in order["apps"]]
    for chat in clients.values():  # connections are open and code is warm, as in a service that has run for a while
        await chat.ainvoke("Say hello.", extra_body={"max_tokens": 4})
        await asyncio.gather(*(chat.root_async_client.models.list() for _ in range(order["width"])))
    start = time.monotonic()

    async def one(app: Json, graph: Any) -> Json:
        await asyncio.sleep(start + app["at"] - time.monotonic())
        told: Json = {"app": app["name"], "began": time.monotonic() - start, "ended": None, "text": "", "problem": ""}
        try:
            state = await graph.ainvoke({}, config={"recursion_limit": RECURSION_LIMIT})
            told["text"], told["ended"] = state[app["output"]], time.monotonic() - start
        except Exception as error:  # noqa: BLE001 - the report's reader is to know
            told["problem"] = repr(error)[:300]
        return told

    return await asyncio.gather(*(one(app, graph) for app, graph in zip(order["apps"], graphs, strict=True)))


def main() -> None:
    """Read, carry out, tell."""
    apps = asyncio.run(carry(json.load(sys.stdin)))
    versions = {name: importlib.metadata.version(name) for name in ("langgraph", "langchain-openai")}
    json.dump({"apps": apps, "versions": versions}, sys.stdout)


if __name__ == "__main__":
    main()
