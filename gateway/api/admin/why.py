"""How a request was served, told in a paragraph: who asked for what, what it waited for, what was tried, what it cost.

It tells what the record holds and nothing else: there is no word of a cache or of routing before they exist.
"""

from collections.abc import Iterator, Mapping
from itertools import pairwise

from core.chat import Endpoint
from core.records import CLIENT_LEFT, CUTS, LegRecord, RequestRecord
from gateway.api.admin.shapes import shown_usd

_LEAST_WAIT_S = 0.001

_ASKED: Mapping[str, str] = {
    Endpoint.CHAT: "a chat answer",
    Endpoint.COMPLETIONS: "a text completion",
    Endpoint.EMBEDDINGS: "an embedding",
    Endpoint.RESPONSES: "a response",
    Endpoint.MESSAGES: "a message",
}
_ENDS: Mapping[str, str] = {
    "done": "answered",
    "refused": "refused the request itself",
    "busy": "was too busy",
    "broken": "failed",
    "lost": "went away while it worked",
    "unreachable": "could not be reached",
    "timed_out": "missed a deadline",
    "hurried": "missed a deadline that the caller had set",
    "aborted": "was told to stop",
    "preempted": "gave its slot to a tenant that was further behind its share",
    "migrated": "had more to do than another worker",
    "drained": "was being drained",
}
_MEANINGS: Mapping[str, str] = {
    "invalid_json": "the body was no JSON object",
    "context_length_exceeded": "the prompt does not fit the model's context",
    "request_too_large": "the body was too large",
    "model_not_found": "no model has this name",
    "invalid_api_key": "the key is not known, or holds no longer",
    "model_not_allowed": "the key may not use the model",
    "endpoint_not_allowed": "the key may not use the route",
    "tenant_suspended": "an operator has suspended the tenant",
    "rate_limit_exceeded": "a limit on requests, tokens or parallel answers had no room",
    "insufficient_quota": "a budget was used up",
    "queue_full": "the model's queue was full",
    "queue_timeout": "no worker had room in time",
    "no_healthy_worker": "no worker of the model ran, nor was one about to",
    "draining": "the gateway was shutting down",
    "connect_timeout": "the worker did not take the connection in time",
    "first_token_timeout": "the worker sent nothing in time",
    "idle_timeout": "the worker stopped sending",
    "upstream_timeout": "the answer was not complete in time",
    "client_idle": "the client did not read its answer",
    "upstream_error": "the engine failed, or refused the request",
    "upstream_busy": "the engine had no room",
    "worker_lost": "the worker went away while it worked",
    "worker_unreachable": "the worker could not be reached",
    "internal": "a fault of the gateway; its log has the details under the request's id",
}


def paragraph(record: RequestRecord) -> str:
    """Return the paragraph."""
    return " ".join([_question(record), *_way(record), _ending(record), _spending(record)])


def fell_back(record: RequestRecord) -> bool:
    """Whether another model answered than the one that was asked."""
    models = [leg.model for leg in record.legs]
    return len(models) > 1 and models[-1] != models[0]


def num_retries(record: RequestRecord) -> int:
    """Return how many legs began anew because the one before had failed."""
    followed = pairwise(record.legs)
    return sum(leg.cause not in CUTS and not following.is_resumed for leg, following in followed)


def duration(seconds: float) -> str:
    """Return a duration as people read it."""
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _question(record: RequestRecord) -> str:
    model = f" of the model {_model(record)}" if record.asked_model or record.model else ""
    kind = _ASKED.get(record.endpoint)
    streamed = ", streamed" if record.stream else ""
    asked = f"called {record.endpoint}{model}" if kind is None else f"asked for {kind}{model}{streamed}"
    again = (
        f" It was the client's own retry, number {record.client_retry}."
        if record.client_retry not in {None, "0"}
        else ""
    )
    return f"{_caller(record)} {asked}.{again}"


def _caller(record: RequestRecord) -> str:
    if record.tenant is None:
        return "An unknown caller"
    with_key = f"with the key {record.key!r}" if record.key else ""
    end_user = f"for the end user {record.end_user!r}" if record.end_user else ""
    details = " and ".join(filter(None, [with_key, end_user]))
    return f"The tenant {str(record.tenant)!r}" + (f", {details}," if details else "")


def _model(record: RequestRecord) -> str:
    first = record.legs[0].model if record.legs else record.model
    asked = record.asked_model or first
    return repr(asked) if first is None or asked == first else f"{asked!r}, which is {first!r}"


def _way(record: RequestRecord) -> Iterator[str]:
    """Yield the sentences about queue and workers."""
    has_waited = record.queue_s >= _LEAST_WAIT_S
    if not record.legs:
        yield (
            f"It waited {duration(record.queue_s)} in the queue, and no worker had begun."
            if has_waited
            else ("It reached no worker.")
        )
        return
    first = record.legs[0]
    in_all = " in all" if len(record.legs) > 1 else ""
    yield (
        f"It waited {duration(record.queue_s)}{in_all} for a worker with room, and {first.worker!r} began "
        f"{duration(first.at_s)} after its arrival."
        if has_waited
        else f"It did not have to wait, and {first.worker!r} began at once."
    )
    for leg, following in pairwise(record.legs):
        again = f" where it was, computing {following.recomputed} tokens again" if following.is_resumed else ""
        yield f"{_end(leg)}, so {_successor(leg, following)} at {duration(following.at_s)}{again}."
    if (last := record.legs[-1]).cause != "done" and record.status != CLIENT_LEFT:
        yield f"{_end(last)}, and that was the last attempt."


def _end(leg: LegRecord) -> str:
    return f"After {duration(leg.duration_s)} {leg.worker!r} {_ENDS.get(leg.cause, f'ended with {leg.cause!r}')}"


def _successor(leg: LegRecord, following: LegRecord) -> str:
    if following.model != leg.model:
        return f"it fell back to the model {following.model!r} on {following.worker!r}"
    if following.is_resumed:
        return "it went on there" if following.worker == leg.worker else f"{following.worker!r} went on with it"
    if leg.cause in CUTS:  # before its first byte
        return f"{following.worker!r} began anew"
    return "it tried again" if following.worker == leg.worker else f"{following.worker!r} took over"


def _ending(record: RequestRecord) -> str:
    took = duration(record.duration_s)
    if record.status == CLIENT_LEFT:
        return f"The client left after {took}, and what still ran for it was stopped."
    if record.error is not None:
        meaning = f" ({_MEANINGS[record.error]})" if record.error in _MEANINGS else ""
        if record.status < 400:
            return f"The answer had begun, and broke off after {took} with the error {record.error!r}{meaning}."
        return f"It ended after {took} with status {record.status} and the error {record.error!r}{meaning}."
    has_first = record.stream and record.first_byte_s is not None
    first = f", its first byte after {duration(record.first_byte_s or 0.0)}" if has_first else ""
    return f"The answer, status {record.status}, was complete after {took}{first}."


def _spending(record: RequestRecord) -> str:
    if (usage := record.usage) is None:
        return "No tokens were counted, and it cost nothing." if not record.cost else f"It cost {_usd(record)}."
    cached = f" ({usage.cached_tokens} of them from the engine's own prefix cache)" if usage.cached_tokens else ""
    return (
        f"It used {usage.prompt_tokens} tokens of prompt{cached} and {usage.completion_tokens} of answer, "
        f"for {_usd(record)}."
    )


def _usd(record: RequestRecord) -> str:
    return f"{shown_usd(record.cost)} USD"
