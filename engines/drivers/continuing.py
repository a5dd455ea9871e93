"""Going on with an answer by its text: the ways in which engines take one, and whether an engine has any of them.

There is no standard for it. An engine that does not know a way ignores or refuses it, or answers from the beginning: so
nothing counts but that the text goes on as it would have, undisturbed.
"""

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from core.chat import Endpoint, Usage
from core.errors import ForebayError, UpstreamBroken
from engines.driver import Continuation, Piece
from engines.drivers.parts import TORN, PieceCount, is_ours
from engines.drivers.sse import json_of, split

Json = dict[str, Any]

_OK = 200
_NUM_WHOLE, _NUM_BEGUN = 16, 6  # tokens of the probe's answers; it has to go on for at least half of the rest


class Way(msgspec.Struct, frozen=True):
    """How an engine is asked to go on: members added to the body, and to the message with the answer so far."""

    body: Json = {}
    message: Json = {}


# vLLM and SGLang; Mistral and DeepSeek; all that go on by themselves where the last message is the assistant's.
_WAYS = {
    Endpoint.CHAT: (
        Way(body={"continue_final_message": True, "add_generation_prompt": False}),
        Way(message={"prefix": True}),
        Way(),
    ),
    Endpoint.COMPLETIONS: (Way(),),
}
_QUESTIONS: dict[Endpoint, Json] = {
    Endpoint.CHAT: {"messages": [{"role": "user", "content": "Write the numbers from one to twenty as words."}]},
    Endpoint.COMPLETIONS: {"prompt": "one, two, three, four, five,"},
}


def continued(endpoint: Endpoint, body: Json, text: str, way: Way) -> tuple[Json, "Tail"]:
    """Return the body that asks for what follows on ``text``, and what is left out of the answer to it.

    Chat templates may drop the white space at the end of a message: it is never sent, so that the engine makes it anew.
    """
    if endpoint is Endpoint.COMPLETIONS:
        return {**body, "prompt": body["prompt"] + text}, Tail("")
    visible = text.rstrip()
    tail = Tail(text[len(visible) :])
    if not visible:
        return body, tail
    said = {"role": "assistant", "content": visible, **way.message}
    return {**body, "messages": [*body["messages"], said], **way.body}, tail


class Tail:
    """White space that was delivered already, and is left out where the rest of the answer begins with it."""

    def __init__(self, text: str) -> None:
        self._text = text

    def add(self, text: str) -> str:
        """Return what is new of the answer's next piece."""
        num = 0
        while num < min(len(text), len(self._text)) and text[num] == self._text[num]:
            num += 1
        self._text = self._text[num:] if num == len(text) else ""
        return text[num:]


class Rest:
    """Reads the events of a stream that goes on with an answer."""

    def __init__(self, endpoint: Endpoint, past: Continuation, num_past: int, tail: Tail) -> None:
        self._is_chat = endpoint is Endpoint.CHAT
        self._past = past
        self._num_past = num_past
        self._tail = tail
        self._begun = past.usage
        self._pieces = PieceCount()
        self._num_anew = 0  # tokens that the answer held already
        self._ending: Json | None = None
        self._torn = ""

    def add(self, event: Any) -> Piece:
        """Return what an event adds; an empty piece is a sign of life. Raises ``UpstreamBroken`` if it is no text."""
        text, ending = _said(event, is_chat=self._is_chat)
        if text is None:
            piece = Piece()
        else:
            self._pieces.add(text)
            if ending is not None:
                whole = text.rstrip(TORN)
                self._torn, text = text[len(whole) :], whole
            new = self._tail.add(text)
            is_anew = bool(text) and not new
            self._num_anew += is_anew
            piece = Piece(new, int(not is_anew))
        self._ending = ending or self._ending
        piece.usage, self._begun = self._begun, None
        return piece

    def close(self, used: Usage | None, most: int | None) -> Piece:
        """Return the last piece: the ending, unless a part of ``most`` tokens has ended, and the usage of all."""
        num_anew = self._num_anew
        if self._ending is not None and most is not None and is_ours(self._ending["finish_reason"], used, most):
            self._ending, self._torn = None, ""
            num_anew += self._pieces.num_silent(used.completion_tokens) if used is not None else 0
        if used is None:
            return Piece(self._torn, ending=self._ending)
        usage = (
            Usage(max(0, used.prompt_tokens - self._num_past + num_anew))
            if self._past.usage is None
            else self._past.usage
        )
        usage = msgspec.structs.replace(usage, completion_tokens=self._num_past + used.completion_tokens - num_anew)
        return Piece(self._torn, ending=self._ending, usage=usage, prefilled=used.prompt_tokens - used.cached_tokens)


async def proven_way(
    fetch: Callable[[str, Json], Awaitable[tuple[int, bytes]]], endpoint: Endpoint, model: str | None
) -> Way | None:
    """Return a way in which the engine goes on with an answer exactly as the undisturbed one does, or None.

    ``fetch`` posts a body and returns status and answer. Costs two to five answers of at most sixteen tokens. An engine
    that does not say the same thing twice is not sure to go on with what it has said: None as well.
    """
    question = {**_QUESTIONS[endpoint], "temperature": 0, "stream": True} | ({"model": model} if model else {})

    async def said(body: Json, num_tokens: int) -> str:
        try:
            status, answer = await fetch(endpoint, {**body, "max_tokens": num_tokens})
            told = [_said(json_of(frame), is_chat=endpoint is Endpoint.CHAT) for frame in split(answer)]
        except (ForebayError, AttributeError, LookupError, TypeError):
            return ""
        return "".join(text or "" for text, _ in told) if status == _OK else ""

    whole = await said(question, _NUM_WHOLE)
    begun = await said(question, _NUM_BEGUN) if whole else ""
    if not begun.strip() or not whole.startswith(begun) or len(whole) == len(begun):
        return None
    for way in _WAYS[endpoint]:
        body, tail = continued(endpoint, question, begun, way)
        rest = tail.add(await said(body, _NUM_WHOLE - _NUM_BEGUN))
        both = begun + rest
        if 2 * len(rest) >= len(whole) - len(begun) and (both.startswith(whole) or whole.startswith(both)):
            return way
    return None


def _said(event: Any, *, is_chat: bool) -> tuple[str | None, Json | None]:
    """Return the text of an event, None if it is no piece of the answer, and why the answer ends there, if it does.

    Raises ``UpstreamBroken`` for what is no text.
    """
    choices = event.get("choices") if isinstance(event, dict) else None
    if not choices:
        return None, None
    choice = choices[0]
    said = choice.get("delta") or {} if is_chat else choice
    name = "content" if is_chat else "text"
    if is_chat and any(value for key, value in said.items() if key not in {"role", "content"}):
        raise UpstreamBroken("the engine went on with something other than text", status=502)
    text = said.get(name) or ("" if name in said and "role" not in said else None)
    ending = {key: choice[key] for key in ("finish_reason", "stop_reason") if key in choice}
    return text, ending if ending.get("finish_reason") else None
