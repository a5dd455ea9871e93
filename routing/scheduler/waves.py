"""Leader first: of many requests whose prompts begin alike, one computes that beginning, and the others follow.

An engine whose slots share one prefix cache computes a beginning as often as it is sent before the first has ended: of
sixteen calls of a map with the same long instruction, sixteen times. So while one is at it, those that would be put
beside it wait for its first token, and then find the beginning in the cache. Who waits has had its turn, and a slot is
kept for it: so no more wait than could run, and nobody else waits longer for them.
(Neither Parrot's paper nor its code waits: its engine shares what is still being filled.)
"""

from routing.fairness.account import Place
from routing.fairness.line import Line
from routing.scheduler.state import Leg, Model, Request, WorkerState

_WORTH = 512  # tokens: less is computed sooner than waited for


def lead(leg: Leg) -> None:
    """The leg starts: it is the leader for what its worker's cache does not hold yet. Before ``Warmth.note``."""
    worker, prefixes = leg.worker, leg.request.prefixes
    if worker.view.kv_tokens is None:  # its slots share nothing
        return
    long = (prefix for prefix in prefixes if prefix.tokens >= _WORTH)
    leg.leads = tuple(prefix.digest for prefix in long if not worker.warmth.holds(prefixes, prefix))
    for digest in leg.leads:
        worker.leaders[digest] = leg


def has_led(leg: Leg, line: Line, now: float) -> bool:
    """The leg's prompt is done, or will never be: those that follow it may go on. Return whether there are any."""
    for digest in leg.leads:
        if leg.worker.leaders.get(digest) is leg:
            del leg.worker.leaders[digest]
    if not leg.has_begun:
        leg.worker.warmth.lose(leg.request.prefixes, leg.leads)
    leg.leads = ()
    followers, leg.followers = leg.followers, []
    model = leg.request.model  # who has given up waiting for it may follow another in another line
    waiting = [request for request in followers if request.place is Place.FOLLOWING and request.model == model]
    for request in waiting:
        line.remove(request)
        line.push_returned(request, now)
    return bool(waiting)


def must_follow(model: Model, request: Request, worker: WorkerState) -> bool:
    """Return whether the request has to wait for one that is ahead of it on the worker; if it is in line, it does so
    from now on, with its turn taken and a slot kept."""
    if not worker.leaders or request.num_legs or request.place is Place.CLAIMING or not model.line.fairness.waves:
        return False
    leaders = (worker.leaders.get(prefix.digest) for prefix in reversed(request.prefixes))
    leader = next((leg for leg in leaders if leg is not None), None)
    if leader is None:
        return False
    if request.place is not Place.NOWHERE:
        model.line.follow(request)
        model.keep_slot(request, worker)
        leader.followers.append(request)
    return True
