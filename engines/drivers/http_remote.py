"""HTTP to an endpoint behind TLS or a proxy of the environment, by aiohttp, which knows both."""

from collections.abc import Mapping
from functools import lru_cache
from urllib.request import getproxies, proxy_bypass

import aiohttp
from yarl import URL

from core.errors import ConnectTimeout, ForebayError, WorkerLost, WorkerUnreachable
from engines.drivers.http import Response
from engines.drivers.http1 import Http1

_READ_AHEAD_BYTES = 2**18


class RemoteHttp:
    """See ``Http``. ``headers`` go with every request."""

    def __init__(self, base: URL, headers: Mapping[str, str], *, reuses_connections: bool) -> None:
        self._base = base
        self._open: set[_Response] = set()
        self._session = aiohttp.ClientSession(
            headers=headers,
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=Http1.KEEPALIVE_S)
            if reuses_connections
            else aiohttp.TCPConnector(limit=0, force_close=True),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            read_bufsize=_READ_AHEAD_BYTES,
            trust_env=has_proxy(base),  # without one it would look through environment and files for every request
        )

    async def send(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes | None, *, connect_timeout: float
    ) -> Response:
        """See ``Http``."""
        try:
            response = await self._session.request(
                method, URL(str(self._base) + path), data=body, headers=headers, timeout=_deadlines(connect_timeout),
                allow_redirects=False,
            )  # fmt: skip
        except (aiohttp.ClientError, OSError) as error:
            raise self.meaning_of(error) from error
        opened = _Response(self, response)
        self._open.add(opened)
        return opened

    async def close(self) -> None:
        """See ``Http``."""
        for response in tuple(self._open):
            response.abort()  # the session's own close wakes nobody who reads a body
        await self._session.close()

    def discard(self, response: "_Response") -> None:
        """Forget an answer that is done."""
        self._open.discard(response)

    def meaning_of(self, error: Exception) -> ForebayError:
        """Return what an error is to a caller; the most specific comes first."""
        match error:
            case aiohttp.ConnectionTimeoutError():
                return ConnectTimeout(f"the worker at {self._base} did not accept a connection in time")
            case aiohttp.ClientConnectorError():
                return WorkerUnreachable(f"the worker at {self._base} cannot be reached")
        return WorkerLost(f"the worker at {self._base} broke the connection")


class _Response:
    """An answer of aiohttp's, as a ``Response``."""

    def __init__(self, origin: RemoteHttp, response: aiohttp.ClientResponse) -> None:
        self._origin = origin
        self._response = response
        self.status = response.status

    @property
    def is_complete(self) -> bool:
        return self._response.content.at_eof()

    async def readany(self) -> bytes:
        try:
            return await self._response.content.readany()
        except (aiohttp.ClientError, OSError) as error:
            raise self._origin.meaning_of(error) from error

    async def read(self) -> bytes:
        try:
            return await self._response.content.read()
        except (aiohttp.ClientError, OSError) as error:
            raise self._origin.meaning_of(error) from error

    def header(self, name: str) -> str | None:
        return self._response.headers.get(name)

    def release(self) -> None:
        if self.is_complete:
            self._origin.discard(self)
            self._response.release()
        else:
            self.abort()

    def abort(self) -> None:
        self._origin.discard(self)
        self._response.close()


def has_proxy(base: URL) -> bool:
    """Whether the environment puts a proxy between us and the origin; never one before our own machine."""
    host = base.host or ""
    return host not in {"127.0.0.1", "localhost", "::1"} and base.scheme in getproxies() and not proxy_bypass(host)


@lru_cache(maxsize=64)
def _deadlines(connect: float) -> aiohttp.ClientTimeout:
    """Only a connection attempt ends by itself: the other deadlines are the dispatcher's."""
    return aiohttp.ClientTimeout(total=None, sock_connect=connect)
