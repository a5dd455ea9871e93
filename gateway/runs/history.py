"""What has happened to a run, as it is kept: the truth from which a run goes on after a crash."""

from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec

from core.workflows import RunState
from semantic_vars.budget import Spent
from semantic_vars.calls import Call, Criteria, Given, Workflow
from semantic_vars.executor import Fact
from semantic_vars.graph import USUAL, Reader, unused_of
from semantic_vars.values import Value
from semantic_vars.variable import Failure, Outcome, State, done

INTERRUPTED = "interrupted"

# Fields were added to events after the first were kept: each has a default, which says that it is not known. Times are
# Unix seconds; within a run they go on evenly, however the machine's clock is set meanwhile.


class Used(msgspec.Struct, frozen=True, array_like=True):
    """What was asked of engines: requests, and the tokens that they processed; ``cached`` is a part of ``prompt``."""

    requests: int = 0
    prompt: int = 0
    cached: int = 0
    completion: int = 0

    def plus(self, other: "Used") -> "Used":
        """Return the sum."""
        return Used(
            self.requests + other.requests,
            self.prompt + other.prompt,
            self.cached + other.cached,
            self.completion + other.completion,
        )


class Made(msgspec.Struct, frozen=True, array_like=True):
    """How a call was made that takes an engine or a tool, all its attempts together. ``queue_s``: waited here, for a
    limit or a worker; ``engine_s``: an engine was at work."""

    began: float
    attempts: int = 1
    queue_s: float = 0.0
    engine_s: float = 0.0
    used: Used = Used()


class Began(msgspec.Struct, frozen=True, tag="run.started", omit_defaults=True):
    """The run was accepted. ``span``: the ``traceparent`` of its own span, if it is traced; ``parent``: the id of the
    span that it was submitted in, if it is known."""

    calls: tuple[str, ...]
    span: str | None = None
    parent: str | None = None


class Appended(msgspec.Struct, frozen=True, tag="run.appended", omit_defaults=True):
    """Calls and variables were added; ``idempotency`` is the caller's own key of that."""

    calls: tuple[Call, ...] = ()
    variables: dict[str, Given] = {}
    outputs: tuple[str, ...] = ()
    idempotency: str | None = None
    at: float = 0.0


class Wanted(msgspec.Struct, frozen=True, tag="run.wanted"):
    """Somebody asked for a variable; ``deadline_s``: and would like to have it so soon after ``at``."""

    variable: str
    criteria: Criteria
    deadline_s: float | None = None
    at: float = 0.0


class Stopped(msgspec.Struct, frozen=True, tag="run.stopped"):
    """Somebody has cancelled these calls; with none, the run."""

    calls: tuple[str, ...] = ()


class Attempted(msgspec.Struct, frozen=True, tag="call.attempted"):
    """A tool that has effects, and may be used once at most, is about to be used. ``key``: see ``Fact``."""

    call: str
    variable: str
    key: str


class Waiting(msgspec.Struct, frozen=True, tag="call.waiting"):
    """The client is to run a tool, and to set ``variable`` to what it came to."""

    call: str
    variable: str
    tool: str
    arguments: Value
    at: float = 0.0


class Retried(msgspec.Struct, frozen=True, tag="call.retried"):
    """A call is made again; what it has said is void."""

    call: str
    attempt: int
    code: str
    message: str


class Settled(msgspec.Struct, frozen=True, tag="variable", omit_defaults=True):
    """A variable has its outcome. ``spent``, ``used``: what the run has used so far. ``key``, ``order``: see ``Fact``.
    ``made``: how the call was made, if it was; what another run had come to is not made again."""

    variable: str
    call: str | None
    outcome: Outcome
    key: str | None = None
    order: tuple[int, ...] = ()
    spent: Spent = Spent()
    used: Used | None = None
    at: float = 0.0
    made: Made | None = None


class Finished(msgspec.Struct, frozen=True, tag="run.ended", omit_defaults=True):
    """All that was wanted has its outcome."""

    state: State
    spent: Spent = Spent()
    used: Used | None = None
    at: float = 0.0


Happening = Began | Appended | Wanted | Stopped | Attempted | Waiting | Retried | Settled | Finished
HAPPENING = msgspec.json.Decoder(Happening)


class End(msgspec.Struct, frozen=True):
    """How and when a call has ended; see ``Settled``. ``number`` is that of the event."""

    at: float
    state: State
    made: Made | None = None
    order: tuple[int, ...] = ()
    number: int = 0


