"""What the scheduler wants done. All are frozen values that can be sent and logged."""

from typing import Literal

import msgspec

from core.ids import LegId, ModelName, RequestId, WorkerId

CutFor = Literal["cancelled", "preempted", "migrated", "drained"]
"""Why a leg is ended before its time."""

Why = Literal["queue_full", "queue_timeout", "no_healthy_worker", "failed"]


class Start(msgspec.Struct, frozen=True, tag="start"):
    """Run a leg of the request on the worker."""

    leg: LegId
    request: RequestId
    worker: WorkerId
    model: ModelName
    attempt: int


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """End the leg at once; its ``LegEnded`` follows when the engine has let go.

    Unless it was ``cancelled``, the request goes on later, by a ``Start`` on this or another worker.
    """

    leg: LegId
    why: CutFor


class Reject(msgspec.Struct, frozen=True, tag="reject"):
    """The request gets no answer. ``failed``: its last leg's own error says why."""

    request: RequestId
    why: Why
    retry_after: float | None = None


Effect = Start | Abort | Reject
