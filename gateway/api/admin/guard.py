"""What every route of the admin port does first and last: who calls, with which role, and a record of what was done."""

import secrets
from collections.abc import Awaitable, Callable, Coroutine
from typing import Annotated, Any

import msgspec
import structlog
from fastapi import Depends, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute

from core.errors import Conflict, DatabaseUnavailable, ForebayError, InvalidJson, InvalidKey, PermissionDenied
from core.records import AuditEntry
from gateway.api.admin.access import ACCESS, CHANGES_NOTHING
from gateway.api.common import Message, read_body
from gateway.auth import Operator, covers
from gateway.errors import status_of
from gateway.services import Services
from storage.sql import database
from storage.sql.database import StorageUnavailable

MAX_BODY = 2**20

_log = structlog.get_logger(__name__)

_ADVICE = " (here an operator's: that of this machine lies in `admin.key` of the state folder)"

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class Act:
    """What an operator is doing. Handlers name its ``target`` where the path does not, and add to ``detail`` what
    is worth knowing later: never a secret."""

    def __init__(self, action: str, target: str) -> None:
        self.action = action
        self.target = target
        self.operator = Operator("", "viewer")
        self.is_known = False
        self.detail: dict[str, object] = {}


def _act_of(request: Request) -> Act:
    act = request.state.act
    assert isinstance(act, Act)
    return act


Acting = Annotated[Act, Depends(_act_of)]


def guarded(services: Services) -> type[APIRoute]:
    """Return the class of the admin port's routes.

    A call is let through with a key whose role covers the one that ``ACCESS`` says, before its body is read. A
    database that is away is a 503. Every change, also a refused one, is recorded with its outcome.
    """

    class Guarded(APIRoute):
        def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
            name = endpoint.__name__
            options["operation_id"] = name
            options["openapi_extra"] = {"x-forebay-role": ACCESS[name], "security": [{"key": []}]}
            super().__init__(path, endpoint, **options)

        def get_route_handler(self) -> Handler:
            handler = super().get_route_handler()

            async def guard(request: Request) -> Response:
                act = request.state.act = Act(self.name, _target_of(request))
                is_change = request.method not in {"GET", "HEAD"}
                status = 500
                try:
                    _admit(act, request, services)
                    whole = await _with_body(request) if is_change else request
                    response = await _answered(handler, whole)
                    status = response.status_code
                    return response
                except ForebayError as error:
                    status = status_of(error)
                    act.detail["code"] = error.specific_code
                    raise
                except RequestValidationError:
                    status = 400
                    raise
                finally:
                    if is_change and self.name not in CHANGES_NOTHING:
                        await _record(act, status, request)

            return guard

    unknown = _Bucket()

    async def _record(act: Act, status: int, request: Request) -> None:
        """Write the entry to the log, and to the database, whose absence does not undo what was done."""
        entry = AuditEntry(
            time=services.clock.wall(),
            id=f"act_{secrets.token_hex(12)}",
            actor=act.operator.name if act.is_known else "",
            role=act.operator.role if act.is_known else "",
            action=act.action,
            target=act.target,
            outcome=status,
            detail={**act.detail, "request_id": request.scope["state"].get("request_id", "")},
        )
        _log.info("audit", actor=entry.actor, role=entry.role, action=entry.action, target=entry.target, outcome=status)
        if not act.is_known and not unknown.has_room(services.clock.monotonic()):
            return
        try:
            await services.store.audit.add(entry)
        except StorageUnavailable as error:
            _log.warning("audit_not_stored", id=entry.id, error=str(error))

    return Guarded


def _target_of(request: Request) -> str:
    """Return what the path names, without characters that not every database keeps."""
    text = "/".join(str(value) for value in request.path_params.values())
    return "".join(letter if letter.isprintable() else "?" for letter in text[:256])


def _admit(act: Act, request: Request, services: Services) -> None:
    """Find out who calls; raise unless the role covers what is asked."""
    headers = dict(request.scope["headers"])
    try:
        act.operator = services.directory.keyring.operator(headers, services.clock.wall())
    except InvalidKey as error:
        raise InvalidKey(f"{error.message}{_ADVICE}", code=error.specific_code) from error
    act.is_known = True
    needed = ACCESS[act.action]
    if not covers(act.operator.role, needed):
        raise PermissionDenied(
            f"this needs the role {needed!r}, and the key {act.operator.name!r} has the role {act.operator.role!r}"
        )


class _Bucket:
    """Room for what callers that nobody knows try on one resource: 60 in a minute, lest they fill the database."""

    _SIZE = 60.0

    def __init__(self) -> None:
        self._level = 0.0
        self._at = 0.0

    def has_room(self, now: float) -> bool:
        self._level = max(0.0, self._level - (now - self._at) * self._SIZE / 60)
        self._at = now
        if self._level >= self._SIZE:
            return False
        self._level += 1
        return True


async def _answered(handler: Callable[[Request], Awaitable[Response]], request: Request) -> Response:
    try:
        return await handler(request)
    except database.Conflict as error:
        raise Conflict(str(error)) from error
    except StorageUnavailable as error:
        raise DatabaseUnavailable(
            "the database cannot be reached; what is in memory holds, and changes have to wait", retry_after=2.0
        ) from error


async def _with_body(request: Request) -> Request:
    """Return the request with its body read: within bounds, and JSON that can be told again (no NaN, whole Unicode)."""
    body = await read_body(request, MAX_BODY)
    if body:
        try:
            msgspec.json.decode(body)
        except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
            raise InvalidJson(f"the body is not JSON: {error}") from error

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    return Request(request.scope, receive)
