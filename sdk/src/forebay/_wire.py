"""What both clients share, without any I/O: requests, answers, errors, when to try again, and the stream's format."""

import email.utils
import json
import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from ipaddress import ip_address
from typing import Any, TypeVar, cast
from urllib.parse import quote

import httpx
from pydantic import ValidationError

from forebay._errors import (
    APIStatusError,
    AuthenticationError,
    BadRequest,
    ClientTimeout,
    Conflict,
    ConnectionFailed,
    ForebayError,
    MalformedAnswer,
    NotFound,
    PermissionDenied,
    PreconditionFailed,
    RateLimited,
    ServerError,
    StreamBroken,
    TimedOut,
    Unavailable,
)
from forebay._types import ChatChunk, ForebayOptions, ResponseMetadata, _Answer

DEFAULT_BASE_URL = "http://127.0.0.1:8411"
DEFAULT_TIMEOUT = httpx.Timeout(600.0, connect=5.0)

_FIRST_DELAY_S = 0.5
_LONGEST_DELAY_S = 8.0
_LONGEST_ADVICE_S = 60.0  # beyond this the caller should know rather than wait

_AnswerT = TypeVar("_AnswerT", bound=_Answer)

_BY_STATUS: Mapping[int, type[APIStatusError]] = {
    400: BadRequest,
    401: AuthenticationError,
    403: PermissionDenied,
    404: NotFound,
    408: TimedOut,
    409: Conflict,
    412: PreconditionFailed,
    413: BadRequest,
    422: BadRequest,
    428: PreconditionFailed,
    429: RateLimited,
    503: Unavailable,
    504: TimedOut,
}


@dataclass(frozen=True, slots=True)
class Call:
    """One request: where it goes and what it says.

    ``is_repeatable``: sent twice it is as good as sent once. So it is tried again also where it may have arrived, and a
    conflict is an answer. ``silence``: the seconds in which no byte may come of an answer that is on its way.
    """

    method: str
    path: str
    body: dict[str, Any] | None = None
    params: Mapping[str, str | int] | None = None
    headers: Mapping[str, str] | None = None
    is_repeatable: bool = False
    silence: float = 0.0

    def timeout(self, usual: httpx.Timeout) -> httpx.Timeout:
        """Return the timeout of this request, of a client's usual one."""
        read = None if usual.read is None else max(usual.read, self.silence)
        return httpx.Timeout(connect=usual.connect, read=read, write=usual.write, pool=usual.pool)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a gateway is and how to speak to it."""

    url: httpx.URL
    headers: Mapping[str, str]
    use_proxies: bool


def endpoint(base_url: str, api_key: str | None, *, variable: str = "FOREBAY_API_KEY") -> Endpoint:
    """Return the endpoint of an address with or without ``/v1``. The key falls back to the environment's ``variable``.

    Proxies from the environment are not used for a loopback address.
    """
    url = httpx.URL(base_url.rstrip("/").removesuffix("/v1") + "/")
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError(f"base_url has to be an http(s) address, not {base_url!r}")
    key = api_key or os.environ.get(variable)
    headers = {"user-agent": f"forebay-python/{version('forebay')}", "accept": "application/json"}
    if key:
        headers["authorization"] = f"Bearer {key}"
    return Endpoint(url, headers, use_proxies=not _is_loopback(url.host))


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def list_models() -> Call:
    """Return the request for all models."""
    return Call("GET", "v1/models")


def retrieve_model(model: str) -> Call:
    """Return the request for one model."""
    return Call("GET", f"v1/models/{quote(model, safe='/')}")


def health(probe: str) -> Call:
    """Return the request for ``liveness`` or ``readiness``."""
    return Call("GET", f"health/{probe}")


def chat(
    model: str,
    messages: Sequence[Mapping[str, Any]],
    options: ForebayOptions | None,
    params: Mapping[str, Any],
    *,
    stream: bool,
) -> Call:
    """Return the request for a chat answer. ``params`` go into the body as they are."""
    if "stream" in params:
        raise TypeError(
            "`stream` is not a parameter: use chat.stream(...) for a stream, chat.create(...) for an answer"
        )
    body: dict[str, Any] = {"model": model, "messages": list(messages), **params}
    if stream:
        body["stream"] = True
    if options is not None:
        body["forebay"] = options
    return Call("POST", "v1/chat/completions", body)


def metadata(headers: httpx.Headers) -> ResponseMetadata:
    """Return what the headers of an answer say about it; a value that makes no sense is left out."""
    attempts = _number(headers.get("x-forebay-attempts"))
    return ResponseMetadata(
        request_id=headers.get("x-request-id"),
        model=headers.get("x-forebay-model"),
        worker=headers.get("x-forebay-worker"),
        attempts=None if attempts is None else int(attempts),
        queue_ms=_number(headers.get("x-forebay-queue-ms")),
        overhead_ms=_number(headers.get("x-forebay-overhead-ms")),
        cache=headers.get("x-forebay-cache"),
        decision=headers.get("x-forebay-decision"),
    )


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def answer(kind: type[_AnswerT], response: httpx.Response) -> _AnswerT:
    """Return a successful response's body, typed; raises ``MalformedAnswer``."""
    try:
        parsed = kind.model_validate_json(response.content)
    except ValidationError as error:
        raise MalformedAnswer(f"{response.url} did not answer with a {kind.__name__}: {error}") from error
    parsed._forebay = metadata(response.headers)
    return parsed


