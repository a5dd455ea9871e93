"""The critical path of a run: the chain of calls that determined when it was over.

It is found backwards, from the call that ended last: what that had waited for the longest is the step before it. Calls
that hold others are no steps: of a map the element that ended last is, of a loop what its last time ended with. It is
told from what the clock said: a call beside the path could have taken longer, to no harm.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, pairwise
from typing import NamedTuple

import msgspec

from gateway.runs.history import End, History
from semantic_vars import calls
from semantic_vars.graph import Block, Node
from semantic_vars.variable import State

_REQUESTS = (calls.Llm, calls.Embed, calls.Tool)


class Step(msgspec.Struct, frozen=True):
    """One call, or a ``variable`` that was set from outside. Times are Unix seconds.

    From the end of the step before, or the run's beginning, to its own end it took ``client_s``: the client had not
    asked for it yet, or did it itself; ``held_s``: it waited for its turn among the run's calls; ``queue_s``: for a
    limit or a worker; ``engine_s``: an engine was at it; and ``other_s``, of a tool its own time.

    ``attempts`` is 0 for what nothing had to be made for. ``is_request``: the gateway has asked an engine or a tool;
    ``cached``: tokens of the prompt that engines had from before.
    """

    call: str
    kind: str
    state: State
    attempts: int
    started_at: float
    ended_at: float
    client_s: float = 0.0
    held_s: float = 0.0
    queue_s: float = 0.0
    engine_s: float = 0.0
    other_s: float = 0.0
    is_request: bool = False
    cached: int = 0

    @property
    def seconds(self) -> float:
        """How much longer the run has taken for it."""
        return self.client_s + self.held_s + self.queue_s + self.engine_s + self.other_s


class CriticalPath(msgspec.Struct, frozen=True):
    """The steps, in their order."""

    steps: tuple[Step, ...]

    @property
    def seconds(self) -> float:
        """From the run's submission to the end of the last step."""
        return sum(step.seconds for step in self.steps)

    @property
    def round_trips_saved(self) -> int:
        """How often a request followed upon another's answer; a client would have been in between each time."""
        counted = [step for step in self.steps if step.is_request or step.kind in {"tool", "variable"}]
        return sum(before.is_request and step.is_request for before, step in pairwise(counted))

    @property
    def prefill_saved(self) -> int:
        """Tokens of the steps' prompts that engines had from before."""
        return sum(step.cached for step in self.steps)


class Ended(msgspec.Struct, frozen=True):
    """What is known of a run's calls; see ``History``. ``began``: when the run was submitted, in Unix seconds."""

    began: float
    ends: Mapping[str, End]
    last: Mapping[str, tuple[str, End]] = {}
    given: Mapping[str, End] = {}
    added: Mapping[str, float] = {}
    is_cancelled: bool = False

    @classmethod
    def of(cls, history: History, began: float) -> "Ended":
        """Return what is known at this moment, whatever happens later."""
        return cls(
            began, dict(history.ends), dict(history.last), dict(history.given), dict(history.added),
            history.state == "cancelled",
        )  # fmt: skip


def critical_path(nodes: Sequence[Node], ended: Ended) -> CriticalPath | None:
    """Return the path to what has ended last so far; None if nothing has, or if its times were not kept."""
    found = list(_Walk(nodes, ended).back())
    if not found or not all(one.end.at for one in found):
        return None
    steps: list[Step] = []
    before = ended.began
    for one in reversed(found):
        steps.append(_step(one, before, ended.added))
        before = steps[-1].ended_at
    return CriticalPath(tuple(steps))


class _Place(NamedTuple):
    """Calls that stand beside each other, as they ran: ``makers``, by their variables. ``given`` are names whose values
    came with it; ``gate`` tells what had to be there before it began, and where that is; None: nothing had."""

    prefix: str
    makers: Mapping[str, Node]
    given: frozenset[str]
    around: "_Place | None"
    gate: "Callable[[], tuple[Iterable[str], _Place]] | None"


