"""Ending legs before their time, so that others get their slots or their requests go on elsewhere.

For a tenant that is behind (``fairness/preemption.py``), where an engine waits for a reader, off a worker that drains,
and to even out the load (``moving.py``). Each cut is remembered with its reason.
"""

from typing import Literal

from routing.fairness.account import MILLI
from routing.fairness.account import Request as Waiting
from routing.fairness.preemption import PER_DECISION, choose_victim
from routing.scheduler.decisions import Decision, Decisions
from routing.scheduler.effects import Abort, CutFor, Effect
from routing.scheduler.moving import best_move, leg_to_drain, roomiest
from routing.scheduler.paying import owe
from routing.scheduler.state import Leg, Model, WorkerState


def cut(model: Model, leg: Leg, why: CutFor) -> Abort:
    """End the leg. Its slot counts as taken until it has ended."""
    leg.cut_for = why
    if why == "cancelled":
        model.line.num_leaving += 1
    else:
        leg.worker.num_cutting += 1
    return Abort(leg=leg.id, why=why)


def take_slots(model: Model, decisions: Decisions, now: float) -> list[Effect]:
    """Somebody waits for a turn: take slots that are idle for want of a reader, or else from who is ahead."""
    if model.unread and (aborts := _take_unread(model, decisions, now)):
        return aborts
    return _preempt(model, decisions, now)


def drain(model: Model, decisions: Decisions, now: float) -> list[Effect]:
    """Move what can go on elsewhere off the workers that drain, as long as there is room for it."""
    aborts: list[Effect] = []
    while (leg := leg_to_drain(model)) is not None and (target := roomiest(model, beside=leg.worker)) is not None:
        model.num_drained += 1
        aborts.append(_send(model, leg, target, why="drained", decisions=decisions, now=now))
    return aborts


def migrate(model: Model, decisions: Decisions, now: float) -> list[Effect]:
    """Nobody waits and there is room: even out the load, a leg at a time, if that gains more than it costs."""
    line = model.line
    if now < line.may_move_at or not line.waste.has_budget(line.fairness):
        return []
    line.may_move_at = now + line.fairness.interval
    move = best_move(model, line.fairness.quantum)
    if move is None:
        return []
    leg, target, gain, cost = move
    model.num_migrated += 1
    owe(line, leg.request, cost)
    return [_send(model, leg, target, why="migrated", decisions=decisions, now=now, gain=gain, cost=cost)]


def _preempt(model: Model, decisions: Decisions, now: float) -> list[Effect]:
    """Take slots for tenants that are behind from those that are ahead, if that is worth it."""
    line = model.line
    fairness = line.fairness
    if (
        fairness.policy != "vtc-pc"
        or now < line.may_preempt_at
        or line.num_leaving  # a slot comes free without it
        or not line.waste.has_budget(fairness)
        or not model.cuttable
    ):
        return []
    aborts: list[Effect] = []
    while len(aborts) < PER_DECISION and line.waste.has_budget(fairness):
        claimant = line.first_in_turn(now)
        if claimant is None:
            break
        line.may_preempt_at = now + fairness.interval
        found = choose_victim(claimant.account, model.cuttable, fairness)
        if found is None:
            break
        leg, cost = found
        request = leg.request
        request.num_cuts += 1
        decisions.add(
            Decision(
                at=now,
                kind="preempted",
                request=request.id,
                tenant=request.account.tenant,
                worker=leg.worker.view.id,
                other=claimant.id,
                other_tenant=claimant.account.tenant,
                behind=(request.account.counter - claimant.account.counter) // MILLI,
                threshold=fairness.threshold,
                cost=int(cost * fairness.prompt_price),
            )
        )
        owe(line, request, cost)
        aborts.append(_take(model, leg, claimant))
    return aborts


def _take_unread(model: Model, decisions: Decisions, now: float) -> list[Effect]:
    """Take slots whose engines wait for a reader. They are idle, so neither credit nor budget matters; what is computed
    again later is paid by the tenant whose reader it was. Costs a look at each such leg."""
    aborts: list[Effect] = []
    for leg in model.unread.values():
        claimant = model.line.first_in_turn(now)
        if claimant is None:
            break
        if not leg.is_movable or not leg.has_slot_of_use:
            continue
        leg.request.pays_again = True
        decisions.add(
            Decision(
                at=now,
                kind="unread",
                request=leg.request.id,
                tenant=leg.request.account.tenant,
                worker=leg.worker.view.id,
                other=claimant.id,
                other_tenant=claimant.account.tenant,
            )
        )
        aborts.append(_take(model, leg, claimant))
    return aborts


def _take(model: Model, leg: Leg, claimant: Waiting) -> Abort:
    """Cut the leg and promise its slot."""
    model.line.num_preempted += 1
    model.line.claim(claimant)
    return cut(model, leg, "preempted")


def _send(
    model: Model,
    leg: Leg,
    target: WorkerState,
    *,
    why: Literal["migrated", "drained"],
    decisions: Decisions,
    now: float,
    gain: float = 0.0,
    cost: int = 0,
) -> Abort:
    """Cut the leg so that its request goes on elsewhere, and keep a slot for it there."""
    decisions.add(
        Decision(
            at=now,
            kind=why,
            request=leg.request.id,
            tenant=leg.request.account.tenant,
            worker=leg.worker.view.id,
            target=target.view.id,
            seconds=gain,
            cost=cost,
        )
    )
    model.keep_slot(leg.request, target)
    return cut(model, leg, why)
