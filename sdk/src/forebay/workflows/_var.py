"""Semantic variables as the program sees them: values that do not exist yet."""

from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, Generic, Literal, Protocol, TypeAlias, TypeVar, Union, cast, get_args, get_origin, overload

from forebay.workflows import _texts

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
Item = TypeVar("Item")

Criteria: TypeAlias = Literal["latency", "throughput"]
"""What whoever wants a variable cares for: that it comes soon, or that much is done."""


class Piece(str):
    """A piece of a variable's text as it comes. ``restarts``: forget the pieces before, the text begins anew."""

    __slots__ = ("restarts",)

    restarts: bool

    def __new__(cls, text: str, *, restarts: bool = False) -> "Piece":
        """Return the piece."""
        piece = super().__new__(cls, text)
        piece.restarts = restarts
        return piece


class House(Protocol):
    """Where a variable lives: a run, or a body within one."""

    def mark(self, var: "Var[Any]") -> str:
        """Return what stands for it in a text."""

    async def value(self, var: "Var[Any]", criteria: Criteria) -> Any:
        """Return its value as JSON, when it is there."""

    def pieces(self, var: "Var[Any]") -> AsyncIterator[Piece]:
        """Yield its text as it comes."""

    def wait(self, var: "Var[Any]", criteria: Criteria) -> Any:
        """Return its value like ``value``, in code without an event loop."""

    def wait_for_pieces(self, var: "Var[Any]") -> Iterator[Piece]:
        """Yield its text like ``pieces``, in code without an event loop."""


