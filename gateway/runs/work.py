"""Doing what the executor asks for: a call to a model, or a tool's."""

import asyncio
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import jsonschema_rs
import msgspec
import structlog

from core import chat
from core.chat import Class, Endpoint, Prefix, Role, Usage
from core.clock import Clock
from core.errors import ForebayError, InvalidRequest
from core.tenancy import PICO_PER_USD
from core.workflows import RunRecord
from gateway.auth import Principal
from gateway.runs.ahead import Ahead
from gateway.runs.calls import Caller
from gateway.tools import ToolFailed, Tools
from semantic_vars.budget import Spent
from semantic_vars.calls import Call, Criteria, Http, Llm, Mcp
from semantic_vars.events import Done, Errand, Failed, Prefill, Request, Start, Work
from semantic_vars.values import Value

_log = structlog.get_logger(__name__)

_ENDPOINTS = {"chat": Endpoint.CHAT, "completions": Endpoint.COMPLETIONS, "embeddings": Endpoint.EMBEDDINGS}
_CLASSES: dict[Criteria, Class] = {"latency": "interactive", "throughput": "standard"}
_LONGEST_STAGE = 128
_TOKENS_OF_ANSWER = 256  # where a request sets no limit
_BYTES_PER_TOKEN = 4
_SECONDS_PER_TOKEN = 0.02  # by which longer calls are told from shorter ones


