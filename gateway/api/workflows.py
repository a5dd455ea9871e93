"""Workflows on the data port: submit, look at, follow, set, cancel, resume. The wire is docs/reference/workflows.md."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Query, Request, Response

from core.chat import Endpoint
from core.errors import Draining, InvalidJson, InvalidRequest, Unavailable, UnknownId
from core.workflows import RunRecord, RunState
from gateway.api.common import read_body
from gateway.api.runs_shapes import frame_of, frame_of_outcome, path_of, run_of, settles, summary_of, variable_of
from gateway.api.streaming import event_stream
from gateway.auth import Principal
from gateway.ceilings import check_depth
from gateway.runs.critical import CriticalPath, Ended, critical_path
from gateway.runs.history import Appended, History
from gateway.runs.live import LiveRun
from gateway.runs.service import is_large
from gateway.runs.work import check_schema
from gateway.services import Services
from gateway.tracing import SUBMITTER
from semantic_vars import drawing, prefixes
from semantic_vars.calls import Call, Criteria, Embed, Given, Llm, Workflow, within
from semantic_vars.events import Put
from semantic_vars.graph import USUAL, Node, Reader
from semantic_vars.values import Value
from semantic_vars.variable import Outcome

_DEPTH = 64
_LONGEST_WAIT_S = 120.0
_LONGEST_DEADLINE_MS = 86_400_000
_LONGEST_END_S = 5.0  # how long a cancelled run may take to end before whoever cancels it is answered
_POLL_S = 0.5  # a run that another gateway has is read from the database, and whether we shut down is looked at
_Draw = Callable[[Sequence[Node], Mapping[str, str], frozenset[str]], str | bytes]
_DRAWN: Mapping[str, tuple[_Draw, str]] = {
    "json": (lambda *drawn: msgspec.json.encode(drawing.as_json(*drawn)), "application/json"),
    "mermaid": (drawing.mermaid, "text/vnd.mermaid"),
    "svg": (drawing.svg, "image/svg+xml"),
}
_INERT = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'",
    "x-content-type-options": "nosniff",
}


class _More(msgspec.Struct, forbid_unknown_fields=True):
    calls: tuple[Call, ...] = ()
    variables: dict[str, Given] = {}
    outputs: tuple[str, ...] = ()


class _Which(msgspec.Struct, forbid_unknown_fields=True):
    calls: tuple[str, ...] = ()


class _Edited(msgspec.Struct, forbid_unknown_fields=True):
    workflow: Workflow | None = None


class _Setting(msgspec.Struct, forbid_unknown_fields=True):
    value: Value = None
    error: str | None = None


class _Workflows:
    """The handlers. Each needs a tenant's key, and another tenant's ids are unknown to it."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._runs = services.runs

    def _identify(self, request: Request) -> Principal:
        return self._services.directory.keyring.identify(dict(request.scope["headers"]), self._services.clock.wall())

    async def _body_of(self, request: Request, principal: Principal, kind: Any) -> Any:
        limit = min(self._services.settings.server.max_body, principal.tenant_spec.ceilings.body)
        raw = await read_body(request, limit)
        check_depth(raw, _DEPTH)
        try:
            return msgspec.json.decode(raw or b"{}", type=kind)
        except msgspec.ValidationError as error:
            raise InvalidRequest(str(error)) from None
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            raise InvalidJson(f"the body is not valid JSON: {str(error)[:200]}") from None

    async def submit(self, request: Request) -> Response:
        """Submit a workflow: 202 once it is durable."""
        principal = self._identify(request)
        workflow: Workflow = await self._body_of(request, principal, Workflow)
        _check_calls(principal, workflow.calls)
        SUBMITTER.set(dict(request.scope["headers"]).get(b"traceparent"))
        record = await self._runs.submit(
            principal,
            workflow,
            end_user=request.headers.get("x-forebay-end-user"),
            idempotency=request.headers.get("idempotency-key"),
        )
        lint = await asyncio.to_thread(_lint, workflow) if is_large(workflow) else _lint(workflow)
        return _json({**run_of(record, History(workflow)), "lint": lint}, 202)

    async def search(
        self,
        request: Request,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        after: str | None = None,
        state: RunState | None = None,
    ) -> Response:
        """List the tenant's runs, newest first."""
        principal = self._identify(request)
        last = None
        if after is not None:
            found = await self._runs.find(principal, after)
            record = found.record if isinstance(found, LiveRun) else found[0]
            last = (record.created_at, record.id)
        page = await self._runs.search(principal, state=state, after=last, limit=limit)
        data = [summary_of(record) for record in page]
        return _json({"object": "list", "data": data, "has_more": len(page) == limit})

    async def show(self, run: str, request: Request, critical_path: bool = False) -> Response:
        """Return a run's state, variables and usage, and if it is asked for what determined how long it took."""
        found = await self._runs.find(self._identify(request), run)
        told = _told(found)
        if critical_path:
            path = await asyncio.to_thread(_path, *_known(found))
            told["critical_path"] = path_of(path) if path is not None else None
        return _json(told)

    async def append(self, run: str, request: Request) -> Response:
        """Append calls and variables to a run."""
        principal = self._identify(request)
        more: _More = await self._body_of(request, principal, _More)
        _check_calls(principal, more.calls)
        key = request.headers.get("idempotency-key")
        appended = Appended(more.calls, more.variables, more.outputs, key)
        live = await self._runs.ask(principal, run, lambda live: live.append(appended))
        await live.durable()
        return _json(_told(live), 202)

    async def cancel(self, run: str, request: Request) -> Response:
        """Cancel calls of a run, or all of it."""
        principal = self._identify(request)
        which: _Which = await self._body_of(request, principal, _Which)
        found: LiveRun | tuple[RunRecord, History] = await self._runs.find(principal, run)
        if _seen(found)[1].state == "running":
            asked = await self._runs.ask(principal, run, lambda live: live.cancel(which.calls))
            await asked.durable()
            found = asked
            if not which.calls:
                with suppress(TimeoutError):
                    async with asyncio.timeout(_LONGEST_END_S):
                        found = await self._ended(found, principal, run)
        return _json(_told(found))

    async def _ended(
        self, found: LiveRun | tuple[RunRecord, History], principal: Principal, run: str
    ) -> LiveRun | tuple[RunRecord, History]:
        """Wait until what was aborted has said what it has used, and the run has ended."""
        while _seen(found)[1].state == "running":
            found = await self._later(found, principal, run)
        return found

    async def _later(
        self, found: LiveRun | tuple[RunRecord, History], principal: Principal, run: str
    ) -> LiveRun | tuple[RunRecord, History]:
        """Return the run as it is once something has happened, or might have. Raises ``Draining`` when we shut down:
        whoever waits had better ask another gateway, or the next one."""
        if self._services.chat.is_draining:
            raise Draining("the server is shutting down; ask again", retry_after=1.0)
        if isinstance(found, LiveRun) and not found.is_gone:
            with suppress(TimeoutError):
                async with asyncio.timeout(_POLL_S):
                    await found.following.changed()
            return found
        await asyncio.sleep(_POLL_S)
        return await self._runs.find(principal, run)

    async def resume(self, run: str, request: Request) -> Response:
        """Run a workflow again, or an edited one, without the calls whose inputs are the same and that went well."""
        principal = self._identify(request)
        edited: _Edited = await self._body_of(request, principal, _Edited)
        record, history = _seen(await self._runs.find(principal, run))
        workflow = edited.workflow or history.whole()
        _check_calls(principal, workflow.calls)
        SUBMITTER.set(dict(request.scope["headers"]).get(b"traceparent"))
        again = await self._runs.submit(
            principal,
            workflow,
            end_user=record.end_user,
            idempotency=request.headers.get("idempotency-key"),
            facts=history.facts_of_successes(),
        )
        return _json(run_of(again, History(workflow)), 202)

    async def graph(self, run: str, request: Request, format: str = "json") -> Response:
        """Draw a run's graph."""
        found = await self._runs.find(self._identify(request), run)
        if (drawn := _DRAWN.get(format)) is None:
            raise InvalidRequest(f"`format` has to be one of {', '.join(_DRAWN)}", param="format")
        draw, media_type = drawn
        picture = await asyncio.to_thread(_drawn, draw, *_known(found), _states(found))
        return Response(picture, headers=_INERT, media_type=media_type)

    async def events(self, run: str, request: Request, after: int | None = None, variables: str = "") -> Response:
        """Follow a run."""
        found = await self._runs.find(self._identify(request), run)
        last = after if after is not None else _last_id(request)
        names = tuple(name for name in variables.split(",") if name)
        return event_stream(_frames(found, run, last, names, self._services))

    async def stream(self, variable: str, request: Request, after: int | None = None) -> Response:
        """Follow one variable."""
        principal = self._identify(request)
        run, name = _parts(variable)
        found = await self._wanted(principal, run, name, "latency")
        if (outcome := _seen(found)[1].outcome(name)) is not None:  # its event may be behind us, or there was none
            return event_stream(_once(frame_of_outcome(name, outcome)))
        last = after if after is not None else _last_id(request)
        return event_stream(_frames(found, run, last, (name,), self._services, ends_with=name))

    async def _wanted(
        self, principal: Principal, run: str, name: str, criteria: Criteria, deadline_s: float | None = None
    ) -> LiveRun | tuple[RunRecord, History]:
        found = await self._runs.find(principal, run)
        record, history = _seen(found)
        if name not in history.names():
            raise UnknownId(f"the run {run[:64]!r} has no variable {name[:64]!r}")
        if history.outcome(name) is not None:
            return found
        try:
            return await self._runs.ask(principal, run, lambda live: live.want(name, criteria, deadline_s))
        except Unavailable:
            if record.state == "running" and not isinstance(found, LiveRun):
                return found  # another gateway has it and does not answer: what is there can be read all the same
            raise

    async def value(
        self,
        variable: str,
        request: Request,
        criteria: Criteria = "latency",
        deadline_ms: Annotated[float | None, Query(gt=0, le=_LONGEST_DEADLINE_MS)] = None,
        wait: Annotated[float, Query(ge=0, le=_LONGEST_WAIT_S)] = 0.0,
    ) -> Response:
        """Return a variable, which is wanted from now on, within ``deadline_ms`` if that is given; 202 while it has no
        value."""
        principal = self._identify(request)
        run, name = _parts(variable)
        deadline_s = deadline_ms / 1000 if deadline_ms is not None else None
        found = await self._wanted(principal, run, name, criteria, deadline_s)
        outcome = _seen(found)[1].outcome(name)
        if outcome is None and wait:
            with suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    outcome = await self._outcome(found, principal, run, name)
        return _json(variable_of(run, name, outcome), 202 if outcome is None else 200)

    async def _outcome(
        self, found: LiveRun | tuple[RunRecord, History], principal: Principal, run: str, name: str
    ) -> Outcome:
        while True:
            _, history = _seen(found)
            if (outcome := history.outcome(name)) is not None:
                return outcome
            found = await self._later(found, principal, run)

    async def put(self, variable: str, request: Request) -> Response:
        """Set an open variable, or what a tool of the client's came to."""
        principal = self._identify(request)
        run, name = _parts(variable)
        setting: _Setting = await self._body_of(request, principal, _Setting)
        live = await self._runs.ask(principal, run, lambda live: live.put(Put(name, setting.value, setting.error)))
        await live.durable()
        fact = live.told.facts.get(name)  # which there is of an element of a map too
        return _json(variable_of(run, name, fact.outcome if fact is not None else None))


