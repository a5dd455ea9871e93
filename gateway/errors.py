"""The one table from error classes to HTTP, and the two envelopes that clients understand."""

from typing import Any, NamedTuple

import msgspec

from core.chat import Endpoint
from core.errors import (
    BudgetExceeded,
    ClientIdle,
    Conflict,
    ConnectionLimit,
    ConnectTimeout,
    ForebayError,
    InternalError,
    InvalidKey,
    InvalidRequest,
    MethodNotAllowed,
    PermissionDenied,
    PreconditionFailed,
    PreconditionRequired,
    QueueTimeout,
    RateLimited,
    RequestTooLarge,
    TimedOut,
    Unavailable,
    UnknownId,
    UnknownModel,
    UnknownUrl,
    UpstreamBroken,
    UpstreamBusy,
    UpstreamError,
    UpstreamRefused,
    WorkerLost,
)


class Outcome(NamedTuple):
    """How an error class looks from outside. ``status`` None: the engine's own."""

    status: int | None
    type: str
    anthropic_type: str


# The nearest class in the error's line of descent decides.
_TABLE: dict[type[ForebayError], Outcome] = {
    InvalidRequest: Outcome(400, "invalid_request_error", "invalid_request_error"),
    RequestTooLarge: Outcome(413, "invalid_request_error", "request_too_large"),
    UnknownModel: Outcome(404, "invalid_request_error", "not_found_error"),
    UnknownUrl: Outcome(404, "invalid_request_error", "not_found_error"),
    UnknownId: Outcome(404, "invalid_request_error", "not_found_error"),
    Conflict: Outcome(409, "invalid_request_error", "invalid_request_error"),
    PreconditionFailed: Outcome(412, "invalid_request_error", "invalid_request_error"),
    PreconditionRequired: Outcome(428, "invalid_request_error", "invalid_request_error"),
    MethodNotAllowed: Outcome(405, "invalid_request_error", "invalid_request_error"),
    InvalidKey: Outcome(401, "authentication_error", "authentication_error"),
    PermissionDenied: Outcome(403, "permission_error", "permission_error"),
    RateLimited: Outcome(429, "rate_limit_error", "rate_limit_error"),
    BudgetExceeded: Outcome(429, "insufficient_quota", "rate_limit_error"),
    Unavailable: Outcome(503, "server_error", "overloaded_error"),
    ConnectionLimit: Outcome(429, "rate_limit_error", "rate_limit_error"),
    TimedOut: Outcome(504, "timeout_error", "api_error"),
    QueueTimeout: Outcome(503, "timeout_error", "overloaded_error"),
    ConnectTimeout: Outcome(502, "server_error", "api_error"),
    ClientIdle: Outcome(408, "timeout_error", "api_error"),
    UpstreamError: Outcome(502, "server_error", "api_error"),
    UpstreamRefused: Outcome(None, "invalid_request_error", "invalid_request_error"),
    UpstreamBusy: Outcome(None, "rate_limit_error", "overloaded_error"),
    UpstreamBroken: Outcome(502, "server_error", "api_error"),
    WorkerLost: Outcome(502, "server_error", "api_error"),
    InternalError: Outcome(500, "server_error", "api_error"),
    ForebayError: Outcome(500, "server_error", "api_error"),
}

# What a client may do about it by itself: our own retries are spent by the time it hears of a failure.
_CLIENT_MAY_RETRY = (Unavailable, QueueTimeout)


def outcome_of(error: ForebayError) -> Outcome:
    """Return the row of the error's nearest ancestor in the table."""
    return next(_TABLE[ancestor] for ancestor in type(error).__mro__ if ancestor in _TABLE)


def status_of(error: ForebayError) -> int:
    """Return the HTTP status that the error means to a caller."""
    outcome = outcome_of(error)
    if outcome.status is not None:
        return outcome.status
    return error.status if isinstance(error, UpstreamError) else 502


def body_of(error: ForebayError, endpoint: Endpoint | None, request_id: str) -> dict[str, Any]:
    """Return the error's envelope: Anthropic's on Anthropic's route, OpenAI's everywhere else."""
    outcome = outcome_of(error)
    if endpoint is Endpoint.MESSAGES:
        inner = {"type": outcome.anthropic_type, "message": error.message, "code": error.specific_code}
        return {"type": "error", "error": inner, "request_id": request_id}
    return {
        "error": {
            "message": error.message,
            "type": outcome.type,
            "param": error.param,
            "code": error.specific_code,
        }
    }


def frame_of(error: ForebayError, endpoint: Endpoint, request_id: str) -> bytes:
    """Return the event that ends a stream which cannot go on."""
    payload = msgspec.json.encode(body_of(error, endpoint, request_id))
    name = b"event: error\n" if endpoint in {Endpoint.MESSAGES, Endpoint.RESPONSES} else b""
    return name + b"data: " + payload + b"\n\n"


def headers_of(error: ForebayError) -> list[tuple[bytes, bytes]]:
    """Return what tells a client whether, and when, to come again."""
    may_retry = isinstance(error, _CLIENT_MAY_RETRY) or (
        isinstance(error, RateLimited) and error.retry_after is not None
    )
    headers = [(b"x-should-retry", b"true" if may_retry else b"false")]
    if isinstance(error, RateLimited) and error.measure in {"requests", "tokens"}:
        measure = error.measure.encode()
        headers += [
            (b"x-ratelimit-limit-" + measure, b"%d" % error.limit),
            (b"x-ratelimit-remaining-" + measure, b"0"),
            (b"x-ratelimit-reset-" + measure, reset_text(error.retry_after or 0).encode()),
        ]
    if error.retry_after is not None:
        headers.append((b"retry-after", str(max(1, round(error.retry_after))).encode()))
        headers.append((b"retry-after-ms", str(round(error.retry_after * 1000)).encode()))
    return headers


def reset_text(seconds: float) -> str:
    """Return seconds as OpenAI writes them in ``x-ratelimit-reset-*``: ``1s``, ``6m0s``."""
    whole = round(seconds)
    return f"{whole // 60}m{whole % 60}s" if whole >= 60 else f"{whole}s"
