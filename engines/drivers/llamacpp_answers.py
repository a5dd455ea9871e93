"""What llama.cpp's events become before the client sees them: other events, or one whole answer."""

import re
import secrets
from collections.abc import Callable, Iterable
from typing import Protocol

import msgspec

from core.errors import UpstreamBroken
from engines.drivers.llamacpp_requests import Json, Plan
from engines.drivers.llamacpp_whole import Collector, collector_for
from engines.drivers.sse import DONE, data_of, json_of, split


def new_call_id() -> str:
    """Return an id for a tool call, in OpenAI's form."""
    return "call_" + secrets.token_hex(12)


class AnswerAssembler:
    """Reads one answer by its plan. Fed with whole frames, one or several at a time, in their order.

    Frames that need no edit come back byte for byte. An error event passes: finding it is the reader's task.
    """

    def __init__(self, plan: Plan, *, new_id: Callable[[], str] = new_call_id) -> None:
        self._editors = _editors_for(plan, new_id)
        self._one_usage = _OneUsage(plan.per_prompt) if plan.num_choices > 1 else None
        self._collector: Collector | None = collector_for(plan.endpoint) if plan.whole else None
        self._is_complete = False

    def feed(self, frames: bytes) -> bytes:
        """Return the frames for the client: maybe none, and none at all if it waits for a whole answer."""
        return b"".join([self._feed_one(frame) for frame in split(frames)])

    def _feed_one(self, frame: bytes) -> bytes:
        payload = data_of(frame)
        if not payload:
            return b"" if self._collector else frame
        if payload.startswith(b"[DONE]"):
            self._is_complete = True
            last = self._written([self._one_usage.total()] if self._one_usage else [])
            return b"" if self._collector else last + DONE
        event = json_of(frame)
        if not isinstance(event, dict):  # "data: null" opens an answer to several prompts; clients choke on it
            return b""
        events = [event]
        for editor in self._editors:
            events = [edited for one in events for edited in editor.edit(one)]
        if self._one_usage:
            events = [edited for one in events for edited in self._one_usage.edit(one)]
        if len(events) == 1 and events[0] is event and self._collector is None:
            return frame
        return self._written(events)

    def _written(self, events: Iterable[Json]) -> bytes:
        if self._collector is None:
            return b"".join([_encoded(event) for event in events])
        for event in events:
            self._collector.add(event)
        return b""

    def whole(self) -> bytes:
        """Return the answer as one JSON body. Raises ``UpstreamBroken`` if the stream has ended before the answer."""
        if self._collector is None or not (self._is_complete or self._collector.is_complete):
            raise UpstreamBroken("the engine closed the stream before the answer was complete", status=502)
        return msgspec.json.encode(self._collector.answer())


def _encoded(event: Json) -> bytes:
    name = event.get("type")
    head = b"event: " + name.encode() + b"\n" if isinstance(name, str) and "choices" not in event else b""
    return head + b"data: " + msgspec.json.encode(event) + b"\n\n"


class _Editor(Protocol):
    """One step of reading: an event in, the events in its place out; the very same object if nothing changes."""

    def edit(self, event: Json) -> list[Json]: ...


def _editors_for(plan: Plan, new_id: Callable[[], str]) -> list[_Editor]:
    editors: list[_Editor] = []
    if plan.restates_prefill:
        editors.append(_OwnWords())
    if plan.forces_tool:
        editors.append(_ToolCalls(new_id))
    return editors


class _OwnWords:
    """Makes the closing events of ``/v1/responses`` say what their deltas said: llama.cpp adds the prefill there."""

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}

    def edit(self, event: Json) -> list[Json]:
        kind = event.get("type")
        item_id = event.get("item_id", "")
        if kind == "response.output_text.delta":
            self._texts[item_id] = self._texts.get(item_id, "") + event["delta"]
        elif kind == "response.output_text.done":
            return [event | {"text": self._texts.get(item_id, "")}]
        elif kind == "response.content_part.done":
            return [event | {"part": self._own_part(event["part"], item_id)}]
        elif kind == "response.output_item.done":
            return [event | {"item": self._own_item(event["item"])}]
        elif kind in {"response.completed", "response.incomplete"}:
            response = event["response"]
            return [event | {"response": response | {"output": [self._own_item(item) for item in response["output"]]}}]
        return [event]

    def _own_part(self, part: Json, item_id: str) -> Json:
        return part | {"text": self._texts.get(item_id, "")} if part.get("type") == "output_text" else part

    def _own_item(self, item: Json) -> Json:
        if item.get("type") != "message":
            return item
        return item | {"content": [self._own_part(part, item["id"]) for part in item["content"]]}


