"""A run as it runs: variables with one producer and many consumers, and calls in scopes that name them."""

from collections.abc import Iterator
from enum import Enum, auto
from typing import Any

from semantic_vars.budget import Spent
from semantic_vars.graph import Node
from semantic_vars.values import Value
from semantic_vars.variable import PENDING, Outcome, State


class Phase(Enum):
    """How far an instance is."""

    IDLE = auto()  # nobody wants what it makes
    WAITING = auto()  # for variables
    READY = auto()  # to be started
    RUNNING = auto()
    OPEN = auto()  # calls within it run
    ENDED = auto()


class Variable:
    """One variable of a run. ``num_needed`` counts who lives and uses it; ``is_wanted``: somebody asked for it.

    ``consumers`` are told when it has its outcome, once.
    """

    __slots__ = ("consumers", "is_wanted", "num_needed", "outcome", "path", "producer")

    def __init__(self, path: str, producer: "Instance | None" = None, outcome: Outcome = PENDING) -> None:
        self.path = path
        self.producer = producer
        self.outcome = outcome
        self.consumers: list[Instance] = []
        self.num_needed = 0
        self.is_wanted = False

    @property
    def is_pending(self) -> bool:
        """Whether it may still get a value."""
        return self.outcome.state is State.PENDING


class Scope:
    """Names of variables and the calls that make them. ``parent`` is around it."""

    __slots__ = ("instances", "parent", "variables")

    def __init__(self, parent: "Scope | None" = None) -> None:
        self.parent = parent
        self.variables: dict[str, Variable] = {}
        self.instances: list[Instance] = []

    def find(self, name: str) -> Variable:
        """Return the variable of this name, here or around. Raises ``KeyError``."""
        scope: Scope | None = self
        while scope is not None:
            if (variable := scope.variables.get(name)) is not None:
                return variable
            scope = scope.parent
        raise KeyError(name)

    def value(self, name: str) -> Value:
        """Return the value of the variable of this name."""
        return self.find(name).outcome.value


class Instance:
    """One call of a run. ``epoch`` counts its starts and ends: what comes from an earlier one is dropped.

    ``inner``: what the scopes within it are about, of a map, loop, branch, race or workflow that is open.
    """

    __slots__ = (
        "attempts", "epoch", "has_prefilled", "inner", "node", "output", "path", "phase", "reserved", "scope", "scopes",
        "unmet", "work",
    )  # fmt: skip

    def __init__(self, path: str, output: str, node: Node, scope: Scope) -> None:
        self.path = path
        self.node = node
        self.scope = scope
        self.output = Variable(output, self)
        self.phase = Phase.IDLE
        self.unmet = 0
        self.epoch = 0
        self.has_prefilled = False
        self.attempts = 0
        self.work: Any = None
        self.reserved = Spent()
        self.inner: Any = None
        self.scopes: dict[Scope, None] = {}

    def uses(self) -> Iterator[Variable]:
        """The variables that live for it: what it waits for, and what its blocks take from around it."""
        return (self.scope.find(name) for name in self.node.uses)