class Worker:
    """Does the work of all runs. ``principal_of`` returns who a key's id is, and raises ``ForebayError`` for one that
    holds no longer; ``cost_of`` what so many tokens of a model cost, in picodollars; ``deduces`` whether the scheduler
    is to be told what the graph says of a call; ``prefills`` whether beginnings of prompts are computed ahead."""

    def __init__(
        self,
        caller: Caller,
        tools: Tools,
        principal_of: Callable[[str], Principal],
        cost_of: Callable[[str, Usage], int],
        clock: Clock,
        *,
        deduces: Callable[[], bool],
        prefills: Callable[[], bool],
    ) -> None:
        self._caller = caller
        self._tools = tools
        self._principal_of = principal_of
        self._cost_of = cost_of
        self._clock = clock
        self._deduces = deduces
        self._prefills = prefills
        self._ahead = Ahead(clock)

    @property
    def prefills(self) -> bool:
        """Whether beginnings of prompts are to be computed ahead."""
        return self._prefills()

    async def do(self, run: RunRecord, start: Start, on_text: Callable[[str], None]) -> Done | Failed:
        """Do what was started, and return how it ended; never raises, but for being cancelled."""
        spent = Spent()

        def on_spent(usage: Usage, cost: int) -> None:
            nonlocal spent
            spent = spent.plus(Spent(usage.prompt_tokens + usage.completion_tokens, cost / PICO_PER_USD))

        def failed(cause: Any, code: str, message: str, *, can_retry: bool) -> Failed:
            return Failed(start.call, start.epoch, cause, code, message, can_retry=can_retry, spent=spent)

        is_tool = isinstance(start.work, Errand)
        is_once = isinstance(start.work, Errand) and start.work.at_most_once
        try:
            async with asyncio.timeout(start.timeout_s):
                value = await self._value(run, start, on_text, on_spent)
        except asyncio.CancelledError:
            return failed("engine", "cancelled", "cancelled", can_retry=False)
        except TimeoutError:
            return failed(
                "timeout", "timeout", f"it took longer than {start.timeout_s or 0:g} s", can_retry=not is_once
            )
        except _Mismatch as error:
            return failed("schema", "schema", str(error), can_retry=True)
        except ToolFailed as error:
            return failed(error.cause, error.code, error.message, can_retry=error.can_retry and not is_once)
        except ForebayError as error:
            cause = "tool" if is_tool else "engine"
            return failed(cause, error.specific_code, error.message, can_retry=error.retryable)
        except Exception:  # noqa: BLE001 - the border of a call: whoever waits for it has to be told
            _log.exception("call_failed", run=run.id, call=start.call)
            return failed("engine", "internal", "an internal error; the log has the details", can_retry=not is_once)
        return Done(start.call, start.epoch, value, spent)

    async def _value(self, run: RunRecord, start: Start, on_text: Any, on_spent: Any) -> Value:
        principal = self._principal_of(run.key)
        if isinstance(work := start.work, Errand):
            assert isinstance(work.server, Http | Mcp)  # the client's own tools are not ours to use
            key = f"{run.id}/{start.call}"
            return await self._tools.run(work.server, work.arguments, key=key, timeout=start.timeout_s)
        deduces = self._deduces()
        call = self._caller.read(principal, _ENDPOINTS[work.endpoint], _body(run, start, work, deduces=deduces))
        if deduces:
            call = self._placed(run, start, work, call)

        def on_used(usage: Usage, cost: int) -> None:
            on_spent(usage, cost)
            self._ahead.used((run.id, start.call), call.model, usage)

        reply = await self._caller.make(principal, call, on_text=on_text, on_spent=on_used)
        if work.endpoint == "embeddings":
            vectors = [list(vector) for vector in reply.vectors]
            return vectors if isinstance(work.body.get("input"), list) else vectors[0]
        return reply.text if work.schema is None else _checked(reply.text, work.schema)

    async def prefill(self, run: RunRecord, ahead: Prefill) -> None:
        """Have an engine compute what a call's prompt begins with, if the budget allows it; never raises, but for being
        cancelled. It is the tenant's call as any other, of the least urgent class, and costs what it costs."""
        work = ahead.work
        body = {**work.body, "max_tokens": 1, "forebay": {"program": run.id, "run": run.id, "class": "batch"}}
        try:
            principal = self._principal_of(run.key)
            call = self._caller.read(principal, _ENDPOINTS[work.endpoint], body)
            if self._ahead.begin((run.id, ahead.call), call.model, call.prompt_tokens_estimate):
                context = msgspec.structs.replace(call.context, prefixes=_prefixes(work, call))
                call = msgspec.structs.replace(call, context=context)
                await self._caller.make(principal, call, on_text=_ignore, on_spent=_ignore)
        except ForebayError as error:
            _log.debug("prefill_failed", run=run.id, call=ahead.call, error=error.message)

    def _placed(self, run: RunRecord, start: Start, work: Request, call: chat.Call) -> chat.Call:
        """Return the call with what the graph says of it."""
        standing, context = start.standing, call.context
        is_followed = standing.level > 0 and standing.group is None  # all of a group are waited for
        age_s = max(0.0, self._clock.wall() - run.created_at)
        context = msgspec.structs.replace(
            context,
            objective=standing.criteria,
            deadline_s=standing.left_s if standing.left_s is not None else context.deadline_s,
            role=Role(age_s, standing.remaining_s, standing.run_s, is_followed, standing.run_calls),
            prefixes=_prefixes(work, call),
        )
        return msgspec.structs.replace(call, context=context)

    # As `semantic_vars.ports.Estimate`

    def most(self, work: Work) -> Spent:
        """Return the most that a call may use."""
        if isinstance(work, Errand):
            return Spent()
        usage = Usage(len(msgspec.json.encode(work.body)) // _BYTES_PER_TOKEN, _longest_answer(work.body))
        cost = self._cost_of(str(work.body.get("model")), usage)
        return Spent(usage.prompt_tokens + usage.completion_tokens, cost / PICO_PER_USD)

    def seconds(self, call: Call) -> float:
        """Return about how long a call takes."""
        return _SECONDS_PER_TOKEN * _longest_answer(call.request) if isinstance(call, Llm) else 0.0


class _Mismatch(Exception):
    """An answer is not what its schema wants."""


def _ignore(*_: object) -> None:
    pass


def _prefixes(work: Request, call: chat.Call) -> tuple[Prefix, ...]:
    """Return how the prompt begins, salted by all that keeps a cache from being shared."""
    if not work.beginnings:
        return ()
    salt = msgspec.json.encode((call.context.tenant, call.model, work.body.get("tools")))
    key = hashlib.blake2b(salt, digest_size=16).digest()
    return tuple(
        Prefix(_digest(one.digest.to_bytes(8, "big"), key), one.size // _BYTES_PER_TOKEN) for one in work.beginnings
    )


def _digest(data: bytes, key: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, key=key).digest(), "big")


def _body(run: RunRecord, start: Start, work: Request, *, deduces: bool) -> dict[str, Any]:
    body = dict(work.body)
    if work.schema is not None:
        schema = {"name": "output", "schema": work.schema, "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    own = body.get("forebay")
    labels: dict[str, Any] = {"program": run.id, "run": run.id, "stage": start.call[-_LONGEST_STAGE:]}
    if deduces:
        labels["class"] = _CLASSES[start.standing.criteria]
    if run.end_user is not None:
        labels["end_user"] = run.end_user
    body["forebay"] = {**labels, **own} if isinstance(own, dict) else labels
    return body


def _longest_answer(body: Mapping[str, Any]) -> int:
    for name in ("max_completion_tokens", "max_tokens"):
        if type(limit := body.get(name)) is int:
            return max(0, limit)
    return 0 if "input" in body else _TOKENS_OF_ANSWER


def check_schema(schema: dict[str, Any]) -> None:
    """Raise ``InvalidRequest`` for a schema that nothing can be checked by. Patterns take linear time."""
    try:
        _validator(schema)
    except ValueError as error:
        raise InvalidRequest(f"the schema cannot be used: {error}") from None


def _validator(schema: dict[str, Any]) -> Any:
    return jsonschema_rs.validator_for(schema, pattern_options=jsonschema_rs.RegexOptions())


def _checked(text: str, schema: dict[str, Any]) -> Value:
    try:
        value = msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        raise _Mismatch(f"the answer is no JSON: {error}") from None
    problem = next(_validator(schema).iter_errors(value), None)
    if problem is not None:
        where = "".join(f"[{step!r}]" for step in problem.instance_path)
        raise _Mismatch(f"the answer{where} does not fit the schema: {problem.message[:200]}")
    return value
