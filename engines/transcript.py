"""An answer that goes on: what the legs so far have said, and what later legs say, told as the first leg told it.

The first leg's frames are parsed when the leg is cut, never as they come; a request that is never cut costs nothing.
"""

import re
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from typing import Any, cast

import msgspec

from core.chat import Call, Endpoint, Usage
from core.errors import UpstreamBroken
from engines.driver import Bounded, Chunk, Continuation, Piece, Resumable
from engines.drivers.parts import PieceCount
from engines.drivers.sse import DONE, data_of, json_of, split
from routing.journal import Journal

_HOLE = re.compile(rb'"(prompt_)?token_ids": ?null')
_PROMPT_MEMBERS = frozenset({"choices", "usage", "prompt_token_ids", "prompt_text", "timings"})
_WHOLE_NAMES = {Endpoint.CHAT: "chat.completion", Endpoint.COMPLETIONS: "text_completion"}


class Transcript:
    """One answer with one choice. ``read`` makes it from a journal; ``go_on`` carries it on, one leg after the other.

    ``text`` is all that was delivered. ``prefilled`` is what the leg that runs now had to process anew before it could
    go on, None until its engine tells, and ``expected`` what that may be: all, unless its driver knows better;
    ``recomputed`` is that of all legs after the first, as expected where an engine has not told.
    """

    def __init__(self, call: Call) -> None:
        self._call = call
        self._is_chat = call.endpoint is Endpoint.CHAT
        self._head: dict[str, Any] = {}
        self._choice: dict[str, Any] = {}
        self._texts: list[str] = []
        self._prompt_ids: list[int] | None = None
        self._ids: list[int] = []
        self._num_sure = 0  # of the ids, those whose text is out
        self._num_at_once = 0
        self._num_held = 0
        self._pieces = PieceCount()
        self._has_ids = True
        self._has_role = False
        self._has_done = False
        self._has_usage = False
        self._ending: dict[str, Any] | None = None
        self._usage: Usage | None = None
        self._num_legs = 1
        self._num_exact = 0
        self.recomputed = 0
        self.prefilled: int | None = None
        self.expected = 0

    @property
    def text(self) -> str:
        """All that was delivered."""
        return "".join(self._texts)

    @property
    def has_begun(self) -> bool:
        """Whether there is an event that later ones can be told like."""
        return bool(self._head)

    @property
    def has_ended(self) -> bool:
        """Whether the engine has said why the answer ends."""
        return self._ending is not None

    def past(self) -> Continuation:
        """Return what the next leg has to know."""
        has_ids = self._has_ids and (self._num_sure > 0 or not self._texts)
        ids = self._ids[: self._num_sure] if has_ids else None
        num_tokens = len(ids) if ids is not None else None
        if self._usage is not None:
            num_tokens = self._usage.completion_tokens
        num_pieces = self._pieces.num_sure
        return Continuation(
            tuple(self._texts), self._prompt_ids, ids, self._num_at_once, num_tokens, self._usage, num_pieces
        )

    # What the first leg has said

    def add(self, frame: bytes, asides: Iterator[bytes]) -> bool:
        """Take a frame of the first leg; False if it says what nobody could go on with."""
        payload = data_of(frame)
        if not payload:
            return True
        if payload.startswith(b"[DONE]"):
            self._has_done = True
            return True
        event = json_of(frame)
        if not isinstance(event, dict) or not isinstance(choices := event.get("choices"), list):
            return False
        if not choices:
            self._has_usage = self._has_usage or bool(event.get("usage"))
            return True
        choice = choices[0]
        if len(choices) != 1 or choice.get("index", 0) != 0 or choice.get("logprobs"):
            return False
        said = choice.get("delta") or {} if self._is_chat else choice
        name = "content" if self._is_chat else "text"
        text = said.get(name) or ""
        if self._is_chat:
            if any(value for key, value in said.items() if key not in {"role", "content"}):
                return False  # a tool's call, or thoughts: the next leg's engine would tell them as plain text
            # llama.cpp forgets the role where its first token ends inside of a letter: after text it is too late.
            self._has_role = self._has_role or "role" in said or bool(text)
        self._note_piece(text, is_piece=name in said and "role" not in said)
        self._note_ids(frame, asides, has_text=bool(text))
        if text or not self._head:
            self._head = {key: value for key, value in event.items() if key not in _PROMPT_MEMBERS}
            if "usage" in event:
                self._head["usage"] = None
            self._choice = {key: value for key, value in choice.items() if key not in {"finish_reason", "stop_reason"}}
        if text:
            self._texts.append(text)
        if choice.get("finish_reason"):
            self._ending = {key: choice[key] for key in ("finish_reason", "stop_reason") if key in choice}
        return True

    def _note_piece(self, text: str, *, is_piece: bool) -> None:
        if text or is_piece:
            self._pieces.add(text)

    def take_count(self, usage: Usage | None) -> None:
        """Take the engine's own count of the first leg, if it has told one."""
        if usage is not None:
            num_silent = 0 if self.has_ended else self._pieces.num_silent(usage.completion_tokens)
            usage = msgspec.structs.replace(usage, completion_tokens=usage.completion_tokens - num_silent)
        self._usage = usage

    def _note_ids(self, frame: bytes, asides: Iterator[bytes], *, has_text: bool) -> None:
        told: list[int] | None = None
        for hole in _HOLE.finditer(frame):
            ids = msgspec.json.decode(next(asides, b"null"), type=list[int] | None)
            if ids is None:
                continue
            if hole[1]:
                self._prompt_ids = ids
            else:
                told = ids
        self._take_ids(told, has_text=has_text)

    def _take_ids(self, ids: list[int] | None, *, has_text: bool) -> None:
        self._ids += ids or []
        if has_text:
            self._has_ids = self._has_ids and ids is not None
            self._num_at_once = len(self._ids) - self._num_sure if ids and len(ids) > 1 else 0
            self._num_sure = len(self._ids)

    # What later legs say

    def write(self, piece: Piece) -> bytes:
        """Take a piece of a later leg, and return the frames in which the first leg would have told it."""
        if piece.prefilled is not None and self.prefilled is None:
            self._num_exact += piece.is_exact
            self.prefilled = piece.prefilled
            self.recomputed += piece.prefilled
        if piece.expected is not None:
            self.expected = piece.expected
        self._take_ids(piece.ids, has_text=bool(piece.text))
        if piece.text or piece.num_tokens:
            self._pieces.add(piece.text)
        if piece.text:
            self._texts.append(piece.text)
        if piece.usage is not None:  # it counts what was held back as well
            self._usage, self._num_held = piece.usage, 0
        self._num_held += piece.num_tokens
        piece.num_tokens = 0
        if piece.text or piece.ending is not None:  # what is held back does not count before its text is there
            piece.num_tokens, self._num_held = self._num_held, 0
        if self._usage is not None and piece.num_tokens:
            total = self._usage.completion_tokens + piece.num_tokens
            self._usage = msgspec.structs.replace(self._usage, completion_tokens=total)
        frames = self._frame(piece.text, None) if piece.text else b""
        if piece.ending is not None:
            self._ending = piece.ending
            frames += self._frame("", piece.ending)
        return frames

    def _frame(self, text: str, ending: dict[str, Any] | None) -> bytes:
        choice: dict[str, Any] = {}
        for key, value in self._choice.items():  # in the engine's own order of members
            if key == "text":
                choice[key] = text
            elif key == "delta":
                choice[key] = self._delta(text, ending)
            else:
                choice[key] = value
        choice |= ending or {"finish_reason": None}
        return _framed({key: value for key, value in self._head.items() if key != "usage"}
                       | {"choices": [choice]} | {key: None for key in self._head if key == "usage"})  # fmt: skip

    def _delta(self, text: str, ending: dict[str, Any] | None) -> dict[str, Any]:
        delta: dict[str, Any] = {} if self._has_role else {"role": "assistant"}
        self._has_role = True
        return delta if ending is not None and not text else delta | {"content": text}

    def close(self) -> bytes:
        """Return what follows the ending of a stream: the usage, if it was asked for, and the last word."""
        frames = b""
        if self._call.wants_usage and not self._has_usage:
            frames = _framed(self._head | {"choices": [], "usage": self._told_usage()})
            self._has_usage = True
        if not self._has_done:
            frames += DONE
            self._has_done = True
        return frames

    def whole(self) -> bytes:
        """Return the whole answer as one body."""
        choice: dict[str, Any] = {"index": 0}
        if self._is_chat:
            choice["message"] = {"role": "assistant", "content": self.text}
        else:
            choice |= {"text": self.text, "logprobs": None}
        choice |= self._ending or {}
        named = self._head | {"object": _WHOLE_NAMES[self._call.endpoint]}
        return msgspec.json.encode(named | {"choices": [choice], "usage": self._told_usage()})

    def _told_usage(self) -> dict[str, Any]:
        usage = self.usage
        told: dict[str, Any] = {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }
        if usage.cached_tokens:
            told["prompt_tokens_details"] = {"cached_tokens": usage.cached_tokens}
        if self._num_legs > 1:
            is_exact = self._num_exact == self._num_legs - 1
            told["forebay"] = {
                "legs": self._num_legs,
                "recomputed_tokens": self.recomputed,
                "exactness": "token" if is_exact else "prefix",
            }
        return told

    @property
    def usage(self) -> Usage:
        """The usage of the whole answer, by the last engine's count; of one that only its first leg made, by ours."""
        if self._usage is not None:
            return self._usage
        prompt = self._call.prompt_tokens_estimate if self._prompt_ids is None else len(self._prompt_ids)
        return Usage(prompt_tokens=prompt, completion_tokens=len(self._ids) if self._has_ids else self._pieces.num_sure)

    async def go_on(self, driver: Resumable, call: Call, most: int | None = None) -> AsyncIterator[Chunk]:
        """Run another leg and yield its chunks; an answer that was over but for its last words needs none.

        With ``most``, which is for a ``Bounded`` driver, the leg may end before the answer. Raises what ``Driver.run``
        raises.
        """
        self.prefilled = None
        streams = call.stream
        if self._ending is None:
            self._num_legs += 1
            del self._ids[self._num_sure :]  # what was held back is made anew
            self._num_held = 0
            self.expected = self.usage.prompt_tokens + self.usage.completion_tokens
            has_begun = False
            try:
                past = self.past()
                further = driver.resume(call, past) if most is None else cast(Bounded, driver).resume(call, past, most)
                async with aclosing(further) as pieces:  # type: ignore[type-var] # generators
                    async for piece in pieces:
                        has_begun = True
                        frames = self.write(piece)
                        yield Chunk(frames if streams else b"", piece.num_tokens, piece.usage)
            finally:
                if has_begun and self.prefilled is None:  # it was cut before its engine has told
                    self.recomputed += self.expected
        if self._ending is None and most is not None:
            return
        if self._ending is None:
            raise UpstreamBroken("the engine closed the stream before the answer was complete", status=502)
        if closing := self.close() if streams else self.whole():
            yield Chunk(closing, 0, self.usage)


def read(journal: Journal) -> Transcript | None:
    """Return what the first leg of a call has said; None if another one cannot go on from there."""
    call = journal.call
    transcript = Transcript(call)
    frames, asides = (journal.frames, iter(journal.asides)) if call.stream else (journal.asides, iter(()))
    try:
        is_plain = all(transcript.add(frame, asides) for joined in frames for frame in split(joined))
    except (UpstreamBroken, msgspec.MsgspecError, AttributeError, TypeError):
        return None
    transcript.take_count(journal.usage)
    return transcript if is_plain and transcript.has_begun else None


def _framed(event: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(event) + b"\n\n"
