"""The whole answer of a request, decided before its first byte: pieces, why it ends, what it is counted as."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from engines.fake_server.asks import BadRequestError, ChatBody, Prompt
from engines.fake_server.schema import instance
from engines.fake_server.text import Author, Piece, decode, encode, pieces_of


@dataclass(frozen=True, slots=True)
class Limits:
    """What ends an answer."""

    natural: int
    max_tokens: int | None
    stops: tuple[str, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class Forced:
    """Text that the request demands in place of prose; `tool` names the function whose arguments it is."""

    text: str
    tool: str | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """One choice; the pieces' texts join to what the client reads."""

    pieces: tuple[Piece, ...]
    finish: str
    stop_reason: str | None = None
    tool: str | None = None

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(piece.text for piece in self.pieces)


def write_answer(author: Author, prompt: Prompt, limits: Limits, forced: Forced | None, voice: int) -> Answer:
    """Return the answer to `prompt`; continuing a part of it gives the rest, ended at the same place."""
    if forced is not None:
        rest = forced.text.removeprefix(prompt.prefill)
        return _ended(pieces_of(encode(rest)), limits, forced.tool)
    length = limits.natural - author.already_written(prompt.ids, voice)
    if limits.ignore_eos and limits.max_tokens is not None:
        length = limits.max_tokens
    elif limits.max_tokens is not None:
        # One more than may be sent tells whether it was cut.
        length = min(length, limits.max_tokens + 1)
    return _ended(pieces_of(author.write(prompt.ids, max(length, 0), voice)), limits, None)


def _ended(pieces: list[Piece], limits: Limits, tool: str | None) -> Answer:
    finish = "tool_calls" if tool else "stop"
    most = limits.max_tokens
    if most is not None and (len(pieces) > most or (limits.ignore_eos and len(pieces) == most)):
        pieces = pieces[:most]
        finish = "length"
    text = "".join(piece.text for piece in pieces)
    found = [(at, stop) for stop in limits.stops if stop and (at := text.find(stop)) >= 0]
    if found:
        cut, stop = min(found)
        return Answer(tuple(_cut_text(pieces, cut, len(stop))), "stop", stop, tool)
    return Answer(tuple(pieces), finish, None, tool)


def _cut_text(pieces: list[Piece], at: int, width: int) -> list[Piece]:
    """Return the pieces up to a stop string: as engines do it, what may belong to one is held back until it is sure."""
    kept: list[Piece] = []
    held = ""
    start = 0
    for piece in pieces:
        if start >= at + width:
            break
        end = start + len(piece.text)
        if end <= at:
            kept.append(piece)
        else:
            held += piece.text[: max(at - start, 0)]
            kept.append(Piece("", piece.id))
        start = end
    kept[-1] = Piece(kept[-1].text + held, kept[-1].id)
    return kept


def chat_forced(author: Author, body: ChatBody, prompt: Prompt) -> Forced | None:
    """Return what `tool_choice` or `response_format` demands, if anything."""
    words = (decode((token,)).strip() for token in author.words(encode(prompt.head)))
    tool = _chosen_tool(body)
    if tool is not None:
        arguments = instance(tool.get("parameters") or {"type": "object"}, words)
        return Forced(msgspec.json.encode(arguments).decode(), str(tool.get("name", "")))
    form = body.response_format or {}
    if form.get("type") == "json_object":
        return Forced(msgspec.json.encode({"answer": next(words)}).decode())
    if form.get("type") == "json_schema":
        schema = (form.get("json_schema") or {}).get("schema")
        return Forced(msgspec.json.encode(instance(schema, words)).decode())
    return None


def _chosen_tool(body: ChatBody) -> dict[str, Any] | None:
    functions: list[dict[str, Any]] = [tool.get("function") or {} for tool in body.tools or ()]
    choice = body.tool_choice
    if choice == "required":
        if not functions:
            raise BadRequestError("tool_choice is required but tools is empty", param="tool_choice")
        return functions[0]
    if isinstance(choice, dict):
        name = (choice.get("function") or {}).get("name")
        for function in functions:
            if function.get("name") == name:
                return function
        raise BadRequestError(f"tool_choice names {name!r}, which is not in tools", param="tool_choice")
    return None


@dataclass(frozen=True, slots=True)
class Job:
    """Everything that the wire formats render: the same for a stream and for a whole answer."""

    id: str
    created: int
    model: str
    prompts: Sequence[Prompt]
    choices: Sequence[Answer]
    cached_tokens: int = 0
    include_usage: bool = False
    usage_with_choices: bool = False
    return_token_ids: bool = False
    top_logprobs: int | None = None
    echo: bool = False

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(len(prompt.ids) for prompt in self.prompts)

    @property
    def completion_tokens(self) -> int:
        """Tokens of all choices."""
        return sum(len(answer.pieces) for answer in self.choices)

    @property
    def steps(self) -> int:
        """Decoding steps, the first at TTFT."""
        return max(len(answer.pieces) for answer in self.choices)

    def prompt_of(self, choice: int) -> Prompt:
        """Return the prompt which `choice` answers."""
        return self.prompts[choice * len(self.prompts) // len(self.choices)]

    def by_step(self) -> "itertools.chain[tuple[int, int]]":
        """Return (step, choice) in the order in which tokens are made."""
        return itertools.chain.from_iterable(
            [(step, at) for at, answer in enumerate(self.choices) if step < max(len(answer.pieces), 1)]
            for step in range(max(self.steps, 1))
        )
