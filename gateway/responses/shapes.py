"""How a background response looks on the wire: OpenAI's ``Response``."""

from typing import Any

from gateway.responses.background import Background, Status
from gateway.responses.ids import message_of
from semantic_vars.variable import State


def response_of(background: Background, *, before: Status | None = None) -> dict[str, Any]:
    """Return the response; or, with a status ``before`` its end, how it was then."""
    asked = background.asked
    status = before or background.status
    is_over = before is None and background.outcome is not None
    is_answered = status in {"completed", "incomplete"}
    return {
        "id": background.id,
        "object": "response",
        "created_at": int(background.record.created_at),
        "status": status,
        "background": True,
        "error": error_of(background) if is_over else None,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "instructions": asked.instructions,
        "max_output_tokens": asked.max_output_tokens,
        "metadata": asked.metadata,
        "model": asked.model,
        "output": [message_item(background, background.text, status)] if is_answered else [],
        "parallel_tool_calls": asked.parallel_tool_calls,
        "previous_response_id": asked.previous_response_id,
        "prompt_cache_key": asked.prompt_cache_key,
        "safety_identifier": asked.safety_identifier,
        "service_tier": asked.service_tier,
        "store": True,
        "temperature": asked.temperature,
        "text": {"format": asked.format or {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_p": asked.top_p,
        "truncation": "disabled",
        "usage": _usage(background) if is_over else None,
        "user": asked.user,
    }


def message_item(background: Background, text: str | None, status: str) -> dict[str, Any]:
    """Return the message that the answer is; without a text it has no parts yet."""
    content = [text_part(text)] if text is not None else []
    return {
        "id": message_of(background.record.id), "type": "message", "status": status, "role": "assistant",
        "content": content,
    }  # fmt: skip


def text_part(text: str) -> dict[str, Any]:
    """Return the one part of a message."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def error_of(background: Background) -> dict[str, str] | None:
    """Return why a response has failed."""
    outcome = background.outcome
    if outcome is None or outcome.state is not State.FAILED or outcome.failure is None:
        return None
    return {"code": outcome.failure.code, "message": outcome.failure.message}


def _usage(background: Background) -> dict[str, Any] | None:
    """Return what was used; None where nobody has counted it."""
    used = background.history.used
    if used is None or not used.requests:
        return None
    return {
        "input_tokens": used.prompt,
        "input_tokens_details": {"cached_tokens": used.cached, "cache_write_tokens": 0},
        "output_tokens": used.completion,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": used.prompt + used.completion,
    }
