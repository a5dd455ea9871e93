"""A background response as OpenAI's server-sent events, from any of them on.

Events are numbered by what they tell, not by how often somebody was told: the number of a piece of text is that of its
last character. So whoever comes back, to whichever gateway, goes on where they were; a number may be left out.
"""

from collections.abc import Iterator
from typing import Any

import msgspec

from gateway.responses.background import Background
from gateway.responses.ids import message_of
from gateway.responses.shapes import message_item, response_of, text_part
from gateway.responses.tapes import Tape

BEFORE_ALL = -1
_CREATED, _QUEUED, _IN_PROGRESS, _ITEM_ADDED, _PART_ADDED = range(5)
_TEXT = _PART_ADDED
"""Its first character is one more."""


class Stream:
    """What one reader is still to be told; ``after`` is the number of the last event that they have."""

    def __init__(self, after: int = BEFORE_ALL) -> None:
        self._last = after
        self.is_over = False

    def frames(self, background: Background, tape: Tape | None) -> Iterator[bytes]:
        """Yield what has not been told yet; ``tape`` is what was said while there is no whole answer."""
        status = background.status
        if self._last < _QUEUED:
            yield from self._greet(background)
        if status == "queued":
            return
        if status in {"failed", "cancelled"}:
            # OpenAI has no event for what was cancelled: the response in this one says so
            yield self._frame(max(self._last, _TEXT) + 1, "response.failed", response=response_of(background))
            self.is_over = True
            return
        if self._last < _PART_ADDED:
            yield from self._begin(background)
        start = self._num_told
        if status == "in_progress":
            if tape is not None and tape.length > start:
                yield self._delta(background, tape.since(start))
            return
        if len(background.text) > start:
            yield self._delta(background, background.text[start:])
        yield from self._end(background)

    @property
    def _num_told(self) -> int:
        """How many characters of the text have been told."""
        return max(0, self._last - _TEXT)

    def _greet(self, background: Background) -> Iterator[bytes]:
        queued = response_of(background, before="queued")
        yield from self._tell(_CREATED, "response.created", response=queued)
        yield from self._tell(_QUEUED, "response.queued", response=queued)

    def _begin(self, background: Background) -> Iterator[bytes]:
        begun, item = response_of(background, before="in_progress"), message_item(background, None, "in_progress")
        yield from self._tell(_IN_PROGRESS, "response.in_progress", response=begun)
        yield from self._tell(_ITEM_ADDED, "response.output_item.added", output_index=0, item=item)
        yield from self._tell(_PART_ADDED, "response.content_part.added", **_place(background), part=text_part(""))

    def _delta(self, background: Background, text: str) -> bytes:
        number = _TEXT + self._num_told + len(text)
        return self._frame(number, "response.output_text.delta", **_place(background), delta=text, logprobs=[])

    def _end(self, background: Background) -> Iterator[bytes]:
        text, place, status = background.text, _place(background), background.status
        first = _TEXT + len(text) + 1
        item = message_item(background, text, status)
        yield from self._tell(first, "response.output_text.done", **place, text=text, logprobs=[])
        yield from self._tell(first + 1, "response.content_part.done", **place, part=text_part(text))
        yield from self._tell(first + 2, "response.output_item.done", output_index=0, item=item)
        # told in any case: after a crash an answer is made anew, and may be shorter than what a reader has had of it
        number = max(self._last + 1, first + 3)
        yield self._frame(number, f"response.{status}", response=response_of(background))
        self.is_over = True

    def _tell(self, number: int, kind: str, **data: Any) -> Iterator[bytes]:
        if number > self._last:
            yield self._frame(number, kind, **data)

    def _frame(self, number: int, kind: str, **data: Any) -> bytes:
        self._last = number
        told = msgspec.json.encode({"type": kind, "sequence_number": number, **data})
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), told)


def _place(background: Background) -> dict[str, Any]:
    return {"item_id": message_of(background.record.id), "output_index": 0, "content_index": 0}
