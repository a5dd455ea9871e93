"""A slot is kept for a moment for the call that follows.

When a call of a run has ended, the one that waits for its answer comes some milliseconds later: by then its slot would
be somebody else's, and the run would queue at each of its steps, however old it is. So the slot is kept that long, if
who would have it is a run of the same tenant and class that is to end later: for all others nothing changes.
"""

from typing import NamedTuple

from core.ids import ModelName, TenantId
from routing.fairness.programs import run_ends_at
from routing.scheduler.state import Model, Request, WorkerState

KEPT_S = 0.02
"""What a gateway needs from an answer's end to the next request, with room to spare."""

Program = tuple[TenantId, str]


class Kept(NamedTuple):
    """A slot that is kept, for which model, and how long. ``ends_at``: when the run would end if it were alone."""

    worker: WorkerState
    model: ModelName
    until: float
    ends_at: float


def program_of(request: Request) -> Program:
    """Return by what a kept slot is found again."""
    return request.account.tenant, request.program


def is_worth_keeping(model: Model, request: Request, now: float) -> bool:
    """Return whether the slot of a request that has ended is to be kept for the next one of its run."""
    role = request.role
    if role is None or not role.is_followed or request.account.programs.is_flat:
        return False
    if not model.line.fairness.run_order or model.line.num_had_turn:
        return False
    head = model.line.first_in_turn(now)
    if head is None or head.role is None or (head.account, head.rank) != (request.account, request.rank):
        return False
    return run_ends_at(head, head.role) > run_ends_at(request, role)
