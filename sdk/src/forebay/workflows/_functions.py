"""Functions that write calls down instead of doing something: ``@llm``, ``@tool``, ``tool(url=...)``, ``embed``."""

import asyncio
import inspect
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from functools import update_wrapper
from typing import Any, Generic, Literal, ParamSpec, TypeAlias, TypeVar, cast, get_type_hints, overload

from pydantic import TypeAdapter
from pydantic_core import to_jsonable_python

from forebay._errors import GraphError
from forebay.workflows._terms import Each, OnError, Retry, Terms
from forebay.workflows._trace import Block, Telling, current
from forebay.workflows._var import Var, list_of

P = ParamSpec("P")
R = TypeVar("R")

Messages: TypeAlias = Sequence[Mapping[str, Any]]


def prompt(said: str | Messages) -> R:  # type: ignore[type-var]  # it is what the caller has promised
    """Return a prompt from a function whose annotation tells what the model answers: a text, or chat messages.

    It is the prompt itself at run time; type checkers take it for the answer.
    """
    return cast("R", said)


@dataclass(frozen=True, slots=True)
class _Errand:
    """A call before it is written down: its kind, the name it would like, the type it makes, and its own fields."""

    kind: str
    name: str
    makes: Any
    fields: Callable[[Telling], Mapping[str, Any]]
    terms: Terms

    def add(self, block: Block) -> Var[Any]:
        """Write it down once."""
        telling = Telling(block)
        fields = {**self.fields(telling), **self.terms.fields(telling)}
        return block.add(self.kind, self.name, self.makes, fields, telling.share)

    def add_each(self, block: Block, each: Each) -> Var[Any]:
        """Write it down for each element of a list."""
        around, inside = Telling(block), Telling(each.block)
        fields = {**each.fields(around), **self.fields(inside), **self.terms.fields(around)}
        return block.add(self.kind, self.name, list_of(self.makes), fields, max(around.share, inside.share))


class LlmFunction(Generic[P, R]):
    """A prompt with parameters. Calling it writes a call down, and gives the variable that will be its answer."""

    def __init__(self, write: Callable[P, R], name: str, params: Mapping[str, Any], terms: Terms) -> None:
        self._write = write
        self._name = name
        self._params = params
        self._terms = terms
        update_wrapper(self, write)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Var[R]:
        """Return the variable of a call with these arguments."""
        block = current()
        return self._errand(self._write(*args, **kwargs), self._terms).add(block)

    def map(
        self,
        items: Sequence[Any] | Var[Any],
        *args: Any,
        max_parallel: int | None = None,
        on_error: OnError | None = None,
        **kwargs: Any,
    ) -> Var[list[R]]:
        """Return the variable of a list: the answers of a call for each element, which is the first argument.

        It is one call of the graph however long the list; at most ``max_parallel`` (64) run at a time. With
        ``on_error="skip"`` the list is shorter by those that failed. The other arguments are the same for all.
        """
        block = current()
        each = Each(items, block, max_parallel)
        said = cast("Callable[..., R]", self._write)(each.item, *args, **kwargs)
        return self._errand(said, self._terms.but(on_error=on_error)).add_each(block, each)

    def using(
        self,
        *,
        name: str | None = None,
        timeout: float | None = None,
        retry: Retry | int | None = None,
        on_error: OnError | None = None,
        default: R | None = None,
        needs: Sequence[Var[Any]] | None = None,
        **params: Any,
    ) -> "LlmFunction[P, R]":
        """Return the same prompt on other terms, or with other parameters of the request, such as ``model``."""
        terms = self._terms.but(timeout=timeout, retry=retry, on_error=on_error, default=default, needs=needs)
        return LlmFunction(self._write, name or self._name, {**self._params, **params}, terms)

    def _errand(self, said: object, terms: Terms) -> _Errand:
        if isinstance(said, str | Var):
            messages: object = [{"role": "user", "content": f"{said}"}]
        elif isinstance(said, Sequence) and all(isinstance(message, Mapping) for message in said):
            messages = said
        else:
            raise GraphError(f"{self._name} returned {said!r}; a prompt is a text, or a list of chat messages")
        makes = _returned(self._write)
        schema = {} if makes is str else {"schema": TypeAdapter(makes).json_schema()}

        def fields(telling: Telling) -> Mapping[str, Any]:
            return {"request": telling.value({**self._params, "messages": messages}), **schema}

        return _Errand("llm", self._name, makes, fields, terms)