def workflow_routes(services: Services) -> APIRouter:
    """Return the routes."""
    router = APIRouter(tags=["workflows"])
    handlers = _Workflows(services)
    router.add_api_route("/v1/workflows", handlers.submit, methods=["POST"], status_code=202)
    router.add_api_route("/v1/workflows", handlers.search, methods=["GET"])
    router.add_api_route("/v1/workflows/{run}", handlers.show, methods=["GET"])
    router.add_api_route("/v1/workflows/{run}/calls", handlers.append, methods=["POST"], status_code=202)
    router.add_api_route("/v1/workflows/{run}/cancel", handlers.cancel, methods=["POST"])
    router.add_api_route("/v1/workflows/{run}/resume", handlers.resume, methods=["POST"], status_code=202)
    router.add_api_route("/v1/workflows/{run}/graph", handlers.graph, methods=["GET"])
    router.add_api_route("/v1/workflows/{run}/events", handlers.events, methods=["GET"])
    router.add_api_route("/v1/variables/{variable:path}/stream", handlers.stream, methods=["GET"])
    router.add_api_route("/v1/variables/{variable:path}", handlers.value, methods=["GET"])
    router.add_api_route("/v1/variables/{variable:path}", handlers.put, methods=["PUT"])
    return router


def _lint(workflow: Workflow) -> list[str]:
    """Return what is to be said of prompts whose order keeps them from being shared."""
    nodes = Reader(USUAL).nodes(workflow.calls, frozenset(workflow.variables))
    forms = [(node.call.id, node.form) for node in nodes if isinstance(node.call, Llm)]
    return [f"call {name!r}: {told}" for name, form in forms if (told := prefixes.lint(form)) is not None]


