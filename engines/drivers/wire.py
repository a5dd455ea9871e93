"""One engine over HTTP: calls and questions go out, chunks, answers and errors of ours come back."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any, Literal

import msgspec
from yarl import URL

from core.chat import Call
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
from engines.drivers.http import Http, Response
from engines.drivers.http1 import Http1
from engines.drivers.http_remote import RemoteHttp, has_proxy
from engines.drivers.sse import FrameBuffer, StreamReader, read_whole

_CONTEXT_WORDS = (
    "context length",
    "context size",
    "exceed_context_size",
    "maximum context",
    "context window",
    "too large to process",  # llama.cpp of an embedding input longer than a batch, with status 500
)
_OK = 200
_PROBE_TIMEOUT_S = 2.0
_LAST_BYTES_TIMEOUT_S = 0.5  # an engine that stays open after its last word loses the connection


class Wire:
    """Connections to one base URL; safe for many tasks at once. ``base_url`` may end in ``/v1``.

    ``reuses_connections`` is for servers that close an idle connection only after a while: one that closes it right
    after an answer may do so just when the next request is on its way.
    """

    def __init__(self, base_url: str, api_key: str | None, *, reuses_connections: bool = True) -> None:
        base = URL(base_url.rstrip("/").removesuffix("/v1"))
        headers = {
            "accept": "*/*",
            "accept-encoding": "identity",
            "content-type": "application/json",
            "user-agent": "forebay",
        }
        if api_key:
            headers["authorization"] = f"Bearer {api_key}"
        kind: type[Http1 | RemoteHttp] = Http1 if _is_plain(base) else RemoteHttp
        self._http: Http = kind(base, headers, reuses_connections=reuses_connections)

    async def stream(self, path: str, call: Call, body: bytes, reader: StreamReader) -> AsyncIterator[Chunk]:
        """Post the call and yield its events as whole frames until the stream is done.

        Raises ``UpstreamError`` for an error status, an error event, or a stream cut short, and ``WorkerLost``.
        """
        buffer = FrameBuffer()
        response = await self._post(path, call, body)
        try:
            readany = response.readany
            while data := await readany():
                if response.status != _OK:
                    raise refusal(response.status, data + await response.read(), response.header("retry-after"))
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
            if response.status != _OK:
                raise refusal(response.status, b"", response.header("retry-after"))
            if buffer.rest:
                raise WorkerLost("the engine closed the connection in the middle of an event")
            if ending := reader.close():
                yield Chunk(ending, 0, reader.usage)
        finally:
            response.release()

    async def whole(self, path: str, call: Call, body: bytes) -> Chunk:
        """Post the call and return its answer, metered. Raises like ``stream``."""
        response = await self._post(path, call, body)
        try:
            answer = await response.read()
            if response.status != _OK:
                raise refusal(response.status, answer, response.header("retry-after"))
        finally:
            response.release()
        whole = read_whole(answer)
        if whole.error:
            raise error_event(whole.error)
        usage = whole.merged_usage(None)
        return Chunk(answer, usage.completion_tokens if usage is not None else 0, usage)

    async def _post(self, path: str, call: Call, body: bytes) -> Response:
        headers: dict[str, str] = {"x-request-id": call.id}
        if call.traceparent is not None:
            headers["traceparent"] = call.traceparent
        return await self._http.send("POST", path, headers, body, connect_timeout=call.timeouts.connect)

    async def ask(self, path: str, body: Any = None, *, timeout_s: float = _PROBE_TIMEOUT_S) -> Any:
        """Return the JSON that a small request (GET, or POST with a body) answers. Raises ``ForebayError``."""
        status, answer = await self.fetch(path, body, timeout_s=timeout_s)
        if status != _OK:
            raise refusal(status, answer, None)
        try:
            return msgspec.json.decode(answer)
        except msgspec.DecodeError as error:
            raise UpstreamBroken(f"{path} did not answer JSON", status=502) from error

    async def fetch(self, path: str, body: Any = None, *, timeout_s: float = _PROBE_TIMEOUT_S) -> tuple[int, bytes]:
        """Return status and body of a small request (GET, or POST with a body). Raises ``WorkerLost``."""
        try:
            async with asyncio.timeout(timeout_s):
                method, sent = ("GET", None) if body is None else ("POST", msgspec.json.encode(body))
                response = await self._http.send(method, path, {}, sent, connect_timeout=timeout_s)
                try:
                    answer = await response.read()
                    return response.status, answer
                finally:
                    response.release()
        except TimeoutError as error:
            raise WorkerLost(f"the worker did not answer {path} in time") from error

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
        await self._http.close()


def _is_plain(base: URL) -> bool:
    """Whether the origin takes nothing but TCP: no TLS, no name and password, no proxy."""
    return base.scheme == "http" and base.user is None and not has_proxy(base)


async def _finish(response: Response) -> None:
    """Read to the end of a stream that has said its last word, so that its connection can be used again."""
    if response.is_complete:
        return
    with suppress(TimeoutError):
        async with asyncio.timeout(_LAST_BYTES_TIMEOUT_S):
            while await response.readany():
                pass


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