def llm(
    *,
    model: str,
    name: str | None = None,
    timeout: float | None = None,
    retry: Retry | int | None = None,
    on_error: OnError | None = None,
    default: Any = None,
    needs: Sequence[Var[Any]] | None = None,
    **params: Any,
) -> Callable[[Callable[P, R]], LlmFunction[P, R]]:
    """Make a prompt of a function that returns it: a text, which is a user's message, or a list of chat messages.

    The function's return annotation says what the model answers: ``str``, a text; anything else that pydantic knows,
    such as a model, JSON of its schema, which becomes a value of that type. ``params`` go into the request as they are.
    ``timeout``: seconds of one attempt. ``on_error``: ``skip`` leaves the answer out if there is none, ``default`` puts
    ``default`` in its place. ``needs``: variables that have to be there first though the prompt does not tell them.
    """
    terms = Terms(timeout, retry, on_error, default, needs)

    def decorated(write: Callable[P, R]) -> LlmFunction[P, R]:
        return LlmFunction(write, name or write.__name__, {"model": model, **params}, terms)

    return decorated


class ToolFunction(Generic[R]):
    """A function of this process that the gateway asks for when its arguments are there.

    Calling it writes a call down, and gives the variable that will be the result.
    """

    def __init__(self, function: Callable[..., Any], name: str, terms: Terms, *, at_most_once: bool) -> None:
        self._function = function
        self._name = name
        self._terms = terms
        self._at_most_once = at_most_once
        self._signature = inspect.signature(function)
        odd = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        if any(parameter.kind in odd for parameter in self._signature.parameters.values()):
            raise TypeError(f"{name}: the parameters of a tool have names")
        update_wrapper(self, function)

    def __call__(self, *args: Any, **kwargs: Any) -> Var[R]:
        """Return the variable of a call with these arguments, values or variables."""
        block = current()
        return self._errand(block, args, kwargs, self._terms).add(block)

    def map(
        self,
        items: Sequence[Any] | Var[Any],
        *args: Any,
        max_parallel: int | None = None,
        on_error: OnError | None = None,
        **kwargs: Any,
    ) -> Var[list[R]]:
        """Return the variable of a list: the results for each element, which is the first argument."""
        block = current()
        each = Each(items, block, max_parallel)
        terms = self._terms.but(on_error=on_error)
        return self._errand(block, (each.item, *args), kwargs, terms).add_each(block, each)

    async def run(self, arguments: Any) -> Any:
        """Run the function, in a thread if it is no coroutine, and return its result as JSON."""
        hints = get_type_hints(self._function)
        given = {name: TypeAdapter(hints.get(name, Any)).validate_python(told) for name, told in arguments.items()}
        async with asyncio.timeout(self._terms.timeout):
            if inspect.iscoroutinefunction(self._function):
                result = await self._function(**given)
            else:
                result = await asyncio.to_thread(self._function, **given)
        return to_jsonable_python(result)

    def _errand(self, block: Block, args: Sequence[Any], kwargs: Mapping[str, Any], terms: Terms) -> _Errand:
        bound = self._signature.bind(*args, **kwargs).arguments
        block.graph.use(self._name, self)
        once = {"at_most_once": True} if self._at_most_once else {}

        def fields(telling: Telling) -> Mapping[str, Any]:
            server = {"type": "client", "tool": self._name}
            return {"server": server, "arguments": telling.value(bound), **once}

        return _Errand("tool", self._name, _returned(self._function, otherwise=Any), fields, terms)


class RemoteTool(Generic[R]):
    """A tool that the gateway calls itself. Calling it writes a call down, and gives the variable of the result."""

    def __init__(self, server: Mapping[str, Any], name: str, returns: Any, terms: Terms, *, at_most_once: bool) -> None:
        self._server = server
        self._name = name
        self._returns = returns
        self._terms = terms
        self._at_most_once = at_most_once

    def __call__(self, **arguments: Any) -> Var[R]:
        """Return the variable of a call with these arguments, values or variables."""
        return self._errand(arguments, self._terms).add(current())

    def map(
        self,
        items: Sequence[Any] | Var[Any],
        arguments: Callable[[Var[Any]], Mapping[str, Any]],
        *,
        max_parallel: int | None = None,
        on_error: OnError | None = None,
    ) -> Var[list[R]]:
        """Return the variable of a list: the results for each element, of which ``arguments`` makes the arguments."""
        block = current()
        each = Each(items, block, max_parallel)
        return self._errand(arguments(each.item), self._terms.but(on_error=on_error)).add_each(block, each)

    def _errand(self, arguments: Mapping[str, Any], terms: Terms) -> _Errand:
        once = {"at_most_once": True} if self._at_most_once else {}

        def fields(telling: Telling) -> Mapping[str, Any]:
            return {"server": telling.value(self._server), "arguments": telling.value(arguments), **once}

        return _Errand("tool", self._name, self._returns, fields, terms)


