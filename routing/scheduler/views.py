"""One model's live values, as operators see them."""

import msgspec

from core.ids import ModelName, TenantId
from routing.fairness.account import MILLI
from routing.fairness.credit import allowance
from routing.fairness.policy import Policy
from routing.scheduler.state import Model


class TenantView(msgspec.Struct, frozen=True):
    """``counter``: weighted tokens by weight, what tenants are compared by. ``credit``: with how many of them less than
    the others it may come back, were it to come now. ``attained``: weighted tokens served in all."""

    tenant: TenantId
    counter: float
    weight: float
    queued: int
    running: int
    attained: float
    credit: float


class FairnessView(msgspec.Struct, frozen=True):
    """One model's live values. ``waste_left``: tokens that may be computed again by our choice; ``lost``: were, after
    failures; ``reserved``: slots that are being freed for a request, or kept for one on its way; ``recovered``: legs
    that went on after a failure. ``holder``: which of several gateways decides, and ``age``: how many seconds ago it
    was so there."""

    model: ModelName
    policy: Policy
    virtual: float
    tenants: tuple[TenantView, ...]
    queued: int
    waste_left: float
    useful_tokens: int
    wasted_tokens: int
    lost_tokens: int
    reserved: int
    preemptions: int
    migrations: int
    drained: int
    recovered: int
    holder: str = ""
    age: float = 0.0


def fairness_view(model: Model) -> FairnessView:
    """Return the model's live values. Costs O(tenants): it is for people."""
    line = model.line
    fairness, virtual = line.fairness, line.turns.virtual_now()
    return FairnessView(
        model=model.name,
        policy=fairness.policy,
        virtual=virtual / MILLI,
        tenants=tuple(
            TenantView(
                tenant=account.tenant,
                counter=account.counter / MILLI,
                weight=account.weight / MILLI,
                queued=account.num_waiting,
                running=account.num_running,
                attained=account.attained / MILLI,
                credit=allowance(account, virtual, fairness) * account.weight / MILLI**2
                if fairness.policy == "vtc-pc"
                else 0.0,
            )
            for account in line.accounts.values()
        ),
        queued=len(line),
        waste_left=line.waste.left,
        useful_tokens=line.waste.useful,
        wasted_tokens=line.waste.wasted,
        lost_tokens=line.waste.lost,
        reserved=line.num_claiming + sum(worker.num_held for worker in model.workers),
        preemptions=line.num_preempted,
        migrations=model.num_migrated,
        drained=model.num_drained,
        recovered=model.num_recovered,
    )
