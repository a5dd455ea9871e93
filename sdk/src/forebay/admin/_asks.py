"""What the admin client asks, described once as values, and the two ways to get it answered: waiting, and awaiting.

A resource's method describes a request and returns an ``Ask``; ``operation`` and ``listing`` turn it into a method that
answers at once on ``Admin``'s resources, and one to await, or to iterate over with ``async for``, on ``AsyncAdmin``'s.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import update_wrapper
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar, overload
from urllib.parse import quote

import httpx

from forebay import _wire
from forebay.admin._values import Page

P = ParamSpec("P")
T = TypeVar("T")
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Ask(Generic[T]):
    """One request below ``/admin/v1``, and how its answer is understood."""

    method: str
    path: str
    understand: Callable[[httpx.Response], T]
    params: Mapping[str, Any] = field(default_factory=dict)
    body: Any = None
    if_match: str | None = None


def path(*parts: str) -> str:
    """Return the path of these names, whatever signs are in them."""
    return "/".join(quote(part, safe="") for part in parts)


def _built(http: httpx.Client | httpx.AsyncClient, ask: Ask[Any]) -> httpx.Request:
    headers = {} if ask.if_match is None else {"if-match": ask.if_match}
    params = {name: value for name, value in ask.params.items() if value is not None}
    return http.build_request(ask.method, f"admin/v1/{ask.path}", params=params, json=ask.body, headers=headers)


def _attempts(ask: Ask[Any], max_retries: int) -> _wire.Attempts:
    """Return how often to try: what changes something is sent once, as nobody knows whether it has arrived."""
    return _wire.Attempts(max_retries if ask.method == "GET" else 0)


def _after(ask: Ask[Page[Item]], page: Page[Item]) -> Ask[Page[Item]] | None:
    return None if page.next is None else replace(ask, params={**ask.params, "after": page.next})


class Runner:
    """Sends requests and waits."""

    def __init__(self, http: httpx.Client, max_retries: int) -> None:
        self._http = http
        self._max_retries = max_retries

    def run(self, ask: Ask[T]) -> T:
        """Return the answer, understood."""
        attempts = _attempts(ask, self._max_retries)
        while True:
            try:
                response = self._http.send(_built(self._http, ask))
                if response.is_success:
                    return ask.understand(response)
                delay = attempts.after_status(response)
            except httpx.TransportError as error:
                delay = attempts.after_error(error)
            time.sleep(delay)

    def items(self, ask: Ask[Page[Item]]) -> Iterator[Item]:
        """Yield what is on all pages, asking for each when it is needed."""
        following: Ask[Page[Item]] | None = ask
        while following is not None:
            page = self.run(following)
            yield from page.data
            following = _after(ask, page)


class AsyncRunner:
    """Sends requests and awaits."""

    def __init__(self, http: httpx.AsyncClient, max_retries: int) -> None:
        self._http = http
        self._max_retries = max_retries

    async def run(self, ask: Ask[T]) -> T:
        """Return the answer, understood."""
        attempts = _attempts(ask, self._max_retries)
        while True:
            try:
                response = await self._http.send(_built(self._http, ask))
                if response.is_success:
                    return ask.understand(response)
                delay = attempts.after_status(response)
            except httpx.TransportError as error:
                delay = attempts.after_error(error)
            await asyncio.sleep(delay)

    async def items(self, ask: Ask[Page[Item]]) -> AsyncIterator[Item]:
        """Yield what is on all pages, asking for each when it is needed."""
        following: Ask[Page[Item]] | None = ask
        while following is not None:
            page = await self.run(following)
            for item in page.data:
                yield item
            following = _after(ask, page)


RunnerT = TypeVar("RunnerT", Runner, AsyncRunner)


class Resource(Generic[RunnerT]):
    """A group of requests about one kind of thing."""

    def __init__(self, runner: RunnerT) -> None:
        self._runner: RunnerT = runner


class operation(Generic[P, T]):
    """A method that asks one thing."""

    def __init__(self, describe: Callable[Concatenate[Any, P], Ask[T]]) -> None:
        self._describe = describe
        update_wrapper(self, describe)  # type: ignore[arg-type]  # for help(): it is no function, and has what one has

    @overload
    def __get__(self, resource: None, kind: type) -> Self: ...
    @overload
    def __get__(self, resource: Resource[Runner], kind: type) -> Callable[P, T]: ...
    @overload
    def __get__(self, resource: Resource[AsyncRunner], kind: type) -> Callable[P, Coroutine[Any, Any, T]]: ...
    def __get__(self, resource: Resource[Any] | None, kind: type) -> Any:
        if resource is None:
            return self

        def ask(*args: P.args, **kwargs: P.kwargs) -> Any:
            return resource._runner.run(self._describe(resource, *args, **kwargs))

        return update_wrapper(ask, self._describe)


class listing(Generic[P, Item]):
    """A method that goes through a list of any length."""

    def __init__(self, describe: Callable[Concatenate[Any, P], Ask[Page[Item]]]) -> None:
        self._describe = describe
        update_wrapper(self, describe)  # type: ignore[arg-type]

    @overload
    def __get__(self, resource: None, kind: type) -> Self: ...
    @overload
    def __get__(self, resource: Resource[Runner], kind: type) -> Callable[P, Iterator[Item]]: ...
    @overload
    def __get__(self, resource: Resource[AsyncRunner], kind: type) -> Callable[P, AsyncIterator[Item]]: ...
    def __get__(self, resource: Resource[Any] | None, kind: type) -> Any:
        if resource is None:
            return self

        def ask(*args: P.args, **kwargs: P.kwargs) -> Any:
            return resource._runner.items(self._describe(resource, *args, **kwargs))

        return update_wrapper(ask, self._describe)
