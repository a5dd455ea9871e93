"""What is kept of files that tenants upload, and of the batches of requests that such files hold."""

from typing import Literal

import msgspec

from core.ids import TenantId

Purpose = Literal["batch", "batch_output"]
"""What a file is for: rows of a batch, or what has come of them."""

BatchState = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]
OPEN: tuple[BatchState, ...] = ("validating", "in_progress", "finalizing", "cancelling")
"""Those in which something is still to be done."""


class FileRecord(msgspec.Struct, frozen=True):
    """One file. ``size``: its bytes; ``end_user``: the tenant's own customer whose it is."""

    id: str
    tenant: TenantId
    name: str
    purpose: Purpose
    size: int
    created_at: float
    end_user: str | None = None


class RowError(msgspec.Struct, frozen=True):
    """Why a batch was not begun. ``line``: of the input file, from 1 on; ``param``: the field of the row."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class BatchRow(msgspec.Struct, frozen=True, array_like=True):
    """A row of a batch, as its results need it: the tenant's own name for it, and the model that it asks."""

    custom_id: str
    model: str


class BatchRecord(msgspec.Struct, frozen=True):
    """One batch. ``key`` is the id of the API key that it runs under, ``run`` the run of a workflow that its rows are.

    ``total`` is 0 until the rows are read. ``ended_at`` is when it came to its last state. ``owner`` is the gateway
    that sees to it, as long as ``leased_until``; where the run is alive, that is the one which has the run.
    ``idempotency`` is the caller's own key of the submission, unique within the tenant.
    """

    id: str
    tenant: TenantId
    key: str
    input_file: str
    endpoint: str
    created_at: float
    expires_at: float
    end_user: str | None = None
    metadata: dict[str, str] = {}
    state: BatchState = "validating"
    errors: tuple[RowError, ...] = ()
    total: int = 0
    completed: int = 0
    failed: int = 0
    run: str | None = None
    output_file: str | None = None
    error_file: str | None = None
    in_progress_at: float | None = None
    finalizing_at: float | None = None
    cancelling_at: float | None = None
    ended_at: float | None = None
    owner: str = ""
    leased_until: float = 0.0
    idempotency: str | None = None
