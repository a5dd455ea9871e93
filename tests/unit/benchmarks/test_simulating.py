"""What the simulated benchmarks compute, and what they compare the scheduler with."""

from collections.abc import Sequence

import pytest

from benchmarks import fairness_sim, scheduler, step_time
from benchmarks.loopback.stats import Interval
from benchmarks.simulating import Direct
from core.ids import LegId, RequestId, TenantId
from routing.fairness.policy import Fairness
from routing.scheduler import Effect, LegEnded, Start, Submit
from routing.simulator.engine import Engine, StepTime
from routing.simulator.simulation import MODEL, Fleet, Simulation, Terms
from routing.simulator.summary import Summary, summarise
from routing.simulator.trace import Arrival, light_and_heavy, trace

STEP = StepTime(0.01, 0.001, 0.0, 0.0001)


def submit(name: str) -> Submit:
    return Submit(RequestId(name), TenantId("a"), (MODEL,), 10, 1.0, 0.0)


def workers(effects: Sequence[Effect]) -> list[str]:
    return [effect.worker for effect in effects if isinstance(effect, Start)]


def test_round_robin_takes_the_workers_in_turn_whatever_they_do() -> None:
    direct = Direct(3, "round_robin")
    assert [workers(direct.on(submit(str(number)))) for number in range(4)] == [["w0"], ["w1"], ["w2"], ["w0"]]


def test_least_requests_takes_the_worker_with_the_fewest_open() -> None:
    direct = Direct(2, "least_requests")
    for number in range(4):
        direct.on(submit(str(number)))
    direct.on(LegEnded(LegId("1/0"), "done", 1.0))
    direct.on(LegEnded(LegId("3/0"), "done", 1.0))
    assert [workers(direct.on(submit(str(number)))) for number in (4, 5)] == [["w1"], ["w1"]]


def test_the_hog_is_that_of_the_papers_kind() -> None:
    found = fairness_sim.hog().arrivals
    hog = [one for one in found if one.tenant == "hog"]
    assert len(hog) == 60
    assert {(one.at, one.prompt, one.output) for one in hog} == {(0.0, 200, 1500)}
    assert len({one.tenant for one in found}) == 7
    assert len(found) - 60 > 300  # what a p99 needs


def test_the_bound_is_the_sum_of_its_parts() -> None:
    one = trace("t", [Arrival(0.0, TenantId("a"), 100, 50), Arrival(1.0, TenantId("b"), 30, 500)], "")
    engine = Engine(step=StepTime(0.05, 0.0, 0.0, 0.0), slots=4)
    scene = fairness_sim.Scene(one, Fleet(engines=(engine,)), {}, Terms())
    fairness = Fairness(threshold=1000, credit=2000, quantum=32, interval=0.05)
    assert fairness_sim.bound(scene, fairness) == pytest.approx(1000 + 530 + 100 + 4 * 2 * (32 + 1 * 2) + 2000)


def small(arm: str) -> Summary:
    light = [Arrival(5.0 + number, TenantId("light-0"), 100, 20) for number in range(10)]
    one = trace("t", [*[Arrival(0.0, TenantId("hog"), 100, 400) for _ in range(12)], *light], "")
    fleet = Fleet(engines=(Engine(step=STEP, slots=2),))
    return fairness_sim.measure(arm, fairness_sim.Scene(one, fleet, light_and_heavy(one.arrivals), Terms()))


def test_every_arm_runs_and_has_a_line_of_the_table_and_targets_tell_what_was_measured() -> None:
    arms = {arm: small(arm) for arm in (*fairness_sim.FAIR, "round robin", "least requests")}
    found = dict.fromkeys(("27 tenants", "hog", "azure × 64", "mooncake × 64"), arms)
    assert len(fairness_sim.table(found)) == 2 + 4 * len(arms)
    lines, kept = fairness_sim.verdicts(found, {"27 tenants": 1e9, "hog": -1.0})
    assert len(lines) == 10
    assert not kept
    assert any(line.startswith("target gap_tenants") and line.endswith("held") for line in lines)
    assert any(line.startswith("target gap_hog") and line.endswith("missed") for line in lines)


def test_a_model_that_is_right_has_no_error_and_one_that_is_twice_as_slow_has() -> None:
    arrivals = [Arrival(0.2 * number, TenantId("a"), 100, 20) for number in range(12)]
    engine = Engine(step=STEP, slots=step_time.SLOTS, chunk=step_time.CHUNK, keeps_prefixes=False)
    run = Simulation(trace("t", arrivals, ""), Fleet(engines=(engine,)), Direct(1), Terms()).run()
    measured = []
    for served in run.served:
        assert served.first_at is not None
        times = [served.first_at]
        for gap in served.gaps:
            times.append(times[-1] + gap)
        measured.append([served.arrival.at, *times])
    assert max(step_time.errors(STEP, arrivals, measured).values()) == pytest.approx(0.0, abs=1e-5)
    slow = StepTime(*(2 * getattr(STEP, name) for name in StepTime.__struct_fields__))
    assert min(step_time.errors(slow, arrivals, measured).values()) > 0.5
    assert summarise(run, {}).preemptions == 0


def test_a_busy_scheduler_stays_full_and_its_decisions_are_filed_by_what_they_led_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in (("QUEUED", 200), ("TENANTS", 20), ("WORKERS", 2), ("SLOTS", 4)):
        monkeypatch.setattr(scheduler, name, value)
    busy = scheduler.Busy("vtc-pc", seed=1)
    busy.go_on(2000)
    assert busy.scheduler.num_waiting(MODEL) >= 190
    assert {"Tokens", "Submit", "LegEnded that starts", "Tick"} <= set(busy.spent)
    assert busy.tokens_a_second(500) > 0


def test_a_target_holds_when_the_intervals_near_end_holds_it() -> None:
    rates = {"vtc": Interval(50_000, 40_000, 60_000)}
    lines, kept = scheduler.verdicts({"vtc": Interval(150, 100, 210)}, rates)
    assert not kept
    assert lines[0].endswith("missed")
    assert lines[1].endswith("held")
