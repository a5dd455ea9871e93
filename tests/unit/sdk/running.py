"""A gateway that runs workflows with the real executor behind ``httpx.MockTransport``; its model is a function."""

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any
from urllib.parse import unquote

import forebay
import httpx
import msgspec

from core.errors import Conflict, ForebayError, UnknownId
from semantic_vars.budget import Spent
from semantic_vars.calls import Call, Client, Workflow
from semantic_vars.events import (
    Abort,
    Append,
    Cancel,
    Done,
    Effect,
    Ended,
    Errand,
    Event,
    Failed,
    Put,
    Resolved,
    Retried,
    Start,
    Want,
    Work,
)
from semantic_vars.executor import Executor
from semantic_vars.variable import State

Engine = Callable[[Any], Any]
"""What a model answers to the body of a request, or a tool to its arguments; it raises ``ValueError`` to fail."""


class Guess:
    """Costs of calls."""

    def most(self, work: Work) -> Spent:
        return Spent(10, 0.1)

    def seconds(self, call: Call) -> float:
        return 1.0


def echo(body: Any) -> Any:
    """Answer with the prompt in brackets."""
    return f"[{body['messages'][-1]['content']}]"


class RunningGateway:
    """One run at a time. ``submitted`` are the bodies that were posted, ``asked`` all requests as ``METHOD path``.

    ``pieces``: into how many a text is cut; ``cuts``: after how many events a stream breaks, one for each connection.
    """

    def __init__(self, engine: Engine = echo, *, pieces: int = 2, cuts: Sequence[int] = ()) -> None:
        self.submitted: list[Any] = []
        self.asked: list[str] = []
        self.requests: list[httpx.Request] = []
        self.criteria: dict[str, str] = {}
        self.fails: deque[httpx.Response | Exception] = deque()
        self._engine = engine
        self._pieces = pieces
        self._cuts = list(cuts)
        self._executor: Executor | None = None
        self._outcomes: dict[str, dict[str, Any]] = {}
        self._events: list[tuple[int | None, str, dict[str, Any]]] = []
        self._number = 0
        self._news = asyncio.Event()
        self._is_over = False
        self._num_waiting = 0
        self.most_waiting = 0
        self.is_slow_to_answer = False

    @property
    def transport(self) -> httpx.MockTransport:
        """The network that leads here."""
        return httpx.MockTransport(self._answer)

    def client(self, **options: Any) -> forebay.AsyncClient:
        """Return a client of this gateway."""
        return forebay.AsyncClient("http://gw:1", api_key="k", transport=self.transport, **options)

    async def _answer(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        path = unquote(request.url.raw_path.decode().partition("?")[0]).removeprefix("/v1/")
        self.asked.append(f"{request.method} {path}")
        if self.fails and (step := self.fails.popleft()):
            if isinstance(step, Exception):
                raise step
            return step
        try:
            return await self._route(request, path)
        except ForebayError as error:
            status = 409 if isinstance(error, Conflict) else 404 if isinstance(error, UnknownId) else 400
            return httpx.Response(status, json={"error": {"message": error.message, "code": "told"}})

    async def _route(self, request: httpx.Request, path: str) -> httpx.Response:
        kind, _, rest = path.partition("/")
        if kind == "variables":
            name, stream = rest.removeprefix("run_1.").removesuffix("/stream"), rest.endswith("/stream")
            if request.method == "PUT":
                body = json.loads(request.content)
                self._on(Put(name, body.get("value"), body.get("error")))
                return httpx.Response(200, json={"state": "done"})
            self.criteria[name] = request.url.params.get("criteria", "latency")
            if self._executor is not None and self._executor.criteria(name) != "latency":
                self._on(Want(name, "latency"))
            return self._stream(request, (name,), name) if stream else await self._value(name)
        if rest == "":
            return self._begin(json.loads(request.content))
        match rest.partition("/")[2]:
            case "resume":
                return self._begin(json.loads(request.content)["workflow"])
            case "":
                return httpx.Response(200, json=self._status())
            case "calls":
                body = json.loads(request.content)
                self.submitted.append(body)
                more = msgspec.convert(body, Workflow)
                self._is_over = False
                self._tell("run.appended", {"run": "run_1", "calls": [call.id for call in more.calls]})
                self._on(Append(more.calls, more.variables))
                for _ in range(50 if self.is_slow_to_answer else 0):
                    await asyncio.sleep(0)
                return httpx.Response(202, json=self._status())
            case "events":
                names = tuple(name for name in request.url.params.get("variables", "").split(",") if name)
                return self._stream(request, names, None)
            case "cancel":
                self._on(Cancel(tuple(json.loads(request.content).get("calls", ()))))
                return httpx.Response(200, json=self._status())
            case "graph":
                return httpx.Response(200, text=f"a graph as {request.url.params['format']}")
        raise AssertionError(path)

    def _begin(self, body: Any) -> httpx.Response:
        self.submitted.append(body)
        workflow = msgspec.json.decode(json.dumps(body), type=Workflow)
        self._executor = Executor(workflow, Guess())
        self._tell("run.started", {"run": "run_1", "calls": [call.id for call in workflow.calls]})
        self._carry_out(self._executor.begin(0.0))
        return httpx.Response(202, json=self._status())

    def _status(self) -> dict[str, Any]:
        assert self._executor is not None
        names = self._executor._scope.variables
        variables = {name: self._outcomes.get(name, {"state": "pending"}) for name in names}
        state = "done" if self._is_over else "running"
        return {"id": "run_1", "state": state, "variables": variables, "usage": {"tokens": 7, "cost": 0.5}}

    async def _value(self, name: str) -> httpx.Response:
        self._num_waiting += 1
        self.most_waiting = max(self.most_waiting, self._num_waiting)
        while name not in self._outcomes:
            await self._changed()
        self._num_waiting -= 1
        return httpx.Response(200, json=self._outcomes[name])

    async def _changed(self) -> None:
        self._news.clear()
        await self._news.wait()

    def _on(self, event: Event) -> None:
        assert self._executor is not None
        self._carry_out(self._executor.on(event, 0.0))

    def _carry_out(self, effects: Sequence[Effect]) -> None:
        waiting = deque(effects)
        while waiting:
            match waiting.popleft():
                case Start() as start:
                    answer = self._made(start)
                    if answer is not None:
                        assert self._executor is not None
                        waiting.extend(self._executor.on(answer, 0.0))
                case Abort(call=call, epoch=epoch):
                    assert self._executor is not None
                    waiting.extend(
                        self._executor.on(Failed(call, epoch, "tool", "cancelled", "", can_retry=False), 0.0)
                    )
                case Retried() as again:
                    error = {"code": again.code, "message": again.message, "call": again.call}
                    self._tell("call.retried", {"call": again.call, "attempt": again.attempt + 1, "error": error})
                case Resolved(variable=name, outcome=outcome):
                    told: dict[str, Any] = {"state": outcome.state.value}
                    if outcome.state is State.DONE:
                        told["value"] = outcome.value
                    if outcome.failure is not None:
                        told["error"] = msgspec.to_builtins(outcome.failure)
                    self._outcomes[name] = told
                    self._tell(f"variable.{outcome.state.value}", {"variable": name, **told})
                case Ended(state=state):
                    self._is_over = True
                    self._tell(f"run.{state.value}", {"run": "run_1", "usage": {"tokens": 7}})

    def _made(self, start: Start) -> Event | None:
        work = start.work
        if isinstance(work, Errand) and isinstance(work.server, Client):
            told = {"call": start.call, "variable": start.call, "tool": work.server.tool, "arguments": work.arguments}
            self._tell("call.waiting", told)
            return None
        self._tell("call.started", {"call": start.call, "attempt": start.epoch}, is_kept=False)
        try:
            value = self._engine(work.arguments if isinstance(work, Errand) else work.body)
        except ValueError as error:
            return Failed(start.call, start.epoch, "engine", "engine_error", str(error))
        if isinstance(value, str):
            size = max(1, -(-len(value) // self._pieces))
            for at in range(0, len(value), size):
                delta = {"variable": start.call, "attempt": start.epoch, "text": value[at : at + size]}
                self._tell("variable.delta", delta, is_kept=False)
        return Done(start.call, start.epoch, value)

    # Events

    def _tell(self, name: str, data: dict[str, Any], *, is_kept: bool = True) -> None:
        self._number += is_kept
        self._events.append((self._number if is_kept else None, name, data))
        self._news.set()

    def _stream(self, request: httpx.Request, names: Sequence[str], variable: str | None) -> httpx.Response:
        after = int(request.headers.get("last-event-id", "0"))
        cut = self._cuts.pop(0) if self._cuts else None
        frames = self._frames(after, names, variable, cut)
        return httpx.Response(200, stream=_Stream(frames), headers={"content-type": "text/event-stream"})

    async def _frames(
        self, after: int, names: Sequence[str], variable: str | None, cut: int | None
    ) -> AsyncIterator[bytes]:
        yield b": hello\n\n"
        at = next((place + 1 for place, event in enumerate(self._events) if event[0] == after), 0) if after else 0
        num_told = 0
        while True:
            while at < len(self._events):
                number, name, data = self._events[at]
                at += 1
                if number is None and after:
                    continue  # pieces are not told again
                about = data.get("variable") or data.get("call")
                if names and about is not None and about.partition("[")[0] not in names:
                    continue
                if cut is not None and num_told == cut:
                    raise httpx.ReadError("cut")
                num_told += 1
                told = f"event: {name}\ndata: {json.dumps(data)}\n\n"
                yield (told if number is None else f"id: {number}\n{told}").encode()
                if name.startswith("variable.") and name != "variable.delta" and data["variable"] == variable:
                    return
            if self._is_over:
                return
            await self._changed()


class _Stream(httpx.AsyncByteStream):
    def __init__(self, frames: AsyncIterator[bytes]) -> None:
        self._frames = frames

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for frame in self._frames:
            yield frame