class _Decorator:
    """Makes a tool of a function."""

    def __init__(self, name: str | None, terms: Terms, *, at_most_once: bool) -> None:
        self._name = name
        self._terms = terms
        self._at_most_once = at_most_once

    @overload
    def __call__(self, function: Callable[..., Coroutine[Any, Any, R]]) -> ToolFunction[R]: ...
    @overload
    def __call__(self, function: Callable[..., R]) -> ToolFunction[R]: ...
    def __call__(self, function: Callable[..., Any]) -> ToolFunction[Any]:
        """Return the tool."""
        name = self._name or function.__name__
        return ToolFunction(function, name, self._terms, at_most_once=self._at_most_once)


@overload
def tool(
    *,
    where: Literal["client"] = "client",
    name: str | None = None,
    timeout: float | None = None,
    on_error: OnError | None = None,
    default: Any = None,
    at_most_once: bool = False,
) -> _Decorator: ...
@overload
def tool(
    *,
    url: str,
    name: str,
    returns: type[R],
    mcp: bool = False,
    headers: Mapping[str, str] | None = None,
    timeout: float | None = None,
    retry: Retry | int | None = None,
    on_error: OnError | None = None,
    default: Any = None,
    at_most_once: bool = False,
) -> RemoteTool[R]: ...
def tool(
    *,
    where: Literal["client"] = "client",
    url: str | None = None,
    name: str | None = None,
    returns: Any = Any,
    mcp: bool = False,
    headers: Mapping[str, str] | None = None,
    timeout: float | None = None,
    retry: Retry | int | None = None,
    on_error: OnError | None = None,
    default: Any = None,
    at_most_once: bool = False,
) -> _Decorator | RemoteTool[Any]:
    """Make a tool of a function, ``@tool(where="client")``, or name one that the gateway calls, ``tool(url=...)``.

    A function runs in this process, when its arguments are there and for as long as the run's block is not left; what
    it raises is the cause of a ``CallFailed``. A URL is posted the arguments as JSON and answers with a value of the
    type ``returns``; with ``mcp`` it is a server of the Model Context Protocol, and ``name`` its tool.
    ``at_most_once``: it has effects, and is not run again where it is not known whether it ran.
    """
    terms = Terms(timeout, retry, on_error, default)
    if url is None:
        return _Decorator(name, terms, at_most_once=at_most_once)
    if name is None:
        raise TypeError("a tool behind a URL needs a name")
    server: dict[str, Any] = {"type": "mcp", "url": url, "tool": name} if mcp else {"type": "http", "url": url}
    if headers:
        server["headers"] = dict(headers)
    return RemoteTool(server, name, returns, terms, at_most_once=at_most_once)


@overload
def embed(text: str | Var[str], *, model: str, name: str = "embed", **params: Any) -> Var[list[float]]: ...
@overload
def embed(
    text: Sequence[str] | Var[list[str]], *, model: str, name: str = "embed", **params: Any
) -> Var[list[list[float]]]: ...
def embed(text: object, *, model: str, name: str = "embed", **params: Any) -> Var[Any]:
    """Return the variable of a text's embedding, or of the embeddings of a list."""
    kind = text.kind if isinstance(text, Var) else type(text)
    makes = Any if kind is Any else list[float] if kind is str else list[list[float]]

    def fields(telling: Telling) -> Mapping[str, Any]:
        return {"request": telling.value({"model": model, **params, "input": text})}

    return _Errand("embed", name, makes, fields, Terms()).add(current())


def _returned(function: Callable[..., Any], otherwise: Any = str) -> Any:
    """Return the type that a function's annotation promises."""
    try:
        return get_type_hints(function, include_extras=True).get("return", otherwise)
    except NameError as error:
        told = f"the annotations of {function.__qualname__} name {error.name!r}, which its module does not have"
        raise GraphError(f"{told}: define that outside of functions") from error
