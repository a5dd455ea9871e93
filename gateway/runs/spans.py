"""Spans of a run: one of the whole, below it one of each call, and calls within calls below those.

The ids of calls' spans follow from the run's and from their paths. So nothing has to be kept of them, and a gateway
that goes on with a run hangs what it does below the same spans. Names and numbers are told, never what was said.
"""

import hashlib
from collections.abc import Iterator
from typing import Self

from core.workflows import RunRecord, RunState
from gateway.runs.history import History, Made, Used
from gateway.tracing import SUBMITTER, UNTRACED, Span, Trace, Tracing, trace_of
from semantic_vars.calls import Client, Mcp
from semantic_vars.events import Errand, Start
from semantic_vars.variable import Outcome

MOST = 1_000
"""Calls of a run that have spans; those that begin later have none, nor have their requests."""
_LONGEST_NAME = 64

_Attributes = dict[str, str | int | float | bool]


class RunSpans:
    """The spans of one run that is traced. ``trace`` is that of its own."""

    def __init__(self, tracing: Tracing, record: RunRecord, trace: Trace) -> None:
        self.trace = trace
        self._tracing = tracing
        self._record = record
        self._begun: dict[str, tuple[float, str, _Attributes]] = {}
        self._num_begun = 0
        self._num_left_out = 0

    @classmethod
    def begin(cls, tracing: Tracing | None, record: RunRecord) -> Self | None:
        """Return the spans of a run that was submitted just now; None if it is not to be traced."""
        trace = tracing.start(SUBMITTER.get()) if tracing is not None else None
        return cls(tracing, record, trace) if tracing is not None and trace is not None else None

    @classmethod
    def go_on(cls, tracing: Tracing | None, record: RunRecord, history: History) -> Self | None:
        """Return the spans of a run that was begun before; None if it was not traced then."""
        if tracing is None or history.span is None:
            return None
        _, trace_id, span_id, _ = history.span.split("-")
        parent_id = int(history.parent, 16) if history.parent is not None else None
        return cls(tracing, record, trace_of(int(trace_id, 16), int(span_id, 16), parent_id))

    @property
    def parent(self) -> str | None:
        """The id of the span of whoever submitted the run, in hex; None without one."""
        return f"{self.trace.parent_id:016x}" if self.trace.parent_id is not None else None

    def call_began(self, start: Start, at: float) -> bytes:
        """Begin the span of a call, and those of the calls that it is within; return what its requests are told."""
        if self._num_begun >= MOST:
            self._num_left_out += 1
            return UNTRACED
        self._begin(start.call, *_of_start(start), at)
        for path in _around(start.call):
            self._begin(path, f"call {_called(path)}", {}, at)
        return self._trace_of(start.call).traceparent

    def _begin(self, path: str, name: str, attributes: _Attributes, at: float) -> None:
        if path not in self._begun:
            self._begun[path] = at, name, attributes
            self._num_begun += 1

    def call_ended(self, path: str, outcome: Outcome, made: Made | None, at: float) -> None:
        """End the span of a call, if it has one."""
        begun = self._begun.pop(path, None)
        if begun is None:
            return
        began_at, name, attributes = begun
        attributes |= {
            "forebay.run.id": self._record.id,
            "forebay.call.path": path,
            "forebay.call.state": outcome.state.value,
        }
        if made is not None:
            attributes |= {"forebay.call.attempts": made.attempts, "forebay.queue_ms": made.queue_s * 1000}
            attributes |= _usage(made.used)
        error = outcome.failure.code if outcome.failure is not None else None
        self._tracing.add(Span(name, began_at, at, attributes, error), self._trace_of(path))

    def run_ended(self, state: RunState, history: History, at: float) -> None:
        """End the run's own span."""
        app = (self._record.app or "")[:_LONGEST_NAME]
        attributes: _Attributes = {
            "gen_ai.operation.name": "invoke_workflow",
            "forebay.run.id": self._record.id,
            "forebay.run.state": state,
            "forebay.run.calls": history.num_calls.total(),
            "forebay.run.calls_without_span": self._num_left_out,
            "forebay.tenant": self._record.tenant,
            "forebay.cost_usd": history.spent.cost,
        }
        if app:
            attributes["gen_ai.workflow.name"] = app
        if history.used is not None:
            attributes |= _usage(history.used)
        error = "workflow_failed" if state == "failed" else None
        name = f"invoke_workflow {app}" if app else "invoke_workflow"
        self._tracing.add(Span(name, self._record.created_at, at, attributes, error), self.trace)

    def _trace_of(self, path: str) -> Trace:
        around = next(_around(path), None)
        parent_id = self.trace.span_id if around is None else self._id_of(around)
        return trace_of(self.trace.trace_id, self._id_of(path), parent_id)

    def _id_of(self, path: str) -> int:
        digest = hashlib.blake2b(path.encode(), digest_size=8, key=self.trace.span_id.to_bytes(8, "big")).digest()
        return int.from_bytes(digest, "big") or 1


def _around(path: str) -> Iterator[str]:
    """Yield the paths of the calls that a call is within, the nearest first: of ``a#then/b[2]`` ``a#then/b``, ``a``."""
    while True:
        if path.endswith("]"):
            path = path[: path.rindex("[")]
        else:
            path, slash, _ = path.rpartition("/")
            if not slash:
                return
            head, body, last = path.rpartition("#")
            if body and "/" not in last:
                path = head
        yield path


def _called(path: str) -> str:
    """Return how a call is called in the graph, wherever it stands there."""
    return path.rpartition("/")[2].partition("[")[0]


def _of_start(start: Start) -> tuple[str, _Attributes]:
    """Return the name of a call's span, and what is known of it at its start."""
    attributes: _Attributes = {"forebay.call.criteria": start.standing.criteria}
    if start.standing.group is not None:
        attributes["forebay.call.group"] = start.standing.group
    if not isinstance(start.work, Errand):
        return f"call {_called(start.call)}", attributes
    server = start.work.server
    tool = (server.tool if isinstance(server, Mcp | Client) else _called(start.call))[:_LONGEST_NAME]
    return f"execute_tool {tool}", {
        **attributes, "gen_ai.operation.name": "execute_tool", "gen_ai.tool.name": tool
    }  # fmt: skip


def _usage(used: Used) -> _Attributes:
    return {
        "gen_ai.usage.input_tokens": used.prompt,
        "gen_ai.usage.output_tokens": used.completion,
        "gen_ai.usage.cache_read.input_tokens": used.cached,
    }
