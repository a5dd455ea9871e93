"""Who may be asked under which name: a page of another site reaches nothing here, whatever its DNS says (S2)."""

import re
from collections.abc import Iterable, Mapping

import msgspec
from starlette.responses import Response

from core.errors import PermissionDenied
from gateway.api.common import AsgiApp, Receive, Scope, Send
from gateway.errors import body_of, headers_of, status_of

_HOST = re.compile(r"(?:\[([^\[\]]+)\]|([^\[\]:]+))(?::[0-9]*)?")
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


class WithHostCheck:
    """ASGI application around another: refuses requests whose ``Host`` is no name of this port, and whose ``Origin``,
    if any, is not the port itself.

    Names of this port: loopback's, the address that the connection came in on, and ``allowed``. A browser that was led
    here by a foreign name (DNS rebinding) sends that name; a page of another site sends its origin.
    """

    def __init__(self, app: AsgiApp, allowed: Iterable[str]) -> None:
        self._app = app
        self._allowed = _LOOPBACK | {name.lower().strip("[]") for name in allowed}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "http" and (error := self._fault(scope)) is not None:
            body = msgspec.json.encode(body_of(error, None, ""))
            headers = {name.decode(): value.decode() for name, value in headers_of(error)}
            answer = Response(body, status_of(error), headers, "application/json")
            await answer(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _fault(self, scope: Scope) -> PermissionDenied | None:
        headers: Mapping[bytes, bytes] = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = host_name(host)
        server = scope.get("server")
        if name not in self._allowed and not (server and name == server[0]):
            return PermissionDenied(
                f"the admin port does not answer to the name {name[:128]!r}; add it to `admin.allowed_hosts` if it is "
                "one of this server's",
                code="host_not_allowed",
            )
        origin = headers.get(b"origin")
        if origin is not None and origin.decode("latin-1").lower().partition("://")[2] != host:
            return PermissionDenied("the admin port takes no requests from pages of other sites", code="foreign_origin")
        return None


def host_name(host: str) -> str:
    """Return the name or address in a ``Host`` header, without port and brackets; nothing for what is none."""
    match = _HOST.fullmatch(host)
    return (match[1] or match[2] or "") if match is not None else ""
