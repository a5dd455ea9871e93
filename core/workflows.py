"""What is kept of a run of a workflow: what was asked for, and what happened, in its order."""

from typing import Literal

import msgspec

from core.ids import TenantId

RunState = Literal["running", "done", "failed", "skipped", "cancelled"]


class RunRecord(msgspec.Struct, frozen=True):
    """One run. ``key`` is the id of the API key that it runs under. ``graph`` is what was submitted, as JSON.

    ``idempotency`` is the caller's own key of the submission, unique within the tenant; ``digest`` that of its body.
    ``owner`` is the gateway that runs it, as long as ``leased_until``.
    """

    id: str
    tenant: TenantId
    key: str
    graph: bytes
    created_at: float
    updated_at: float
    state: RunState = "running"
    end_user: str | None = None
    app: str | None = None
    idempotency: str | None = None
    digest: str = ""
    owner: str = ""
    leased_until: float = 0.0


class RunEvent(msgspec.Struct, frozen=True):
    """Something that happened to a run, as JSON. ``number`` counts from 1 within the run, without gaps."""

    run: str
    number: int
    body: bytes


class RunLetter(msgspec.Struct, frozen=True):
    """What a gateway asks of another one that has a run, as JSON. A later letter has a higher ``number``."""

    number: int
    run: str
    body: bytes


class RunAnswer(msgspec.Struct, frozen=True):
    """What came of the letter of this number, as JSON."""

    number: int
    body: bytes