def _check_calls(principal: Principal, calls: tuple[Call, ...]) -> None:
    """Raise for calls of endpoints that the key may not use, and for schemas that nothing can be checked by."""
    for call in (inner for one in calls for inner in within(one)):
        if isinstance(call, Embed):
            principal.check_endpoint(Endpoint.EMBEDDINGS)
        elif isinstance(call, Llm):
            principal.check_endpoint(Endpoint.CHAT if "messages" in call.request else Endpoint.COMPLETIONS)
        if isinstance(call, Llm) and call.schema is not None:
            try:
                check_schema(call.schema)
            except InvalidRequest as error:
                raise InvalidRequest(f"call {call.id!r}: {error.message}") from None


def _json(body: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(body), status, media_type="application/json")


def _seen(found: LiveRun | tuple[RunRecord, History]) -> tuple[RunRecord, History]:
    return (found.record, found.told) if isinstance(found, LiveRun) else found


def _told(found: LiveRun | tuple[RunRecord, History]) -> dict[str, Any]:
    return run_of(*_seen(found), len(_underway(found)))


def _underway(found: LiveRun | tuple[RunRecord, History]) -> tuple[str, ...]:
    return found.underway if isinstance(found, LiveRun) else ()


def _known(found: LiveRun | tuple[RunRecord, History]) -> tuple[Workflow, Ended]:
    """Return what a run is and how it has gone so far; for another thread, while it goes on in this one."""
    record, history = _seen(found)
    return history.whole(), Ended.of(history, record.created_at)


