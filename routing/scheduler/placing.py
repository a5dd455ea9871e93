"""Which worker a request starts on: the one that keeps a slot for it, the one that may hold its cache, else the score
of ``routing/placement.py``."""

from collections.abc import Sequence

import msgspec

from routing.placement import Candidate, choose
from routing.scheduler.books import Books
from routing.scheduler.focus import is_in_the_way, may_stand_back
from routing.scheduler.pace import Pace
from routing.scheduler.patience import waits_until
from routing.scheduler.state import Model, Request, WorkerState, usual_answer


def able_workers(model: Model, now: float) -> list[WorkerState]:
    """Return the workers that have room and may be used."""
    return [worker for worker in model.with_room.values() if worker.breaker.allows(now)]


def worker_for(books: Books, model: Model, request: Request, now: float) -> WorkerState | None:
    """Return the worker, None if none that may be used has room, or where others had better have it. The slot that was
    kept for the request is free."""
    target = request.target
    books.drop_target(request)
    able = able_workers(model, now)
    if target is not None and target in able:
        return target
    home = books.workers.get(request.home[0]) if request.home is not None else None
    if home is not None and home in able and home.view.id not in request.tried and home.view.is_healthy:
        return home
    if not may_stand_back(model, request):
        return _best(books, model, request, able)
    chosen = _best(books, model, request, [one for one in able if not is_in_the_way(books, model, request, one)])
    if chosen is None or (until := waits_until(model, request, chosen, now)) is None:
        return chosen
    if request.patient_since is None:
        request.patient_since = now
        books.wake(until, model.name)
    return None


def _best(books: Books, model: Model, request: Request, able: Sequence[WorkerState]) -> WorkerState | None:
    if len(able) < 2:
        return able[0] if able else None
    if request.prefixes and model.line.fairness.affinity:
        # Of whom too little was seen, it is taken to be like another.
        known = next((worker.pace for worker in able if worker.pace.can_tell), None)
        candidates = [_with_cache(worker, request, worker.pace if worker.pace.can_tell else known) for worker in able]
    else:
        candidates = [_by_load(worker, request) for worker in able]
    chosen = choose(candidates)
    assert chosen is not None
    return books.workers[chosen]


def _by_load(worker: WorkerState, request: Request) -> Candidate:
    return Candidate(
        worker=worker.view.id,
        outstanding_tokens=worker.outstanding,
        is_healthy=worker.view.is_healthy,
        was_tried=worker.view.id in request.tried,
        legs_lost=max(0, worker.most_legs - worker.capped(worker.num_urgent + 1)) if request.is_urgent else 0,
    )


def _with_cache(worker: WorkerState, request: Request, pace: Pace | None) -> Candidate:
    fresh = max(0, request.context - worker.warmth.saved(request.prefixes))
    seconds = None
    if pace is not None:
        prefill_s, step_s = pace.prefill(fresh), pace.step(worker.num_running + 1)
        if prefill_s is not None and step_s is not None:
            seconds = prefill_s + step_s * usual_answer(request)
    return msgspec.structs.replace(_by_load(worker, request), fresh_tokens=fresh, seconds=seconds)
