"""The graph of a workflow: calls as nodes, variables as edges (Parrot, section 4.2), checked before anything runs.

Every variable has one writer, every hole a variable, and nothing waits for itself; so whatever was accepted ends.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from core.errors import InvalidRequest
from semantic_vars import calls
from semantic_vars.template import Form, Hole, Template, form_of

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")


class Bounds(msgspec.Struct, frozen=True):
    """How large a graph may be. ``width``: elements of a map; ``depth``: bodies within bodies; ``value``: bytes of
    one, ``total``: bytes of all that calls make."""

    calls: int = 10_000
    width: int = 100_000
    iterations: int = 1_000
    depth: int = 8
    value: int = 4 << 20
    total: int = 256 << 20


USUAL = Bounds()


class Node(msgspec.Struct, frozen=True):
    """A call, read: ``form`` is what it says once ``inputs`` are there, ``each`` the list that it is made for.
    ``captured``: what its blocks use from around it."""

    call: calls.Call
    form: Form
    each: Form | None
    blocks: "tuple[Block, ...]"
    inputs: frozenset[str]
    captured: frozenset[str]

    @property
    def uses(self) -> frozenset[str]:
        """All variables without which it cannot end."""
        return self.inputs | self.captured


class Block(msgspec.Struct, frozen=True):
    """A body, read. ``free``: the variables that it takes from around it."""

    nodes: tuple[Node, ...]
    result: Form
    free: frozenset[str]


class Reader:
    """Reads calls into nodes, one block inside of another. Raises ``InvalidRequest`` that names call and variable."""

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self._num_calls = 0

    def nodes(self, given: Sequence[calls.Call], around: frozenset[str]) -> tuple[Node, ...]:
        """Return the nodes of calls that stand beside each other; ``around`` are the variables that they may use."""
        return self._nodes(given, around, depth=0)

    def _nodes(self, given: Sequence[calls.Call], around: frozenset[str], depth: int) -> tuple[Node, ...]:
        self._num_calls += len(given)
        if self._num_calls > self._bounds.calls:
            raise InvalidRequest(f"the workflow has more than {self._bounds.calls} calls; map over a list instead")
        if depth > self._bounds.depth:
            raise InvalidRequest(f"bodies stand within bodies more than {self._bounds.depth} deep")
        writers = _writers(given, around)
        names = around | writers.keys()
        read = tuple(self._node(call, names, depth) for call in given)
        _refuse_cycles(read)
        return read

    def _node(self, call: calls.Call, names: frozenset[str], depth: int) -> Node:
        try:
            each = form_of(call.foreach) if call.foreach is not None else None
            form = form_of(_said(call))
            if isinstance(call, calls.Llm):
                _check_messages(form.shape)
            own = frozenset((call.item, "index")) if each is not None else frozenset[str]()
            inside = names | own if own else names  # a copy of all names for each call is quadratic
            blocks = tuple(self._blocks(call, inside, depth + 1))
        except InvalidRequest as error:
            raise _in_call(call, error) from None
        needed = form.names - own | frozenset(call.needs) | (each.names if each is not None else frozenset())
        captured = frozenset[str]().union(*(block.free for block in blocks)) - own
        for name in sorted(needed - names):
            raise InvalidRequest(f"call {call.id!r} uses the variable {name!r}, which no call makes and nobody gives")
        return Node(call, form, each, blocks, needed, captured)

    def _blocks(self, call: calls.Call, names: frozenset[str], depth: int) -> Iterator[Block]:
        match call:
            case calls.Branch():
                yield self._block(call.then, names, frozenset(), depth)
                if call.otherwise is not None:
                    yield self._block(call.otherwise, names, frozenset(), depth)
            case calls.Race():
                if not 1 <= call.first <= len(call.of):
                    raise InvalidRequest(f"first is {call.first}, of {len(call.of)} bodies")
                for body in call.of:
                    yield self._block(body, names, frozenset(), depth)
            case calls.Sub():
                yield self._block(call.body, names, frozenset(call.inputs), depth)
            case calls.Loop():
                self._check_loop(call)
                result = {"next": call.next, "until": call.until, "result": call.result}
                yield self._block(calls.Body(result, call.calls), names, frozenset(call.state), depth)
            case _:
                pass

    def _check_loop(self, loop: calls.Loop) -> None:
        most = loop.max_iterations
        if most is None or not 1 <= most <= self._bounds.iterations:
            raise InvalidRequest(f"a loop needs max_iterations, of 1 to {self._bounds.iterations}")
        if loop.state.keys() != loop.next.keys():
            odd = ", ".join(sorted(loop.state.keys() ^ loop.next.keys()))
            raise InvalidRequest(f"state and next have to name the same variables; one of them lacks {odd}")

    def _block(self, body: calls.Body, names: frozenset[str], own: frozenset[str], depth: int) -> Block:
        for name in own:
            _check_name(name)
        nodes = self._nodes(body.calls, names | own, depth)
        made = own | {node.call.variable for node in nodes}
        result = form_of(body.result)
        for name in sorted(result.names - names - made):
            raise InvalidRequest(f"its result uses the variable {name!r}, which no call makes and nobody gives")
        used = result.names.union(*(node.uses for node in nodes))
        return Block(nodes, result, used - made)


def _said(call: calls.Call) -> object:
    match call:
        case calls.Llm() | calls.Embed():
            return call.request
        case calls.Transform():
            return call.value
        case calls.Tool():
            return {"arguments": call.arguments, "server": msgspec.to_builtins(call.server)}
        case calls.Branch():
            return call.condition
        case calls.Loop():
            return call.state
        case calls.Sub():
            return call.inputs
        case calls.Race():
            return None


def _check_messages(shape: Any) -> None:
    messages = shape.get("messages", [])
    is_one_hole = isinstance(messages, Template) and len(messages.parts) == 1 and isinstance(messages.parts[0], Hole)
    if not isinstance(messages, list) and not is_one_hole:
        raise InvalidRequest("messages has to be a list, or a text that is one hole and nothing else, of a list")


def unused_of(nodes: Sequence[Node]) -> tuple[str, ...]:
    """Return the variables that these calls make and none of them uses: what is wanted where nothing is said."""
    used = frozenset[str]().union(*(node.uses for node in nodes))
    return tuple(node.call.variable for node in nodes if node.call.variable not in used)


def _in_call(call: calls.Call, error: InvalidRequest) -> InvalidRequest:
    return InvalidRequest(f"call {call.id!r}: {error.message}", param=error.param)


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise InvalidRequest(f"{name!r} is no name: letters, digits and _, not a digit first, 64 at most")


def _writers(given: Sequence[calls.Call], around: frozenset[str]) -> Mapping[str, str]:
    ids: set[str] = set()
    writers: dict[str, str] = {}
    for call in given:
        for name in (call.id, call.variable, call.item):
            _check_name(name)
        if call.id in ids:
            raise InvalidRequest(f"two calls have the id {call.id!r}")
        ids.add(call.id)
        if (other := writers.get(call.variable)) is not None:
            raise InvalidRequest(f"two calls write the variable {call.variable!r}: {other!r} and {call.id!r}")
        if call.variable in around:
            raise InvalidRequest(f"call {call.id!r} writes the variable {call.variable!r}, which is there already")
        writers[call.variable] = call.id
    return writers


def _refuse_cycles(nodes: Iterable[Node]) -> None:
    by_variable = {node.call.variable: node for node in nodes}
    done: set[str] = set()
    for start in by_variable:
        way: dict[str, Iterator[str]] = {}
        _enter(start, by_variable, way, done)
        while way:
            name, rest = next(reversed(way.items()))
            following = next(rest, None)
            if following is None:
                done.add(name)
                del way[name]
            elif following in way:
                circle = [*way][[*way].index(following) :]
                told = " → ".join(f"{by_variable[one].call.id!r}" for one in [*circle, circle[0]])
                raise InvalidRequest(f"calls wait for each other in a circle, each for the next: {told}")
            else:
                _enter(following, by_variable, way, done)


def _enter(name: str, nodes: Mapping[str, Node], way: dict[str, Iterator[str]], done: set[str]) -> None:
    if name in nodes and name not in done:
        way[name] = iter(sorted(nodes[name].uses))
