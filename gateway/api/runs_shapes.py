"""How runs, variables and events look on the wire; docs/reference/workflows.md has the tables."""

from typing import Any

import msgspec

from core.workflows import RunEvent, RunRecord
from gateway.runs import history as happenings
from gateway.runs.critical import CriticalPath
from gateway.runs.history import HAPPENING, History, Used
from semantic_vars.budget import Spent
from semantic_vars.variable import Failure, Outcome, State

_ENDS = (State.DONE, State.FAILED, State.SKIPPED, State.CANCELLED)
_PARTS = ("client_s", "held_s", "queue_s", "engine_s", "other_s")


def summary_of(record: RunRecord) -> dict[str, Any]:
    """Return a run as it stands in a list."""
    return {
        "id": record.id, "object": "workflow", "state": record.state, "created_at": record.created_at,
        "updated_at": record.updated_at, "app": record.app,
    }  # fmt: skip


def run_of(record: RunRecord, history: History, num_underway: int = 0) -> dict[str, Any]:
    """Return a run with its variables, without their values; ``num_underway``: calls that have begun and not ended."""
    variables = {name: variable_of(record.id, name, history.outcome(name), has_value=False) for name in history.names()}
    waiting = [_waiting(one) for one in history.waiting.values()]
    return {
        **summary_of(record), "state": history.state, "variables": variables, "waiting": waiting,
        "calls": {"running": num_underway, **{state.value: history.num_calls[state] for state in _ENDS}},
        "usage": _usage(history.spent, history.used),
    }  # fmt: skip


def _usage(spent: Spent, used: Used | None) -> dict[str, Any]:
    told: dict[str, Any] = {"tokens": spent.tokens, "cost": spent.cost}
    if used is not None:
        told |= {
            "requests": used.requests, "prompt_tokens": used.prompt, "cached_tokens": used.cached,
            "completion_tokens": used.completion,
        }  # fmt: skip
    return told


def path_of(path: CriticalPath) -> dict[str, Any]:
    """Return the critical path of a run, with its sums."""
    return {
        "calls": [
            {
                "call": step.call, "kind": step.kind, "state": step.state.value, "attempts": step.attempts,
                "started_at": step.started_at, "ended_at": step.ended_at, "cached_tokens": step.cached,
                **{name: round(getattr(step, name), 3) for name in _PARTS},
            }
            for step in path.steps
        ],
        "seconds": round(path.seconds, 3),
        **{name: round(sum(getattr(step, name) for step in path.steps), 3) for name in _PARTS},
        "round_trips_saved": path.round_trips_saved, "prefill_saved": path.prefill_saved,
    }  # fmt: skip


def variable_of(run: str, name: str, outcome: Outcome | None, *, has_value: bool = True) -> dict[str, Any]:
    """Return a variable; without an outcome it is pending."""
    told: dict[str, Any] = {"id": f"{run}.{name}", "object": "variable", "state": State.PENDING.value}
    if outcome is None:
        return told
    told["state"] = outcome.state.value
    if has_value and outcome.state is State.DONE:
        told["value"] = outcome.value
    if outcome.total:
        told |= {"missing": outcome.missing, "total": outcome.total}
    if outcome.failure is not None:
        told["error"] = _error(outcome.failure)
    return told


def _waiting(one: happenings.Waiting) -> dict[str, Any]:
    return {"call": one.call, "variable": one.variable, "tool": one.tool, "arguments": one.arguments}


def _error(failure: Failure) -> dict[str, str]:
    return {"code": failure.code, "message": failure.message, "call": failure.call}


class _Said(msgspec.Struct):
    event: str
    variable: str | None = None
    call: str | None = None


def frame_of(event: RunEvent | bytes, run: str, names: tuple[str, ...]) -> bytes | None:
    """Return an event as a frame of a stream; None where it concerns none of ``names``, if there are any."""
    if isinstance(event, bytes):
        said = msgspec.json.decode(event, type=_Said)
        if not _concerns(said.variable or said.call, names):
            return None
        return b"event: %b\ndata: %b\n\n" % (said.event.encode(), event)
    kind, about, data = _public(HAPPENING.decode(event.body), run)
    if not _concerns(about, names):
        return None
    return b"id: %d\nevent: %b\ndata: %b\n\n" % (event.number, kind.encode(), msgspec.json.encode(data))


def frame_of_outcome(name: str, outcome: Outcome) -> bytes:
    """Return a variable's outcome as the one frame of a stream that comes too late for the event itself."""
    data = msgspec.json.encode({"variable": name, **_outcome(outcome)})
    return b"event: variable.%b\ndata: %b\n\n" % (outcome.state.value.encode(), data)


def _outcome(outcome: Outcome) -> dict[str, Any]:
    told: dict[str, Any] = {"value": outcome.value} if outcome.state is State.DONE else {}
    return told if outcome.failure is None else {**told, "error": _error(outcome.failure)}


def _concerns(about: str | None, names: tuple[str, ...]) -> bool:
    """Whether an event about this path is for who follows these variables; what is about the run is for all."""
    return not names or about is None or any(about == name or about[: len(name) + 1] == f"{name}[" for name in names)


def _public(told: happenings.Happening, run: str) -> tuple[str, str | None, dict[str, Any]]:
    """Return the event's name, what it is about, and its data."""
    data: dict[str, Any]
    match told:
        case happenings.Began(calls=calls):
            return "run.started", None, {"run": run, "calls": calls}
        case happenings.Appended(calls=appended):
            return "run.appended", None, {"run": run, "calls": [call.id for call in appended]}
        case happenings.Wanted(variable=name, criteria=criteria):
            data = {"run": run, "variable": name, "criteria": criteria}
            return "run.wanted", name, data | ({"deadline_s": told.deadline_s} if told.deadline_s is not None else {})
        case happenings.Stopped(calls=stopped):
            return "run.stopped", None, {"run": run, "calls": stopped}
        case happenings.Attempted(variable=name):
            return "call.attempted", name, {"call": told.call, "variable": name}
        case happenings.Waiting(variable=name):
            return "call.waiting", name, _waiting(told)
        case happenings.Retried(call=call):
            error = {"code": told.code, "message": told.message, "call": call}
            return "call.retried", call, {"call": call, "attempt": told.attempt, "error": error}
        case happenings.Settled(variable=name, outcome=outcome):
            data = {"variable": name, "call": told.call, "usage": _usage(told.spent, told.used), **_outcome(outcome)}
            return f"variable.{outcome.state.value}", name, data
        case happenings.Finished(state=state):
            return f"run.{state.value}", None, {"run": run, "usage": _usage(told.spent, told.used)}


def settles(event: RunEvent | bytes, name: str) -> bool:
    """Return whether an event is the outcome of a variable."""
    if isinstance(event, bytes):
        return False
    told = HAPPENING.decode(event.body)
    return isinstance(told, happenings.Settled) and told.variable == name
