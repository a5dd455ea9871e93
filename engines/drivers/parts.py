"""Answers that are made in parts: a limit of our own ends each but the last, and nothing of such an end is told."""

import re
from collections.abc import AsyncIterator
from typing import Any

import msgspec

from core.chat import Call, Endpoint, Usage
from engines.driver import Chunk
from engines.drivers.pinning import limit_of
from engines.drivers.sse import StreamReader, json_of, split

TORN = "\ufffd"  # what an engine may say in place of a character that its last token has only begun
_FINISH = re.compile(rb'"finish_reason"\s*:\s*"')
_NO_FINISH = {"finish_reason": None, "stop_reason": None}


def limit_to(body: dict[str, Any], call: Call, num_tokens: int) -> None:
    """Have the body ask for so many tokens at most, by the name that the call itself uses for its limit."""
    uses_new_name = call.endpoint is Endpoint.CHAT and call.body.get("max_completion_tokens") is not None
    for name in ("max_tokens", "max_completion_tokens"):
        body.pop(name, None)
    body["max_completion_tokens" if uses_new_name else "max_tokens"] = num_tokens


def is_ours(finish_reason: Any, usage: Usage | None, num_tokens: int) -> bool:
    """Return whether our limit has ended a part, and not the answer itself or the engine's room for it."""
    return finish_reason == "length" and (usage is None or usage.completion_tokens >= num_tokens)


def part_for(call: Call, num_tokens: int, num_past: int = 0) -> int | None:
    """Return the limit of the next part; None if the rest of the answer cannot be longer."""
    limit = limit_of(call)
    return num_tokens if limit is None or limit - num_past > num_tokens else None


class PieceCount:
    """Counts an answer's pieces, to tell how many tokens at its end have said nothing yet.

    They have begun a character, say. The next part makes them again, and the engine's count of the last one holds them.
    """

    def __init__(self) -> None:
        self._num = 0
        self.num_sure = 0

    def add(self, text: str) -> None:
        """Take the text of a piece, which may be none; the first event of a chat is no piece."""
        self._num += 1
        if text:
            self.num_sure = self._num

    def num_silent(self, num_tokens: int) -> int:
        """Return how many of the engine's ``num_tokens`` are silent; 0 if it does not send each as a piece.

        The piece with the ending is a token's at some engines, and nothing at others.
        """
        num_silent = self._num - self.num_sure
        num_more = self._num - num_tokens
        return num_silent - num_more if num_more in {0, 1} and num_silent >= num_more else 0


async def without_our_end(chunks: AsyncIterator[Chunk], reader: StreamReader, num_tokens: int) -> AsyncIterator[Chunk]:
    """Yield a stream's chunks; of an end that is ours, no more than its last piece, without the ending."""
    held: list[bytes] = []
    async for chunk in chunks:
        if not held and not _FINISH.search(chunk.raw):
            yield chunk
            continue
        frames = [] if held else split(chunk.raw)
        first = next((number for number, frame in enumerate(frames) if _FINISH.search(frame)), len(frames))
        held += frames[first:] if frames else [chunk.raw]
        if frames[:first] or chunk.num_tokens:
            yield Chunk(b"".join(frames[:first]), chunk.num_tokens, chunk.usage)
    if not held:
        return
    event = json_of(held[0])
    choice = event["choices"][0]
    if is_ours(choice["finish_reason"], reader.usage, num_tokens):
        choice |= {key: value for key, value in _NO_FINISH.items() if key in choice}
        if "usage" in event:
            event["usage"] = None
        said = choice.get("delta", choice)
        is_piece = False
        for name in said.keys() & {"content", "text"}:
            is_piece = True
            said[name] = (said[name] or "").rstrip(TORN)
        yield Chunk(b"data: " + msgspec.json.encode(event) + b"\n\n" if is_piece else b"", 0, reader.usage)
    else:
        yield Chunk(b"".join(held), 0, reader.usage)
