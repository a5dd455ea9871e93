"""Which answers may be cut and continued, as far as it depends on the request alone."""

from typing import Any

from core.chat import Call, Endpoint

# What a second leg, whose prompt holds what the first has made, treats as the first did. A list of what is known to be
# harmless, not of what is not: a field that nobody here knows pins its request.
_HARMLESS = frozenset({
    "model", "messages", "prompt", "stream", "stream_options", "user", "metadata", "store", "service_tier",
    "safety_identifier", "prompt_cache_key", "priority",
    "max_tokens", "max_completion_tokens", "min_tokens", "stop", "stop_token_ids", "ignore_eos", "logit_bias",
    "temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty", "repeat_penalty",
    "skip_special_tokens", "spaces_between_special_tokens", "chat_template_kwargs",
})  # fmt: skip
# Harmless with this value, which changes nothing. A penalty on what the answer holds so far would not see a first leg's
# part of it; a grammar would begin anew; a generator of random numbers as well.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (False,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "tools": ([],),
    "tool_choice": ("none",),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
}
_STREAM_OPTIONS: tuple[dict[str, bool], ...] = ({"include_usage": True}, {"include_usage": False}, {})
_PLAIN = frozenset({Endpoint.CHAT, Endpoint.COMPLETIONS})


def may_be_cut(call: Call) -> bool:
    """Return whether the rest of an answer can follow from its prompt and its beginning. Costs some microseconds."""
    if call.endpoint not in _PLAIN:
        return False
    body = call.body
    for key, value in body.items():
        if key in _HARMLESS or value is None or value in _NEUTRAL.get(key, ()):
            continue
        if key != "seed" or body.get("temperature") != 0:  # a greedy answer draws no numbers
            return False
    if body.get("stream_options") is not None and body["stream_options"] not in _STREAM_OPTIONS:
        return False
    return _is_text(body.get("messages")) if call.endpoint is Endpoint.CHAT else _is_one_prompt(body.get("prompt"))


def _is_text(messages: Any) -> bool:
    """Return whether the messages are text, and the last one is not an answer's beginning."""
    if not isinstance(messages, list) or not messages:
        return False
    for message in messages:
        if not isinstance(message, dict):
            return False
        content = message.get("content")
        if isinstance(content, list):
            if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
                return False
        elif content is not None and not isinstance(content, str):
            return False
    return bool(messages[-1].get("role") != "assistant")


def _is_one_prompt(prompt: Any) -> bool:
    return isinstance(prompt, str) or (
        isinstance(prompt, list) and bool(prompt) and all(isinstance(part, int) for part in prompt)
    )


def limit_of(call: Call) -> int | None:
    """Return how many tokens the whole answer may have; None where the request does not say."""
    for key in ("max_completion_tokens", "max_tokens") if call.endpoint is Endpoint.CHAT else ("max_tokens",):
        limit = call.body.get(key)
        if isinstance(limit, int):
            return limit
    return None
