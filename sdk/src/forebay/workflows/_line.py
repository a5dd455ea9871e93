"""All that is said between one run and the gateway: requests about it, and what it tells."""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import fields
from typing import Any
from urllib.parse import quote

import httpx

from forebay import _wire
from forebay._errors import BadRequest, Conflict, MalformedAnswer
from forebay.events import (
    Event,
    RunAppended,
    RunCancelled,
    RunDone,
    RunFailed,
    RunSkipped,
    VarCancelled,
    VarDone,
    VarFailed,
    VarSkipped,
)
from forebay.workflows._feed import Send, Told, follow
from forebay.workflows._options import CriticalPath, RunStatus, Step
from forebay.workflows._var import Criteria

_WAIT_S = 30
_MOST_WAITING = 50  # at a time: the connections are for other things too
_WAIT_AMONG_MANY_S = 1
_SHORTEST_WAIT_S = 0.2  # between two questions, where the gateway answers before the time

_RUN_ENDS = (RunDone, RunFailed, RunSkipped, RunCancelled)
_OF_STEP = tuple(field.name for field in fields(Step))
_SUMS = tuple(field.name for field in fields(CriticalPath) if field.name != "steps")
_VAR_ENDS = (VarDone, VarFailed, VarSkipped, VarCancelled)


