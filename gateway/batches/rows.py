"""The rows of a batch: from the lines of a file to the calls of one workflow, checked before anything runs."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import Any, NoReturn

import msgspec

from core.batches import BatchRow, RowError
from core.chat import Endpoint
from core.errors import InvalidRequest
from gateway.batches.references import translated
from gateway.ceilings import check_depth, num_prompts
from semantic_vars.calls import Call, Embed, Llm, Retry
from semantic_vars.graph import USUAL
from semantic_vars.template import form_of

ENDPOINTS = (Endpoint.CHAT, Endpoint.COMPLETIONS, Endpoint.EMBEDDINGS)
"""Those whose requests a batch may hold."""
MOST_ROWS = USUAL.calls
"""Rows of one batch: they are the calls of one run."""

_MOST_ERRORS = 100
_LONGEST_ID = 512
_RETRY = Retry(max=2, on=("engine", "timeout"), backoff_s=1.0)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_OWN_PREFIX = "_row_"  # of calls whose custom_id is no name in a graph
_FIELD = re.compile(r"field `(\w+)`|\$\.(\w+)")
_BOM = b"\xef\xbb\xbf"

# A run's call comes to one text, so what more than that an engine would answer would be lost, unsaid.
_TEXT_ALONE = "a row of a batch is answered by one text; send such requests one by one"
_UNTOLD: Mapping[str, Callable[[Any], bool]] = {
    "n": lambda value: value != 1,
    "best_of": lambda value: value != 1,
    "tools": bool,
    "functions": bool,
    "logprobs": lambda value: value is not False,
    "top_logprobs": bool,
    "audio": bool,
    "modalities": lambda value: value != ["text"],
    "encoding_format": lambda value: value != "float",
}


class Plan(msgspec.Struct, frozen=True):
    """A batch that can run: its calls, and by the names of these what the results have to know."""

    calls: tuple[Call, ...]
    rows: dict[str, BatchRow]


class InvalidRows(Exception):
    """A file that cannot be a batch; ``errors`` tell why, a hundred at most."""

    def __init__(self, errors: Sequence[RowError]) -> None:
        super().__init__(f"{len(errors)} errors")
        self.errors = tuple(errors)


class _Row(msgspec.Struct):
    custom_id: str
    method: str
    url: str
    body: dict[str, Any]


_ROW = msgspec.json.Decoder(_Row)


class _Wrong(Exception):
    """One row cannot be; the arguments are those of a ``RowError`` but for the line."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.param = code, message, param


def read(content: bytes, endpoint: Endpoint, *, depth: int, most: int = MOST_ROWS) -> Plan:
    """Return the plan of a file for one endpoint. ``depth``: how deep a line may nest. Raises ``InvalidRows``.

    What depends on the moment, as whether a model is there, is told of the row when its turn comes.
    """
    lines = list(_lines(content))
    if not lines:
        raise InvalidRows([RowError("empty_file", "the file holds no rows; each is a line of JSON")])
    if len(lines) > most:
        told = f"the file holds {len(lines):,} rows, and a batch may hold {most:,}: make several batches of it"
        raise InvalidRows([RowError("too_many_rows", told)])
    rows = _each(lines, lambda raw: _row_of(raw, endpoint, depth))
    names = _names(rows)
    used: dict[str, set[str]] = {}
    calls = _each(rows, lambda row: _call_of(row, endpoint, names, used))
    _refuse_circles(rows, used)
    return Plan(
        tuple(call for _, call in calls),
        {names[row.custom_id]: BatchRow(row.custom_id, row.body["model"]) for _, row in rows},
    )


def _lines(content: bytes) -> Iterator[tuple[int, bytes]]:
    for number, line in enumerate(content.removeprefix(_BOM).split(b"\n"), 1):
        if stripped := line.strip():
            yield number, stripped


def _each(lines: Sequence[tuple[int, Any]], read_one: Callable[[Any], Any]) -> list[tuple[int, Any]]:
    """Read every line, and raise ``InvalidRows`` for those that cannot be."""
    done: list[tuple[int, Any]] = []
    errors: list[RowError] = []
    for number, line in lines:
        try:
            done.append((number, read_one(line)))
        except _Wrong as wrong:
            errors.append(RowError(wrong.code, wrong.message, number, wrong.param))
            if len(errors) == _MOST_ERRORS:
                break
    if errors:
        raise InvalidRows(errors)
    return done


