"""What a request becomes before llama.cpp sees it, and how its answer then has to be read."""

import itertools
from collections.abc import Iterator
from typing import Any

import msgspec

from core.chat import Endpoint
from core.errors import InvalidRequest

Json = dict[str, Any]

# Slots, KV and adapters belong to whoever runs the worker (S12); ``n_predict`` and ``n_cmpl`` are second names of
# ``max_tokens`` and ``n`` that would win over the checked ones; ``verbose`` puts prompt and slot into the answer.
_NEVER_SENT = frozenset({
    "id_slot", "slot_id", "cache_prompt", "n_cache_reuse", "n_keep", "n_discard", "filename", "action", "lora",
    "cache_salt", "kv_transfer_params",
    "priority", "n_predict", "n_cmpl", "verbose", "response_fields", "sse_ping_interval", "return_progress",
    "backend_sampling", "speculative", "best_of",
})  # fmt: skip
_TOOL_KEYS = ("tools", "tool_choice", "parallel_tool_calls")
_GRAMMAR_KEYS = ("response_format", "grammar", "json_schema")
_LIMITS = {
    Endpoint.CHAT: ("max_completion_tokens", "max_tokens"),
    Endpoint.COMPLETIONS: ("max_tokens",),
    Endpoint.RESPONSES: ("max_output_tokens",),
    Endpoint.MESSAGES: ("max_tokens",),
}


class Plan(msgspec.Struct, frozen=True):
    """How the answer to an edited request is read.

    ``streams``: the engine answers with events, whatever the client asked for. ``restates_prefill``: the closing events
    repeat the assistant's message that the answer continues. ``forces_tool``: the answer's text is a tool call in JSON.
    ``num_choices`` come in one answer, ``per_prompt`` of them from each prompt.
    """

    endpoint: Endpoint
    streams: bool = True
    whole: bool = False
    restates_prefill: bool = False
    forces_tool: bool = False
    num_choices: int = 1
    per_prompt: int = 1

    @property
    def passthrough(self) -> bool:
        """Whether the engine's bytes are the client's bytes: an ``AnswerAssembler`` would change nothing."""
        return not (self.whole or self.restates_prefill or self.forces_tool or self.num_choices > 1)


def edit_request(endpoint: Endpoint, body: Json, *, stream: bool) -> tuple[Json, Plan]:
    """Return the body for llama.cpp and the plan for its answer; ``body`` itself stays as it is.

    The engine is always asked to stream, because it notices a client that has gone only then. ``stream`` is what the
    client asked for. Raises ``InvalidRequest`` for what the engine would misread, or refuse with a riddle.
    """
    sent = {key: value for key, value in body.items() if key not in _NEVER_SENT and not key.startswith("speculative.")}
    if endpoint is Endpoint.EMBEDDINGS:
        return sent, Plan(endpoint, streams=False)
    _set_limit(endpoint, sent)
    sent["stream"] = True
    if endpoint in {Endpoint.CHAT, Endpoint.COMPLETIONS}:
        sent["stream_options"] = {"include_usage": True}
    plan = Plan(endpoint, whole=not stream)
    if endpoint is Endpoint.CHAT:
        return _edit_chat(sent, plan)
    if endpoint is Endpoint.COMPLETIONS:
        per_prompt = _count(sent)
        return sent, msgspec.structs.replace(
            plan, num_choices=per_prompt * _num_prompts(sent.get("prompt")), per_prompt=per_prompt
        )
    if endpoint is Endpoint.RESPONSES and isinstance(sent.get("input"), list):
        sent["input"] = [_spelt_out(item) for item in sent["input"]]
        plan = msgspec.structs.replace(plan, restates_prefill=_ends_in_prefill(sent["input"]))
    return sent, plan


def _spelt_out(item: Any) -> Any:
    """Return an assistant's turn of ``/v1/responses`` in its long form: llama.cpp refuses OpenAI's short one."""
    if not isinstance(item, dict) or item.get("role") != "assistant" or not isinstance(item.get("content"), str):
        return item
    return item | {"type": "message", "content": [{"type": "output_text", "text": item["content"]}]}


def _set_limit(endpoint: Endpoint, body: Json) -> None:
    """Leave one limit in the body. The engine makes one token for 0, and has no limit for less than 0."""
    given = [(key, body.pop(key)) for key in _LIMITS[endpoint] if body.get(key) is not None]
    if not given:
        return
    key, limit = given[0]
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        raise InvalidRequest(f"{key} must be an integer of at least 1", param=key)
    body["max_output_tokens" if endpoint is Endpoint.RESPONSES else "max_tokens"] = limit


def _count(body: Json) -> int:
    count = body.get("n")
    return count if isinstance(count, int) and count > 0 else 1


def _num_prompts(prompt: Any) -> int:
    """Return how many prompts a completion request holds: a list of numbers is one prompt in token ids."""
    if isinstance(prompt, list) and any(isinstance(part, str | list) for part in prompt):
        is_mixed = any(isinstance(part, int) for part in prompt)  # ids and text of one prompt, an own form of llama.cpp
        return 1 if is_mixed else len(prompt)
    return 1


def _ends_in_prefill(turns: Any) -> bool:
    """Return whether the last message is text by the assistant, which llama.cpp continues."""
    last = turns[-1] if isinstance(turns, list) and turns else None
    if not isinstance(last, dict) or last.get("role") != "assistant":
        return False
    content = last.get("content")
    if isinstance(content, list):
        return any(isinstance(part, dict) and part.get("text") for part in content)
    return bool(content)


