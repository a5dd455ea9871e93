"""What was decided and why, in plain words: a bounded memory that is asked by request."""

from collections import deque
from typing import Literal

import msgspec

from core.ids import ModelName, RequestId, TenantId, WorkerId
from routing.fairness.policy import Policy

Kind = Literal["started", "preempted", "migrated", "drained", "resumed", "recovered"]

REMEMBERED = 4096


class Decision(msgspec.Struct, frozen=True):
    """One decision. ``other``: whom a slot was taken for, and its tenant. ``behind``: by how many weighted tokens that
    tenant is behind. ``cost``: tokens that will be, or were, computed again. ``seconds``: waited, or gained."""

    at: float
    kind: Kind
    request: RequestId
    tenant: TenantId
    worker: WorkerId
    other: RequestId | None = None
    other_tenant: TenantId | None = None
    behind: int = 0
    threshold: int = 0
    cost: int = 0
    seconds: float = 0.0
    target: WorkerId | None = None

    @property
    def text(self) -> str:
        """The decision as a sentence."""
        who = f"{self.request} of tenant {self.tenant}"
        match self.kind:
            case "started":
                return f"started {who} on {self.worker} after {self.seconds:.2f} s: it was its turn"
            case "preempted":
                return (
                    f"preempted {who} on {self.worker} for {self.other} of tenant {self.other_tenant}: "
                    f"{self.other_tenant} is {self.behind:,} weighted tokens behind, "
                    f"threshold {self.threshold:,} + resume cost {self.cost:,}"
                )
            case "migrated":
                return (
                    f"migrated {who} from {self.worker} to {self.target}: it gains {self.seconds:.2f} s there, "
                    f"less the time for {self.cost:,} tokens that are computed again"
                )
            case "drained":
                return f"moved {who} from {self.worker} to {self.target}: {self.worker} is draining"
            case "resumed":
                return f"resumed {who} on {self.worker} after {self.seconds:.2f} s"
            case "recovered":
                return f"resumed {who} on {self.worker} after its worker had failed"


class Decisions:
    """The last decisions, oldest first. Looking one up costs a walk over all of them: it is for people."""

    def __init__(self) -> None:
        self._ring: deque[Decision] = deque(maxlen=REMEMBERED)

    def add(self, decision: Decision) -> None:
        """Remember a decision; the oldest is forgotten for it."""
        self._ring.append(decision)

    def of(self, request: RequestId) -> tuple[Decision, ...]:
        """Return what was decided about the request, or for it, in order."""
        return tuple(one for one in self._ring if request in (one.request, one.other))


class TenantView(msgspec.Struct, frozen=True):
    """``counter``: weighted tokens by weight, what tenants are compared by. ``credit``: with how many of them less than
    the others it may come back, were it to come now. ``attained``: weighted tokens served in all."""

    tenant: TenantId
    counter: float
    weight: float
    queued: int
    running: int
    attained: float
    credit: float


class FairnessView(msgspec.Struct, frozen=True):
    """One model's live values. ``waste_left``: tokens that may be computed again by our choice; ``lost``: were, after
    failures; ``reserved``: slots that are being freed for a request, or kept for one on its way; ``recovered``: legs
    that went on after a failure."""

    model: ModelName
    policy: Policy
    virtual: float
    tenants: tuple[TenantView, ...]
    queued: int
    waste_left: float
    useful_tokens: int
    wasted_tokens: int
    lost_tokens: int
    reserved: int
    preemptions: int
    migrations: int
    drained: int
    recovered: int
