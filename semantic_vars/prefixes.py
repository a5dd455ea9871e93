"""What prompts have in common at their beginning, at the boundaries of variables (Parrot, section 5.3).

A prompt is hashed where variables begin and end, over what they hold: two runs that put the same value there share it,
which the paper's code, hashing names of variables, does not see. Hashes are salted by whoever must not share.
"""

import hashlib
from collections.abc import Iterator, Sequence

from semantic_vars.template import Form, Hole, Lookup, Template

LARGE = 1_000
"""Characters of a constant that is worth to be shared."""


def segments_of(form: Form, lookup: Lookup) -> tuple[str, ...]:
    """Return the prompt of a request, divided where variables and messages begin and end. Raises ``TransformError``."""
    return tuple(segment for segment in _segments(form.shape, lookup) if segment)


def _segments(shape: object, lookup: Lookup) -> Iterator[str]:
    if not isinstance(shape, dict):
        return
    if "prompt" in shape:
        yield from _texts(shape["prompt"], lookup)
    for message in shape.get("messages") or ():
        if isinstance(message, dict):
            yield "\x00" + "".join(_texts(message.get("role"), lookup)) + "\x00"
            yield from _texts(message.get("content"), lookup)


def _texts(shape: object, lookup: Lookup) -> Iterator[str]:
    if isinstance(shape, Template):
        yield from shape.segments(lookup)
    elif isinstance(shape, list):
        for part in shape:
            yield from _texts(part.get("text") if isinstance(part, dict) else part, lookup)


def chain(segments: Sequence[str], salt: bytes) -> tuple[int, ...]:
    """Return a hash of 64 bits for each beginning of the prompt: of one segment, of two, and so on."""
    hashes = []
    so_far = hashlib.blake2b(salt, digest_size=8).digest()
    for segment in segments:
        so_far = hashlib.blake2b(so_far + segment.encode(), digest_size=8).digest()
        hashes.append(int.from_bytes(so_far, "big"))
    return tuple(hashes)


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
