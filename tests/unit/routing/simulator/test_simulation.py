"""The whole: production's scheduler over modelled workers, and the figures that come of it."""

import math
from collections.abc import Sequence

import pytest

from core.ids import TenantId
from routing.fairness.policy import Fairness, Policy
from routing.scheduler import Effect, Event, Tick
from routing.simulator.engine import Engine, StepTime
from routing.simulator.service import Service
from routing.simulator.simulation import Fleet, Outage, Run, Simulation, Stuck, Terms, scheduler
from routing.simulator.summary import spread, summarise
from routing.simulator.trace import Arrival, Trace, light_and_heavy, trace

A, B = TenantId("a"), TenantId("b")
STEP = StepTime(base=0.01, per_sequence=0.001, per_kv_token=0.0, per_prefill_token=0.0001)


def fleet(workers: int = 1, slots: int = 2, outages: tuple[Outage, ...] = ()) -> Fleet:
    return Fleet(engines=(Engine(step=STEP, slots=slots),) * workers, outages=outages)


def run(one: Trace, where: Fleet, policy: Policy = "vtc-pc", terms: Terms | None = None) -> Run:
    return Simulation(one, where, scheduler(Fairness(policy=policy)), terms or Terms()).run()


def hog_and_light() -> Trace:
    hog = [Arrival(0.0, A, 100, 1500) for _ in range(12)]
    light = [Arrival(5.0 + number, B, 100, 20) for number in range(20)]
    return trace("hog", [*hog, *light], "")


def test_a_request_alone_takes_what_its_steps_take() -> None:
    found = run(trace("one", [Arrival(0.0, A, 200, 10)], ""), fleet()).served[0]
    assert found.ttft == pytest.approx(0.01 + 0.001 + 200 * 0.0001)
    assert found.ended_at == pytest.approx(0.031 + 9 * 0.011)
    assert list(found.gaps) == pytest.approx([0.011] * 9)
    assert (found.end, found.num_tokens, found.num_legs) == ("done", 10, 1)


def test_the_same_input_gives_the_same_run() -> None:
    one, other = run(hog_and_light(), fleet()), run(hog_and_light(), fleet())
    assert one.served == other.served
    assert summarise(one, {}) == summarise(other, {})


@pytest.mark.parametrize("policy", ["fcfs", "drr", "vtc", "vtc-pc", "priority"])
def test_every_policy_gives_every_request_all_of_its_tokens(policy: Policy) -> None:
    found = run(hog_and_light(), fleet(), policy)
    assert {one.end for one in found.served} == {"done"}
    assert all(one.num_tokens == one.arrival.output for one in found.served)
    assert all(len(one.gaps) == one.arrival.output - 1 for one in found.served)


def test_who_asks_for_little_waits_less_with_preemption_than_without_and_least_fair_is_first_come() -> None:
    light = {
        policy: summarise(run(hog_and_light(), fleet(), policy), {A: "heavy", B: "light"}).classes[2].ttft.p90
        for policy in ("fcfs", "vtc", "vtc-pc")
    }
    assert light["vtc-pc"] * 5 < light["vtc"] < light["fcfs"]


def test_what_is_computed_again_is_counted_as_waste_and_served_to_nobody() -> None:
    found = run(hog_and_light(), fleet())
    assert found.num_aborts["preempted"] > 0
    assert sum(one.num_preempted for one in found.served) == found.num_aborts["preempted"]
    useful = sum(one.arrival.prompt for one in found.served)
    assert found.num_prefilled == useful + found.num_recomputed
    asked = sum(one.arrival.prompt + 2 * one.arrival.output for one in found.served)
    assert sum(found.service.received.values()) == asked


def test_a_worker_that_dies_loses_no_request() -> None:
    one = trace("many", [Arrival(0.01 * number, A, 50, 60) for number in range(30)], "")
    found = run(one, fleet(workers=2, slots=4, outages=(Outage(0, 0.5, 1.0),)))
    assert {served.end for served in found.served} == {"done"}
    assert all(served.num_tokens == 60 for served in found.served)
    assert any(served.num_legs > 1 for served in found.served)
    assert found.num_recomputed > 0


def test_a_request_that_waits_longer_than_it_may_is_rejected() -> None:
    one = trace("late", [Arrival(0.0, A, 10, 500), Arrival(0.1, A, 10, 5)], "")
    found = run(one, fleet(slots=1), "fcfs", Terms(queue_timeout=1.0))
    assert [served.end for served in found.served] == ["done", "rejected"]
    summary = summarise(found, {A: "heavy"})
    assert (summary.classes[0].rejected, summary.classes[0].ttft.num) == (1, 1)


