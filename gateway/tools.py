"""Tools that workflows call: posts to addresses that requests name, which are checked and pinned before they are asked.

An address may be made by a template, and so by a model: nothing in it is trusted. See ``egress`` for what is checked.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Protocol

import aiohttp
import msgspec
from multidict import CIMultiDict
from yarl import URL

from core.errors import InvalidRequest
from gateway import mcp
from semantic_vars.calls import Cause, Http, Mcp
from semantic_vars.values import Value

_TOLD = 200  # characters of an answer that is an error
_BYE_S = 1.0
_DEPTH = 64  # of JSON, as of requests
_NO_TIMEOUT = aiohttp.ClientTimeout()  # ours is around all of a call
_CHARSETS = frozenset({"utf-8", "us-ascii", "iso-8859-1", "windows-1252"})  # some that Python knows take very long
_JSON = re.compile(r"application/(?:json|[a-z0-9.!#$&^_-]+\+json)")

_MAX_HEADERS = 16 << 10  # characters of all
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,256}")
_HEADER_VALUE = re.compile(r"[\t\x20-\x7e]*")
_HEADERS_OF_OURS = frozenset({
    "connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "http2-settings",  # hop by hop
    "host", "content-length", "content-encoding", "accept-encoding", "expect", "idempotency-key", "last-event-id",
})  # fmt: skip
_PREFIXES_OF_OURS = ("proxy-", "mcp-")


class ToolFailed(Exception):
    """A tool gave no value. ``can_retry``: it may another time. ``cause``: what a call's ``retry`` calls it."""

    code = "tool_failed"

    def __init__(self, message: str, *, can_retry: bool, cause: Cause = "tool") -> None:
        super().__init__(message)
        self.message = message
        self.can_retry = can_retry
        self.cause = cause


class Gate(Protocol):
    """Lets through what may be asked; ``Egress`` does."""

    async def session(self, url: URL) -> aiohttp.ClientSession:
        """Return a session that leads to this address and to no other, for the caller to close.

        Raises ``InvalidRequest`` for an address that may not be asked, ``OSError`` for one that cannot be found.
        """


class Limits(msgspec.Struct, frozen=True):
    """What one call of a tool may take. ``max_size``: bytes of all its answers; ``timeout``: seconds at most."""

    max_size: int = 4 << 20
    timeout: float = 120.0


class Tools:
    """Runs tools over HTTP and those of MCP servers."""

    def __init__(self, gate: Gate, limits: Limits) -> None:
        self._gate = gate
        self._limits = limits

    async def run(self, server: Http | Mcp, arguments: Value, *, key: str, timeout: float | None = None) -> Value:
        """Return what a tool answers: JSON as its value, text as text.

        ``key`` is the same whenever the same call is made again. ``timeout``: seconds. Raises ``ToolFailed``.
        """
        seconds = self._limits.timeout if timeout is None else min(timeout, self._limits.timeout)
        deadline = asyncio.timeout(seconds)
        try:
            async with deadline:
                return await self._run(server, arguments, key)
        except InvalidRequest as error:
            raise ToolFailed(f"the tool may not be asked: {error.message}", can_retry=False) from None
        except mcp.McpError as error:
            raise ToolFailed(str(error), can_retry=error.can_retry) from None
        except (aiohttp.ClientError, OSError):  # of which a timeout is one
            if deadline.expired():
                told = f"the tool did not answer within {seconds:g} s"
                raise ToolFailed(told, can_retry=True, cause="timeout") from None
            raise ToolFailed("the tool could not be reached, or broke off", can_retry=True) from None

    async def _run(self, server: Http | Mcp, arguments: Value, key: str) -> Value:
        url, headers = _url_of(server.url), _headers_of(server.headers)
        async with await self._gate.session(url) as session:
            peer = _Peer(session, url, headers, self._limits.max_size)
            if isinstance(server, Mcp):
                value = await mcp.call(peer, server.tool, arguments, key=key)
            else:
                async with peer.post(msgspec.json.encode(arguments), {"idempotency-key": key}) as answer:
                    value = await _value_of(answer)
        if not _is_flat(value):
            raise ToolFailed(f"the tool's answer is nested deeper than {_DEPTH} levels", can_retry=False)
        return value


