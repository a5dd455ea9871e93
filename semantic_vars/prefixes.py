"""What prompts have in common at their beginning, at the boundaries of variables (Parrot, section 5.3)."""

from collections.abc import Iterator

from semantic_vars.template import Form, Hole, Template

LARGE = 1_000
"""Characters of a constant that is worth to be shared."""


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