def status_error(response: httpx.Response) -> APIStatusError:
    """Return the error that a response with an error status and a read body stands for."""
    fault = _error_object(response.content)
    status = response.status_code
    kind = _BY_STATUS.get(status, ServerError if status >= 500 else APIStatusError)
    return kind(
        str(fault.get("message") or response.text[:500] or response.reason_phrase),
        status=status,
        code=_text(fault.get("code")),
        type=_text(fault.get("type")),
        param=_text(fault.get("param")),
        request_id=response.headers.get("x-request-id"),
        retry_after=_retry_after(response.headers),
    )


def _error_object(content: bytes) -> Mapping[str, Any]:
    try:
        body = json.loads(content)
    except ValueError:
        return {}
    fault = body.get("error") if isinstance(body, dict) else None
    return fault if isinstance(fault, dict) else {}


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _retry_after(headers: httpx.Headers) -> float | None:
    milliseconds = _number(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1e3
    advice = headers.get("retry-after")
    seconds = _number(advice)
    if seconds is not None or advice is None:
        return seconds
    try:
        return max(0.0, email.utils.parsedate_to_datetime(advice).timestamp() - time.time())
    except ValueError:
        return None


def connection_error(error: httpx.TransportError) -> ConnectionFailed:
    """Return the error that stands for a request without an answer."""
    kind = ClientTimeout if isinstance(error, httpx.TimeoutException) else ConnectionFailed
    return kind(str(error) or type(error).__name__)


class Attempts:
    """Counts the tries of one request and says how long to wait before the next, or raises what ended them."""

    def __init__(self, max_retries: int, *, is_repeatable: bool = False) -> None:
        self._left = max_retries
        self._is_repeatable = is_repeatable
        self._delay_s = _FIRST_DELAY_S

    def after_error(self, error: httpx.TransportError) -> float:
        """Return the seconds to wait after a try without an answer; raises ``ConnectionFailed``."""
        # After a read timeout the request may still be running: repeating it would run it twice.
        may_run = isinstance(error, (httpx.ReadTimeout, httpx.WriteTimeout)) and not self._is_repeatable
        if self._left <= 0 or may_run or isinstance(error, httpx.UnsupportedProtocol):
            raise connection_error(error) from error
        return self._spend()

    def after_end(self) -> float:
        """Return the seconds to wait after a stream that ended before its end; raises ``StreamBroken``."""
        if self._left <= 0:
            raise StreamBroken("the stream ended before its end", code="stream_truncated")
        return self._spend()

    def after_status(self, response: httpx.Response) -> float:
        """Return the seconds to wait after an error status; raises the ``APIStatusError`` if it is final."""
        error = status_error(response)
        is_answer = self._is_repeatable and response.status_code == 409
        if self._left <= 0 or is_answer or not _is_worth_retrying(response):
            raise error
        if error.retry_after is None:
            return self._spend()
        if error.retry_after > _LONGEST_ADVICE_S:
            raise error
        self._spend()
        return max(0.0, error.retry_after)

    def _spend(self) -> float:
        self._left -= 1
        delay = self._delay_s * random.uniform(0.75, 1.0)  # noqa: S311 - spreads retries, guards no secret
        self._delay_s = min(self._delay_s * 2, _LONGEST_DELAY_S)
        return delay


def _is_worth_retrying(response: httpx.Response) -> bool:
    told = response.headers.get("x-should-retry")
    if told in ("true", "false"):
        return bool(told == "true")
    return response.status_code in (408, 409, 429) or response.status_code >= 500


class ChunkReader:
    """Turns the bytes of an event stream into chunks, however they are cut."""

    def __init__(self, request_id: str | None) -> None:
        self._request_id = request_id
        self._rest = b""
        self._data: list[bytes] = []
        self._is_done = False

    def feed(self, piece: bytes) -> Iterator[ChatChunk]:
        """Yield the chunks that are complete now; raises ``StreamBroken`` where the stream tells an error."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            chunk = self._line(line.removesuffix(b"\r"))
            if chunk is not None:
                yield chunk

    def finish(self) -> None:
        """Raise ``StreamBroken`` unless the stream has told its end."""
        if not self._is_done:
            raise StreamBroken("the stream ended before its end", code="stream_truncated", request_id=self._request_id)

    def broken(self, error: httpx.TransportError) -> ForebayError | None:
        """Return the error that a broken connection means; None if all had been said before."""
        if self._is_done:
            return None
        message = str(error) or type(error).__name__
        return StreamBroken(message, code="connection_lost", request_id=self._request_id)

    def _line(self, line: bytes) -> ChatChunk | None:
        if line.startswith(b"data:"):
            self._data.append(line[5:].removeprefix(b" "))
            return None
        if line or not self._data:  # comments and other fields say nothing here
            return None
        data, self._data = b"\n".join(self._data), []
        if self._is_done:
            return None
        if data.startswith(b"[DONE]"):
            self._is_done = True
            return None
        return self._chunk(data)

    def _chunk(self, data: bytes) -> ChatChunk:
        fault = _error_object(data)
        if fault:
            raise StreamBroken(
                str(fault.get("message") or "the stream broke"),
                code=_text(fault.get("code")),
                type=_text(fault.get("type")),
                param=_text(fault.get("param")),
                request_id=self._request_id,
            )
        try:
            return ChatChunk.model_validate_json(data)
        except ValidationError as error:
            raise MalformedAnswer(f"the stream holds something that is not a chunk: {error}") from error


def as_timeout(timeout: float | httpx.Timeout) -> httpx.Timeout:
    """Return a timeout whose connect part is short even where one number was given."""
    if isinstance(timeout, httpx.Timeout):
        return timeout
    return httpx.Timeout(timeout, connect=min(timeout, cast("float", DEFAULT_TIMEOUT.connect)))
