"""Runs end one after another where engines gain little by running them beside each other.

The order of runs (``fairness/programs.py``) says who starts first; but with many slots later ones start as well, and
each of their legs slows those of earlier ones. Whether that pays hangs on the engine. Of what a leg takes, t0 is shared
by all that run beside it (the fixed part of its steps: weights are read once), and t1 is added by each (its prompt, and
its own part of its steps): c legs together take t0 + c·t1. Of N equal ones, c at a time, the k-th ends after ⌈k/c⌉ such
rounds, in the mean after about (t0 + c·t1)(N/c + 1)/2, which is least at c = √(N·t0/t1).

So a call of a run is not put beside legs of a run of the same tenant that is to end before, where that were more than c
legs in all; nobody else is held up by it. On a CPU, where t0 is next to nothing, runs have the engine one by one; a GPU
with many calls before it is filled. (In Parrot's paper, section 5.2, a batch's size follows from its
calls' objectives alone.)
"""

from core.chat import Role
from routing.fairness.account import Place
from routing.fairness.programs import run_ends_at
from routing.scheduler.books import Books
from routing.scheduler.state import Model, Request, WorkerState, usual_answer


def may_stand_back(model: Model, request: Request) -> bool:
    """Return whether the call, whose turn it is, may let others go first: one of a run that has never run, and is not
    given a slot out of turn."""
    programs = request.account.programs
    if request.role is None or request.num_legs or not model.line.fairness.run_order or programs.is_flat:
        return False
    return request.place is Place.NOWHERE or programs.first() is request


def is_in_the_way(books: Books, model: Model, request: Request, worker: WorkerState) -> bool:
    """Return whether the call is not to be put on the worker now, for the sake of an earlier run's. Costs O(1) where
    there are few legs, else O(legs)."""
    role = request.role
    if role is None or not model.line.fairness.focus:
        return False
    return not _pays(model, request, role, worker) and _is_behind(books, request, role, worker)


def _pays(model: Model, request: Request, role: Role, worker: WorkerState) -> bool:
    """Whether one leg more makes the mean of all times shorter, or nothing is known of that. N is what all the tenant's
    runs have to do, calls that are not ready included, if they are all like this one."""
    num_workers = sum(one.is_usable for one in model.workers)
    num = request.account.programs.num_runs * role.run_calls / max(1, num_workers)
    fresh = max(0, request.context - worker.warmth.saved(request.prefixes))
    for known in (worker, *model.workers):  # of whom too little was seen, it is taken to be like another
        best = known.cost.best_legs(num, prompt=fresh, answer=usual_answer(request))
        if best is not None:
            return worker.num_running + 1 <= best
    return True


def _is_behind(books: Books, request: Request, role: Role, worker: WorkerState) -> bool:
    """Whether a run of the same tenant that is to end before runs on the worker, or is about to go on there."""
    ends_at = run_ends_at(request, role)
    for leg in worker.legs.values():
        other = leg.request
        if (
            other.account is request.account
            and other.role is not None
            and other.program != request.program
            and run_ends_at(other, other.role) < ends_at
        ):
            return True
    return books.is_kept_for_earlier(worker, request.account.tenant, ends_at)
