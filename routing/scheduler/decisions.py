"""What was decided and why, in plain words: a bounded memory that is asked by request."""

from collections import deque
from typing import Literal

import msgspec

from core.ids import RequestId, TenantId, WorkerId

Kind = Literal["started", "preempted", "unread", "migrated", "drained", "resumed", "recovered"]

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
            case "unread":
                return (
                    f"took the slot of {who} on {self.worker} for {self.other} of tenant {self.other_tenant}: "
                    "the engine waited for the reader of the answer"
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
