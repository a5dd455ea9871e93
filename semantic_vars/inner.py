"""Calls that are made of other calls: maps, loops, branches, races, workflows within workflows.

Each is an ``Inner`` of an open instance: it opens scopes, hears what came of them, and at last says what became of the
whole. No code is uploaded and every one of them ends: lists have their length, loops their bound, bodies their number.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import msgspec

from semantic_vars import calls
from semantic_vars.graph import Block, Node
from semantic_vars.instance import Instance, Variable
from semantic_vars.values import Value
from semantic_vars.variable import Failure, Outcome, State, done


class House(Protocol):
    """The executor, as an inner sees it. All of it takes effect after the caller has returned."""

    def open(self, owner: Instance, name: str, block: Block, given: Mapping[str, Value]) -> Variable:
        """Run a block in a scope of its own; its result is returned, and heard when it has its outcome."""

    def element(self, owner: Instance, node: Node, index: int, given: Mapping[str, Value]) -> Variable:
        """Run one call in a scope of its own, likewise."""

    def close(self, owner: Instance) -> None:
        """Cancel what still runs in the owner's scopes."""

    def settle(self, owner: Instance, outcome: Outcome, order: tuple[int, ...] = ()) -> None:
        """Say what became of the owner, which ends it."""

    def wake(self, owner: Instance, after_s: float) -> None:
        """Have ``woken`` called when so much time has passed."""


class Inner(Protocol):
    """What an open instance does."""

    def begin(self) -> None:
        """Open what comes first."""

    def heard(self, result: Variable) -> None:
        """Take the outcome of what was opened."""

    def woken(self) -> None:
        """Do what time was asked for."""


class Only:
    """One body, whose result is the owner's: of a branch, or a workflow within a workflow."""

    def __init__(self, house: House, owner: Instance, name: str, block: Block, given: Mapping[str, Value]) -> None:
        self._house, self._owner = house, owner
        self._name, self._block, self._given = name, block, given

    def begin(self) -> None:
        """Open the body."""
        self._house.open(self._owner, self._name, self._block, self._given)

    def heard(self, result: Variable) -> None:
        """End as the body has ended."""
        self._house.settle(self._owner, result.outcome)

    def woken(self) -> None:
        """Nothing waits for time."""


class Iterations:
    """A body again and again, each time with the state that the last has left; see ``calls.Loop``."""

    def __init__(self, house: House, owner: Instance, loop: calls.Loop, state: Mapping[str, Value]) -> None:
        self._house, self._owner, self._loop, self._state = house, owner, loop, state
        self._number = 0

    def begin(self) -> None:
        """Open the body for the first time."""
        self._house.open(self._owner, f"#{self._number}", self._owner.node.blocks[0], self._state)

    def heard(self, result: Variable) -> None:
        """Go round once more, or end."""
        if result.outcome.state is not State.DONE:
            self._house.settle(self._owner, result.outcome)
            return
        said = result.outcome.value
        self._number += 1
        if said["until"] or self._number == self._loop.max_iterations:
            self._house.settle(self._owner, done(said["result"]))
            return
        self._state = said["next"]
        self._house.close(self._owner)
        self.begin()

    def woken(self) -> None:
        """Nothing waits for time."""


class Contest:
    """Several bodies, of which the first count; see ``calls.Race``. With an ``order``, the outcome of an earlier
    time, only those that won are opened."""

    def __init__(self, house: House, owner: Instance, race: calls.Race, order: tuple[int, ...] = ()) -> None:
        self._house, self._owner, self._race = house, owner, race
        self._order = order
        self._waiting = list(order or range(len(race.of)))
        self._opened: dict[str, int] = {}
        self._results: dict[int, Value] = {}
        self._num_lost = 0

    def begin(self) -> None:
        """Open the first body, or all if none has to wait for time."""
        self._open_next()
        while self._waiting and (self._order or not self._race.after_s):
            self._open_next()
        if self._waiting:
            self._house.wake(self._owner, self._race.after_s)

    def _open_next(self) -> None:
        number = self._waiting.pop(0)
        result = self._house.open(self._owner, f"#{number}", self._owner.node.blocks[number], {})
        self._opened[result.path] = number

    def heard(self, result: Variable) -> None:
        """Count a winner; after a body that failed, open the next at once."""
        if result.outcome.state is State.DONE:
            self._results[self._opened[result.path]] = result.outcome.value
            if len(self._results) == self._race.first:
                order = self._order or tuple(self._results)
                values = [self._results[number] for number in order]
                self._house.settle(self._owner, done(values[0] if self._race.first == 1 else values), order)
            return
        self._num_lost += 1
        if len(self._race.of) - self._num_lost < self._race.first:
            self._house.settle(self._owner, result.outcome)
        elif self._waiting:
            self._open_next()

    def woken(self) -> None:
        """Open one that has waited for its time."""
        if self._waiting:
            self._open_next()
        if self._waiting:
            self._house.wake(self._owner, self._race.after_s)


class Elements:
    """A call for each element of a list; the output is the list of results, in its order.

    No more than ``max_parallel`` exist at a time, so a long list costs memory for its values alone.
    """

    def __init__(self, house: House, owner: Instance, items: Sequence[Value]) -> None:
        self._house, self._owner, self._items = house, owner, items
        call = owner.node.call
        self._node = msgspec.structs.replace(owner.node, each=None)
        self._item, self._most = call.item, call.max_parallel
        self._next = 0
        self._live: dict[str, int] = {}
        self._results: list[Outcome | None] = [None] * len(items)
        self._missing = 0

    @property
    def num_left(self) -> int:
        """How many elements have not ended."""
        return len(self._items) - self._next + len(self._live)

    def begin(self) -> None:
        """Begin with as many as there may be at a time."""
        while self._next < len(self._items) and len(self._live) < self._most:
            index, self._next = self._next, self._next + 1
            given = {self._item: self._items[index], "index": index}
            self._live[self._house.element(self._owner, self._node, index, given).path] = index
        if not self._live and self._next == len(self._items):
            values = [outcome.value for outcome in self._results if outcome is not None]
            self._house.settle(self._owner, Outcome(State.DONE, values, missing=self._missing, total=len(self._items)))

    def heard(self, result: Variable) -> None:
        """Take a result and begin with another element; one that has failed fails the whole."""
        index = self._live.pop(result.path)
        match result.outcome.state:
            case State.DONE:
                self._results[index] = result.outcome
            case State.FAILED:
                self._house.settle(self._owner, _of_element(result.outcome, index, len(self._items)))
                return
            case _:
                self._missing += 1
        self.begin()

    def woken(self) -> None:
        """Nothing waits for time."""


def _of_element(outcome: Outcome, index: int, total: int) -> Outcome:
    failure = outcome.failure
    assert failure is not None
    told = f"element {index} of {total}: {failure.message}"
    return Outcome(State.FAILED, failure=Failure(failure.code, told, failure.call))
