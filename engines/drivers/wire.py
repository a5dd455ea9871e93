"""HTTP to one engine: the only module that knows aiohttp's client, and translates its errors."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from functools import lru_cache
from typing import Any, Literal

import aiohttp
import msgspec
from multidict import CIMultiDict
from yarl import URL

from core.chat import Call, Endpoint
from core.errors import (
    ConnectTimeout,
    ContextLengthExceeded,
    ForebayError,
    UpstreamBroken,
    UpstreamBusy,
    UpstreamError,
    UpstreamRefused,
    WorkerLost,
    WorkerUnreachable,
)
from engines.driver import Chunk
from engines.drivers.sse import FrameBuffer, StreamReader, read_whole

_CONTEXT_WORDS = (
    "context length",
    "context size",
    "exceed_context_size",
    "maximum context",
    "context window",
    "too large to process",  # llama.cpp of an embedding input longer than a batch, with status 500
)
_PROBE_TIMEOUT_S = 2.0
_KEEPALIVE_S = 4.0  # less than the 5 s after which uvicorn, and so vLLM, closes an idle connection
_LAST_BYTES_TIMEOUT_S = 0.5  # an engine that stays open after its last word loses the connection


class Wire:
    """Connections to one base URL; safe for many tasks at once. ``base_url`` may end in ``/v1``.

    ``reuses_connections`` is for servers that close an idle connection only after a while: one that closes it right
    after an answer may do so just when the next request is on its way.
    """

    def __init__(self, base_url: str, api_key: str | None, *, reuses_connections: bool = True) -> None:
        self._base = base_url.rstrip("/").removesuffix("/v1")
        headers = {
            "accept": "*/*",
            "accept-encoding": "identity",
            "content-type": "application/json",
            "user-agent": "forebay",
        }
        if api_key:
            headers["authorization"] = f"Bearer {api_key}"
        self._translated = _Translated(self._base)
        self._open: set[aiohttp.ClientResponse] = set()
        self._urls: dict[str, URL] = {path: self._url(path) for path in Endpoint}
        is_local = self._url("").host in {"127.0.0.1", "localhost", "::1"}
        self._session = aiohttp.ClientSession(
            headers=headers,
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S)
            if reuses_connections
            else aiohttp.TCPConnector(limit=0, force_close=True),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            read_bufsize=2**18,
            # A proxy of the environment may stand between us and a provider, never before our own workers.
            trust_env=not is_local,
        )

    def _url(self, path: str) -> URL:
        return URL(self._base + path)

    async def stream(self, path: str, call: Call, body: bytes, reader: StreamReader) -> AsyncIterator[Chunk]:
        """Post the call and yield its events as whole frames until the stream is done.

        Raises ``UpstreamError`` for an error status, an error event, or a stream cut short, and ``WorkerLost``.
        """
        buffer = FrameBuffer()
        with self._translated:
            async with self._post(path, call, body) as response:
                self._open.add(response)
                try:
                    if response.status != 200:
                        raise refusal(response.status, await response.read(), response.headers.get("retry-after"))
                    readany = response.content.readany
                    while data := await readany():
                        frames = buffer.feed(data)
                        if not frames:
                            continue
                        if frames.startswith(b":") and b"data:" not in frames:
                            yield Chunk(raw=frames, is_progress=False)
                            continue
                        raw = reader.read(frames)
                        yield Chunk(raw, reader.num_tokens, reader.usage, aside=reader.aside)
                        if reader.error is not None:
                            raise error_event(reader.error)
                        if reader.is_done:
                            await _finish(response)
                            return
                    if buffer.rest:
                        raise WorkerLost("the engine closed the connection in the middle of an event")
                    if ending := reader.close():
                        yield Chunk(ending, 0, reader.usage)
                finally:
                    self._open.discard(response)

    async def whole(self, path: str, call: Call, body: bytes) -> Chunk:
        """Post the call and return its answer, metered. Raises like ``stream``."""
        with self._translated:
            async with self._post(path, call, body) as response:
                self._open.add(response)
                try:
                    answer = await response.read()
                finally:
                    self._open.discard(response)
                if response.status != 200:
                    raise refusal(response.status, answer, response.headers.get("retry-after"))
        whole = read_whole(answer)
        if whole.error:
            raise error_event(whole.error)
        usage = whole.merged_usage(None)
        return Chunk(answer, usage.completion_tokens if usage is not None else 0, usage)

    def _post(self, path: str, call: Call, body: bytes) -> Any:
        headers: CIMultiDict[str] = CIMultiDict({"x-request-id": call.id})
        if call.traceparent is not None:
            headers["traceparent"] = call.traceparent
        return self._session.post(self._urls.get(path) or self._url(path), data=body, headers=headers,
                                  timeout=_deadlines(call.timeouts.connect), allow_redirects=False)  # fmt: skip

    async def ask(self, path: str, body: Any = None, *, timeout_s: float = _PROBE_TIMEOUT_S) -> Any:
        """Return the JSON that a small request (GET, or POST with a body) answers. Raises ``ForebayError``."""
        status, answer = await self.fetch(path, body, timeout_s=timeout_s)
        if status != 200:
            raise refusal(status, answer, None)
        try:
            return msgspec.json.decode(answer)
        except msgspec.DecodeError as error:
            raise UpstreamBroken(f"{path} did not answer JSON", status=502) from error

    async def fetch(self, path: str, body: Any = None, *, timeout_s: float = _PROBE_TIMEOUT_S) -> tuple[int, bytes]:
        """Return status and body of a small request (GET, or POST with a body). Raises ``WorkerLost``."""
        method = "GET" if body is None else "POST"
        data = None if body is None else msgspec.json.encode(body)
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        with self._translated:
            async with self._session.request(
                method, self._url(path), data=data, timeout=timeout, allow_redirects=False
            ) as response:
                return response.status, await response.read()

    async def probe(self, path: str) -> int | Literal["silent", "unreachable"]:
        """Return the status that a GET answers, or what it means that there is none. Never raises."""
        try:
            status, _ = await self.fetch(path)
        except (WorkerUnreachable, ConnectTimeout):
            return "unreachable"
        except ForebayError:
            return "silent"
        return status

    async def close(self) -> None:
        """Close every connection. Who waits for an answer gets a ``WorkerLost``."""
        for response in tuple(self._open):
            response.close()  # the session's own close wakes nobody who reads a body
        await self._session.close()


async def _finish(response: aiohttp.ClientResponse) -> None:
    """Read to the end of a stream that has said its last word, so that its connection can be used again."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_LAST_BYTES_TIMEOUT_S):
            while await response.content.readany():
                pass


