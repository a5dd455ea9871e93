"""Clients that carry out applications themselves, call by call: what people write without a workflow server.

``good`` is the best that can be written by hand: asyncio, connections kept open and warmed, as many requests at a time
as the graph allows, each sent in the moment in which its last input is there. ``sequential`` makes an application's
calls one after the other. Both try again what was refused or broken off, as OpenAI's clients do. Answers of
applications come whole; those of chats are streamed.
"""

import asyncio
import contextlib
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import aiohttp
import msgspec

from benchmarks.dataflow.seen import Done, Said, Seen, digest
from benchmarks.dataflow.workloads import App, Ask, Chat, Loop, Node, Tool, Workload, needs, rendered

CHAT = "/v1/chat/completions"
TRIES = 3
FIRST_WAIT_S = 0.5  # as OpenAI's clients; doubled each time
RETRIED = (408, 409, 429, 500, 502, 503, 504)

Placing = Literal["round_robin", "affinity"]


@dataclass(frozen=True)
class Target:
    """Where requests go: one address, or several to choose from. ``chat_more``: what chats say besides their own."""

    urls: tuple[str, ...]
    model: str
    key: str = ""
    chat_more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def headers(self) -> dict[str, str]:
        """Headers of every request."""
        return {"authorization": f"Bearer {self.key}"} if self.key else {}


class Hands(Protocol):
    """Does what a graph's nodes stand for."""

    async def ask(self, node: Ask, text: str) -> str:
        """Return the model's answer."""

    async def use(self, tool: Tool, text: str) -> None:
        """Use a tool on a text."""


async def carried_out(
    nodes: Sequence[Node], known: Mapping[str, str], hands: Hands, *, at_once: bool
) -> dict[str, str]:
    """Carry out nodes over known values, and return all values. ``at_once``: each as soon as it can be; or in order."""
    values = dict(known)
    if not at_once:
        for node in nodes:
            values[node.name] = await _value(node, values, hands, at_once=False)
        return values
    tasks: dict[str, asyncio.Task[str]] = {}

    async def one(node: Node) -> str:
        inputs = {name: known[name] if name in known else await tasks[name] for name in needs(node)}
        return await _value(node, inputs, hands, at_once=True)

    async with asyncio.TaskGroup() as group:
        for node in nodes:
            tasks[node.name] = group.create_task(one(node))
    return values | {name: task.result() for name, task in tasks.items()}


async def _value(node: Node, values: Mapping[str, str], hands: Hands, *, at_once: bool) -> str:
    match node:
        case Ask():
            return await hands.ask(node, rendered(node.prompt, dict(values)))
        case Tool():
            await hands.use(node, values[node.of])
            return values[node.of]
        case Loop():
            return await _looped(node, values, hands, at_once=at_once)


async def _looped(loop: Loop, values: Mapping[str, str], hands: Hands, *, at_once: bool) -> str:
    state = values[loop.begins]
    for _ in range(loop.times):  # then the tool is content
        inner = await carried_out(loop.body, {**values, loop.state: state}, hands, at_once=at_once)
        state = inner[loop.next]
    return state


class _Message(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    message: _Message = msgspec.field(default_factory=_Message)


class _Answer(msgspec.Struct):
    choices: list[_Choice]


class _Delta(msgspec.Struct):
    content: str | None = None


class _StreamChoice(msgspec.Struct):
    delta: _Delta = msgspec.field(default_factory=_Delta)


class _Event(msgspec.Struct):
    choices: list[_StreamChoice] = []
    error: Any = None


class RequestFailed(Exception):
    """A request was not answered; the message says how."""


def body_of(target: Target, system: str, text: str, tokens: int) -> dict[str, Any]:
    """Return a request's body: greedy, and exactly so many tokens."""
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": text})
    fixed = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    return {"model": target.model, "messages": messages, **fixed}


@dataclass(frozen=True)
class _Worker:
    """One application's hands. ``first``: which of the addresses its requests go to; None: in turn."""

    http: aiohttp.ClientSession
    target: Target
    first: int | None
    turn: Callable[[], int]
    more: Mapping[str, Any]

    async def ask(self, node: Ask, text: str) -> str:
        body = body_of(self.target, node.system, text, node.tokens) | dict(self.more)
        payload = msgspec.json.encode(body)
        where = self.turn() if self.first is None else self.first
        wait_s = FIRST_WAIT_S
        for attempt in range(1, TRIES + 1):
            url = self.target.urls[(where + max(0, attempt - 2)) % len(self.target.urls)]
            try:
                async with self.http.post(url + CHAT, data=payload) as response:
                    raw = await response.read()
                if response.status == 200:
                    return msgspec.json.decode(raw, type=_Answer).choices[0].message.content or ""
                problem = f"{response.status} {raw[:200].decode('utf-8', 'replace')}"
                if response.status not in RETRIED:
                    break
            except aiohttp.ClientError as error:
                problem = repr(error)
                if attempt == 1:  # most likely a connection that was kept open, and closed at the other end
                    continue
            if attempt < TRIES:
                await asyncio.sleep(wait_s)
                wait_s *= 2
        raise RequestFailed(problem)

    async def use(self, tool: Tool, text: str) -> None:
        await asyncio.sleep(tool.seconds)


@contextlib.asynccontextmanager
async def pooled(target: Target, connections: int) -> AsyncIterator[aiohttp.ClientSession]:
    """Yield a client with so many connections open to every address already: a service that has run for a while."""
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=600)
    headers = {"content-type": "application/json", **target.headers}
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers) as http:

        async def knock(url: str) -> None:
            async with http.get(url + "/v1/models") as response:
                await response.read()

        await asyncio.gather(*(knock(url) for url in target.urls for _ in range(connections)))
        yield http


