"""Taking over a request that another scheduler had in its books: it is entered as it stands, and nothing is charged."""

from routing.scheduler.books import Books
from routing.scheduler.events import Adopt, WorkerView
from routing.scheduler.state import Leg, Request


def adopt(books: Books, event: Adopt, number: int) -> Request:
    """Enter the request, and its leg if it has one; what was known of it is forgotten first. ``number``: as for any
    that arrives now. One without a leg still has to be queued. The tenant is lifted only if it is not known or the
    request has just come: whoever waits already was lifted then."""
    submit, now = event.submit, event.now
    if (known := books.requests.get(submit.request)) is not None:
        if known.leg is not None:
            books.release(known.leg, now)
        books.forget(known, now)
    model = books.model(submit.models[0])
    has_just_come = submit.tenant not in model.line.accounts or (event.leg is None and not event.waited)
    request = Request(submit, model.line.account(submit.tenant, submit.weight), number)
    request.arrived_at = now - event.waited
    request.deadline = request.arrived_at + submit.queue_timeout
    request.waits_since = request.arrived_at
    request.num_legs = event.num_legs
    request.num_attempts = event.num_attempts
    request.is_committed = event.is_committed
    request.delivered = event.num_tokens
    request.charged = submit.prompt_tokens if event.num_legs else None
    books.requests[request.id] = request
    if has_just_come:
        model.line.arrive(request)
    else:
        model.line.rejoin(request)
    if event.leg is not None and event.worker is not None:
        if event.worker not in books.workers:  # it is heard of later; until then it only holds the leg
            unknown = WorkerView(
                event.worker, model.name, is_ready=False, is_healthy=False, may_return=True, max_inflight=0
            )
            books.note_worker(unknown)
        books.hold(Leg(event.leg, request, books.workers[event.worker], now))
    return request
