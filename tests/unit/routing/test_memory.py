"""What one scheduler has learned is known to the next: within a bound, however little of it is told."""

from hypothesis import given
from hypothesis import strategies as st

from core.ids import LegId, ModelName, RequestId, TenantId, WorkerId
from routing.fairness.policy import Fairness
from routing.scheduler import (
    FairnessView,
    LegEnded,
    Limits,
    Scheduler,
    Start,
    Submit,
    Tokens,
    Worker,
    WorkerView,
)

MODEL = ModelName("m")
FAIRNESS = Fairness(credit=500, threshold=200)
WORKER = WorkerView(WorkerId("w"), MODEL, is_ready=True, is_healthy=True, may_return=True, max_inflight=2)

Step = tuple[
    str, int, float
]  # a tenant asks, with a prompt so long and a weight; or "" : a leg delivers so much and ends
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["", "", "a", "b", "c", "d", "e"]), st.integers(1, 400), st.sampled_from([0.5, 1.0, 3.0])
    ),
    max_size=60,
)


def scheduler() -> Scheduler:
    return Scheduler(Limits(), {MODEL: FAIRNESS})


def after(steps: list[Step]) -> Scheduler:
    """Return a scheduler that has been through this."""
    seen = scheduler()
    seen.on(Worker(WORKER, 0.0))
    legs: list[LegId] = []
    for number, (tenant, size, weight) in enumerate(steps):
        now = float(number)
        effects = []
        if tenant:
            effects = seen.on(
                Submit(
                    request=RequestId(f"r{number}"),
                    tenant=TenantId(tenant),
                    models=(MODEL,),
                    tokens_estimate=1000,
                    queue_timeout=1e9,
                    now=now,
                    prompt_tokens=size,
                    weight=weight,
                )
            )
        elif legs:
            leg = legs.pop(0)
            effects = seen.on(Tokens(leg=leg, num=size, now=now)) + seen.on(LegEnded(leg=leg, cause="done", now=now))
        legs += [effect.leg for effect in effects if isinstance(effect, Start)]
    return seen


def standing(view: FairnessView) -> dict[TenantId, float]:
    """Return by how many weighted tokens each tenant would be ahead of the others if it came now."""
    return {one.tenant: max((one.counter - view.virtual) * one.weight, -one.credit) for one in view.tenants}


@given(steps=STEPS, most=st.integers(0, 6))
def test_a_tenant_is_wronged_by_no_more_than_the_bound(steps: list[Step], most: int) -> None:
    before = after(steps)
    now = float(len(steps))
    told = before.memory(MODEL, most)
    assert len(told.view.tenants) <= most
    heir = scheduler()
    heir.on(Worker(WORKER, now))
    heir.recall(told, now)
    was, is_now = standing(before.fairness_view(MODEL)), standing(heir.fairness_view(MODEL))
    wrongs = {tenant: abs(is_now.get(tenant, -FAIRNESS.credit) - ahead) for tenant, ahead in was.items()}
    bound = min((is_now[tenant] + FAIRNESS.credit for tenant in is_now), default=float("inf"))
    for tenant, wrong in wrongs.items():
        assert wrong <= (0.01 if tenant in is_now else bound + 0.01)
    assert heir.waste_left(MODEL) == before.waste_left(MODEL)


def test_a_worker_that_failed_too_often_is_tried_with_care_again() -> None:
    before = after([("a", 10, 1.0), ("b", 10, 1.0)])
    for leg in ("r0/0", "r1/0"):
        before.on(LegEnded(leg=LegId(leg), cause="lost", now=2.0))
    assert before.is_tripped(WORKER.id)
    heir = scheduler()
    heir.on(Worker(WORKER, 9.0))
    heir.recall(before.memory(MODEL, 8), 9.0)
    assert heir.is_tripped(WORKER.id)
    assert heir.next_wakeup() == 9.25