def _edit_chat(sent: Json, plan: Plan) -> tuple[Json, Plan]:
    num_choices = _count(sent)
    tools = allowed_tools(sent)
    has_grammar = bool(tools) or any(sent.get(key) not in (None, {"type": "text"}) for key in _GRAMMAR_KEYS)
    if has_grammar and _ends_in_prefill(sent.get("messages")):
        raise InvalidRequest(
            "this engine cannot continue an assistant message under a response_format or a forced tool call",
            param="messages",
        )
    if tools:
        force_tool(sent, tools)
    return sent, msgspec.structs.replace(plan, forces_tool=bool(tools), num_choices=num_choices, per_prompt=num_choices)


def allowed_tools(body: Json) -> list[Json]:
    """Return the functions of which the answer must call one; none where a call is not demanded.

    Raises ``InvalidRequest`` where ``tool_choice`` demands a function that ``tools`` does not have.
    """
    names = _demanded(body.get("tool_choice"))
    if names is None:
        return []
    tools = [tool for tool in body.get("tools") or [] if isinstance(tool, dict) and _name(tool)]
    chosen = [tool for tool in tools if not names or _name(tool) in names]
    if not chosen or not names <= {_name(tool) for tool in tools}:
        raise InvalidRequest("tool_choice demands a function that is not among tools", param="tool_choice")
    return chosen


def _demanded(choice: Any) -> set[str] | None:
    """Return the names one of which must be called; an empty set stands for all of them, None for no demand."""
    if choice == "required":
        return set()
    if not isinstance(choice, dict):
        return None
    if choice.get("type") == "function":
        return {_name(choice)}
    allowed = choice.get("allowed_tools")
    if choice.get("type") == "allowed_tools" and isinstance(allowed, dict) and allowed.get("mode") == "required":
        return {_name(tool) for tool in allowed.get("tools") or [] if isinstance(tool, dict)}
    return None


def _name(tool: Json) -> str:
    function = tool.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else ""


def force_tool(body: Json, tools: list[Json]) -> None:
    """Replace a demanded tool call by a schema of the same meaning, which llama.cpp does enforce.

    The tools are told in the system message, because many small models' templates do not render them.
    """
    for key in (*_TOOL_KEYS, *_GRAMMAR_KEYS):
        body.pop(key, None)
    schema = {"name": "tool_call", "strict": True, "schema": call_schema(tools)}
    body["response_format"] = {"type": "json_schema", "json_schema": schema}
    body["messages"] = _with_instruction(body.get("messages"), _instruction(tools))


def call_schema(tools: list[Json]) -> Json:
    """Return the JSON schema of one call: ``{"name": …, "arguments": …}`` of any of the tools."""
    definitions: Json = {}
    calls: list[Json] = []
    for index, tool in enumerate(tools):
        function = tool["function"]
        arguments = _hoisted(function.get("parameters"), f"tool{index}_", definitions)
        calls.append({
            "type": "object",
            "properties": {"name": {"const": function["name"]}, "arguments": arguments},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        })  # fmt: skip
    schema = calls[0] if len(calls) == 1 else {"anyOf": calls}
    return schema | {"$defs": definitions} if definitions else schema


def _hoisted(parameters: Any, prefix: str, definitions: Json) -> Json:
    """Return a tool's schema with its definitions moved to the root, where ``$ref`` looks for them."""
    if not isinstance(parameters, dict) or not parameters:
        return {"type": "object", "properties": {}}
    own = {key: value for key, value in parameters.items() if key not in {"$defs", "definitions", "$schema"}}
    for place in ("$defs", "definitions"):
        for name, schema in (parameters.get(place) or {}).items():
            definitions[prefix + name] = _rebased(schema, prefix)
    rebased: Json = _rebased(own, prefix)
    return rebased


def _rebased(node: Any, prefix: str) -> Any:
    if isinstance(node, list):
        return [_rebased(item, prefix) for item in node]
    if not isinstance(node, dict):
        return node
    return {
        key: _moved(value, prefix) if key == "$ref" and isinstance(value, str) else _rebased(value, prefix)
        for key, value in node.items()
    }


def _moved(reference: str, prefix: str) -> str:
    for place in ("#/$defs/", "#/definitions/"):
        if reference.startswith(place):
            return f"#/$defs/{prefix}{reference.removeprefix(place)}"
    return reference


def _instruction(tools: list[Json]) -> str:
    described = "\n".join(_lines(tools))
    return (
        "You can call these functions:\n"
        f"{described}\n"
        'Answer with one call and nothing else, as JSON: {"name": "<function>", "arguments": {<its arguments>}}'
    )


def _lines(tools: list[Json]) -> Iterator[str]:
    for tool in tools:
        function = tool["function"]
        shown = {key: function[key] for key in ("name", "description", "parameters") if function.get(key)}
        yield msgspec.json.encode(shown).decode()


def _with_instruction(messages: Any, text: str) -> list[Any]:
    """Return the messages with the text at the end of the system message, which stays the first and only one."""
    given = list(messages) if isinstance(messages, list) else []
    first = given[0] if given and isinstance(given[0], dict) else {}
    if first.get("role") not in {"system", "developer"}:
        return [{"role": "system", "content": text}, *given]
    content = first.get("content")
    if isinstance(content, list):
        joined: Any = [*content, {"type": "text", "text": text}]
    else:
        joined = f"{content}\n\n{text}" if content else text
    return [first | {"content": joined}, *itertools.islice(given, 1, None)]
