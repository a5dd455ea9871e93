"""Server-sent events of OpenAI-like engines: cut into whole frames, read only where something stands that we need.

A frame is parsed only if its bytes hold a needle such as ``"usage"``. A needle cannot occur inside a JSON string,
because there its quotes would be escaped.
"""

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from core.chat import Endpoint, Usage
from core.errors import UpstreamBroken

MAX_FRAME_BYTES = 32 * 2**20  # larger than any answer of one piece; bounds what a stream without frames can hold
DONE = b"data: [DONE]\n\n"

_BOUNDARY = re.compile(rb"\r?\n\r?\n")
_USAGE = re.compile(rb'"usage"\s*:\s*')
_IDS = re.compile(rb'token_ids":(\[[^\]]*\]|null)')  # of the prompt too; vLLM writes no spaces
_OUTPUT = re.compile(
    rb'"(?:content|text|delta|arguments|reasoning_content|reasoning|thinking|partial_json)": ?"[^"]', re.ASCII
)
_ENDS = {
    Endpoint.CHAT: re.compile(rb'"finish_reason": ?"'),
    Endpoint.COMPLETIONS: re.compile(rb'"finish_reason": ?"'),
    Endpoint.RESPONSES: re.compile(rb'"type": ?"response\.(?:completed|incomplete|failed)"'),
    Endpoint.MESSAGES: re.compile(rb'"type": ?"message_stop"'),
}
_SENDS_DONE = frozenset({Endpoint.CHAT, Endpoint.COMPLETIONS})


class FrameBuffer:
    """Gives whole frames back as they come, byte for byte."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> bytes:
        """Return all frames that are whole by now, joined, or nothing. Raises ``UpstreamBroken`` on an endless one."""
        if self._rest:
            data = self._rest + data
        if data.endswith((b"\n\n", b"\n\r\n")):
            self._rest = b""
            return data
        cut = max(data.rfind(b"\n\n") + 2, data.rfind(b"\n\r\n") + 3, 0)
        if cut in {1, 2}:  # neither was found
            cut = 0
        self._rest = data[cut:]
        if len(self._rest) > MAX_FRAME_BYTES:
            raise UpstreamBroken("the engine sent a stream event without end", status=502)
        return data[:cut]

    @property
    def rest(self) -> bytes:
        """Bytes of a frame that has not ended."""
        return self._rest


def split(frames: bytes) -> list[bytes]:
    """Return the single frames, each with its blank line."""
    parts: list[bytes] = []
    start = 0
    for match in _BOUNDARY.finditer(frames):
        parts.append(frames[start : match.end()])
        start = match.end()
    if start < len(frames):
        parts.append(frames[start:])
    return parts


def data_of(frame: bytes) -> bytes:
    """Return the payload of a frame: its ``data`` lines joined, or nothing for a comment."""
    lines = [line[5:].removeprefix(b" ") for line in frame.splitlines() if line.startswith(b"data:")]
    return b"\n".join(lines)


def json_of(frame: bytes) -> Any:
    """Return the frame's JSON, or None where it has none (a comment, ``[DONE]``). Raises ``UpstreamBroken``."""
    payload = data_of(frame)
    if not payload or payload.startswith(b"[DONE]"):
        return None
    try:
        return msgspec.json.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UpstreamBroken("the engine sent a stream event that is not JSON", status=502) from error


class _TokenDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _RawUsage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _TokenDetails | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    input_tokens_details: _TokenDetails | None = None
    cache_read_input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None


class _Holder(msgspec.Struct):
    usage: _RawUsage | None = None


class Whole(msgspec.Struct):
    """What is read of an answer of one piece or one event, whatever else stands in it."""

    usage: _RawUsage | None = None
    response: _Holder | None = None
    message: _Holder | None = None
    error: Any = None

    def merged_usage(self, before: Usage | None) -> Usage | None:
        """Return all that is known of the usage: Anthropic tells the prompt first and the answer last."""
        for holder in (self, self.response, self.message):
            if holder is not None and holder.usage is not None:
                return _merge(holder.usage, before or Usage())
        return before


def _merge(raw: _RawUsage, before: Usage) -> Usage:
    details = raw.prompt_tokens_details or raw.input_tokens_details
    prompt = raw.prompt_tokens if raw.prompt_tokens is not None else raw.input_tokens
    completion = raw.completion_tokens if raw.completion_tokens is not None else raw.output_tokens
    cached = details.cached_tokens if details is not None else raw.cache_read_input_tokens
    if raw.prompt_tokens is None and raw.input_tokens is not None:  # Anthropic counts cached tokens apart
        prompt = raw.input_tokens + (raw.cache_read_input_tokens or 0) + (raw.cache_creation_input_tokens or 0)
    return Usage(
        prompt_tokens=before.prompt_tokens if prompt is None else prompt,
        completion_tokens=before.completion_tokens if completion is None else completion,
        cached_tokens=before.cached_tokens if cached is None else cached,
    )


_WHOLE = msgspec.json.Decoder(Whole)


