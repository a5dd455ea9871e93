"""A run's call waits for the worker whose cache holds its prompt, if it is done sooner there than elsewhere at once.

``placing.py`` weighs what caches hold of a prompt among the workers that have room. Where the one that holds most of it
is full, the call would have all of it computed on another, for a slot that may come free in less time than that takes;
and while it waits, others have that other worker. It waits no longer than it could have gained in all: legs may run
longer than is usual. (Parrot's ``FindEngine``, section 5.4, looks at engines as they are.)
"""

from routing.scheduler.state import Leg, Model, Request, WorkerState, usual_answer

_WORTH = 256  # tokens: less is computed sooner than thought about


def waits_until(model: Model, request: Request, chosen: WorkerState, now: float) -> float | None:
    """Return until when the request, which has never run, had better wait for another worker than start on the chosen
    one; None if it had not. Costs O(workers), and O(legs) of those that hold much more of its prompt."""
    if not request.prefixes or not model.line.fairness.affinity:
        return None
    saved = chosen.warmth.saved(request.prefixes)
    if request.context - saved < _WORTH or (here_s := chosen.pace.prefill(request.context - saved)) is None:
        return None
    until = (now if request.patient_since is None else request.patient_since) + here_s
    if until <= now:
        return None
    for other in model.workers:
        there = other.warmth.saved(request.prefixes) if other is not chosen and other.is_usable else 0
        if there - saved < _WORTH or not other.breaker.allows(now) or not other.view.is_healthy:
            continue
        wait_s = min((_remaining_s(leg, now) for leg in other.legs.values()), default=0.0)
        if wait_s + (other.pace.prefill(request.context - there) or 0.0) < here_s:
            return until
    return None


def _remaining_s(leg: Leg, now: float) -> float:
    """About how long the leg runs on, if its answer is of the usual length."""
    pace = leg.worker.pace
    step_s = pace.step(leg.worker.num_running)
    if step_s is None:
        return float("inf")
    answer_s = step_s * usual_answer(leg.request)
    if leg.has_begun:
        return answer_s
    prompt_s = pace.prefill(leg.context - leg.saved) or 0.0
    return max(0.0, prompt_s - (now - leg.started_at)) + answer_s
