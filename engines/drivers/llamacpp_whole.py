"""Whole answers, put together from the events of a stream: equal to what llama.cpp answers without streaming."""

from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from core.chat import Endpoint
from engines.drivers.llamacpp_requests import Json


class Collector(Protocol):
    """Takes the events of one answer."""

    @property
    def is_complete(self) -> bool:
        """Whether the events themselves have said that the answer is over."""

    def add(self, event: Json) -> None:
        """Take the next event."""

    def answer(self) -> Json:
        """Return the whole answer."""


def collector_for(endpoint: Endpoint) -> Collector:
    """Return an empty collector for the endpoint's kind of events."""
    kinds: dict[Endpoint, Callable[[], Collector]] = {
        Endpoint.CHAT: _ChatCollector,
        Endpoint.COMPLETIONS: _CompletionsCollector,
        Endpoint.RESPONSES: _ResponsesCollector,
        Endpoint.MESSAGES: _MessagesCollector,
    }
    return kinds[endpoint]()


class _ChoicesCollector:
    """What chat and text completions share: the frame around the choices, and the choices by index."""

    object_name = ""
    is_complete = False  # ``[DONE]`` says it, which is no event

    def __init__(self) -> None:
        self._head: Json = {}
        self._choices: dict[int, Json] = {}

    def add(self, event: Json) -> None:
        if not isinstance(event.get("choices"), list):
            return
        self._head.update({key: value for key, value in event.items() if key != "choices"})
        for piece in event["choices"]:
            index = piece.get("index", 0)
            choice = self._choices.setdefault(index, {"finish_reason": None, "index": index})
            choice["finish_reason"] = piece.get("finish_reason") or choice["finish_reason"]
            self._add_logprobs(choice, piece)
            self._add_piece(choice, piece)

    def _add_logprobs(self, choice: Json, piece: Json) -> None:
        new = piece.get("logprobs")
        if not isinstance(new, dict):
            return
        logprobs = choice["logprobs"] = choice.get("logprobs") or {}
        for key, values in new.items():
            if isinstance(values, list):
                logprobs[key] = [*logprobs.get(key, []), *values]

    def _add_piece(self, choice: Json, piece: Json) -> None:
        raise NotImplementedError

    def _closed(self, choice: Json) -> Json:
        return choice

    def answer(self) -> Json:
        choices = [self._closed(self._choices[index]) for index in sorted(self._choices)]
        return {"choices": choices} | self._head | {"object": self.object_name}


class _ChatCollector(_ChoicesCollector):
    """Chat completions: deltas are joined into messages."""

    object_name = "chat.completion"

    def _add_piece(self, choice: Json, piece: Json) -> None:
        message = choice.setdefault("message", {"role": "assistant", "content": None})
        for key, value in (piece.get("delta") or {}).items():
            if key == "tool_calls":
                _join_calls(message.setdefault("tool_calls", []), value or [])
            elif key != "role":
                message[key] = _joined(message.get(key), value)

    def _closed(self, choice: Json) -> Json:
        message = choice["message"]
        if message["content"] is None and not message.get("tool_calls"):
            message["content"] = ""
        return choice


def _joined(before: Any, piece: Any) -> Any:
    if isinstance(before, str) and isinstance(piece, str):
        return before + piece
    return before if piece is None else piece


def _join_calls(calls: list[Json], pieces: list[Json]) -> None:
    for piece in pieces:
        index = piece.get("index", len(calls))
        while len(calls) <= index:
            calls.append({"type": "function", "function": {"name": "", "arguments": ""}})
        call = calls[index]
        function = piece.get("function") or {}
        for key in ("name", "arguments"):
            call["function"][key] += function.get(key) or ""
        if piece.get("id"):
            call["id"] = piece["id"]


class _CompletionsCollector(_ChoicesCollector):
    """Text completions."""

    object_name = "text_completion"

    def _add_piece(self, choice: Json, piece: Json) -> None:
        choice["text"] = choice.get("text", "") + (piece.get("text") or "")
        choice.setdefault("logprobs", None)


class _ResponsesCollector:
    """``/v1/responses``: the last event holds the whole answer, less one field."""

    def __init__(self) -> None:
        self._response: Json | None = None

    @property
    def is_complete(self) -> bool:
        return self._response is not None

    def add(self, event: Json) -> None:
        if event.get("type") in {"response.completed", "response.incomplete", "response.failed"}:
            self._response = dict(event["response"])

    def answer(self) -> Json:
        response = dict(self._response or {})
        if response.get("status") == "completed" and "created_at" in response:
            response.setdefault("completed_at", response["created_at"])  # llama.cpp means the end by both
        return response


class _MessagesCollector:
    """Anthropic's ``/v1/messages``: blocks by index between a start and a closing delta."""

    def __init__(self) -> None:
        self._message: Json = {}
        self._blocks: dict[int, Json] = {}
        self._inputs: dict[int, str] = {}
        self.is_complete = False

    def add(self, event: Json) -> None:
        kind = event.get("type")
        if kind == "message_start":
            self._message = dict(event["message"])
        elif kind == "content_block_start":
            self._blocks[event["index"]] = dict(event["content_block"])
        elif kind == "content_block_delta":
            self._add_delta(event["index"], event["delta"])
        elif kind == "message_delta":
            usage = (self._message.get("usage") or {}) | (event.get("usage") or {})
            self._message |= (event.get("delta") or {}) | {"usage": usage}
        elif kind == "message_stop":
            self.is_complete = True

    def _add_delta(self, index: int, delta: Json) -> None:
        if delta.get("type") == "input_json_delta":
            self._inputs[index] = self._inputs.get(index, "") + delta.get("partial_json", "")
            return
        block = self._blocks.setdefault(index, {"type": "text", "text": ""})
        for key, value in delta.items():
            if key != "type":
                block[key] = _joined(block.get(key), value)

    def answer(self) -> Json:
        for index, text in self._inputs.items():
            self._blocks[index]["input"] = _input_of(text)
        return self._message | {"content": [self._blocks[index] for index in sorted(self._blocks)]}


def _input_of(text: str) -> Any:
    """Return a tool's input; nothing of one that was cut short, as half a JSON text is no object."""
    try:
        return msgspec.json.decode(text or "{}")
    except msgspec.DecodeError:
        return {}