class _Found(NamedTuple):
    """A call, or where there is no ``node`` a variable, that has ended."""

    path: str
    end: End
    node: Node | None
    place: _Place

    @property
    def began_at(self) -> float:
        """When it was begun to be made; of what nothing was made for, when it was there."""
        return self.end.made.began if self.end.made is not None else self.end.at


class _Walk:
    """The way back through a run."""

    def __init__(self, nodes: Sequence[Node], ended: Ended) -> None:
        self._ended = ended
        self._top = _Place("", _by_variable(nodes), frozenset(), None, None)
        paths = chain(ended.ends, (path for path, _ in ended.last.values()))
        self._bodies, self._times = _begun(paths)

    def back(self) -> Iterator[_Found]:
        """Yield the steps, the last one first."""
        one = self._latest({**self._top.makers, **self._ended.given}, self._top, None)
        while one is not None:
            yield one
            if one.node is None:
                return
            before = self._latest(one.node.inputs, one.place, one.end.number)
            if one.began_at > (before.end.at if before is not None else self._ended.began):
                before = self._decider(one) or before
            one = before

    def _decider(self, one: _Found) -> _Found | None:
        """Return what a branch has waited for that was decided when a call began: until then nobody may have needed it,
        as what only one body of a branch uses is made when that is taken."""
        around: _Place | None = one.place
        while around is not None:
            for decider in self._deciders(around, one.end.number):
                if decider.end.at == one.began_at:
                    return decider
            around = around.around
        return None

    def _deciders(self, place: _Place, until: int) -> Iterator[_Found]:
        for name, node in place.makers.items():
            if not isinstance(node.call, calls.Branch) or (branch := self._maker(name, place)) is None:
                continue
            if (decider := self._latest(node.inputs, place, until)) is not None:
                yield decider
            for body, block in zip(("#then", "#else"), node.blocks, strict=False):
                if f"{branch.path}{body}/" in self._bodies:
                    yield from self._deciders(_body(branch, body, block, frozenset()), until)

    def _latest(self, names: Iterable[str], place: _Place, until: int | None) -> _Found | None:
        """Return what ended last of what makes these variables, or let the place begin that they are named in.

        ``until``: the number of the end that it led to; what fails with one of its inputs waits for no other.
        """
        best: _Found | None = None
        while True:
            is_inside = False
            for name in names:
                one = self._maker(name, place)
                if one is None or (until is not None and one.end.number >= until):
                    continue
                is_inside |= one.place is place
                if best is None or one.end.number > best.end.number:
                    best = one
            if is_inside or place.gate is None:  # what is inside ended later than what the place has waited for
                return self._leaf(best) if best is not None else None
            names, place = place.gate()

    def _maker(self, name: str, place: _Place) -> _Found | None:
        around: _Place | None = place
        while around is not None:
            if name in around.given:
                return None
            if (node := around.makers.get(name)) is not None:
                path = around.prefix + node.call.id
                end = self._ended.ends.get(path)
                if end is None or (end.state is State.CANCELLED and not self._ended.is_cancelled):
                    return None  # nothing has waited for it
                return _Found(path, end, node, around)
            if around is self._top and (end := self._ended.given.get(name)) is not None:
                return _Found(name, end, None, around)
            around = around.around
        return None

    def _leaf(self, one: _Found) -> _Found:
        while (inner := self._inside(one)) is not None:
            one = inner
        return one

    def _inside(self, one: _Found) -> _Found | None:
        """Return what a call that holds others has ended with; None if it holds none, or none of them was begun."""
        path, end, node, _ = one
        if node is None:
            return None
        if node.each is not None:
            return self._element(one, node)
        match node.call:
            case calls.Branch():
                taken = [name for name in ("#then", "#else") if f"{path}{name}/" in self._bodies]
                return self._result(one, taken[0], node.blocks[taken[0] == "#else"]) if taken else None
            case calls.Sub(inputs=inputs):
                return self._result(one, "", node.blocks[0], frozenset(inputs))
            case calls.Loop(state=state):
                number = self._times.get(path)
                if number is None:
                    return None
                last = self._time(one, number, node.blocks[0], frozenset(state))
                return self._latest(node.blocks[0].result.names, last, end.number)
            case calls.Race():
                numbers = end.order[-1:] or range(len(node.blocks))
                ran = [number for number in numbers if f"{path}#{number}/" in self._bodies]
                results = [self._result(one, f"#{number}", node.blocks[number]) for number in ran]
                return max((found for found in results if found), key=lambda found: found.end.number, default=None)
            case _:
                return None

    def _element(self, one: _Found, node: Node) -> _Found | None:
        if (last := self._ended.last.get(one.path)) is None:
            return None
        path, end = last
        given = frozenset((node.call.item, "index"))
        place = _Place("", {}, given, one.place, lambda: (node.inputs, one.place))
        return _Found(path, end, msgspec.structs.replace(node, each=None), place)

    def _result(self, owner: _Found, name: str, block: Block, given: frozenset[str] = frozenset()) -> _Found | None:
        return self._latest(block.result.names, _body(owner, name, block, given), owner.end.number)

    def _time(self, owner: _Found, number: int, block: Block, given: frozenset[str]) -> _Place:
        """Return the body of a loop at one of its times; each begins with the end of the one before."""
        place = _body(owner, f"#{number}", block, given)
        if not number:
            return place
        return place._replace(gate=lambda: (block.result.names, self._time(owner, number - 1, block, given)))