class Line:
    """The requests of one run. ``run`` is its id, once it has been submitted; nothing else can be asked before.

    ``num_sent`` and ``num_appended``: how often calls were appended, with and without what is still on its way.
    """

    def __init__(self, send: Send, max_retries: int) -> None:
        self.run: str | None = None
        self.num_sent = 0
        self.num_appended = 0
        self._send = send
        self._max_retries = max_retries
        self._asking = asyncio.Semaphore(_MOST_WAITING)
        self._num_waiting = 0

    async def submit(self, body: Mapping[str, Any], key: str, resume: str | None) -> None:
        """Begin the run, or with ``resume`` another time of that one; with the same key it begins once."""
        if resume is None:
            told = await self._post("v1/workflows", dict(body), key)
        else:
            told = await self._post(f"v1/workflows/{quote(resume, safe='')}/resume", {"workflow": body}, key)
        if not isinstance(run := told.get("id"), str):
            raise MalformedAnswer("the answer to a workflow has no id")
        self.run = run

    async def append(self, body: Mapping[str, Any], key: str, names: Sequence[str]) -> None:
        """Add calls and variables of these names to the run."""
        self.num_sent += 1  # it may be told as an event before it is answered
        try:
            await self._append(body, key, names)
            self.num_appended += 1
        finally:
            self.num_sent = self.num_appended

    async def _append(self, body: Mapping[str, Any], key: str, names: Sequence[str]) -> None:
        try:
            await self._post(self._workflow("/calls"), dict(body), key)
        except (BadRequest, Conflict):
            # Names are given once: what is there already is what arrived at a try whose answer was lost.
            if not (await self.status()).variables.keys() >= set(names):
                raise

    async def status(self) -> RunStatus:
        """Return where the run is."""
        told = _object(await self._get(self._workflow()))
        variables = {name: str(variable.get("state")) for name, variable in told.get("variables", {}).items()}
        calls = {name: count for name, count in (told.get("calls") or {}).items() if count}
        return RunStatus(str(self.run), str(told.get("state")), variables, told.get("usage") or {}, calls)

    async def critical_path(self) -> CriticalPath | None:
        """Return what determined how long the run has taken; None while nothing has ended."""
        told = _object(await self._get(self._workflow(), {"critical_path": "true"})).get("critical_path")
        if told is None:
            return None
        try:
            sums = {name: told[name] for name in _SUMS}
            steps = tuple(Step(**{name: step[name] for name in _OF_STEP}) for step in told["calls"])
            return CriticalPath(steps, **sums)
        except (KeyError, TypeError) as error:
            raise MalformedAnswer(f"the critical path of run {self.run} lacks something: {error!r}") from error

    async def graph(self, format: str) -> str:
        """Return a drawing of the graph."""
        return (await self._get(self._workflow("/graph"), {"format": format})).text

    async def cancel(self, calls: Sequence[str]) -> None:
        """Cancel these calls and what only they need; with none, the run."""
        body = {"calls": list(calls)} if calls else {}
        await self._ask(_wire.Call("POST", self._workflow("/cancel"), body, is_repeatable=True))

    async def put(self, variable: str, value: Any) -> None:
        """Set a variable that is open, or the result of a tool. Raises ``Conflict`` if it is set."""
        await self._ask(_wire.Call("PUT", self._variable(variable), {"value": value}, is_repeatable=True))

    async def fail(self, variable: str, message: str) -> None:
        """Say that a variable will have no value, and why."""
        await self._ask(_wire.Call("PUT", self._variable(variable), {"error": message}, is_repeatable=True))

    async def resolved(self, variable: str, criteria: Criteria) -> dict[str, Any]:
        """Return what became of a variable, when it has: its ``state``, and its ``value`` or ``error``."""
        loop = asyncio.get_running_loop()
        self._num_waiting += 1
        try:
            while True:
                async with self._asking:
                    asked = loop.time()
                    wait = _WAIT_S if self._num_waiting <= _MOST_WAITING else _WAIT_AMONG_MANY_S
                    response = await self._get(self._variable(variable), {"criteria": criteria, "wait": wait})
                if response.status_code != 202:
                    return _object(response)
                if loop.time() - asked < _SHORTEST_WAIT_S:
                    await asyncio.sleep(_SHORTEST_WAIT_S)
        finally:
            self._num_waiting -= 1

    def events(self, variables: Sequence[str] = (), *, num_seen: int = 0, after: int = 0) -> AsyncGenerator[Told, None]:
        """Yield what happens to the run behind a number, or to these variables, until it ends for the last time.

        ``num_seen``: how often calls had been appended until that number.
        """

        def ends(event: Event) -> bool:
            nonlocal num_seen
            num_seen += isinstance(event, RunAppended)
            return isinstance(event, _RUN_ENDS) and num_seen >= self.num_sent

        params = {"variables": ",".join(variables)} if variables else {}
        return follow(self._send, self._workflow("/events"), params, self._max_retries, after=after, ends=ends)

    def events_of(self, variable: str) -> AsyncGenerator[Told, None]:
        """Yield what happens to one variable, until it ends."""

        def ends(event: Event) -> bool:
            return isinstance(event, _VAR_ENDS) and event.variable == variable

        return follow(self._send, f"{self._variable(variable)}/stream", {}, self._max_retries, ends=ends)

    def _workflow(self, rest: str = "") -> str:
        return f"v1/workflows/{self.run}{rest}"

    def _variable(self, name: str) -> str:
        return f"v1/variables/{quote(f'{self.run}.{name}', safe='')}"

    async def _post(self, path: str, body: dict[str, Any], key: str) -> dict[str, Any]:
        headers = {"idempotency-key": key}
        return _object(await self._ask(_wire.Call("POST", path, body, headers=headers, is_repeatable=True)))

    async def _get(self, path: str, params: Mapping[str, str | int] | None = None) -> httpx.Response:
        call = _wire.Call("GET", path, params=params, is_repeatable=True, silence=2.0 * _WAIT_S)
        return await self._ask(call)

    async def _ask(self, call: _wire.Call) -> httpx.Response:
        response = await self._send(call)
        try:
            await response.aread()
        except httpx.TransportError as error:
            raise _wire.connection_error(error) from error
        return response


def _object(response: httpx.Response) -> dict[str, Any]:
    try:
        told = response.json()
    except ValueError as error:
        raise MalformedAnswer(f"{response.url} did not answer with JSON") from error
    if not isinstance(told, dict):
        raise MalformedAnswer(f"{response.url} did not answer with an object")
    return told
