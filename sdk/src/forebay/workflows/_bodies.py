"""What a run can hold beside single calls: bodies that are taken, repeated, raced or made for each element."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Generic, TypeVar, overload

from forebay._errors import GraphError
from forebay.workflows._terms import Each, OnError
from forebay.workflows._trace import Block, Graph, Telling, current
from forebay.workflows._var import Body, Var, list_of, union_of

R = TypeVar("R")
S = TypeVar("S")
T = TypeVar("T")


class Loop(Generic[S]):
    """A loop that is being written. ``state`` is what the body begins with each time."""

    def __init__(self, block: Block, name: str, state: Var[S]) -> None:
        self.state: Var[S] = block.var(name, state.kind)
        self._next: Var[S] | None = None
        self._until: Var[Any] | None = None
        self._gives: Var[S] | None = None
        self._result: Var[S] | None = None

    def next(self, state: Var[S]) -> None:
        """Say what the state of the next time is."""
        self._next = state

    def until(self, condition: Var[Any]) -> None:
        """Say what ends the loop when it is true after a time."""
        self._until = condition

    def gives(self, result: Var[S]) -> None:
        """Say what comes of the last time, if it is not what ``next`` was told."""
        self._gives = result

    @property
    def result(self) -> Var[S]:
        """What came of the last time; of a loop that has been written."""
        if self._result is None:
            raise GraphError("a loop's result is there after its `with` block")
        return self._result

    def fields(self, name: str, telling: Telling) -> dict[str, Any]:
        """Return what the gateway is told of the body."""
        if self._next is None or self._until is None:
            raise GraphError("a loop needs both: next(...), the state of the next time, and until(...), what ends it")
        result = self._next if self._gives is None else self._gives
        return {
            "next": {name: telling.value(self._next)},
            "until": telling.value(self._until),
            "result": telling.value(result),
        }

    def end(self, result: Var[S]) -> None:
        """Take the variable that the loop makes."""
        self._result = result


class Writing:
    """The part of a run that writes its graph, the same in both kinds of clients."""

    _graph: Graph

    @overload
    def let(self, value: Var[T], *, name: str = "value") -> Var[T]: ...
    @overload
    def let(self, value: T, *, name: str = "value") -> Var[T]: ...
    def let(self, value: object, *, name: str = "value") -> Var[Any]:
        """Return a variable of a value, which may be made of variables: a text, or JSON with texts and variables."""
        return current().let(value, name)

    def open(self, name: str, kind: type[T]) -> Var[T]:
        """Return a variable that somebody will ``set``, such as a person who approves."""
        chosen = self._graph.name(name)
        self._graph.variables[chosen] = {"open": True}
        return self._graph.root.var(chosen, kind)

    @overload
    def branch(self, condition: Var[Any], *, then: Body[R], orelse: None = None, name: str = "branch") -> Var[R]: ...
    @overload
    def branch(self, condition: Var[Any], *, then: Body[R], orelse: Body[S], name: str = "branch") -> Var[R | S]: ...
    def branch(
        self, condition: Var[Any], *, then: Body[Any], orelse: Body[Any] | None = None, name: str = "branch"
    ) -> Var[Any]:
        """Return the variable of one body or the other; what the other holds is never made.

        Without ``orelse`` it is skipped if the condition is not true.
        """
        block = current()
        telling = Telling(block)
        fields: dict[str, Any] = {"if": telling.value(condition)}
        fields["then"], kind = _body(block, then)
        kinds = [kind]
        if orelse is not None:
            fields["else"], kind = _body(block, orelse)
            kinds.append(kind)
        return block.add("branch", name, union_of(kinds), fields, telling.share)

    def race(self, *bodies: Var[R] | Body[R], after: float = 0.0, name: str = "race") -> Var[R]:
        """Return the variable of the first body to be done; the others are cancelled.

        Each begins ``after`` seconds after the one before it, or when that has failed. What is given as a variable, and
        not as a function, begins at once, and is not cancelled if others need it.
        """
        return self._race(bodies, {"after_s": after} if after else {}, name, is_list=False)

    def race_for(self, first: int, *bodies: Var[R] | Body[R], after: float = 0.0, name: str = "race") -> Var[list[R]]:
        """Return the variable of the ``first`` bodies to be done, as a list in the order in which they came."""
        if not 2 <= first <= len(bodies):
            raise GraphError(f"a race for {first} of {len(bodies)} bodies: race_for is for 2 or more, and not all lost")
        fields = {"first": first, "after_s": after} if after else {"first": first}
        return self._race(bodies, fields, name, is_list=True)

    def _race(self, bodies: Sequence[Any], fields: dict[str, Any], name: str, *, is_list: bool) -> Var[Any]:
        block = current()
        read = [_body(block, partial(_same, body) if isinstance(body, Var) else body) for body in bodies]
        kind = union_of([kind for _, kind in read])
        fields = {"of": [told for told, _ in read], **fields}
        return block.add("race", name, list_of(kind) if is_list else kind, fields)

    def map(
        self,
        items: Sequence[Any] | Var[Any],
        body: Callable[[Var[Any]], Var[R]],
        *,
        max_parallel: int | None = None,
        on_error: OnError | None = None,
        name: str = "map",
    ) -> Var[list[R]]:
        """Return the variable of a list: what the body makes of each element.

        The body is called once, with the variable of an element; each element goes on by itself, without waiting for
        the others between the body's calls.
        """
        block = current()
        around, each = Telling(block), Each(items, block, max_parallel)
        inside, kind = _body(each.block, lambda: body(each.item))
        fields = {**each.fields(around), "inputs": {}, "body": inside}
        if on_error is not None:
            fields["on_error"] = on_error
        return block.add("workflow", name, list_of(kind), fields, around.share)

    @contextmanager
    def loop(self, *, state: Var[S], max_iter: int, name: str = "loop") -> Iterator[Loop[S]]:
        """Write a loop: what is called in the block is made again and again, ``max_iter`` times at most.

        ::

            with run.loop(state=draft, max_iter=3) as it:
                review = critic(it.state)
                it.next(revise(it.state, review))
                it.until(review.json("$.approved"))
            final = it.result
        """
        block = current()
        telling = Telling(block)
        begin = telling.value(state)
        called = self._graph.name("state")
        inside = block.inner()
        loop = Loop(inside, called, state)
        with inside.written():
            yield loop
        body = loop.fields(called, Telling(inside))
        fields = {"state": {called: begin}, "calls": inside.calls, **body, "max_iterations": max_iter}
        loop.end(block.add("loop", name, state.kind, fields, telling.share))


def _same(var: Var[Any]) -> Var[Any]:
    return var


def _body(block: Block, write: Body[Any]) -> tuple[dict[str, Any], Any]:
    inside = block.inner()
    with inside.written():
        result = write()
    if not isinstance(result, Var):
        raise GraphError(f"a body has to return a variable, not {result!r}; run.let(...) makes one of a value")
    told = Telling(inside).value(result)
    return {"calls": inside.calls, "result": told}, result.kind