class _ToolCalls:
    """Turns an answer whose text is a call in JSON into an answer that makes the call.

    The text is held back until the choice has ended, so that the arguments go out in one piece and are valid JSON
    unless the answer itself was cut.
    """

    def __init__(self, new_id: Callable[[], str]) -> None:
        self._new_id = new_id
        self._texts: dict[int, list[str]] = {}

    def edit(self, event: Json) -> list[Json]:
        choices = event.get("choices")
        if not choices:
            return [event]
        edited = [new for choice in choices for new in self._edit_choice(choice)]
        if len(edited) == 1 and edited[0] is choices[0]:
            return [event]
        extras: Json = {key: event[key] for key in ("usage", "timings") if key in event}
        bare = {key: value for key, value in event.items() if key not in extras}
        frames = [bare | {"choices": [choice]} for choice in edited]
        if frames:
            frames[-1] |= extras
        return frames

    def _edit_choice(self, choice: Json) -> list[Json]:
        index = choice.get("index", 0)
        delta = dict(choice.get("delta") or {})
        text = delta.pop("content", None)
        if text:
            self._texts.setdefault(index, []).append(text)
        if not choice.get("finish_reason"):
            if text is None:
                return [choice]
            rest = {key: value for key, value in choice.items() if key != "logprobs"} | {"delta": delta}
            return [rest] if delta else []
        call = read_call("".join(self._texts.pop(index, [])))
        if call is None:
            return [choice | {"delta": delta}]
        name, arguments = call
        function = {"name": name, "arguments": arguments}
        called = {"tool_calls": [{"index": 0, "id": self._new_id(), "type": "function", "function": function}]}
        ended = "tool_calls" if choice["finish_reason"] == "stop" else choice["finish_reason"]
        return [
            {"finish_reason": None, "index": index, "delta": called},
            choice | {"delta": delta, "finish_reason": ended},
        ]


_CUT_CALL = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*(?:,\s*(?:"arguments"\s*:\s*(.*))?)?', re.DOTALL)


def read_call(text: str) -> tuple[str, str] | None:
    """Return name and arguments (as JSON text) of a call; of one that was cut short, the arguments as far as they go.

    None if not even the name is whole.
    """
    try:
        call = msgspec.json.decode(text)
        return call["name"], msgspec.json.encode(call["arguments"]).decode()
    except (msgspec.DecodeError, KeyError, TypeError):
        match = _CUT_CALL.match(text)
    if match is None:
        return None
    return msgspec.json.decode(match[1], type=str), (match[2] or "").rstrip()


class _OneUsage:
    """Adds up the usage of an answer with several choices: llama.cpp tells each for itself, clients read one.

    A prompt that has several choices counts once.
    """

    def __init__(self, per_prompt: int) -> None:
        self._per_prompt = per_prompt
        self._index = 0
        self._usages: dict[int, Json] = {}
        self._last: Json = {}

    def edit(self, event: Json) -> list[Json]:
        choices = event.get("choices")
        if choices is None:
            return [event]
        for choice in choices:
            self._index = choice.get("index", 0)
        if "usage" not in event:
            return [event]
        # The usage event of a choice has no index, and follows at once on the event that ended this choice.
        self._usages[self._index] = event["usage"]
        if self._index == 0:
            self._last = event
        rest = {key: value for key, value in event.items() if key not in {"usage", "timings"}}
        return [rest] if choices else []

    def total(self) -> Json:
        """Return the event that ends the answer with the usage of all choices."""
        whole_prompts = [usage for index, usage in self._usages.items() if index % self._per_prompt == 0]
        prompt = sum(usage["prompt_tokens"] for usage in whole_prompts)
        completion = sum(usage["completion_tokens"] for usage in self._usages.values())
        cached = sum((usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0) for usage in whole_prompts)
        usage = {
            "completion_tokens": completion,
            "prompt_tokens": prompt,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }
        return self._last | {"choices": [], "usage": usage}