class _Peer:
    """One tool's address, and what is posted there. ``room``: bytes that its answers may have, all together."""

    def __init__(self, session: aiohttp.ClientSession, url: URL, headers: Mapping[str, str], room: int) -> None:
        self._session = session
        self._url = url
        self._headers = headers
        self.room = room

    @asynccontextmanager
    async def post(self, content: bytes, headers: Mapping[str, str]) -> "AsyncIterator[_Answer]":
        """Post JSON and give the answer. Raises ``ToolFailed`` for one that is not of the 2xx kind."""
        async with self._session.post(
            self._url, data=content, headers=self._all(headers), allow_redirects=False, timeout=_NO_TIMEOUT
        ) as response:
            if not 200 <= response.status < 300:
                raise await _refusal(response)
            if response.headers.get("content-encoding", "identity").lower() != "identity":
                raise ToolFailed("the tool's answer is compressed, which it was not to be", can_retry=False)
            yield _Answer(response, self)

    async def delete(self, headers: Mapping[str, str]) -> None:
        """End an MCP session. Raises nothing; takes no longer than a second, also where time is up."""
        with suppress(aiohttp.ClientError, OSError):
            async with (
                asyncio.timeout(_BYE_S),
                self._session.delete(self._url, headers=self._all(headers), allow_redirects=False, timeout=_NO_TIMEOUT),
            ):
                pass

    def _all(self, headers: Mapping[str, str]) -> CIMultiDict[str]:
        every = CIMultiDict({"content-type": "application/json", "accept": "application/json, text/*"})
        every.update(self._headers)
        every.update({**headers, "accept-encoding": "identity"})
        every.setdefault("user-agent", "forebay")
        return every


class _Answer:
    """An answer whose body has not been read."""

    def __init__(self, response: aiohttp.ClientResponse, peer: _Peer) -> None:
        self._response = response
        self._peer = peer

    @property
    def media_type(self) -> str:
        """What it is, without parameters; lower case."""
        return self._response.content_type.lower()

    @property
    def session(self) -> str | None:
        """The MCP session that it names."""
        return self._response.headers.get("mcp-session-id")

    @property
    def charset(self) -> str:
        """How its text is encoded."""
        return (self._response.charset or "utf-8").lower()

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yield the body as it comes. Raises ``ToolFailed`` when it becomes too large."""
        async for piece in self._response.content.iter_any():
            self._peer.room -= len(piece)
            if self._peer.room < 0:
                raise ToolFailed("the tool answers more than may be taken of it", can_retry=False)
            yield piece


def _url_of(text: str) -> URL:
    try:
        return URL(text)
    except ValueError:
        raise ToolFailed("the tool's url is none", can_retry=False) from None


def _headers_of(given: Mapping[str, str]) -> Mapping[str, str]:
    if sum(len(name) + len(value) for name, value in given.items()) > _MAX_HEADERS:
        raise ToolFailed(f"the tool's headers have more than {_MAX_HEADERS} characters", can_retry=False)
    for name, value in given.items():
        lowered = name.lower()
        if not _HEADER_NAME.fullmatch(name) or lowered in _HEADERS_OF_OURS or lowered.startswith(_PREFIXES_OF_OURS):
            raise ToolFailed(f"the tool's header {name[:64]!r} is not one that a workflow may set", can_retry=False)
        if not _HEADER_VALUE.fullmatch(value):
            raise ToolFailed(f"the tool's header {name[:64]!r} holds what no header may", can_retry=False)
    return given


async def _value_of(answer: _Answer) -> Value:
    content = b"".join([piece async for piece in answer.pieces()])
    if not content:
        return None
    media_type = answer.media_type
    try:
        if _JSON.fullmatch(media_type):
            return msgspec.json.decode(content)
        if media_type.startswith("text/") and answer.charset in _CHARSETS:
            return content.decode(answer.charset)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise ToolFailed(f"the tool's answer is not the {media_type} that it says", can_retry=False) from None
    raise ToolFailed(f"the tool answered {media_type[:64]}; JSON and text are understood", can_retry=False)


async def _refusal(response: aiohttp.ClientResponse) -> ToolFailed:
    status = response.status
    if status < 400:
        return ToolFailed(f"the tool answered {status}; redirects are not followed", can_retry=False)
    begun = b""
    async for piece in response.content.iter_any():
        begun += piece
        if len(begun) > 4 * _TOLD:
            break
    text = " ".join(begun[: 4 * _TOLD].decode(errors="replace").split())
    words = "".join(letter for letter in text if letter.isprintable())[:_TOLD]
    return ToolFailed(
        f"the tool answered {status}: {words}" if words else f"the tool answered {status}",
        can_retry=status in {408, 429} or status >= 500,
    )


def _is_flat(value: Value) -> bool:
    """Whether a value is nested no deeper than requests may be."""
    level = [value]
    for _ in range(_DEPTH):
        inner = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list)]
        level = [part for parts in inner for part in parts]
    return not any(isinstance(one, dict | list) for one in level)
