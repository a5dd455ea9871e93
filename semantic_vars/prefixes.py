"""What prompts have in common at their beginning, at the boundaries of variables (Parrot, section 5.3).

A prompt is hashed where variables and messages end, over what is said up to there: two runs that put the same value in
the same place share it, which the paper's code, hashing names of variables, does not see.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from semantic_vars.template import Form, Hole, Lookup, Template
from semantic_vars.values import Value, text_of

LARGE = 1_000
"""Characters of a constant that is worth to be shared."""
_LEAST = 400  # bytes: what is shorter is not worth a place
_LEAST_READY = 2_000  # bytes: what is shorter is computed sooner than asked for
_MOST = 8
_ROLE = "\x00"


class Beginning(msgspec.Struct, frozen=True, array_like=True):
    """The first ``size`` bytes of a prompt, roles of messages included, and a hash of 64 bits of them."""

    digest: int
    size: int


def messages_of(shape: Mapping[str, Any]) -> Sequence[Any]:
    """Return the messages of a request as far as they were written; a variable that is all of them is not read."""
    messages = shape.get("messages")
    return messages if isinstance(messages, list) else ()


class Segments:
    """Hears how the texts of a request are divided, while it is filled; see ``Form.fill``."""

    def __init__(self) -> None:
        self._of: dict[int, Sequence[str]] = {}

    def __call__(self, template: Template, segments: Sequence[str]) -> None:
        """Note the text of a template."""
        self._of[id(template)] = segments

    def beginnings(self, form: Form) -> tuple[Beginning, ...]:
        """Return where the prompt of the form that was filled begins as others may, the shortest first: of many the
        first ones and the last."""
        return _hashed(self._prompt(form.shape))

    def _prompt(self, shape: object) -> Iterator[str]:
        if not isinstance(shape, dict):
            return
        if "prompt" in shape:
            yield from self._texts(shape["prompt"])
        for message in messages_of(shape):
            if isinstance(message, dict):
                yield _ROLE + "".join(self._texts(message.get("role"))) + _ROLE
                yield from self._texts(message.get("content"))

    def _texts(self, shape: object) -> Iterator[str]:
        if isinstance(shape, Template):
            yield from self._of.get(id(shape), ())
        elif isinstance(shape, list):
            for part in shape:
                yield from self._texts(part.get("text") if isinstance(part, dict) else part)


class Ready(msgspec.Struct, frozen=True):
    """A request for what a prompt begins with, and where that begins as others may."""

    body: dict[str, Value]
    beginnings: tuple[Beginning, ...]


def ready_part(form: Form, lookup: Lookup, is_there: Callable[[str], bool]) -> Ready | None:
    """Return what the prompt of a form begins with, up to the first variable that is not there yet; None if that is not
    worth a request. ``lookup`` is asked for what is there alone. Raises ``TransformError``."""
    shape = form.shape
    if not isinstance(shape, dict):
        return None
    reader = _Reader(lookup, is_there)
    body: dict[str, Value] = {}
    if "prompt" in shape:
        body["prompt"] = reader.read(shape["prompt"])
    messages: list[Value] = []
    for message in messages_of(shape):
        if not reader.is_open or not isinstance(message, dict):
            break
        role = reader.read(message.get("role"), is_role=True)
        messages.append({"role": role, "content": reader.read(message.get("content"))})
    if messages:
        body["messages"] = messages
    if reader.size < _LEAST_READY:
        return None
    body.update((name, Form(shape[name], frozenset()).fill(lookup)) for name in ("model", "tools") if name in shape)
    return Ready(body, _hashed(reader.segments))


class _Reader:
    """Reads texts one after another, as long as all that they need is there."""

    def __init__(self, lookup: Lookup, is_there: Callable[[str], bool]) -> None:
        self._lookup = lookup
        self._is_there = is_there
        self.is_open = True
        self.segments: list[str] = []
        self.size = 0

    def read(self, shape: object, *, is_role: bool = False) -> str:
        texts = list(self._texts(shape))
        if is_role:
            self.segments.append(_ROLE + "".join(texts) + _ROLE)
        else:
            self.segments += texts
            self.size += sum(len(text.encode()) for text in texts)
        return "".join(texts)

    def _texts(self, shape: object) -> Iterator[str]:
        if isinstance(shape, list):
            for part in shape:
                yield from self._texts(part.get("text") if isinstance(part, dict) else part)
        elif isinstance(shape, Template):
            for piece in shape.parts:
                if isinstance(piece, Hole) and not self._is_there(piece.name):
                    self.is_open = False
                if not self.is_open:
                    return
                yield piece if isinstance(piece, str) else text_of(piece.value(self._lookup))


def _hashed(segments: Iterable[str]) -> tuple[Beginning, ...]:
    hashed, size = hashlib.blake2b(digest_size=8), 0
    found: list[Beginning] = []
    for segment in segments:
        encoded = segment.encode()
        hashed.update(encoded)
        size += len(encoded)
        if size >= _LEAST and not segment.startswith(_ROLE):
            found.append(Beginning(int.from_bytes(hashed.digest(), "big"), size))
    return tuple(found if len(found) <= _MOST else found[: _MOST // 2] + found[-_MOST // 2 :])


def lint(form: Form) -> str | None:
    """Return what is to be said of a prompt whose order keeps a large constant from being shared; None if nothing."""
    seen: str | None = None
    for part in _parts(form.shape):
        if isinstance(part, Hole):
            seen = seen or part.name
        elif seen is not None and len(part) >= LARGE:
            return f"{{{{{seen}}}}} stands before {len(part)} characters that never change; behind them, it costs less"
    return None


def _parts(shape: object) -> Iterator[str | Hole]:
    if isinstance(shape, Template):
        yield from shape.parts
    elif isinstance(shape, dict):
        for key in ("prompt", "messages", "content", "text"):
            yield from _parts(shape.get(key))
    elif isinstance(shape, list):
        for one in shape:
            yield from _parts(one)
