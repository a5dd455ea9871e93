"""What a run is told at its beginning, and what it tells of itself."""

from collections.abc import Mapping
from dataclasses import dataclass
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
    """Where a run is. ``variables``: each one's state: pending, done, failed, skipped or cancelled."""

    id: str
    state: str
    variables: Mapping[str, str]
    usage: Mapping[str, Any]
