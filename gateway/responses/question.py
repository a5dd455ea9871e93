"""What a body of ``/v1/responses`` with ``background`` asks for, as a chat.

A field is taken if a chat can be asked the same, or if its value asks for nothing; what no chat could be told is
refused by name, so that nobody believes it was heard.
"""

from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeAlias

import msgspec

from core.errors import InvalidRequest, UnsupportedParameter
from gateway.requests import TIERS
from gateway.responses.asked import Asked, Conversation, Question
from gateway.responses.references import read, refers
from semantic_vars.template import quoted

MOST_REFERENCES = 128
"""Responses that one may refer to."""

_Json: TypeAlias = dict[str, Any]
_Names: TypeAlias = dict[str, None]

_ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
_PARTS = ("input_text", "output_text", "text")
_TEXTS = ("instructions", "user", "safety_identifier", "prompt_cache_key", "service_tier", "previous_response_id")
_RANGES = {"temperature": (0, 2), "top_p": (0, 1)}
_PASSED = ("model", "temperature", "top_p", "user", "safety_identifier", "prompt_cache_key", "service_tier")
# Fields that a chat has no like of, with the values that ask for nothing.
_IDLE: Mapping[str, tuple[Any, ...]] = {
    "background": (True,), "conversation": (), "context_management": (), "include": ([],), "max_tool_calls": (),
    "moderation": (), "parallel_tool_calls": (True, False), "prompt": (), "prompt_cache_retention": ("in_memory",),
    "reasoning": ({},), "store": (True,), "stream": (True, False),
    "stream_options": ({}, {"include_obfuscation": False}), "tool_choice": ("auto", "none"), "tools": ([],),
    "top_logprobs": (0,), "truncation": ("disabled",),
}  # fmt: skip
_KNOWN = (*_IDLE, *_TEXTS, *_RANGES, "model", "input", "max_output_tokens", "metadata", "text")
_MOST_METADATA, _LONGEST_KEY, _LONGEST_VALUE = 16, 64, 512


def read_question(body: Mapping[str, Any], options: Mapping[str, Any], before: Conversation) -> Question:
    """Return what a body asks for behind what was said ``before``; ``options`` are Forebay's own, taken out of it.

    Raises ``InvalidRequest`` that names the field.
    """
    for name, value in body.items():
        _check(name, value)
    names: _Names = dict.fromkeys(before.references)
    instructions = body.get("instructions")
    system = [{"role": "system", "content": _template(instructions, "instructions", names)}] if instructions else []
    messages = [*system, *before.messages, *_messages(body.get("input"), names)]
    if len(names) > MOST_REFERENCES:
        raise InvalidRequest(f"it refers to {len(names)} responses; {MOST_REFERENCES} are allowed", param="input")
    form = _format(body.get("text"))
    asked = Asked(
        model=_model(body),
        format=form,
        metadata=body.get("metadata") or {},
        max_output_tokens=body.get("max_output_tokens"),
        parallel_tool_calls=body.get("parallel_tool_calls") is not False,
        stream=body.get("stream") is True,
        **{name: body.get(name) for name in (*_TEXTS, *_RANGES)},
    )
    chat = {name: body[name] for name in _PASSED if body.get(name) is not None}
    if asked.max_output_tokens is not None:
        chat["max_tokens"] = asked.max_output_tokens
    if form is not None and (response_format := _FORMATS[form["type"]](form)) is not None:
        chat["response_format"] = response_format
    # A run's call is urgent unless it says something else; these are as urgent as any request.
    chat["forebay"] = {"class": TIERS.get(asked.service_tier, "standard"), **options}
    return Question(asked, {**_quoted(chat), "messages": messages}, tuple(names))


def refers_to_others(body: Mapping[str, Any]) -> bool:
    """Whether a text in ``input`` or ``instructions`` refers to another response."""
    return any(map(refers, _texts([body.get("input"), body.get("instructions")])))


def _texts(value: Any) -> list[str]:
    texts: list[str] = []
    rest = [value]
    while rest:
        match rest.pop():
            case str() as text:
                texts.append(text)
            case list() as items:
                rest += items
            case dict() as item:
                rest += item.get("content"), item.get("text")
    return texts


# The parts of a body


def _check(name: str, value: Any) -> None:
    if name not in _KNOWN:
        told = f"`{name[:64]}` is unknown, or nothing that a background response could be asked"
        raise UnsupportedParameter(told, param=name[:64])
    if value is None:
        return
    if name in _IDLE:
        _check_idle(name, value)
    elif name in _TEXTS and not isinstance(value, str):
        _wrong(name, "a text")
    elif name in _RANGES:
        least, most = _RANGES[name]
        if type(value) not in {int, float} or not least <= value <= most:
            _wrong(name, f"a number from {least} to {most}")
    elif name == "max_output_tokens" and (type(value) is not int or value < 1):
        _wrong(name, "a whole number of at least 1")
    elif name == "metadata":
        _check_metadata(value)


