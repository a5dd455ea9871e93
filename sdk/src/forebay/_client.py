"""The two clients. They differ in how they wait; what they say and understand stands in ``_wire``."""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self

import httpx

from forebay import _wire
from forebay._errors import ForebayError
from forebay._types import (
    ChatChunk,
    ChatCompletion,
    ForebayOptions,
    Model,
    ModelList,
    ResponseMetadata,
)
from forebay.workflows._options import Budget, RunOptions
from forebay.workflows._run import AsyncRun
from forebay.workflows._sync import Background, Run
from forebay.workflows._var import Criteria

_Send = Callable[[_wire.Call], httpx.Response]
_AsyncSend = Callable[[_wire.Call], Awaitable[httpx.Response]]
_Messages = Sequence[Mapping[str, Any]]


class AsyncClient:
    """A client for asyncio; use it as a context manager, or ``aclose`` it.

    ``timeout`` bounds each wait for bytes, not the whole answer. ``transport`` replaces the network, for tests.
    """

    def __init__(
        self,
        base_url: str = _wire.DEFAULT_BASE_URL,
        *,
        api_key: str | None = None,
        timeout: float | httpx.Timeout = _wire.DEFAULT_TIMEOUT,
        max_retries: int = 2,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        gateway = _wire.endpoint(base_url, api_key)
        self._http = httpx.AsyncClient(
            base_url=gateway.url,
            headers=gateway.headers,
            timeout=_wire.as_timeout(timeout),
            trust_env=gateway.use_proxies,
            transport=transport,
        )
        self._max_retries = max_retries
        self.models = AsyncModels(self._send)
        self.chat = AsyncChat(self._send)
        self.health = AsyncHealth(self._http)

    def run(
        self,
        *,
        app: str | None = None,
        objective: Criteria = "latency",
        deadline: float | None = None,
        budget: Budget | None = None,
        resume: str | None = None,
        progress: bool = False,
    ) -> AsyncRun:
        """Return a run of a workflow, whose calls are made in its block: ``async with client.run() as run:``.

        ``objective`` is what its outputs are wanted for; ``deadline`` the seconds that it may take. ``resume``: the id
        of an earlier run of the same program, or of one that has been edited since; what is sent first makes only those
        calls whose inputs have changed. ``progress`` writes a line about it to stderr.
        """
        options = RunOptions(app, objective, deadline, budget, resume, progress)
        return AsyncRun(self._send, self._max_retries, options)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections; streams that are still open end."""
        await self._http.aclose()

    async def _send(self, call: _wire.Call) -> httpx.Response:
        """Return the first successful answer, its body unread."""
        attempts = _wire.Attempts(self._max_retries, is_repeatable=call.is_repeatable)
        while True:
            request = self._http.build_request(
                call.method,
                call.path,
                json=call.body,
                params=call.params,
                headers=call.headers,
                timeout=call.timeout(self._http.timeout),
            )
            try:
                response = await self._http.send(request, stream=True)
                if response.is_success:
                    return response
                await response.aread()
                delay = attempts.after_status(response)
            except httpx.TransportError as error:
                delay = attempts.after_error(error)
            await asyncio.sleep(delay)


class AsyncModels:
    """The models that the key may use."""

    def __init__(self, send: _AsyncSend) -> None:
        self._send = send

    async def list(self) -> ModelList:
        """Return all of them."""
        return _wire.answer(ModelList, await _aread(await self._send(_wire.list_models())))

    async def retrieve(self, model: str) -> Model:
        """Return one of them; raises ``NotFound``."""
        return _wire.answer(Model, await _aread(await self._send(_wire.retrieve_model(model))))


class AsyncChat:
    """Chat answers."""

    def __init__(self, send: _AsyncSend) -> None:
        self._send = send

    async def create(
        self, *, model: str, messages: _Messages, forebay: ForebayOptions | None = None, **params: Any
    ) -> ChatCompletion:
        """Return a whole answer. ``params`` are OpenAI's and the engine's own, passed on as they are."""
        call = _wire.chat(model, messages, forebay, params, stream=False)
        return _wire.answer(ChatCompletion, await _aread(await self._send(call)))

    def stream(
        self, *, model: str, messages: _Messages, forebay: ForebayOptions | None = None, **params: Any
    ) -> "AsyncChatStream":
        """Return a stream; it is asked for when it is entered or first read."""
        call = _wire.chat(model, messages, forebay, params, stream=True)
        return AsyncChatStream(lambda: self._send(call))


class AsyncHealth:
    """Whether the gateway runs, asked once and without retries."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http

    async def live(self) -> bool:
        """Return whether the process answers."""
        return await self._probe("liveness")

    async def ready(self) -> bool:
        """Return whether it takes requests: False while it starts or drains, or where nothing answers."""
        return await self._probe("readiness")

    async def _probe(self, probe: str) -> bool:
        call = _wire.health(probe)
        try:
            return (await self._http.request(call.method, call.path)).is_success
        except httpx.TransportError:
            return False


class AsyncChatStream:
    """Chunks as they come. Leaving the context, or ``aclose``, cancels what is still running."""

    def __init__(self, send: Callable[[], Awaitable[httpx.Response]]) -> None:
        self._send = send
        self._response: httpx.Response | None = None
        self._chunks = self._read()

    @property
    def forebay(self) -> ResponseMetadata:
        """How the gateway answers; empty before the stream is entered or read."""
        return ResponseMetadata() if self._response is None else _wire.metadata(self._response.headers)

    async def __aenter__(self) -> Self:
        await self._opened()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> ChatChunk:
        return await anext(self._chunks)

    async def aclose(self) -> None:
        """End the stream; the gateway then stops the engine."""
        await self._chunks.aclose()
        if self._response is not None:
            await self._response.aclose()

    async def _opened(self) -> httpx.Response:
        if self._response is None:
            self._response = await self._send()
        return self._response

    async def _read(self) -> AsyncGenerator[ChatChunk, None]:
        response = await self._opened()
        reader = _wire.ChunkReader(response.headers.get("x-request-id"))
        try:
            async for piece in response.aiter_bytes():
                for chunk in reader.feed(piece):
                    yield chunk
            reader.finish()
        except httpx.TransportError as error:
            _raise_if(reader.broken(error), error)
        finally:
            await response.aclose()


class Client:
    """The same client for code without an event loop; safe to share between threads."""

    def __init__(
        self,
        base_url: str = _wire.DEFAULT_BASE_URL,
        *,
        api_key: str | None = None,
        timeout: float | httpx.Timeout = _wire.DEFAULT_TIMEOUT,
        max_retries: int = 2,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        gateway = _wire.endpoint(base_url, api_key)
        self._http = httpx.Client(
            base_url=gateway.url,
            headers=gateway.headers,
            timeout=_wire.as_timeout(timeout),
            trust_env=gateway.use_proxies,
            transport=transport,
        )
        self._max_retries = max_retries
        self.models = Models(self._send)
        self.chat = Chat(self._send)
        self.health = Health(self._http)
        self._background = Background(
            partial(AsyncClient, base_url, api_key=api_key, timeout=timeout, max_retries=max_retries), transport
        )

    def run(
        self,
        *,
        app: str | None = None,
        objective: Criteria = "latency",
        deadline: float | None = None,
        budget: Budget | None = None,
        resume: str | None = None,
        progress: bool = False,
    ) -> Run:
        """Return a run of a workflow, as ``AsyncClient.run`` does, for a ``with`` block.

        Its values are ``var.result()`` and ``for piece in var``. It speaks to the gateway from a thread of its own.
        """
        return Run(self._background, RunOptions(app, objective, deadline, budget, resume, progress))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; streams that are still open end."""
        self._background.close()
        self._http.close()

    def _send(self, call: _wire.Call) -> httpx.Response:
        """Return the first successful answer, its body unread."""
        attempts = _wire.Attempts(self._max_retries)
        while True:
            request = self._http.build_request(call.method, call.path, json=call.body)
            try:
                response = self._http.send(request, stream=True)
                if response.is_success:
                    return response
                response.read()
                delay = attempts.after_status(response)
            except httpx.TransportError as error:
                delay = attempts.after_error(error)
            time.sleep(delay)


class Models:
    """The models that the key may use."""

    def __init__(self, send: _Send) -> None:
        self._send = send

    def list(self) -> ModelList:
        """Return all of them."""
        return _wire.answer(ModelList, _read(self._send(_wire.list_models())))

    def retrieve(self, model: str) -> Model:
        """Return one of them; raises ``NotFound``."""
        return _wire.answer(Model, _read(self._send(_wire.retrieve_model(model))))


class Chat:
    """Chat answers."""

    def __init__(self, send: _Send) -> None:
        self._send = send

    def create(
        self, *, model: str, messages: _Messages, forebay: ForebayOptions | None = None, **params: Any
    ) -> ChatCompletion:
        """Return a whole answer. ``params`` are OpenAI's and the engine's own, passed on as they are."""
        call = _wire.chat(model, messages, forebay, params, stream=False)
        return _wire.answer(ChatCompletion, _read(self._send(call)))

    def stream(
        self, *, model: str, messages: _Messages, forebay: ForebayOptions | None = None, **params: Any
    ) -> "ChatStream":
        """Return a stream; it is asked for when it is entered or first read."""
        call = _wire.chat(model, messages, forebay, params, stream=True)
        return ChatStream(lambda: self._send(call))


class Health:
    """Whether the gateway runs, asked once and without retries."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http

    def live(self) -> bool:
        """Return whether the process answers."""
        return self._probe("liveness")

    def ready(self) -> bool:
        """Return whether it takes requests: False while it starts or drains, or where nothing answers."""
        return self._probe("readiness")

    def _probe(self, probe: str) -> bool:
        call = _wire.health(probe)
        try:
            return self._http.request(call.method, call.path).is_success
        except httpx.TransportError:
            return False


class ChatStream:
    """Chunks as they come. Leaving the context, or ``close``, cancels what is still running."""

    def __init__(self, send: Callable[[], httpx.Response]) -> None:
        self._send = send
        self._response: httpx.Response | None = None
        self._chunks = self._read()

    @property
    def forebay(self) -> ResponseMetadata:
        """How the gateway answers; empty before the stream is entered or read."""
        return ResponseMetadata() if self._response is None else _wire.metadata(self._response.headers)

    def __enter__(self) -> Self:
        self._opened()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> ChatChunk:
        return next(self._chunks)

    def close(self) -> None:
        """End the stream; the gateway then stops the engine."""
        self._chunks.close()
        if self._response is not None:
            self._response.close()

    def _opened(self) -> httpx.Response:
        if self._response is None:
            self._response = self._send()
        return self._response

    def _read(self) -> Generator[ChatChunk, None, None]:
        response = self._opened()
        reader = _wire.ChunkReader(response.headers.get("x-request-id"))
        try:
            for piece in response.iter_bytes():
                yield from reader.feed(piece)
            reader.finish()
        except httpx.TransportError as error:
            _raise_if(reader.broken(error), error)
        finally:
            response.close()


def _raise_if(told: ForebayError | None, cause: httpx.TransportError) -> None:
    if told is not None:
        raise told from cause


async def _aread(response: httpx.Response) -> httpx.Response:
    try:
        await response.aread()
    except httpx.TransportError as error:
        raise _wire.connection_error(error) from error
    return response


def _read(response: httpx.Response) -> httpx.Response:
    try:
        response.read()
    except httpx.TransportError as error:
        raise _wire.connection_error(error) from error
    return response