def _row_of(raw: bytes, endpoint: Endpoint, depth: int) -> _Row:
    try:
        check_depth(raw, depth)
        row = _ROW.decode(raw)
    except msgspec.ValidationError as error:
        _complain_of_field(error)
    except (InvalidRequest, msgspec.DecodeError, ValueError, RecursionError) as error:
        raise _Wrong("invalid_json_line", f"the line is no JSON object: {str(error)[:200]}") from None
    if not 0 < len(row.custom_id) <= _LONGEST_ID:
        raise _Wrong("invalid_custom_id", f"custom_id has to have 1 to {_LONGEST_ID} characters", "custom_id")
    if row.method != "POST":
        raise _Wrong("invalid_method", f"method has to be POST, not {row.method[:20]!r}", "method")
    if row.url != endpoint.value:
        raise _Wrong("invalid_url", f"url has to be that of the batch, {endpoint.value}, not {row.url[:60]!r}", "url")
    _check_body(row.body, endpoint)
    return row


def _complain_of_field(error: msgspec.ValidationError) -> NoReturn:
    found = _FIELD.search(str(error))
    param = (found[1] or found[2]) if found is not None else None
    code = "missing_required_parameter" if "missing" in str(error) else "invalid_type"
    raise _Wrong(code, f"{error}; a row is {{custom_id, method, url, body}}", param) from None


def _check_body(body: Mapping[str, Any], endpoint: Endpoint) -> None:
    model = body.get("model")
    if not isinstance(model, str) or not model or "{{" in model:
        raise _Wrong("missing_required_parameter", "body.model has to be the name of a model", "body.model")
    if body.get("stream"):
        raise _Wrong("unsupported_parameter", "nobody is there to read a stream: leave body.stream out", "body.stream")
    if not isinstance(body.get("forebay", {}), dict):
        raise _Wrong("invalid_type", "body.forebay has to be an object", "body.forebay")
    field = {Endpoint.CHAT: "messages", Endpoint.COMPLETIONS: "prompt", Endpoint.EMBEDDINGS: "input"}[endpoint]
    prompt = body.get(field)
    if not prompt or not isinstance(prompt, list if endpoint is Endpoint.CHAT else str | list):
        told = "an array of messages" if endpoint is Endpoint.CHAT else "a text or an array, and not empty"
        raise _Wrong("missing_required_parameter", f"body.{field} has to be {told}", f"body.{field}")
    if endpoint is Endpoint.COMPLETIONS and ("messages" in body or num_prompts(prompt) > 1):
        raise _Wrong("unsupported_parameter", f"a row is one prompt: {_TEXT_ALONE}", "body.prompt")
    for name, is_untold in _UNTOLD.items():
        if (value := body.get(name)) is not None and is_untold(value):
            raise _Wrong("unsupported_parameter", f"body.{name} is not taken here: {_TEXT_ALONE}", f"body.{name}")


def _names(rows: Sequence[tuple[int, _Row]]) -> dict[str, str]:
    """Return the names of the rows' calls by their ``custom_id``: this itself, where it can be a name."""
    names: dict[str, str] = {}
    errors: list[RowError] = []
    for line, row in rows:
        if row.custom_id in names:
            told = f"another row has the custom_id {row.custom_id[:64]!r} already"
            errors.append(RowError("duplicate_custom_id", told, line, "custom_id"))
        is_name = _NAME.fullmatch(row.custom_id) and not row.custom_id.startswith(_OWN_PREFIX)
        names[row.custom_id] = row.custom_id if is_name else f"{_OWN_PREFIX}{line}"
    if errors:
        raise InvalidRows(errors[:_MOST_ERRORS])
    return names


def _call_of(row: _Row, endpoint: Endpoint, names: Mapping[str, str], used: dict[str, set[str]]) -> Call:
    """Return the call of a row, and note in ``used`` which others it uses."""
    uses = used[row.custom_id] = set[str]()

    def name_of(other: str) -> str:
        if other not in names:
            told = f"the row refers to {other!r}, and no row of this file has that custom_id"
            raise _Wrong("unknown_row", told, "body")
        if endpoint is Endpoint.EMBEDDINGS:
            raise _Wrong("no_output_text", "embeddings have no output_text to refer to", "body")
        uses.add(other)
        return names[other]

    try:
        request = translated(row.body, name_of)
        form_of(request)
    except InvalidRequest as error:
        raise _Wrong("invalid_reference", error.message, "body") from None
    request["forebay"] = {**request.get("forebay", {}), "class": "batch"}
    if endpoint is Endpoint.EMBEDDINGS:
        return Embed(id=names[row.custom_id], request=request, retry=_RETRY)
    return Llm(id=names[row.custom_id], request=request, retry=_RETRY)


def _refuse_circles(rows: Sequence[tuple[int, _Row]], used: Mapping[str, set[str]]) -> None:
    try:
        TopologicalSorter(used).prepare()
    except CycleError as error:
        circle: list[str] = error.args[1]
        first = circle[0]
        line = next(line for line, row in rows if row.custom_id == first)
        told = " → ".join(map(repr, circle[::-1]))
        message = f"rows wait for each other in a circle: {told}"
        raise InvalidRows([RowError("circular_reference", message, line, "body")]) from None
