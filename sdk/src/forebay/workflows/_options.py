"""What a run is told at its beginning, and what it tells of itself."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from forebay.workflows._var import Criteria


@dataclass(frozen=True, slots=True)
class Budget:
    """What a whole run may use: tokens, and US dollars."""

    tokens: int | None = None
    cost: float | None = None


@dataclass(frozen=True, slots=True)
class RunOptions:
    """The arguments of a client's ``run``."""

    app: str | None = None
    objective: Criteria = "latency"
    deadline: float | None = None
    budget: Budget | None = None
    resume: str | None = None
    progress: bool = False

    def fields(self) -> dict[str, Any]:
        """Return what the gateway is told of them, without what is usual."""
        told: dict[str, Any] = {} if self.objective == "latency" else {"objective": self.objective}
        if self.app is not None:
            told["app"] = self.app
        if self.deadline is not None:
            told["deadline_s"] = self.deadline
        if self.budget is not None:
            budget = {"tokens": self.budget.tokens, "cost": self.budget.cost}
            told["budget"] = {name: most for name, most in budget.items() if most is not None}
        return told


@dataclass(frozen=True, slots=True)
class RunStatus:
    """Where a run is. ``variables``: each one's state: pending, done, failed, skipped or cancelled. ``calls``: how many
    calls are running, and how many have ended in each state, elements of lists too."""

    id: str
    state: str
    variables: Mapping[str, str]
    usage: Mapping[str, Any]
    calls: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Step:
    """One call of a critical path, or a ``variable`` that somebody set; times are Unix seconds.

    From the end of the step before to its own the run took ``client_s``: the client had not asked for it yet, or did it
    itself; ``held_s``: it waited for its turn among the run's calls; ``queue_s``: for a limit or a worker;
    ``engine_s``: an engine was at it; ``other_s``: all else, of a tool its own time.
    """

    call: str
    kind: str
    state: str
    attempts: int
    started_at: float
    ended_at: float
    cached_tokens: int
    client_s: float
    held_s: float
    queue_s: float
    engine_s: float
    other_s: float


@dataclass(frozen=True, slots=True)
class CriticalPath:
    """The calls that determined how long a run has taken so far, in their order, and the sums of their times.

    ``round_trips_saved``: how often one call was made of another's answer without a client in between;
    ``prefill_saved``: tokens of their prompts that engines had from before.
    """

    steps: tuple[Step, ...]
    seconds: float
    client_s: float
    held_s: float
    queue_s: float
    engine_s: float
    other_s: float
    round_trips_saved: int
    prefill_saved: int
