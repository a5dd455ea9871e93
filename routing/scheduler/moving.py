"""Which running leg goes on elsewhere, and where: to empty a worker that is draining, or to even out the load.

After Llumnix (arXiv 2406.03243, §4.4): from the fullest worker to the emptiest, if both are better balanced after than
before. Where we differ: no cache is copied, so a move costs a prefill, and it is made only for a gain in finish time
that is larger. How long an answer goes on is not known; it is taken to last as long again as it has lasted, which is
right for lengths without a scale.
"""

from routing.scheduler.state import Leg, Model, WorkerState

PER_TARGET = 2
"""Legs on their way to one worker."""
MARGIN_S = 0.25
"""What a move has to gain beside its cost."""


def roomiest(model: Model, *, beside: WorkerState) -> WorkerState | None:
    """Return the worker that a leg of ``beside`` would best go on; None if none has room."""
    able = [
        worker
        for worker in model.with_room.values()
        if worker is not beside
        and worker.breaker.open_until is None
        and worker.view.is_healthy
        and worker.num_held < PER_TARGET
    ]
    return min(
        able,
        key=lambda worker: (worker.num_running + worker.num_held, worker.outstanding, worker.view.id),
        default=None,
    )


def leg_to_drain(model: Model) -> Leg | None:
    """Return a leg of a draining worker that can go on elsewhere; None if there is none. The cheapest to move first."""
    legs = (
        leg
        for worker in model.draining.values()
        for leg in worker.legs.values()
        if leg.is_movable and not leg.request.is_pinned and not leg.request.is_cancelled
    )
    return min(legs, key=lambda leg: (leg.request.context, leg.request.number), default=None)


def best_move(model: Model, quantum: int) -> tuple[Leg, WorkerState, float, int] | None:
    """Return a leg, the worker it should move to, the seconds that gains and the tokens it costs; None if none gains.

    Costs O(workers) and a walk over the legs of one.
    """
    source = max(model.workers, key=lambda worker: worker.num_running, default=None)
    if source is None or source.num_running < 2:
        return None
    target = roomiest(model, beside=source)
    if target is None or source.num_running - target.num_running - target.num_held < 2:
        return None
    if any(not leg.has_begun for leg in target.legs.values()):
        return None  # it has prompts to do, who knows for how long
    slow = source.pace.step(source.num_running)
    load = target.num_running + target.num_held + 1
    fast = target.pace.step(load)
    if fast is None:  # not seen enough of it: taken to be like the other
        fast = source.pace.step(load)
    if slow is None or fast is None or fast >= slow:
        return None
    best: tuple[Leg, WorkerState, float, int] | None = None
    for leg in source.legs.values():
        if leg.request.is_pinned or leg.request.is_cancelled or not leg.is_eligible(quantum):
            continue
        cost = target.resume_cost.tokens(leg.request.context, is_home=False)
        pause = target.pace.prefill(cost)
        pause = source.pace.prefill(cost) if pause is None else pause
        if pause is None:
            continue
        gain = min(leg.request.delivered, leg.request.remaining) * (slow - fast) - pause
        if gain > MARGIN_S and (best is None or gain > best[2]):
            best = (leg, target, gain, cost)
    return best
