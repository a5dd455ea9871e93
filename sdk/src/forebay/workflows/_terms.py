"""What every call can be told, whatever kind it is."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from pydantic_core import to_jsonable_python

from forebay.workflows._trace import Block, Telling
from forebay.workflows._var import Var, element_of

OnError: TypeAlias = Literal["fail", "skip", "default"]
Cause: TypeAlias = Literal["engine", "timeout", "schema", "tool"]

_ITEM = "item"


@dataclass(frozen=True, slots=True)
class Retry:
    """How often a call is tried again, after what, and the seconds before the first time; then twice as long each."""

    max: int = 2
    on: Sequence[Cause] = ("engine", "timeout", "schema", "tool")
    backoff: float = 0.2


@dataclass(frozen=True, slots=True)
class Terms:
    """The terms of a call. ``timeout``: seconds of one attempt; ``needs``: what has to be there first."""

    timeout: float | None = None
    retry: Retry | int | None = None
    on_error: OnError | None = None
    default: Any = None
    needs: Sequence[Var[Any]] | None = None

    def but(self, **other: Any) -> "Terms":
        """Return these terms with what else is given; None is nothing."""
        return replace(self, **{name: value for name, value in other.items() if value is not None})

    def fields(self, telling: Telling) -> dict[str, Any]:
        """Return them as the gateway reads them, without what is usual."""
        told: dict[str, Any] = {}
        if self.timeout is not None:
            told["timeout_s"] = self.timeout
        if self.retry is not None:
            retry = Retry(self.retry) if isinstance(self.retry, int) else self.retry
            told["retry"] = {"max": retry.max, "on": list(retry.on), "backoff_s": retry.backoff}
        if self.on_error is not None:
            told["on_error"] = self.on_error
        if self.on_error == "default":
            told["default"] = to_jsonable_python(self.default)
        if self.needs:
            told["needs"] = [telling.name(var) for var in self.needs]
        return told


class Each:
    """A call, or a body, for each element of a list. ``item`` is the element, for ``block`` and what is within it."""

    def __init__(self, items: Sequence[Any] | Var[Any], around: Block, max_parallel: int | None) -> None:
        self._items = items
        self._max_parallel = max_parallel
        self.block = around.inner(is_element=True)
        name = around.graph.name(_ITEM) if around.is_in_element else _ITEM
        self.item: Var[Any] = self.block.var(name, _kind_of_element(items))

    def fields(self, telling: Telling) -> dict[str, Any]:
        """Return what the gateway is told of the list."""
        told = {"foreach": telling.value(self._items)}
        if self.item.name != _ITEM:
            told["item"] = self.item.name
        if self._max_parallel is not None:
            told["max_parallel"] = self._max_parallel
        return told


def _kind_of_element(items: Sequence[Any] | Var[Any]) -> Any:
    if isinstance(items, Var):
        return element_of(items.kind)
    return str if items and all(isinstance(item, str) for item in items) else Any