def _check_idle(name: str, value: Any) -> None:
    if name == "store" and value is False:
        raise InvalidRequest("a background response is kept until it is fetched: `store` cannot be false", param=name)
    allowed = _IDLE[name]
    if not any(type(value) is type(one) and value == one for one in allowed):
        but = " or ".join(msgspec.json.encode(one).decode() for one in allowed)
        told = f"`{name}` is not available for background responses" + (f", but as {but}" if but else "")
        raise UnsupportedParameter(told, param=name)


def _check_metadata(metadata: Any) -> None:
    if not isinstance(metadata, dict) or len(metadata) > _MOST_METADATA:
        _wrong("metadata", f"an object of at most {_MOST_METADATA} texts")
    for key, value in metadata.items():
        if len(key) > _LONGEST_KEY or not isinstance(value, str) or len(value) > _LONGEST_VALUE:
            told = f"keys have {_LONGEST_KEY} characters at most, values are texts of {_LONGEST_VALUE} at most"
            raise InvalidRequest(f"`metadata[{key[:64]!r}]`: {told}", param="metadata")


def _model(body: Mapping[str, Any]) -> str:
    model = body.get("model")
    if not isinstance(model, str):
        _wrong("model", "the name of a model")
    return model


def _messages(given: Any, names: _Names) -> list[_Json]:
    if isinstance(given, str):
        return [{"role": "user", "content": _template(given, "input", names)}]
    if given is None:
        raise InvalidRequest("`input` is missing", param="input")
    if not isinstance(given, list) or not given:
        _wrong("input", "a text or an array of at least one message")
    return [_message(item, f"input[{index}]", names) for index, item in enumerate(given)]


def _message(item: Any, where: str, names: _Names) -> _Json:
    if not isinstance(item, dict):
        _wrong(where, "a message")
    if (kind := item.get("type", "message")) != "message":
        told = f"`{where}` is a {str(kind)[:64]!r}, and background responses take messages alone"
        raise UnsupportedParameter(told, param=where)
    role = item.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        _wrong(f"{where}.role", f"one of {', '.join(_ROLES)}")
    return {"role": _ROLES[role], "content": _content(item.get("content"), f"{where}.content", names)}


def _content(content: Any, where: str, names: _Names) -> Any:
    if isinstance(content, str):
        return _template(content, where, names)
    if not isinstance(content, list) or not content:
        _wrong(where, "a text or an array of at least one part")
    texts = [_part(part, f"{where}[{index}]", names) for index, part in enumerate(content)]
    return texts[0] if len(texts) == 1 else [{"type": "text", "text": text} for text in texts]


def _part(part: Any, where: str, names: _Names) -> str:
    if not isinstance(part, dict):
        _wrong(where, "a part")
    if part.get("type") not in _PARTS:
        told = f"`{where}` is a {str(part.get('type'))[:64]!r}, and background responses take 'input_text' alone"
        raise UnsupportedParameter(told, param=where)
    text = part.get("text")
    if not isinstance(text, str):
        _wrong(f"{where}.text", "a text")
    return _template(text, where, names)


def _template(text: str, where: str, names: _Names) -> str:
    reading = read(text, where)
    names.update(dict.fromkeys(reading.references))
    return reading.template


def _format(text: Any) -> _Json | None:
    if text is None:
        return None
    if not isinstance(text, dict):
        _wrong("text", "an object")
    for name, value in text.items():
        if name != "format" and value is not None:
            told = f"`text.{name[:64]}` is not available for background responses"
            raise UnsupportedParameter(told, param="text")
    form = text.get("format")
    if form is not None and (not isinstance(form, dict) or form.get("type") not in tuple(_FORMATS)):
        _wrong("text.format", f"an object with the `type` {' or '.join(_FORMATS)}")
    return form


def _json_schema(form: _Json) -> _Json:
    if not isinstance(form.get("name"), str) or not isinstance(form.get("schema"), dict):
        told = "`text.format` of the type 'json_schema' needs a `name`, and a `schema` that is an object"
        raise InvalidRequest(told, param="text.format")
    told_of = {name: form[name] for name in ("name", "schema", "strict", "description") if form.get(name) is not None}
    return {"type": "json_schema", "json_schema": told_of}


_FORMATS: Mapping[str, Callable[[_Json], _Json | None]] = {
    "text": lambda _: None,
    "json_object": lambda _: {"type": "json_object"},
    "json_schema": _json_schema,
}


def _quoted(value: Any) -> Any:
    """Return a template of a JSON value that is nothing but this value."""
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, dict):
        return {key: _quoted(one) for key, one in value.items()}
    return [_quoted(one) for one in value] if isinstance(value, list) else value


def _wrong(field: str, wanted: str) -> NoReturn:
    raise InvalidRequest(f"`{field}` has to be {wanted}", param=field)