@lru_cache(maxsize=64)
def _deadlines(connect: float) -> aiohttp.ClientTimeout:
    """Only a connection attempt ends by itself: the other deadlines are the dispatcher's."""
    return aiohttp.ClientTimeout(total=None, sock_connect=connect)


class _Translated:
    """A context in which aiohttp's errors become ours; the most specific comes first."""

    __slots__ = ("_base",)

    def __init__(self, base: str) -> None:
        self._base = base

    def __enter__(self) -> None:
        """Enter; nothing happens."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Raise what the error means to a caller; errors of other kinds pass."""
        match error:
            case None | ForebayError():
                return
            case aiohttp.ConnectionTimeoutError():
                raise ConnectTimeout(f"the worker at {self._base} did not accept a connection in time") from error
            case aiohttp.ClientConnectorError():
                raise WorkerUnreachable(f"the worker at {self._base} cannot be reached") from error
            case aiohttp.ClientError() | ConnectionError():
                raise WorkerLost(f"the worker at {self._base} broke the connection") from error
            case TimeoutError():
                raise WorkerLost(f"the worker at {self._base} did not answer in time") from error


def _described(body: bytes) -> dict[str, Any]:
    """Return the error object of an engine's error body, whatever shape the engine gives it."""
    try:
        tree = msgspec.json.decode(body)
    except msgspec.DecodeError:
        text = body[:500].decode("utf-8", "replace").strip()
        return {"message": text} if text else {}
    if isinstance(tree, dict):
        error = tree.get("error", tree)
        if isinstance(error, dict):
            return error
        return {"message": str(error)}
    return {"message": str(tree)[:500]}


def _seconds(text: str | None) -> float | None:
    try:
        return max(0.0, float(text)) if text else None
    except ValueError:
        return None


def refusal(status: int, body: bytes, retry_after: str | None) -> ForebayError:
    """Return the error that an engine's error answer means; its code is text even where the engine sent a number."""
    error = _described(body)
    message = str(error.get("message") or error.get("detail") or f"the engine answered {status}")
    code = error.get("code")
    text_code = code if isinstance(code, str) and not code.isdigit() else None
    param = error.get("param") if isinstance(error.get("param"), str) else None
    kind = str(error.get("type") or "")
    if status in {400, 413, 500} and any(word in f"{message} {kind} {text_code}".lower() for word in _CONTEXT_WORDS):
        return ContextLengthExceeded(message, param=param or "messages")
    if status in {429, 503}:
        return UpstreamBusy(message, status=status, code=text_code, retry_after=_seconds(retry_after))
    if status in {401, 403}:
        # The engine rejects *our* credentials: the caller's key has nothing to do with it.
        return UpstreamBroken("the worker refuses the gateway's credentials", status=502, code="upstream_auth")
    if 400 <= status < 500 and status != 408:
        return UpstreamRefused(message, status=status, param=param, code=text_code or "invalid_request")
    return UpstreamBroken(message, status=status, code=text_code)


def error_event(error: Any) -> ForebayError:
    """Return the error that an engine hid in a stream it had opened with 200."""
    tree = error if isinstance(error, dict) else {"message": str(error)}
    code = tree.get("code")
    try:
        status = int(code)  # type: ignore[arg-type] # vLLM and llama.cpp put the status there
    except (TypeError, ValueError):
        status = 400 if "invalid" in str(tree.get("type")) else 500
    known = refusal(status if 400 <= status < 600 else 500, msgspec.json.encode({"error": tree}), None)
    return known if isinstance(known, UpstreamError | ContextLengthExceeded) else UpstreamBroken(str(known), status=502)