def read_whole(body: bytes) -> Whole:
    """Return what we need of a JSON answer. Raises ``UpstreamBroken`` if it is no object.

    What has another shape than we know is not metered, and no reason to lose a good answer.
    """
    try:
        return _WHOLE.decode(body)
    except msgspec.ValidationError as error:
        if isinstance(tree := _any_json(body), dict):
            return Whole(error=tree.get("error"))
        raise UpstreamBroken("the engine's answer is not the JSON it should be", status=502) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UpstreamBroken("the engine's answer is not the JSON it should be", status=502) from error


def _any_json(body: bytes) -> Any:
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def _without_usage(frame: bytes, event: dict[str, Any]) -> bytes:
    """Return the frame less its member ``usage``, all other bytes being what they were."""
    wanted = {key: value for key, value in event.items() if key != "usage"}
    value = bytes(msgspec.json.decode(data_of(frame), type=dict[str, msgspec.Raw])["usage"])
    for match in _USAGE.finditer(frame):
        if not frame.startswith(value, match.end()):
            continue
        before, after = frame[: match.start()].rstrip(), frame[match.end() + len(value) :]
        cut = before[:-1] + after if before.endswith(b",") else before + after.lstrip().removeprefix(b",").lstrip()
        if _any_json(data_of(cut)) == wanted:
            return cut
    return b"data: " + msgspec.json.encode(wanted) + b"\n\n"


class StreamReader:
    """Follows one stream: meters it, finds its end and its hidden errors, takes out what we had asked for ourselves.

    ``takes_ids``: the lists of token ids go to ``aside``, and what the client gets says ``null`` in their place, as it
    does where nobody asks for ids.
    """

    def __init__(self, endpoint: Endpoint, *, strips_usage: bool, takes_ids: bool = False) -> None:
        self._strips_usage = strips_usage
        self._takes_ids = takes_ids
        self.aside: Sequence[bytes] = ()
        self._end = _ENDS.get(endpoint)
        self._sends_done = endpoint in _SENDS_DONE
        self._is_first = True
        self._has_finished = False
        self._has_done = False
        self.usage: Usage | None = None
        self.error: Any = None
        self.num_tokens = 0

    @property
    def is_done(self) -> bool:
        """Whether the stream has said its last word."""
        return self._has_done or (self._has_finished and not self._sends_done)

    def read(self, frames: bytes) -> bytes:
        """Return what the client gets of these frames and count what is in them.

        An error that stands in them is left in ``error``, and everything from it on is held back. Raises
        ``UpstreamBroken`` if the first event is not JSON.
        """
        if self._has_done:
            self.num_tokens = 0
            self.aside = ()
            return b""
        if self._is_first:
            self._check_first(frames)
        if b"[DONE]" in frames:
            frames = self._cut_after_done(frames)
        if b'"error"' in frames:
            frames = self._cut_at_error(frames)
        if b'"usage"' in frames:
            frames = self._take_usage(frames)
        if self._takes_ids:
            frames = self._take_ids(frames)
        self.num_tokens = len(_OUTPUT.findall(frames))
        if self._end is not None and not self._has_finished and self._end.search(frames):
            self._has_finished = True
        return frames

    def close(self) -> bytes:
        """Return what is missing at the end of a finished stream. Raises ``UpstreamBroken`` if it was cut short."""
        if self.is_done:
            return b""
        if self._has_finished:
            self._has_done = True
            return DONE
        raise UpstreamBroken("the engine closed the stream before the answer was complete", status=502)

    def _check_first(self, frames: bytes) -> None:
        for frame in split(frames):
            if data_of(frame):
                json_of(frame)
                self._is_first = False
                return

    def _cut_at_error(self, frames: bytes) -> bytes:
        good: list[bytes] = []
        for frame in split(frames):
            if b'"error"' in frame and isinstance(event := json_of(frame), dict):
                self.error = event.get("error") or (event if event.get("type") == "error" else None)
                if self.error:
                    break
            good.append(frame)
        return b"".join(good)

    def _take_ids(self, frames: bytes) -> bytes:
        parts = _IDS.split(frames)  # text, ids, text, ids, …, text
        self.aside = parts[1::2]
        return b'token_ids":null'.join(parts[::2])

    def _take_usage(self, frames: bytes) -> bytes:
        if self._strips_usage:
            frames = frames.replace(b',"usage":null', b"")
        kept: list[bytes] = []
        for frame in split(frames):
            kept.append(self._metered(frame) if b'"usage"' in frame else frame)
        return b"".join(kept)

    def _metered(self, frame: bytes) -> bytes:
        """Book the frame's usage; return the frame without it if the client did not ask for it."""
        payload = data_of(frame)
        if not payload.startswith(b"{"):
            return frame
        whole = read_whole(payload)
        self.usage = whole.merged_usage(self.usage)
        if not self._strips_usage:
            return frame
        event = json_of(frame)
        if "usage" not in event:  # the word stands elsewhere
            return frame
        if event.get("choices") == [] and event["usage"] is not None:
            return b""
        return _without_usage(frame, event)

    def _cut_after_done(self, frames: bytes) -> bytes:
        kept: list[bytes] = []
        for frame in split(frames):
            kept.append(frame)
            if data_of(frame).startswith(b"[DONE]"):
                self._has_done = True
                break
        return b"".join(kept)
