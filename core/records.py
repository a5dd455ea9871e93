"""What is kept of a finished request: a record for people, and lines for the ledger. Never its content."""

from typing import Literal

import msgspec

from core.chat import Class, Usage
from core.ids import TenantId

CLIENT_LEFT = 499


CUTS = frozenset({"preempted", "migrated", "drained"})
"""Causes of legs that were cut by our own choice, to go on later."""


class LegRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """One run of a request on one worker. ``at_s``: when it began, counted from the request's arrival. ``recomputed``:
    tokens of prompt and answer that it computed again to go on where an earlier leg was cut; None: it began anew."""

    worker: str
    model: str
    at_s: float
    duration_s: float
    cause: str
    recomputed: int | None = None

    @property
    def is_resumed(self) -> bool:
        """Whether it went on where an earlier leg was cut."""
        return self.recomputed is not None


class RequestRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """One request. ``status`` 499: the client left. ``cost`` in picodollars; ``key`` is the key's id.

    ``model`` is the one that answered, or that was asked for where none did; None where it is not one of ours.
    """

    time: float
    id: str
    endpoint: str
    status: int
    duration_s: float
    tenant: TenantId | None = None
    key: str | None = None
    model: str | None = None
    urgency: Class = "standard"
    asked_model: str | None = None
    worker: str | None = None
    stream: bool = False
    attempts: int = 0
    queue_s: float = 0.0
    first_byte_s: float | None = None
    overhead_s: float | None = None
    usage: Usage | None = None
    cost: int = 0
    error: str | None = None
    end_user: str | None = None
    session: str | None = None
    program: str | None = None
    run: str | None = None
    stage: str | None = None
    client_retry: str | None = None
    traceparent: str | None = None
    legs: tuple[LegRecord, ...] = ()


class LedgerLine(msgspec.Struct, frozen=True):
    """What one end user (or none: ``""``) of one key used of one model on one day (UTC, days since the epoch)."""

    day: int
    tenant: TenantId
    key: str
    end_user: str
    model: str
    requests: int = 0
    errors: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    cost: int = 0


class Batch(msgspec.Struct, frozen=True):
    """What is booked in one transaction. ``id`` is unique: a batch that is booked twice counts once."""

    id: str
    lines: tuple[LedgerLine, ...]
    records: tuple[RequestRecord, ...]


class Sum(msgspec.Struct, frozen=True):
    """What one end user (or none) of one key used over some days."""

    tenant: TenantId
    key: str
    end_user: str
    tokens: int
    cost: int


class AuditEntry(msgspec.Struct, frozen=True):
    """One act of an operator. ``outcome``: the HTTP status it had. ``detail`` holds no secret."""

    time: float
    id: str
    actor: str
    role: str
    action: str
    target: str
    outcome: int
    detail: dict[str, object] = {}


class Revision(msgspec.Struct, frozen=True):
    """One state of a resource that is changed by revisions: ``config``, or a kind of policy.

    ``overlay`` holds what differs from the file, by dotted path. ``number`` counts from 1 within the resource.
    """

    resource: str
    number: int
    overlay: dict[str, object]
    author: str
    created_at: float
    note: str = ""
    state: Literal["applied", "canary", "replaced", "rolled_back"] = "applied"
    expires_at: float | None = None
