"""References between the rows of a batch: ``{{row-7.output_text | json('$.a')}}`` in a text is what the row named
``row-7`` has answered.

All else in a text stands as it is, braces too: files that were written for others hold templates of other kinds. What
would be a reference and is meant as text is written ``{{"{{"}}row-7.output_text}}``, as in the templates of workflows.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from core.errors import InvalidRequest
from semantic_vars.template import quoted

_BEGINNING = re.compile(
    r"""\{\{\s*(?:
        (?P<row>[A-Za-z0-9_-]{1,64})\.output_text\b
        | (?P<quote>['"])\{\{(?P=quote)\s*\}\}
    )""",
    re.VERBOSE,
)
_TOKEN = re.compile(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|\}\}|.""", re.DOTALL)

NameOf = Callable[[str], str]
"""What the call of a row is named in the graph, by its ``custom_id``. Raises ``InvalidRequest`` for an unknown one."""


class _Reference(NamedTuple):
    row: str
    steps: str


def translated(value: Any, name_of: NameOf) -> Any:
    """Return a JSON value whose texts are templates of a workflow, which come to what the references of the given ones
    mean. Raises ``InvalidRequest`` for a reference that cannot be read, and what ``name_of`` raises."""
    if isinstance(value, str):
        return _translated(value, name_of) if "{{" in value else value
    if isinstance(value, dict):
        return {key: translated(one, name_of) for key, one in value.items()}
    if isinstance(value, list):
        return [translated(one, name_of) for one in value]
    return value


def _translated(text: str, name_of: NameOf) -> str:
    return "".join(
        quoted(part) if isinstance(part, str) else f"{{{{{name_of(part.row)}{part.steps}}}}}" for part in _parts(text)
    )


def _parts(text: str) -> Iterator[str | _Reference]:
    """Yield texts and references in turn. Takes time linear in the text: it ends at the first that is not closed."""
    plain: list[str] = []
    at = 0
    while found := _BEGINNING.search(text, at):
        plain.append(text[at : found.start()])
        if found["row"] is None:
            plain.append("{{")
            at = found.end()
            continue
        end = _end(text, found)
        steps = text[found.end() : end].strip()
        if steps and not steps.startswith("|"):
            raise InvalidRequest(
                f"{text[found.start() : end + 2][:80]!r} cannot be read: behind output_text come }}}}, or | and a "
                "transform"
            )
        yield "".join(plain)
        yield _Reference(found["row"], steps)
        plain, at = [], end + len("}}")
    yield "".join([*plain, text[at:]])


def _end(text: str, beginning: re.Match[str]) -> int:
    for token in _TOKEN.finditer(text, beginning.end()):
        if token[0] == "}}":
            return token.start()
    raise InvalidRequest(
        f"a reference is never closed: {text[beginning.start() : beginning.end() + 20]!r}; "
        'two braces that are meant as text are {{"{{"}}'
    )
