"""Which worker a request starts on: the one that keeps a slot for it, the one that may hold its cache, else the score
of ``routing/placement.py``."""

from routing.placement import Candidate, choose
from routing.scheduler.books import Books
from routing.scheduler.state import Model, Request, WorkerState


def worker_for(books: Books, model: Model, request: Request, now: float) -> WorkerState | None:
    """Return the worker, None if none that may be used has room. The slot that was kept for the request is free."""
    target = request.target
    books.drop_target(request)
    able = [worker for worker in model.with_room.values() if worker.breaker.allows(now)]
    if not able:
        return None
    if target is not None and target in able:
        return target
    home = books.workers.get(request.home[0]) if request.home is not None else None
    if home is not None and home in able and home.view.id not in request.tried and home.view.is_healthy:
        return home
    if len(able) == 1:
        return able[0]
    chosen = choose(
        Candidate(
            worker=worker.view.id,
            outstanding_tokens=worker.outstanding,
            is_healthy=worker.view.is_healthy,
            was_tried=worker.view.id in request.tried,
        )
        for worker in able
    )
    assert chosen is not None
    return books.workers[chosen]