class Var(Generic[T_co]):
    """A value that a run makes once, and any number of calls use.

    Put it in an f-string or pass it to calls without waiting: the gateway brings it where it is needed. ``await var``
    gives the value itself, and raises ``CallFailed``, ``CallSkipped`` or ``CallCancelled`` if there will be none;
    ``async for piece in var`` gives its text as it comes. In a ``Client``'s runs these are ``var.result()`` and
    ``for piece in var``. The methods that are named as the gateway's transforms give what the gateway makes of it.
    """

    __slots__ = ("house", "kind", "name", "share", "steps")

    def __init__(self, house: House, name: str, kind: Any, steps: tuple[str, ...] = (), share: float = 0.0) -> None:
        self.house = house
        self.name = name
        self.kind = kind
        self.steps = steps
        self.share = share

    @property
    def expression(self) -> str:
        """How a template tells it, without the braces."""
        return " | ".join((self.name, *self.steps))

    def __repr__(self) -> str:
        return f"<Var {self.expression}>"

    def __str__(self) -> str:
        return self.house.mark(self)

    def __format__(self, spec: str) -> str:
        if spec:
            raise TypeError(f"{self!r} has no value yet that could be formatted as {spec!r}")
        return self.house.mark(self)

    def __bool__(self) -> bool:
        raise TypeError(f"{self!r} has no value yet: await it, or let the gateway decide with run.branch(...)")

    # The value

    def __await__(self) -> Generator[Any, None, T_co]:
        return self.get().__await__()

    async def get(self, criteria: Criteria = "latency") -> T_co:
        """Return the value when it is there. ``throughput``: it need not come soon, but cheaply."""
        return cast("T_co", await self.house.value(self, criteria))

    def __aiter__(self) -> AsyncIterator[Piece]:
        return self.house.pieces(self)

    def result(self, criteria: Criteria = "latency") -> T_co:
        """Return the value when it is there; only in runs of a ``Client``."""
        return cast("T_co", self.house.wait(self, criteria))

    def __iter__(self) -> Iterator[Piece]:
        return self.house.wait_for_pieces(self)

    # Transforms

    @overload
    def json(self, path: str) -> "Var[Any]": ...
    @overload
    def json(self, path: str, kind: type[T]) -> "Var[T]": ...
    def json(self, path: str, kind: Any = Any) -> "Var[Any]":
        """What stands at a path like ``$.steps[0].name``; ``[*]`` is all elements. ``kind``: the type that it is."""
        return self._then(kind, "json", path)

    def regex(self, pattern: str, group: int = 0) -> "Var[str]":
        """What the pattern matches, in RE2's syntax."""
        return self._then(str, "regex", pattern, group)

    def matches(self, pattern: str) -> "Var[bool]":
        """Whether the pattern is in the text, in RE2's syntax."""
        return self._then(bool, "matches", pattern)

    def split(self, by: str) -> "Var[list[str]]":
        """The text's parts."""
        return self._then(list[str], "split", by)

    def lines(self) -> "Var[list[str]]":
        """The text's lines that are not empty."""
        return self._then(list[str], "lines")

    def join(self, by: str) -> "Var[str]":
        """The list's elements as one text."""
        return self._then(str, "join", by)

    def item(self: "Var[Sequence[Item]]", index: int) -> "Var[Item]":
        """An element of the list; -1 is the last."""
        return self._then(element_of(self.kind), "item", index)

    def length(self) -> "Var[int]":
        """How long the text or list is."""
        return self._then(int, "length")

    def strip(self) -> "Var[str]":
        """The text without blanks around it."""
        return self._then(str, "strip")

    def lower(self) -> "Var[str]":
        """The text in small letters."""
        return self._then(str, "lower")

    def truncate(self, most: int) -> "Var[str]":
        """The text's first characters."""
        return self._then(str, "truncate", most)

    def code(self) -> "Var[str]":
        """The text's first fenced block."""
        return self._then(str, "code")

    def text(self) -> "Var[str]":
        """The value as text."""
        return self._then(str, "text")

    def contains(self, text: str) -> "Var[bool]":
        """Whether the text is in it."""
        return self._then(bool, "contains", text)

    def equals(self, value: object) -> "Var[bool]":
        """Whether it is this value."""
        return self._then(bool, "equals", value)

    def all(self, path: str) -> "Var[bool]":
        """Whether what stands at the path is true in all elements."""
        return self._then(bool, "all", path)

    def any(self, path: str) -> "Var[bool]":
        """Whether what stands at the path is true in an element."""
        return self._then(bool, "any", path)

    def __invert__(self) -> "Var[bool]":
        """Whether it is not true."""
        return self._then(bool, "not")

    def choose(self, table: Mapping[str, T]) -> "Var[T]":
        """The table's entry for the value's text; the entry ``*`` is for all others."""
        return self._then(union_of([type(entry) for entry in table.values()]), "choose", table)

    def at_least(self, share: float) -> "Var[T_co]":
        """The same list, for a call that can do with this share of its elements, of 0 to 1."""
        if not 0 <= share <= 1:
            raise ValueError(f"a share is a number from 0 to 1, not {share}")
        return Var(self.house, self.name, self.kind, self.steps, share)

    def _then(self, kind: Any, transform: str, *arguments: object) -> "Var[Any]":
        told = f"({', '.join(map(_texts.literal, arguments))})" if arguments else ""
        return Var(self.house, self.name, kind, (*self.steps, transform + told), self.share)


Input: TypeAlias = T | Var[T]
"""What a parameter may be given that takes a value as well as a variable."""


def join(parts: Var[Any] | Sequence[object], by: str) -> str:
    """Return a list's elements as one text, to be put in a prompt: of a variable that is a list, or of variables."""
    return str(parts.join(by)) if isinstance(parts, Var) else by.join(map(str, parts))


def element_of(kind: Any) -> Any:
    """Return the type of a list's elements; Any if it does not say."""
    arguments = get_args(kind)
    is_list = get_origin(kind) in (list, Sequence, tuple)
    return arguments[0] if is_list and arguments else Any


def list_of(kind: Any) -> Any:
    """Return the type of a list of such."""
    return list[kind]


def union_of(kinds: Sequence[Any]) -> Any:
    """Return the type of what is one or the other."""
    if not kinds or any(kind is Any for kind in kinds):
        return Any
    return Union[tuple(kinds)]  # noqa: UP007 - of types that are known at run time alone


Body: TypeAlias = Callable[[], Var[T]]
"""What a branch or race holds: it is called once, and the calls that it makes belong to it."""
