"""The Model Context Protocol, as far as one call of a tool needs it: over streamable HTTP, revision 2025-06-18.

The official package ``mcp`` is not used: it speaks through httpx, whose connections would have to be pinned to checked
addresses a second time and by other means, and it reads answers of any size.
"""

import re
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Any, Protocol

import msgspec

from semantic_vars.values import Value

REVISION = "2025-06-18"
_REVISIONS = frozenset({REVISION, "2025-03-26"})
_ACCEPT = {"accept": "application/json, text/event-stream"}
_SESSION = re.compile(r"[\x21-\x7e]{1,1024}")
_TOLD = 200  # characters of a server's own words
_NO_METHOD = -32601
_OUR_FAULT = frozenset({-32700, -32600, _NO_METHOD, -32602})


class McpError(Exception):
    """A server gave no value. ``can_retry``: it may another time."""

    def __init__(self, message: str, *, can_retry: bool) -> None:
        super().__init__(message)
        self.can_retry = can_retry


class Answer(Protocol):
    """The answer to a post that went well."""

    @property
    def media_type(self) -> str:
        """What it is, without parameters; lower case."""

    @property
    def session(self) -> str | None:
        """The header ``Mcp-Session-Id``."""

    def pieces(self) -> AsyncIterator[bytes]:
        """Yield the body as it comes, of bounded size."""


class Wire(Protocol):
    """The way to one server. What it raises passes through here."""

    def post(self, content: bytes, headers: Mapping[str, str]) -> AbstractAsyncContextManager[Answer]:
        """Post JSON and return the answer, if it is of the 2xx kind."""

    async def delete(self, headers: Mapping[str, str]) -> None:
        """Tell the server that the session is over. Raises nothing, and does not take long."""


async def call(wire: Wire, tool: str, arguments: Value, *, key: str) -> Value:
    """Call one tool, in a session of its own, and return its structured content, or else its text.

    ``key`` tells a call that is made again. Raises ``McpError``.
    """
    if arguments is not None and not isinstance(arguments, dict):
        raise McpError("a tool of an MCP server takes an object of arguments", can_retry=False)
    session = _Session(wire)
    try:
        await session.begin()
        params = {"name": tool, "arguments": arguments or {}}
        return _value_of(await session.ask("tools/call", params, {"idempotency-key": key}))
    finally:
        await session.end()


class _Fault(msgspec.Struct, frozen=True):
    code: int = 0
    message: str = ""


class _Message(msgspec.Struct, frozen=True):
    """A message of JSON-RPC 2.0: a request has ``method`` and ``id``, a notification the one, an answer the other."""

    id: int | float | str | None = None
    method: str | None = None
    result: dict[str, Any] | None = None
    error: _Fault | None = None


class _Part(msgspec.Struct, frozen=True):
    type: str
    text: str = ""


class _Result(msgspec.Struct, frozen=True, rename="camel"):
    content: tuple[_Part, ...] = ()
    structured_content: Any = None
    is_error: bool = False