def width_of(workload: Workload) -> int:
    """Return how many connections a client keeps open: as many as calls can be made at a time, up to 64."""
    return min(64, sum(len(app.nodes) for app in workload.apps) + len(workload.chats))


async def play(
    workload: Workload, target: Target, *, at_once: bool = True, placing: Placing = "round_robin",
    labels: Callable[[App], Mapping[str, Any]] = lambda app: {},
) -> Seen:  # fmt: skip
    """Carry out all applications and chats, each from its time on. ``labels``: what requests of an application say."""
    turns = 0

    def turn() -> int:
        nonlocal turns
        turns += 1
        return turns

    async with pooled(target, width_of(workload)) as http:

        async def carry(app: App) -> str:
            first = zlib.crc32(app.session.encode()) if placing == "affinity" else None
            worker = _Worker(http, target, first, turn, labels(app))
            return (await carried_out(app.nodes, {}, worker, at_once=at_once))[app.output]

        return await timed(workload, carry, lambda chat, said, start: talk(http, target, chat, said, start))


async def timed(
    workload: Workload,
    carry: Callable[[App], Awaitable[str]],
    speak: Callable[[Chat, Said, float], Awaitable[None]],
) -> Seen:
    """Start every application and chat at its time, and return what became of them."""
    start = time.monotonic()
    apps = [Done(app.name, app.at) for app in workload.apps]
    chats = [Said(chat.at) for chat in workload.chats]

    async def application(app: App, done: Done) -> None:
        await asyncio.sleep(start + app.at - time.monotonic())
        done.began = time.monotonic() - start
        try:
            done.text = digest(await carry(app))
            done.ended = time.monotonic() - start
        except* (RequestFailed, aiohttp.ClientError) as group:
            done.problem = str(_first(group))[:300]

    async def conversation(chat: Chat, said: Said) -> None:
        await asyncio.sleep(start + chat.at - time.monotonic())
        said.asked = time.monotonic() - start
        try:
            await speak(chat, said, start)
        except (RequestFailed, aiohttp.ClientError) as error:
            said.problem = repr(error)[:300]

    async with asyncio.TaskGroup() as tasks:
        for app, done in zip(workload.apps, apps, strict=True):
            tasks.create_task(application(app, done))
        for chat, said in zip(workload.chats, chats, strict=True):
            tasks.create_task(conversation(chat, said))
    return Seen(apps, chats)


def _first(error: BaseException) -> BaseException:
    return _first(error.exceptions[0]) if isinstance(error, BaseExceptionGroup) else error


async def talk(http: aiohttp.ClientSession, target: Target, chat: Chat, said: Said, start: float) -> None:
    """Ask for one streamed answer, and note when its first and last token came. Raises ``RequestFailed``."""
    body = body_of(target, "", chat.prompt, chat.tokens) | dict(target.chat_more) | {"stream": True}
    url = target.urls[zlib.crc32(chat.prompt.encode()) % len(target.urls)]
    async with http.post(url + CHAT, data=msgspec.json.encode(body)) as response:
        if response.status != 200:
            raise RequestFailed(f"{response.status} {(await response.text())[:200]}")
        async for line in response.content:
            if line.startswith(b"data: [DONE]"):
                said.ended = time.monotonic() - start
            elif line.startswith(b"data: "):
                event = msgspec.json.decode(line[6:], type=_Event)
                if event.error is not None:
                    raise RequestFailed(str(event.error))
                if said.first is None and event.choices and event.choices[0].delta.content:
                    said.first = time.monotonic() - start
    if said.ended is None:
        raise RequestFailed("the stream ended without [DONE]")