def _body(owner: _Found, name: str, block: Block, given: frozenset[str]) -> _Place:
    node = owner.node
    assert node is not None
    gate = (node.inputs, owner.place)
    return _Place(f"{owner.path}{name}/", _by_variable(block.nodes), given, owner.place, lambda: gate)


def _by_variable(nodes: Iterable[Node]) -> dict[str, Node]:
    return {node.call.variable: node for node in nodes}


def _begun(paths: Iterable[str]) -> tuple[set[str], dict[str, int]]:
    """Return the prefixes of all bodies in which something has ended, and of loops the number of the last time."""
    bodies: set[str] = set()
    times: dict[str, int] = {}
    for path in paths:
        at = path.find("/")
        while at >= 0:
            if path[: at + 1] not in bodies:
                bodies.add(path[: at + 1])
                owner, _, number = path[:at].rpartition("#")
                if number.isdigit():
                    times[owner] = max(times.get(owner, 0), int(number))
            at = path.find("/", at + 1)
    return bodies, times


def _step(one: _Found, before: float, added: Mapping[str, float]) -> Step:
    end, made = one.end, one.end.made
    ended_at = max(before, end.at)
    call = one.node.call if one.node is not None else None
    is_clients = call is None or (isinstance(call, calls.Tool) and isinstance(call.server, calls.Client))
    began_at = _within(before, one.began_at, ended_at)
    step = Step(
        one.path,
        str(call.__struct_config__.tag) if call is not None else "variable",
        end.state,
        made.attempts if made is not None else 0,
        began_at,
        ended_at,
    )
    if is_clients:
        return msgspec.structs.replace(step, client_s=ended_at - before)
    asked_at = _within(before, added.get(_top(one.path), before), began_at)
    took_s = ended_at - began_at
    queue_s = min(made.queue_s, took_s) if made is not None else 0.0
    engine_s = min(made.engine_s, took_s - queue_s) if made is not None else 0.0
    return msgspec.structs.replace(
        step,
        client_s=asked_at - before,
        held_s=began_at - asked_at,
        queue_s=queue_s,
        engine_s=engine_s,
        other_s=took_s - queue_s - engine_s,
        is_request=made is not None and isinstance(call, _REQUESTS),
        cached=made.used.cached if made is not None else 0,
    )


def _within(low: float, value: float, high: float) -> float:
    return max(low, min(value, high))


def _top(path: str) -> str:
    """Return the call of the run itself that a path is in."""
    return path.partition("/")[0].partition("#")[0].partition("[")[0]
