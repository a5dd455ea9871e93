"""A gateway in a few lines behind ``httpx.MockTransport``: scripted answers, and what was asked."""

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx

HEADERS = {
    "x-request-id": "req_1",
    "x-forebay-model": "m",
    "x-forebay-worker": "m-0",
    "x-forebay-attempts": "2",
    "x-forebay-queue-ms": "1.5",
    "x-forebay-overhead-ms": "0.25",
    "x-forebay-cache": "miss",
}
MESSAGES = [{"role": "user", "content": "hello"}]


class ScriptedGateway:
    """Answers with the scripted responses in turn, the last one for ever; remembers the requests."""

    def __init__(self, *script: httpx.Response | Exception) -> None:
        self._script = list(script)
        self.requests: list[httpx.Request] = []

    @property
    def transport(self) -> httpx.MockTransport:
        """The network that leads to this gateway, sync and async."""
        return httpx.MockTransport(self._answer)

    def body(self) -> Any:
        """Return the last request's body."""
        return json.loads(self.requests[-1].content)

    def _answer(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        step = self._script.pop(0) if len(self._script) > 1 else self._script[0]
        if isinstance(step, Exception):
            raise step
        return step


class Pieces(httpx.AsyncByteStream, httpx.SyncByteStream):
    """A body that comes in pieces, may break, and knows whether it was closed."""

    def __init__(self, *pieces: bytes | Exception) -> None:
        self._pieces = pieces
        self.is_closed = False

    def __iter__(self) -> Iterator[bytes]:
        for piece in self._pieces:
            if isinstance(piece, Exception):
                raise piece
            yield piece

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self:
            yield piece

    def close(self) -> None:
        """Note that the reader is gone."""
        self.is_closed = True

    async def aclose(self) -> None:
        """Note that the reader is gone."""
        self.is_closed = True


def completion(text: str = "hi") -> httpx.Response:
    """Return a whole chat answer."""
    message = {"role": "assistant", "content": text}
    body = {
        "id": "c1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
        "engine_extra": {"kept": True},
    }
    return httpx.Response(200, json=body, headers=HEADERS)


def frame(text: str) -> bytes:
    """Return one SSE frame of a chat stream."""
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    return b"data: " + json.dumps({"id": "c1", "choices": [choice]}, ensure_ascii=False).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


def stream(*pieces: bytes | Exception) -> httpx.Response:
    """Return an event stream in these pieces."""
    return httpx.Response(200, stream=Pieces(*pieces), headers={**HEADERS, "content-type": "text/event-stream"})


def error(status: int, code: str = "some_code", **headers: str) -> httpx.Response:
    """Return an error in OpenAI's envelope."""
    fault = {"message": "it went wrong", "type": "some_error", "param": "model", "code": code}
    return httpx.Response(status, json={"error": fault}, headers={"x-request-id": "req_9", **headers})
