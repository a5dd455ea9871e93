"""What a program writes down of a graph, as it runs: calls, the bodies that they stand in, and names.

Which block is written to is a matter of the context, so tasks beside each other write each to its own.
"""

import re
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from itertools import count
from typing import Any, Protocol

from pydantic_core import PydanticSerializationError, to_jsonable_python

from forebay._errors import GraphError
from forebay.workflows import _texts
from forebay.workflows._var import Criteria, Piece, Var

_LONGEST_NAME = 56  # of 64: a number may follow
_OF_THE_GATEWAY = ("item", "index")
_NUMBERS = count(1)

_CURRENT: ContextVar["Block | None"] = ContextVar("forebay_block", default=None)


class Driver(Protocol):
    """What brings a graph to the gateway."""

    async def value(self, var: Var[Any], criteria: Criteria) -> Any:
        """Return the value of a variable of the run itself."""

    def pieces(self, var: Var[Any]) -> AsyncIterator[Piece]:
        """Yield its text as it comes."""

    def wait(self, var: Var[Any], criteria: Criteria) -> Any:
        """Return its value, in code without an event loop."""

    def wait_for_pieces(self, var: Var[Any]) -> Iterator[Piece]:
        """Yield its text, in code without an event loop."""


class ClientTool(Protocol):
    """A function of this process that a call of the graph is to run."""

    async def run(self, arguments: Any) -> Any:
        """Return what it makes of the arguments, as JSON."""


