"""A request as the layers below HTTP see it, and what an engine reports about the work it did."""

from enum import StrEnum
from typing import Any, Literal

import msgspec

from core.ids import ModelName, RequestId, TenantId


class Endpoint(StrEnum):
    """Routes whose requests are scheduled; the value is the path that an OpenAI-compatible engine serves."""

    CHAT = "/v1/chat/completions"
    COMPLETIONS = "/v1/completions"
    EMBEDDINGS = "/v1/embeddings"
    RESPONSES = "/v1/responses"
    MESSAGES = "/v1/messages"


Class = Literal["interactive", "standard", "batch"]
"""How urgent a request is among those of its own tenant. A key caps it."""

CLASSES: tuple[Class, ...] = ("interactive", "standard", "batch")
"""The most urgent first."""

Objective = Literal["latency", "throughput"]
"""What counts of an answer: that it is there soon, or that much is done in all."""


class Usage(msgspec.Struct, frozen=True):
    """Tokens that an engine says it processed. ``cached_tokens`` is the part of the prompt it did not recompute."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


class Timeouts(msgspec.Struct, frozen=True):
    """Deadlines of one request, in seconds. Keep-alive comments from an engine reset none of them.

    ``first_token`` counts from the start of a leg, ``idle`` between chunks, ``total`` from arrival. A whole
    (non-streamed) answer of an engine that sends nothing until the end is bounded by ``total`` alone.
    """

    connect: float = 2.0
    queue: float = 30.0
    first_token: float = 120.0
    idle: float = 60.0
    total: float = 600.0


class Prefix(msgspec.Struct, frozen=True, array_like=True):
    """A beginning of a prompt that others may have too. ``digest``: of the text and all that must not be shared across,
    64 bits; ``tokens``: about how long it is."""

    digest: int
    tokens: int


class Role(msgspec.Struct, frozen=True):
    """What a call is to the run of a workflow. ``age_s``: seconds since the run was accepted; ``remaining_s``: about
    how long it takes, from the call's start to the end of the longest path behind it, and ``run_s`` about how long all
    of the run takes. ``is_followed``: another call of the run can begin as soon as this one has ended. ``run_calls``:
    about how many calls the run has."""

    age_s: float = 0.0
    remaining_s: float = 0.0
    run_s: float = 0.0
    is_followed: bool = False
    run_calls: int = 1


class CallContext(msgspec.Struct, frozen=True):
    """Who calls, and what decisions may know of the caller. Only ``tenant`` and its ``weight`` are trusted: they come
    from the key. ``weight`` is the tenant's share of an engine, beside those of others that want it. ``deadline_s``:
    within how many seconds from its arrival the answer is wanted. ``role``: None of a call that is of no run.
    ``prefixes``: where the prompt begins as others may, the shorter ones first."""

    tenant: TenantId
    end_user: str | None = None
    session: str | None = None
    program: str | None = None
    run: str | None = None
    stage: str | None = None
    urgency: Class = "standard"
    weight: float = 1.0
    objective: Objective | None = None
    deadline_s: float | None = None
    role: Role | None = None
    prefixes: tuple[Prefix, ...] = ()


class Call(msgspec.Struct, frozen=True):
    """One request, parsed and checked, with the body that goes to the engine.

    ``body`` is the client's JSON object less what was Forebay's own; drivers copy it before they edit it.
    ``wants_usage`` is whether a streaming client itself asked for the usage chunk. ``has_own_timeouts``: the caller
    chose deadlines, and a worker that misses them need not be ill. ``has_leg_spans``: ``traceparent`` is our own span
    of the request, and each leg is to be a child of it; else the engine is told what the client said.
    """

    id: RequestId
    endpoint: Endpoint
    model: ModelName
    context: CallContext
    body: dict[str, Any]
    stream: bool
    wants_usage: bool
    timeouts: Timeouts
    prompt_tokens_estimate: int
    max_tokens: int
    fallbacks: tuple[ModelName, ...] = ()
    traceparent: str | None = None
    has_own_timeouts: bool = False
    has_leg_spans: bool = False

    @property
    def tokens_estimate(self) -> int:
        """What the call may cost in all: the estimated prompt and the longest answer it allows."""
        return self.prompt_tokens_estimate + self.max_tokens