def _states(found: LiveRun | tuple[RunRecord, History]) -> dict[str, str]:
    """Return the states of calls by their paths. Of a map there is the state of the whole once it has ended, and until
    then those of its elements that are under way."""
    _, history = _seen(found)
    states = dict.fromkeys(_underway(found), "running")
    states |= dict.fromkeys((one.call for one in history.waiting.values()), "waiting")
    return states | {path: end.state.value for path, end in history.ends.items()}


def _nodes(whole: Workflow) -> tuple[Node, ...]:
    return Reader(USUAL).nodes(whole.calls, frozenset(whole.variables))


def _path(whole: Workflow, ended: Ended) -> CriticalPath | None:
    return critical_path(_nodes(whole), ended)


def _drawn(draw: _Draw, whole: Workflow, ended: Ended, states: Mapping[str, str]) -> str | bytes:
    nodes = _nodes(whole)
    path = critical_path(nodes, ended)
    critical = frozenset(step.call for step in path.steps) if path is not None else frozenset[str]()
    return draw(nodes, states, critical)


def _parts(variable: str) -> tuple[str, str]:
    run, dot, name = variable.partition(".")
    if not dot:
        raise UnknownId(f"there is no variable {variable[:64]!r}; its id is that of the run, a dot, and its name")
    return run, name


def _last_id(request: Request) -> int:
    given = request.headers.get("last-event-id", "0")
    return int(given) if given.isascii() and given.isdigit() and len(given) < 10 else 0


async def _once(frame: bytes) -> AsyncGenerator[bytes, None]:
    yield frame


async def _frames(
    found: LiveRun | tuple[RunRecord, History],
    run: str,
    after: int,
    names: tuple[str, ...],
    services: Services,
    *,
    ends_with: str | None = None,
) -> AsyncGenerator[bytes, None]:
    """Yield events as frames, until the run ends, or one settles the variable ``ends_with``."""
    source = services.runs.follow(found, after)
    with services.metrics.runs.watching():
        async with aclosing(source):
            async for event in source:
                if (frame := frame_of(event, run, names)) is not None:
                    yield frame
                if ends_with is not None and settles(event, ends_with):
                    return