class Graph:
    """All of a run: the names that are taken, and the variables whose marks stand in texts."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.root = Block(self, None)
        self.variables: dict[str, dict[str, Any]] = {}
        self.tools: dict[str, ClientTool] = {}
        self._taken = set(_OF_THE_GATEWAY)
        self._numbers: Counter[str] = Counter()
        self._marked: dict[int, Var[Any]] = {}
        self._made: dict[str, Var[Any]] = {}

    def name(self, wish: str) -> str:
        """Return a name that no other call or variable of the run has, like the wish."""
        plain = re.sub(r"[^A-Za-z0-9_]", "_", wish)[:_LONGEST_NAME] or "_"
        wish = f"_{plain}" if plain[0].isdigit() else plain
        name = wish
        while name in self._taken:
            self._numbers[wish] = max(2, self._numbers[wish] + 1)
            name = f"{wish}_{self._numbers[wish]}"
        self._taken.add(name)
        return name

    def mark(self, var: Var[Any]) -> str:
        """Return what stands for a variable in texts of this process."""
        number = next(_NUMBERS)
        self._marked[number] = var
        return _texts.mark(number)

    def marked(self, number: int) -> Var[Any]:
        """Return the variable of a mark. Raises ``GraphError`` for that of another run."""
        var = self._marked.get(number)
        if var is None:
            raise GraphError("a text holds a variable of another run: await it there, and pass the value")
        return var

    def use(self, name: str, tool: ClientTool) -> None:
        """Have a tool run in this process. Raises ``GraphError`` if another has its name."""
        if self.tools.setdefault(name, tool) is not tool:
            raise GraphError(f"two tools of this run are named {name!r}")

    def plain(self, var: Var[Any]) -> Var[Any]:
        """Return a variable that can be asked for: of what is only told in templates, a new one with the same value."""
        if var.house is not self.root:
            raise GraphError(f"{var!r} stands in the body of a call: nobody outside can ask for it, only for the call")
        if not var.steps:
            return var
        if var.expression not in self._made:
            self._made[var.expression] = self.root.let(var, f"{var.name}_{var.steps[-1].partition('(')[0]}")
        return self._made[var.expression]


class Block:
    """Calls that stand beside each other: those of the run itself, or of a body.

    ``is_in_element``: they are made for each element of a list.
    """

    def __init__(self, graph: Graph, around: "Block | None", *, is_in_element: bool = False) -> None:
        self.graph = graph
        self.around = around
        self.is_in_element = is_in_element
        self.calls: list[dict[str, Any]] = []

    def mark(self, var: Var[Any]) -> str:
        """Return what stands for a variable in a text."""
        return self.graph.mark(var)

    async def value(self, var: Var[Any], criteria: Criteria) -> Any:
        """Return its value."""
        return await self.graph.driver.value(var, criteria)

    def pieces(self, var: Var[Any]) -> AsyncIterator[Piece]:
        """Yield its text as it comes."""
        return self.graph.driver.pieces(var)

    def wait(self, var: Var[Any], criteria: Criteria) -> Any:
        """Return its value, in code without an event loop."""
        return self.graph.driver.wait(var, criteria)

    def wait_for_pieces(self, var: Var[Any]) -> Iterator[Piece]:
        """Yield its text, in code without an event loop."""
        return self.graph.driver.wait_for_pieces(var)

    def var(self, name: str, kind: Any) -> Var[Any]:
        """Return a variable that lives here."""
        return Var(self, name, kind)

    def inner(self, *, is_element: bool = False) -> "Block":
        """Return a body within."""
        return Block(self.graph, self, is_in_element=is_element or self.is_in_element)

    def sees(self, house: object) -> bool:
        """Whether what lives there can be used here."""
        block: Block | None = self
        while block is not None:
            if block is house:
                return True
            block = block.around
        return False

    def let(self, value: object, name: str) -> Var[Any]:
        """Write down a call that makes a value of others."""
        telling = Telling(self)
        kind = value.kind if isinstance(value, Var) else type(value)
        return self.add("transform", name, kind, {"value": telling.value(value)}, telling.share)

    def add(self, kind: str, name: str, makes: Any, fields: Mapping[str, Any], share: float = 0.0) -> Var[Any]:
        """Write down a call, and return its variable, of the type that it ``makes``."""
        chosen = self.graph.name(name)
        least = {"min_inputs": share} if share else {}
        self.calls.append({"kind": kind, "id": chosen, **fields, **least})
        return self.var(chosen, makes)

    @contextmanager
    def written(self) -> Iterator["Block"]:
        """Have the calls that are made in this context written down here."""
        token = _CURRENT.set(self)
        try:
            yield self
        finally:
            with suppress(ValueError):  # left in another task than it was entered in
                _CURRENT.reset(token)


class Telling:
    """Turns values of the program into templates. ``share``: what at most ``at_least`` asked for of those told."""

    def __init__(self, block: Block) -> None:
        self._block = block
        self.share = 0.0

    def value(self, value: object) -> Any:
        """Return a value as JSON, with templates for the variables in it. Raises ``GraphError``."""
        match value:
            case Var():
                return self._hole(value)
            case str():
                return self.text(value)
            case None | bool() | int() | float():
                return value
            case Mapping():
                return {self._key(key): self.value(entry) for key, entry in value.items()}
            case Sequence() if not isinstance(value, bytes | bytearray):
                return [self.value(entry) for entry in value]
        return self.value(_as_json(value))

    def text(self, text: str) -> str:
        """Return the template of a text; one that is a variable and nothing else stays a text whatever its value is."""
        parts = _texts.divide(text)
        if len(parts) == 1 and isinstance(number := parts[0], int):
            var = self._block.graph.marked(number)
            return self._hole(var if var.kind is str else var.text())
        told = [
            self._hole(self._block.graph.marked(part))
            if isinstance(part, int)
            else _texts.escaped(part, is_before_hole=place < len(parts))
            for place, part in enumerate(parts, 1)
        ]
        return "".join(told)

    def name(self, var: Var[Any]) -> str:
        """Return a variable's name. Raises ``GraphError`` if it cannot be used here."""
        self._hole(var)
        return var.name

    def _key(self, key: object) -> str:
        if not isinstance(key, str) or any(isinstance(part, int) for part in _texts.divide(key)):
            raise GraphError(f"the name of a field has to be a constant text, not {key!r}")
        return key

    def _hole(self, var: Var[Any]) -> str:
        if not self._block.sees(var.house):
            where = (
                "another run" if _graph_of(var) is not self._block.graph else "the body of a call, and is used outside"
            )
            raise GraphError(f"{var!r} was made in {where}")
        self.share = max(self.share, var.share)
        return f"{{{{{var.expression}}}}}"


def _graph_of(var: Var[Any]) -> Graph | None:
    return var.house.graph if isinstance(var.house, Block) else None


def _as_json(value: object) -> Any:
    try:
        return to_jsonable_python(value)
    except PydanticSerializationError as error:
        raise GraphError(f"{value!r} cannot be told as JSON") from error


def current() -> Block:
    """Return the block that is written to. Raises ``GraphError`` outside of a run."""
    block = _CURRENT.get()
    if block is None:
        raise GraphError("there is no run to write to: make calls inside of `async with client.run() as run:`")
    return block