class _Session:
    """What is said to one server from ``initialize`` to the end."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._headers: dict[str, str] = {}
        self._id: str | None = None
        self._num_asked = 0

    async def begin(self) -> None:
        """Agree on a revision of the protocol."""
        client = {"name": "forebay", "version": "1"}
        said = await self.ask("initialize", {"protocolVersion": REVISION, "capabilities": {}, "clientInfo": client})
        revision = said.get("protocolVersion")
        if revision not in _REVISIONS:
            raise McpError(f"the server speaks MCP {str(revision)[:40]!r}; this is {REVISION}", can_retry=False)
        self._headers["mcp-protocol-version"] = revision
        await self._tell({"method": "notifications/initialized"})

    async def ask(
        self, method: str, params: dict[str, Any], headers: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """Make a request and return its result; what the server says before it is heard on the way."""
        self._num_asked += 1
        content = _written({"id": self._num_asked, "method": method, "params": params})
        async with self._wire.post(content, {**self._headers, **(headers or {}), **_ACCEPT}) as answer:
            self._note(answer.session)
            async with aclosing(_messages(answer)) as messages:
                async for message in messages:
                    if message.method is not None:
                        await self._hear(message)
                    elif message.id == self._num_asked:
                        return _result_of(message)
        raise McpError("the server ended its answer before it had given one", can_retry=True)

    async def end(self) -> None:
        """Say good-bye, where the server keeps a session."""
        if self._id is not None:
            await self._wire.delete(self._headers)

    def _note(self, session: str | None) -> None:
        if session is None or self._id is not None:
            return
        if not _SESSION.fullmatch(session):
            raise McpError("the server named its session by what is no such name", can_retry=False)
        self._id = self._headers["mcp-session-id"] = session

    async def _hear(self, message: _Message) -> None:
        """Answer a request, so that no server waits for us. It was told that there is nothing to ask but ``ping``."""
        if message.id is None:
            return
        if message.method == "ping":
            await self._tell({"id": message.id, "result": {}})
        else:
            error = {"code": _NO_METHOD, "message": "this client has no such method"}
            await self._tell({"id": message.id, "error": error})

    async def _tell(self, message: dict[str, Any]) -> None:
        async with self._wire.post(_written(message), {**self._headers, **_ACCEPT}):
            pass  # 202, without a body


def _written(message: dict[str, Any]) -> bytes:
    return msgspec.json.encode({"jsonrpc": "2.0", **message})


async def _messages(answer: Answer) -> AsyncGenerator[_Message, None]:
    if answer.media_type == "text/event-stream":
        async with aclosing(_events(answer.pieces())) as events:
            async for data in events:
                for message in _read(data):
                    yield message
    elif answer.media_type == "application/json":
        for message in _read(b"".join([piece async for piece in answer.pieces()])):
            yield message
    else:
        raise McpError("the server answered neither JSON nor a stream of events", can_retry=False)


async def _events(pieces: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    """Yield the data of each server-sent event that is whole."""
    rest = b""
    data: list[bytes] = []
    async for piece in pieces:
        lines = (rest + piece).splitlines(keepends=True)
        rest = lines.pop() if lines and not lines[-1].endswith(b"\n") else b""
        for line in lines:
            if line.startswith(b"data:"):
                data.append(line[5:].strip(b"\r\n").removeprefix(b" "))
            elif not line.strip(b"\r\n"):
                if any(data):
                    yield b"\n".join(data)
                data = []


def _read(data: bytes) -> list[_Message]:
    try:
        read = msgspec.json.decode(data, type=_Message | list[_Message])  # a list: revision 2025-03-26
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise McpError("the server sent what is no message of JSON-RPC", can_retry=False) from None
    return read if isinstance(read, list) else [read]


def _result_of(message: _Message) -> dict[str, Any]:
    if (fault := message.error) is not None:
        told = f"the server answered the error {fault.code}: {fault.message[:_TOLD]}"
        raise McpError(told, can_retry=fault.code not in _OUR_FAULT)
    return message.result or {}


def _value_of(said: dict[str, Any]) -> Value:
    try:
        result = msgspec.convert(said, _Result)
    except msgspec.ValidationError:
        raise McpError("the server answered what is no result of a tool", can_retry=False) from None
    texts = [part.text for part in result.content if part.type == "text"]
    text = "\n".join(texts)
    if result.is_error:  # its own fault or its arguments': a call that says how often may try
        raise McpError(f"the tool failed: {text[:_TOLD]}", can_retry=True)
    if result.structured_content is not None:
        return result.structured_content
    if result.content and not texts:
        kinds = ", ".join(sorted({part.type[:20] for part in result.content}))
        raise McpError(f"the tool answered without text, by {kinds[:_TOLD]} alone", can_retry=False)
    return text
