"""References to other responses in the texts of one: ``{{resp_….output_text | json('$.a')}}``.

What a text says becomes a template of a workflow in which each response that it refers to is an open variable of the
response's own id. All else stays text, also braces: only a response's id makes two of them a reference. What would be
one and is meant as text is written ``{{"{{"}}resp_….output_text}}``, as in the templates of workflows.
"""

import re

import msgspec

from core.errors import InvalidRequest
from gateway.responses.ids import is_id
from semantic_vars import template
from semantic_vars.template import quoted

_FIELD = "output_text"
_OPENING = re.compile(
    r"""\{\{\s*(?:
        (?P<id>resp_[0-9A-Za-z_]{1,128}) \s* (?:\.\s*(?P<field>[0-9A-Za-z_]{1,128}))?
        | (?P<quote>['"])\{\{(?P=quote)\s*\}\}
    )""",
    re.VERBOSE,
)
_TOKEN = re.compile(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|\}\}|.""", re.DOTALL)


class Reading(msgspec.Struct, frozen=True):
    """A text as a template, and the ids of the responses that it refers to."""

    template: str
    references: tuple[str, ...]


def refers(text: str) -> bool:
    """Whether a text holds a reference."""
    return any(_is_reference(found) for found in _OPENING.finditer(text))


def read(text: str, param: str) -> Reading:
    """Return what a text says. Raises ``InvalidRequest`` for a reference that cannot be read."""
    parts: list[str] = []
    references: dict[str, None] = {}
    at = 0
    while found := _OPENING.search(text, at):
        parts.append(quoted(text[at : found.start()]))
        at = found.end()
        if found["quote"]:
            parts.append(quoted("{{"))
        elif not _is_reference(found):
            parts.append(quoted(found[0]))
        else:
            end = _end(text, found, param)
            parts.append(_hole(found, text[at:end].strip(), param))
            references[found["id"]] = None
            at = end + len("}}")
    parts.append(quoted(text[at:]))
    return Reading("".join(parts), tuple(references))


def hole_of(response: str) -> str:
    """Return the template of all that a response says."""
    return f"{{{{{response} | text}}}}"


def _is_reference(found: re.Match[str]) -> bool:
    """Whether it is meant as one: the field is a response's, or the id looks like one of ours."""
    return found["field"] == _FIELD or (found["id"] is not None and is_id(found["id"]))


def _end(text: str, found: re.Match[str], param: str) -> int:
    """Return where the two braces stand that close a reference."""
    for token in _TOKEN.finditer(text, found.end()):
        if token[0] == "}}":
            return token.start()
    raise InvalidRequest(f"a reference is never closed: {text[found.start() : found.start() + 60]!r}", param=param)


def _hole(found: re.Match[str], steps: str, param: str) -> str:
    name, field = found["id"], found["field"]
    if field != _FIELD or (steps and not steps.startswith("|")):
        raise InvalidRequest(
            f"a response is referred to as {{{{{name[:64]}.{_FIELD}}}}}, with transforms behind a |: "
            f"{found.string[found.start() : found.start() + 100]!r} is something else",
            param=param,
        )
    hole = f"{{{{{name} {steps} | text}}}}"  # `text`: a message's part is text, whatever the transforms have made
    try:
        template.parse(hole)
    except InvalidRequest as error:
        raise InvalidRequest(f"the reference to {name[:64]}: {error.message}", param=param) from None
    return hole
