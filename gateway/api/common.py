"""What the FastAPI routes of both ports share: errors in our envelope, and an id on every answer."""

from collections.abc import Awaitable, Callable, MutableMapping
from http import HTTPStatus
from typing import Any

import msgspec
import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from core.chat import Endpoint
from core.errors import ForebayError, InternalError, InvalidRequest, MethodNotAllowed, RequestTooLarge, UnknownUrl
from core.ids import new_request_id
from gateway.errors import body_of, headers_of, status_of
from gateway.logs import REQUEST
from gateway.requests import request_id_of

_log = structlog.get_logger(__name__)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]


class WithRequestId:
    """ASGI application around another: echoes ``x-request-id`` on every answer, making one up if none was sent."""

    def __init__(self, app: AsgiApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = request_id_of(dict(scope["headers"])) or new_request_id()
        scope.setdefault("state", {})["request_id"] = request_id
        REQUEST.set((request_id, None))

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        await self._app(scope, receive, send_with_id)


async def read_body(request: Request, limit: int) -> bytes:
    """Return the whole body. Raises ``RequestTooLarge``."""
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise RequestTooLarge(f"the body has more than {limit} bytes")
        parts.append(part)
    return b"".join(parts)


def speak_our_errors(app: FastAPI) -> None:
    """Let every failure of the app's routes leave in our envelope; the framework's own never do."""
    app.add_exception_handler(ForebayError, _known)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(Exception, _unknown)


def _answer(request: Request, error: ForebayError) -> Response:
    endpoint = Endpoint.MESSAGES if request.url.path.startswith("/v1/messages") else None
    body = body_of(error, endpoint, request.scope.get("state", {}).get("request_id", ""))
    headers = {name.decode(): value.decode() for name, value in headers_of(error)}
    if isinstance(error, RequestTooLarge):
        headers["connection"] = "close"  # what may still come of the body is nobody's request
    return Response(msgspec.json.encode(body), status_of(error), headers, "application/json")


async def _known(request: Request, error: Exception) -> Response:
    assert isinstance(error, ForebayError)
    return _answer(request, error)


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"][1:]).encode(errors="replace").decode()[:256]
    message = str(first["msg"]).removeprefix("Value error, ")
    return _answer(request, InvalidRequest(f"`{place}`: {message}" if place else message, param=place or None))


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path
    if error.status_code == HTTPStatus.NOT_FOUND:
        return _answer(request, UnknownUrl(f"there is no {path} here; see /docs for what there is"))
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        answer = _answer(request, MethodNotAllowed(f"{path} does not take {request.method}"))
        answer.headers.update(error.headers or {})  # `Allow`
        return answer
    return _answer(request, InvalidRequest(str(error.detail)))


async def _gone(request: Request, error: Exception) -> Response:
    return _answer(request, InvalidRequest("the client closed its connection before the body was complete"))


async def _unknown(request: Request, error: Exception) -> Response:
    request_id = request.scope.get("state", {}).get("request_id", "")
    _log.error("request_failed", request_id=request_id, exc_info=error)
    return _answer(request, InternalError(f"an internal error; its id is {request_id}"))
