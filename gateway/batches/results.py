"""What has come of the rows of a batch, as the lines of its two files.

An answer holds what a run keeps of a call: its text, or its vectors, and what it has used. What is not known stands
there as null, and not as a guess: ``finish_reason``, and ``usage`` where the engine has not told it.
"""

from collections.abc import Mapping
from typing import Any

import msgspec

from core.batches import BatchRecord, BatchRow
from core.chat import Endpoint
from gateway.runs.history import Settled
from semantic_vars.variable import Failure, State

EXPIRED = "deadline"
"""The code of a call whose run has had its time."""
_UPSTREAM = "upstream_failed"


def line_of(batch: BatchRecord, rows: Mapping[str, BatchRow], settled: Settled) -> bytes:
    """Return the line of a row that has its outcome: of the output file if that is done, else of the error file."""
    row, outcome = rows[settled.variable], settled.outcome
    name = f"{batch.run}.{settled.variable}"
    response: dict[str, Any] | None = None
    error: dict[str, str] | None = None
    if outcome.state is State.DONE:
        response = {"status_code": 200, "request_id": name, "body": _body(batch, name, row, settled)}
    else:
        error = _error(outcome.failure, rows)
    line = {"id": name, "custom_id": row.custom_id, "response": response, "error": error}
    return msgspec.json.encode(line) + b"\n"


def _error(failure: Failure | None, rows: Mapping[str, BatchRow]) -> dict[str, str]:
    if failure is None:
        return {"code": "batch_cancelled", "message": "the batch was cancelled before this row was done"}
    if failure.code == EXPIRED:
        return {"code": "batch_expired", "message": "the batch's completion window ended before this row was done"}
    message = failure.message
    if failure.code == _UPSTREAM and (cause := rows.get(failure.call)) is not None:
        message = f"the row {cause.custom_id!r}" + message.removeprefix(failure.call)  # as the tenant calls it
    return {"code": failure.code, "message": message}


def _body(batch: BatchRecord, name: str, row: BatchRow, settled: Settled) -> dict[str, Any]:
    value = settled.outcome.value
    if batch.endpoint == Endpoint.EMBEDDINGS.value:
        vectors = value if value and isinstance(value[0], list) else [value]
        data = [{"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(vectors)]
        return {"object": "list", "data": data, "model": row.model, "usage": _usage(settled, is_embedding=True)}
    is_chat = batch.endpoint == Endpoint.CHAT.value
    said = {"message": {"role": "assistant", "content": value}} if is_chat else {"text": value}
    return {
        "id": name,
        "object": "chat.completion" if is_chat else "text_completion",
        "created": int(settled.at or batch.finalizing_at or batch.created_at),
        "model": row.model,
        "choices": [{"index": 0, **said, "logprobs": None, "finish_reason": None}],
        "usage": _usage(settled, is_embedding=False),
    }


def _usage(settled: Settled, *, is_embedding: bool) -> dict[str, Any] | None:
    if settled.made is None or not settled.made.used.prompt:
        return None
    used = settled.made.used
    if is_embedding:
        return {"prompt_tokens": used.prompt, "total_tokens": used.prompt}
    return {
        "prompt_tokens": used.prompt,
        "completion_tokens": used.completion,
        "total_tokens": used.prompt + used.completion,
        "prompt_tokens_details": {"cached_tokens": used.cached},
    }