class History:
    """All that is known of a run, event by event. ``number`` is that of the last event.

    ``ends`` are those of calls, but for elements of maps: of these ``last`` has each map's that ended last and was not
    cancelled, with its path. ``given`` are those of variables that were set from outside; ``added``: when calls were
    appended. ``num_calls``: how many have ended, elements too, by state. ``used`` is None where it is not known.
    """

    def __init__(self, workflow: Workflow) -> None:
        self.workflow = workflow
        self.number = 0
        self.state: RunState = "running"
        self._whole: Workflow | None = workflow
        self._variables = dict(workflow.variables)
        self.spent = Spent()
        self.used: Used | None = Used()
        self.span: str | None = None
        self.parent: str | None = None
        self.num_ends = 0
        self.outcomes: dict[str, Outcome] = {}
        self.ends: dict[str, End] = {}
        self.last: dict[str, tuple[str, End]] = {}
        self.given: dict[str, End] = {}
        self.added: dict[str, float] = {}
        self.num_calls: Counter[State] = Counter()
        self.facts: dict[str, Fact] = {}
        self.asked: list[Appended | Wanted | Stopped] = []
        self.waiting: dict[str, Waiting] = {}
        self.attempted: dict[str, Attempted] = {}

    def add(self, happening: Happening) -> None:
        """Take the next event."""
        self.number += 1
        match happening:
            case Began(span=span, parent=parent):
                self.span, self.parent = span, parent
            case Appended() | Wanted() | Stopped():
                self.asked.append(happening)
                self.state = "running"
                if isinstance(happening, Appended):
                    self._whole = None
                    self._variables |= happening.variables
                    self.added |= {call.id: happening.at for call in happening.calls}
            case Waiting(variable=name):
                self.waiting[name] = happening
            case Retried(call=call):  # the client has answered, and will be told of it anew
                self.waiting = {name: one for name, one in self.waiting.items() if one.call != call}
            case Attempted(variable=name):
                self.attempted[name] = happening
            case Settled(variable=name, outcome=outcome):
                self.waiting.pop(name, None)
                self.attempted.pop(name, None)
                self.spent, self.used = happening.spent, happening.used
                self.facts[name] = Fact(outcome, happening.key, happening.order)
                if "[" not in name:  # elements are in their list
                    self.outcomes[name] = outcome
                end = End(happening.at, outcome.state, happening.made, happening.order, self.number)
                if happening.call is None:
                    self.given[name] = end
                else:
                    self._end(happening.call, end)
            case Finished(state=state):
                self.spent, self.used = happening.spent, happening.used
                self.num_ends += 1
                self.state = state.value  # type: ignore[assignment] # no run ends as pending

    def _end(self, call: str, end: End) -> None:
        self.num_calls[end.state] += 1
        if not call.endswith("]"):
            self.ends[call] = end
        elif end.state is not State.CANCELLED:  # one that nobody needed any more has held nothing up
            self.last[call[: call.rindex("[")]] = call, end

    def read(self, bodies: Iterable[bytes]) -> None:
        """Take events as they were kept."""
        for body in bodies:
            self.add(HAPPENING.decode(body))

    def facts_to_go_on(self) -> dict[str, Fact]:
        """Return what an executor has to know that goes on with this run: outcomes, and what may have happened."""
        failure = "it is not known whether the tool did its work when the server stopped, and it must not do it twice"
        return self.facts | {
            name: Fact(Outcome(State.FAILED, failure=Failure(INTERRUPTED, failure, attempted.call)), attempted.key)
            for name, attempted in self.attempted.items()
        }

    def facts_of_successes(self) -> dict[str, Fact]:
        """Return what a new run of a like workflow need not make again: what calls came to that cost something, and
        what somebody has set. Not what stands in for a failure, nor who won a race, which another may win."""
        return {
            name: msgspec.structs.replace(fact, order=())
            for name, fact in self.facts.items()
            if fact.outcome.state is State.DONE
            and fact.outcome.failure is None
            and (fact.key is not None or name in self.given)
        }

    def whole(self) -> Workflow:
        """Return the workflow with all that was added to it, as if it had come at once: what was wanted then is wanted.

        Costs a reading of the graph where some parts name their outputs and others do not.
        """
        if self._whole is None:
            parts: list[Workflow | Appended] = [
                self.workflow,
                *(one for one in self.asked if isinstance(one, Appended)),
            ]
            calls = tuple(call for part in parts for call in part.calls)
            outputs = _outputs_of(parts) if any(part.outputs for part in parts) else ()
            self._whole = msgspec.structs.replace(
                self.workflow, calls=calls, variables=dict(self._variables), outputs=outputs
            )
        return self._whole

    def names(self) -> tuple[str, ...]:
        """Return the run's own variables."""
        return (*self._variables, *(call.variable for call in self.whole().calls))

    def outcome(self, name: str) -> Outcome | None:
        """Return what became of a variable; None while it is pending, or where it was given no value yet."""
        if (outcome := self.outcomes.get(name)) is not None:
            return outcome
        given = self._variables.get(name)
        return done(given.value) if given is not None and not given.open else None


def _outputs_of(parts: Sequence[Workflow | Appended]) -> tuple[str, ...]:
    outputs: list[str] = []
    around: frozenset[str] = frozenset()
    for part in parts:
        around |= part.variables.keys()
        nodes = Reader(USUAL).nodes(part.calls, around)
        outputs += part.outputs or unused_of(nodes)
        around |= {call.variable for call in part.calls}
    return tuple(dict.fromkeys(outputs))