def test_a_coarse_stride_serves_the_same_in_nearly_the_same_time() -> None:
    exact, coarse = run(hog_and_light(), fleet()), run(hog_and_light(), fleet(), terms=Terms(stride=8))
    assert coarse.makespan == pytest.approx(exact.makespan, rel=0.1)
    assert all(one.num_tokens == one.arrival.output for one in coarse.served)


def test_a_tenant_of_twice_the_weight_is_served_twice_as_much_while_both_wait() -> None:
    both = trace("both", [Arrival(0.0, tenant, 50, 50) for tenant in (A, B) for _ in range(100)], "")
    found = run(both, fleet(slots=4), "vtc", Terms(weights={A: 2.0}))
    ended = sorted(found.served, key=lambda one: one.ended_at or math.inf)[:90]
    share = sum(one.arrival.tenant == A for one in ended) / 90
    assert share == pytest.approx(2 / 3, abs=0.06)


def test_a_decider_that_starts_nothing_is_found_out() -> None:
    class Lazy:
        def on(self, event: Event) -> Sequence[Effect]:
            return ()

        def next_wakeup(self) -> float | None:
            return None

    with pytest.raises(Stuck, match="1 of 1 requests are left"):
        Simulation(trace("one", [Arrival(0.0, A, 1, 1)], ""), fleet(), Lazy(), Terms()).run()


def test_a_wakeup_that_is_late_already_is_a_tick_and_not_a_standstill() -> None:
    class Eager:
        def __init__(self) -> None:
            self.inner = scheduler(Fairness())
            self.num_ticks = 0

        def on(self, event: Event) -> Sequence[Effect]:
            self.num_ticks += isinstance(event, Tick)
            return self.inner.on(event)

        def next_wakeup(self) -> float | None:
            return -1.0

    eager = Eager()
    found = Simulation(trace("one", [Arrival(0.0, A, 10, 5)], ""), fleet(), eager, Terms()).run()
    assert found.served[0].end == "done"
    assert 0 < eager.num_ticks < 1000


def test_progress_is_told_of() -> None:
    told: list[int] = []
    one = trace("many", [Arrival(0.1 * number, A, 10, 2) for number in range(200)], "")
    Simulation(one, fleet(), scheduler(Fairness()), Terms()).run(lambda done, now: told.append(done))
    assert told == sorted(told)
    assert len(told) > 20


def test_the_gap_is_what_one_got_more_than_the_other_while_both_waited() -> None:
    service = Service({}, interval=0.0)
    for now, tenant in enumerate((A, B)):
        service.at(float(now))
        service.waits(tenant)
    service.at(2.0)
    service.serves(A, 10, 5)
    service.at(3.0)
    service.serves(B, 4, 0)
    service.at(4.0)
    assert service.gap == 20.0
    service.leaves(B)
    service.serves(A, 100, 0)
    service.at(5.0)
    service.waits(B)  # waits anew: what came between does not count
    service.at(6.0)
    service.at(7.0)
    assert service.gap == 20.0
    assert (service.backlogged_s, service.backlogged_tokens) == (7.0, 5)


def test_jains_index_is_one_for_equal_service_and_less_for_unequal() -> None:
    def index(most: int) -> float | None:
        service = Service({}, interval=100.0)
        service.waits(A)
        service.waits(B)
        service.at(10.0)
        service.serves(A, most, 0)
        service.serves(B, 10, 0)
        service.at(20.0)
        return service.jain

    assert index(10) == 1.0
    assert index(30) == pytest.approx(0.8)


def test_percentiles_are_values_that_were_seen() -> None:
    found = spread(float(value) for value in range(100, 0, -1))
    assert (found.num, found.p50, found.p90, found.p99, found.most) == (100, 51.0, 91.0, 100.0, 100.0)
    assert math.isnan(spread([]).p99)


def test_classes_are_summed_up_by_themselves_and_together() -> None:
    found = summarise(run(hog_and_light(), fleet()), light_and_heavy(hog_and_light().arrivals))
    assert [(one.name, one.requests, one.tenants) for one in found.classes] == [
        ("all", 32, 2), ("heavy", 12, 1), ("light", 20, 1),
    ]  # fmt: skip
    assert found.tokens_per_s == pytest.approx((12 * 1500 + 20 * 20) / found.makespan)
