"""The kinds of calls that a workflow may hold, as they are sent.

Texts inside of ``request``, ``value``, ``arguments``, ``state``, ``inputs``, ``foreach``, ``if``, ``until``, ``next``
and ``result`` are templates; see ``template``.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import Meta

from semantic_vars.values import Value

Criteria = Literal["latency", "throughput"]
"""What whoever wants a variable cares for: that it comes soon, or that much is done (Parrot, section 5.2)."""

OnError = Literal["fail", "skip", "default"]
Cause = Literal["engine", "timeout", "schema", "tool"]

_Count: TypeAlias = Annotated[int, Meta(ge=1, le=100_000)]
_Seconds: TypeAlias = Annotated[float, Meta(gt=0, le=86_400)]
_Share: TypeAlias = Annotated[float, Meta(ge=0, le=1)]


class Retry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """How often a call is tried again, after what, and how long after the first time; then twice as long each time."""

    max: Annotated[int, Meta(ge=0, le=20)] = 0
    on: tuple[Cause, ...] = ("engine", "timeout", "schema", "tool")
    backoff_s: Annotated[float, Meta(ge=0, le=600)] = 0.2


class Common(
    msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", forbid_unknown_fields=True, omit_defaults=True
):
    """What every call has.

    ``output`` names the variable that it makes, which is called as the call itself unless it says otherwise. With
    ``foreach``, a list, the call is made once for each element, which is the variable ``item`` there, and its output is
    the list of results. ``needs`` are variables that must be there first, though no text uses them. If the call fails,
    or what it needs has failed, then its output fails too (``on_error: fail``), is left out (``skip``; consumers are
    skipped, lists are shorter), or is ``default``. ``min_inputs``: the share of a list's elements that must be there.
    """

    id: str
    output: str | None = None
    needs: tuple[str, ...] = ()
    foreach: Value = None
    item: str = "item"
    max_parallel: _Count = 64
    min_inputs: _Share = 0.0
    on_error: OnError = "fail"
    default: Value = None
    retry: Retry = Retry()
    timeout_s: _Seconds | None = None

    @property
    def variable(self) -> str:
        """The name of the variable that it makes."""
        return self.output or self.id


class Body(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Calls with names of their own, which may use variables from around them, and what comes of them."""

    result: Value
    calls: "tuple[Call, ...]" = ()


class Llm(Common, frozen=True, tag="llm"):
    """A model's answer. ``request`` is the body of a chat, or of a completion if it has ``prompt``; with ``schema`` the
    answer is held to it by the engine, and the variable is the JSON value."""

    request: dict[str, Any]
    schema: dict[str, Any] | None = None


class Embed(Common, frozen=True, tag="embed"):
    """Embeddings. ``request`` is the body of ``/v1/embeddings``; the variable is the vector, or the list of vectors."""

    request: dict[str, Any]


class Transform(Common, frozen=True, tag="transform"):
    """A value made of others, by nothing but templates."""

    value: Value


class Http(msgspec.Struct, frozen=True, tag="http", tag_field="type", forbid_unknown_fields=True, omit_defaults=True):
    """A tool behind a URL: the arguments are posted as JSON, the answer's body is the value."""

    url: str
    headers: dict[str, str] = {}


class Mcp(msgspec.Struct, frozen=True, tag="mcp", tag_field="type", forbid_unknown_fields=True, omit_defaults=True):
    """A tool of a server that speaks the Model Context Protocol over HTTP."""

    url: str
    tool: str
    headers: dict[str, str] = {}


class Client(
    msgspec.Struct, frozen=True, tag="client", tag_field="type", forbid_unknown_fields=True, omit_defaults=True
):
    """A tool that the client runs itself: it is told the arguments, and sets the variable."""

    tool: str


Server: TypeAlias = Http | Mcp | Client


class Tool(Common, frozen=True, tag="tool"):
    """What a tool answers. ``at_most_once``: after a crash it is not known whether the tool ran, and it has effects:
    the call fails, instead of being made again."""

    server: Server
    arguments: Value = None
    at_most_once: bool = False


class Branch(Common, frozen=True, tag="branch", rename={"condition": "if", "otherwise": "else"}):
    """One body or the other. The calls of the one that is not taken are never made; without ``else``, the output is
    skipped then."""

    condition: Value
    then: Body
    otherwise: Body | None = None


class Loop(Common, frozen=True, tag="loop"):
    """A body made again and again. ``state`` are variables that it begins with; after each time ``until`` tells whether
    it ends, and if not ``next`` is the state of the next time. After ``max_iterations`` it ends anyway. The output is
    ``result`` of the last time."""

    state: dict[str, Value]
    calls: "tuple[Call, ...]"
    next: dict[str, Value]
    until: Value
    result: Value
    max_iterations: int | None = None


class Race(Common, frozen=True, tag="race"):
    """The ``first`` of several bodies to be done; what only the others need is cancelled. Each begins ``after_s`` after
    the one before it, or when that one has failed. The output is the result, or with more than one a list of them in
    the order in which they came."""

    of: tuple[Body, ...]
    first: _Count = 1
    after_s: Annotated[float, Meta(ge=0, le=86_400)] = 0.0


class Sub(Common, frozen=True, tag="workflow"):
    """A workflow inside of this one: what its calls are named stays in it."""

    inputs: dict[str, Value]
    body: Body


Call: TypeAlias = Llm | Embed | Transform | Tool | Branch | Loop | Race | Sub


def within(call: Call) -> Iterator[Call]:
    """Yield a call, and all that stand in its bodies."""
    yield call
    inner: tuple[Call, ...] = ()
    match call:
        case Branch(then=then, otherwise=otherwise):
            inner = then.calls + (otherwise.calls if otherwise is not None else ())
        case Loop():
            inner = call.calls
        case Race(of=of):
            inner = tuple(one for body in of for one in body.calls)
        case Sub(body=body):
            inner = body.calls
        case _:
            pass
    for one in inner:
        yield from within(one)


class Given(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A variable that no call makes: it has a value, or it is ``open`` and somebody will set it, once."""

    value: Value | msgspec.UnsetType = msgspec.UNSET
    open: bool = False


class Budget(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a whole run may use: tokens, and money in the currency of the operator's prices."""

    tokens: Annotated[int, Meta(ge=1)] | None = None
    cost: Annotated[float, Meta(gt=0)] | None = None


class Workflow(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A graph, or its beginning. ``outputs`` are the variables that are wanted; with none, all that nothing uses. What
    nobody wants is not made."""

    calls: tuple[Call, ...] = ()
    variables: dict[str, Given] = {}
    outputs: tuple[str, ...] = ()
    objective: Criteria = "latency"
    deadline_s: _Seconds | None = None
    budget: Budget = Budget()
    app: str | None = None
