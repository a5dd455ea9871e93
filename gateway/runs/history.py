"""What has happened to a run, as it is kept: the truth from which a run goes on after a crash."""

from collections.abc import Iterable

import msgspec

from core.workflows import RunState
from semantic_vars.budget import Spent
from semantic_vars.calls import Call, Criteria, Given, Workflow
from semantic_vars.executor import Fact
from semantic_vars.values import Value
from semantic_vars.variable import Failure, Outcome, State, done

INTERRUPTED = "interrupted"


class Began(msgspec.Struct, frozen=True, tag="run.started"):
    """The run was accepted."""

    calls: tuple[str, ...]


class Appended(msgspec.Struct, frozen=True, tag="run.appended"):
    """Calls and variables were added; ``idempotency`` is the caller's own key of that."""

    calls: tuple[Call, ...] = ()
    variables: dict[str, Given] = {}
    outputs: tuple[str, ...] = ()
    idempotency: str | None = None


class Wanted(msgspec.Struct, frozen=True, tag="run.wanted"):
    """Somebody asked for a variable."""

    variable: str
    criteria: Criteria


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


class Retried(msgspec.Struct, frozen=True, tag="call.retried"):
    """A call is made again; what it has said is void."""

    call: str
    attempt: int
    code: str
    message: str


class Settled(msgspec.Struct, frozen=True, tag="variable"):
    """A variable has its outcome. ``spent``: what the run has used so far. ``key``, ``order``: see ``Fact``."""

    variable: str
    call: str | None
    outcome: Outcome
    key: str | None = None
    order: tuple[int, ...] = ()
    spent: Spent = Spent()


class Finished(msgspec.Struct, frozen=True, tag="run.ended"):
    """All that was wanted has its outcome."""

    state: State
    spent: Spent = Spent()


Happening = Began | Appended | Wanted | Stopped | Attempted | Waiting | Retried | Settled | Finished
HAPPENING = msgspec.json.Decoder(Happening)


class History:
    """All that is known of a run, event by event. ``number`` is that of the last event; ``calls`` are those that have
    ended, but for elements of maps."""

    def __init__(self, workflow: Workflow) -> None:
        self.workflow = workflow
        self.number = 0
        self.state: RunState = "running"
        self.spent = Spent()
        self.outcomes: dict[str, Outcome] = {}
        self.calls: dict[str, State] = {}
        self.facts: dict[str, Fact] = {}
        self.asked: list[Appended | Wanted | Stopped] = []
        self.waiting: dict[str, Waiting] = {}
        self.attempted: dict[str, Attempted] = {}

    def add(self, happening: Happening) -> None:
        """Take the next event."""
        self.number += 1
        match happening:
            case Appended() | Wanted() | Stopped():
                self.asked.append(happening)
                self.state = "running"
            case Waiting(variable=name):
                self.waiting[name] = happening
            case Attempted(variable=name):
                self.attempted[name] = happening
            case Settled(variable=name, outcome=outcome):
                self.waiting.pop(name, None)
                self.attempted.pop(name, None)
                self.spent = happening.spent
                self.facts[name] = Fact(outcome, happening.key, happening.order)
                if "[" not in name:  # elements are in their list
                    self.outcomes[name] = outcome
                    if happening.call is not None:
                        self.calls[happening.call] = outcome.state
            case Finished(state=state):
                self.spent = happening.spent
                self.state = state.value  # type: ignore[assignment] # no run ends as pending
            case _:
                pass

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
        """Return what a new run of a like workflow need not make again."""
        return {name: fact for name, fact in self.facts.items() if fact.outcome.state is State.DONE}

    def whole(self) -> Workflow:
        """Return the workflow with all that was added to it."""
        whole = self.workflow
        for one in self.asked:
            if isinstance(one, Appended):
                whole = msgspec.structs.replace(
                    whole,
                    calls=whole.calls + one.calls,
                    variables={**whole.variables, **one.variables},
                    outputs=whole.outputs + one.outputs,
                )
        return whole

    def names(self) -> tuple[str, ...]:
        """Return the run's own variables."""
        whole = self.whole()
        return (*whole.variables, *(call.variable for call in whole.calls))

    def outcome(self, name: str) -> Outcome | None:
        """Return what became of a variable; None while it is pending, or where it was given no value yet."""
        if (outcome := self.outcomes.get(name)) is not None:
            return outcome
        given = self.whole().variables.get(name)
        return done(given.value) if given is not None and not given.open else None
