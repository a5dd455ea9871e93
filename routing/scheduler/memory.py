"""What a scheduler has learned of a model, for another one that goes on in its place.

Requests and legs are told by those whose they are (``Adopt``); this is the rest: what tenants have had, what of the
budget for waste is left, which workers have failed too often. It is bounded: of many tenants those are told that would
be most wrong if they were forgotten. Whoever is not told begins as a tenant that nobody knows, at full credit behind
virtual time; that is wrong, in weighted tokens, by no more than any of those that are told would have been.
"""

import heapq

import msgspec

from core.ids import WorkerId
from routing.fairness.account import MILLI
from routing.scheduler.books import Books
from routing.scheduler.state import Model
from routing.scheduler.views import FairnessView, TenantView, fairness_view


class Memory(msgspec.Struct, frozen=True):
    """One model's live values, with few of its tenants; ``tripped``: workers that are given no work, or a trial."""

    view: FairnessView
    tripped: tuple[WorkerId, ...] = ()


def remember(model: Model, most_tenants: int) -> Memory:
    """Return what is known of the model. Costs O(tenants)."""
    view = fairness_view(model)

    def ahead(tenant: TenantView) -> float:
        return max((tenant.counter - view.virtual) * tenant.weight, -tenant.credit)

    if len(view.tenants) > most_tenants:
        view = msgspec.structs.replace(view, tenants=tuple(heapq.nlargest(most_tenants, view.tenants, key=ahead)))
    tripped = tuple(worker.view.id for worker in model.workers if worker.breaker.open_until is not None)
    return Memory(view, tripped)


def recall(books: Books, memory: Memory, now: float) -> None:
    """Go on from there; workers have to be known, and nothing else may be. Cool-downs begin anew with the shortest."""
    view = memory.view
    model = books.model(view.model)
    line = model.line
    virtual = line.turns.virtual = round(view.virtual * MILLI)
    line.waste.recall(view.waste_left, line.fairness)
    for tenant in view.tenants:
        account = line.account(tenant.tenant, tenant.weight)
        # As if it came now: what it did not use up to here has become credit.
        behind = round(tenant.credit * MILLI * MILLI / account.weight) if view.policy == "vtc-pc" else virtual
        account.counter = max(round(tenant.counter * MILLI), virtual - behind)
        account.virtual = virtual
        account.attained = round(tenant.attained * MILLI)
    for worker in model.workers:
        if worker.view.id in memory.tripped:
            books.wake(worker.breaker.trip(now), model.name)
