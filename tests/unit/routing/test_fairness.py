"""Whose turn it is: each policy by examples, over the line alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.ids import RequestId, TenantId
from routing.fairness.account import MILLI, Request
from routing.fairness.line import Line
from routing.fairness.policy import Fairness, Policy


class Waiters:
    """Requests such as ``a1``: the first of tenant ``a``."""

    def __init__(self, fairness: Fairness) -> None:
        self.line = Line(fairness)
        self.now = 0.0
        self.requests: dict[str, Request] = {}

    def push(self, *names: str, rank: int = 0, program: str = "", weight: float = 1.0) -> None:
        for name in names:
            account = self.line.account(TenantId(name[0]), weight)
            request = Request(
                RequestId(name), account, rank=rank, program=program, number=len(self.requests), arrived_at=self.now
            )
            self.requests[name] = request
            self.line.arrive(request)
            self.line.push(request)

    def serve(self, cost: int = 10) -> str:
        """Start the next request; it costs so many weighted tokens."""
        request = self.line.first(self.now)
        assert request is not None
        self.line.serve(request)
        request.account.charge(cost * MILLI)
        return request.id

    def charge(self, tenant: str, cost: int) -> None:
        self.line.account(TenantId(tenant), 1.0).charge(cost * MILLI)

    def counter(self, tenant: str) -> int:
        return self.line.accounts[TenantId(tenant)].counter // MILLI

    def order(self, cost: int = 10) -> list[str]:
        return [self.serve(cost) for _ in range(len(self.line))]


def waiters(policy: Policy, *names: str, **figures: float) -> Waiters:
    made = Waiters(Fairness(policy=policy, **figures))  # type: ignore[arg-type]
    made.push(*names)
    return made


@pytest.mark.parametrize("policy", ["vtc", "vtc-pc", "priority"])
def test_tenants_take_turns_while_they_cost_the_same(policy: Policy) -> None:
    assert waiters(policy, "a1", "a2", "a3", "b1", "c1", "b2").order() == ["a1", "b1", "c1", "a2", "b2", "a3"]


def test_who_has_had_least_is_next() -> None:
    line = waiters("vtc", "a1", "a2", "b1", "b2", "b3")
    line.serve(30)

    assert [line.serve(10) for _ in range(4)] == ["b1", "b2", "b3", "a2"]


def test_what_runs_is_charged_and_counts_at_once() -> None:
    line = waiters("vtc", "a1", "b1")
    line.charge("a", 1)

    assert line.order() == ["b1", "a1"]


def test_a_weight_of_two_gets_twice_as_much() -> None:
    line = Waiters(Fairness(policy="vtc"))
    line.push(*(f"a{index}" for index in range(20)), weight=2.0)
    line.push(*(f"b{index}" for index in range(20)))

    order = [line.serve(10)[0] for _ in range(15)]

    assert (order.count("a"), order.count("b")) == (10, 5)


def test_who_comes_back_begins_level_with_the_least_of_those_that_queue() -> None:
    line = waiters("vtc", "a1", "a2", "b1", "b2")
    line.charge("a", 500)
    line.charge("b", 300)
    line.push("c1")

    assert line.counter("c") == 300


def test_what_runs_without_a_queue_does_not_hold_the_others_back() -> None:
    line = waiters("vtc", "a1", "a2", "b1")
    line.charge("a", 500)
    assert line.serve() == "b1"  # b runs, has hardly anything and queues for nothing
    line.push("c1")

    assert line.counter("c") == 500


def test_when_nobody_queues_who_comes_begins_level_with_the_last_that_left_the_queue() -> None:
    line = waiters("vtc", "a1")
    line.serve(70)
    line.push("b1")

    assert line.counter("b") == 70


def test_a_queue_that_is_not_empty_is_not_lifted() -> None:
    line = waiters("vtc", "a1", "a2")
    line.push("b1")
    line.charge("a", 500)
    line.push("b2")

    assert line.counter("b") == 0


def test_credit_lets_a_tenant_begin_so_much_behind_and_no_further() -> None:
    line = waiters("vtc-pc", "a1", "a2", credit=100)
    line.charge("a", 5000)
    line.push("b1")

    assert line.counter("b") == 4900


def test_credit_is_by_weight() -> None:
    line = waiters("vtc-pc", "a1", "a2", credit=100)
    line.charge("a", 5000)
    line.push("b1", weight=4.0)

    assert line.counter("b") == 4975


def test_credit_is_not_given_on_top_of_anothers_credit() -> None:
    line = waiters("vtc-pc", "a1", "a2", credit=100)
    line.charge("a", 5000)
    line.push("b1")
    line.push("c1")

    assert line.counter("c") == 4900


def test_used_credit_comes_back_as_fast_as_a_fair_share_passes() -> None:
    line = waiters("vtc-pc", "a1", "a2", "a3", credit=100)
    line.charge("a", 1000)
    line.push("b1")
    assert line.serve(100) == "b1"
    line.push("b2")
    assert line.counter("b") == 1000  # all of it is used

    line.line.remove(line.requests["b2"])
    line.charge("a", 30)
    line.push("b3")

    assert line.counter("b") == 1000  # 30 behind again


def test_credit_may_come_back_slower_or_not_at_all() -> None:
    line = waiters("vtc-pc", "a1", "a2", "a3", credit=100, credit_refill=0.5)
    line.charge("a", 1000)
    line.push("b1")
    line.serve(100)
    line.charge("a", 30)
    line.push("b3")

    assert line.counter("b") == 1015


def test_round_robin_gives_each_tenant_a_round_before_the_next() -> None:
    line = waiters("drr", *(f"{tenant}{index}" for tenant in "ab" for index in range(6)), threshold=30)

    assert "".join(name[0] for name in line.order(cost=10)) == "aaabbbaaabbb"


def test_who_overdraws_its_round_sits_out_as_many_as_it_owes() -> None:
    line = waiters("drr", "a0", "a1", *(f"b{index}" for index in range(8)), threshold=30)
    line.serve(90)

    assert "".join(line.serve(10)[0] for _ in range(9)) == "bbbbbbbba"


def test_first_come_is_first_served_whoever_and_however_urgent_it_is() -> None:
    line = waiters("fcfs", "a1", "a2", "b1")
    line.charge("a", 1000)
    line.push("b2", rank=0, program="p")
    line.push("a3", rank=2)

    assert line.order() == ["a1", "a2", "b1", "b2", "a3"]


def test_priority_is_by_class_first_and_fair_inside_it() -> None:
    line = Waiters(Fairness(policy="priority"))
    line.push("a-batch", rank=2)
    line.push("b-now", "b-too", "c-now", rank=0)
    line.push("d-soon", rank=1)

    assert line.order() == ["b-now", "c-now", "b-too", "d-soon", "a-batch"]


def test_under_priority_nobody_waits_for_ever() -> None:
    line = Waiters(Fairness(policy="priority", ageing=10.0, rescue_share=0.25))
    line.push("a-batch", rank=2)
    line.push(*(f"b{index}" for index in range(10)), rank=0)
    line.now = 20.0

    assert line.order().index("a-batch") == 4  # one start in four may be such a one


def test_a_target_that_would_be_missed_goes_first_unless_its_tenant_is_ahead() -> None:
    line = Waiters(Fairness(policy="vtc", targets=(2.0,), rescue_share=1.0, threshold=100))
    line.push("c1", "a1", "a2", "b1", "b2")
    line.serve()
    line.charge("a", 90)
    assert line.line.first(0.9) is line.requests["b1"]

    assert line.line.first(1.0) is line.requests["a1"]

    line.charge("a", 20)
    assert line.line.first(1.0) is line.requests["b1"]


@pytest.mark.parametrize("policy", ["vtc", "vtc-pc"])
def test_targets_are_minded_however_much_all_have_had_since_a_tenant_last_came(policy: Policy) -> None:
    line = Waiters(Fairness(policy=policy, targets=(2.0,), rescue_share=1.0, threshold=100))
    line.push("c1", "a1", "a2", "b1", "b2")
    line.serve()
    line.charge("a", 5050)
    line.charge("b", 5000)
    assert line.line.first(0.9) is line.requests["b1"]

    assert line.line.first(1.0) is line.requests["a1"]


@pytest.mark.parametrize("policy", ["drr", "vtc", "vtc-pc"])
def test_urgency_moves_no_tenant_before_another(policy: Policy) -> None:
    line = Waiters(Fairness(policy=policy))
    line.push("a-batch", rank=2)
    line.push("b-now", rank=0)

    assert line.order() == ["a-batch", "b-now"]


@pytest.mark.parametrize("policy", ["fcfs", "drr", "vtc", "vtc-pc", "priority"])
@given(
    steps=st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(0, 2), st.booleans(), st.integers(0, 300)), max_size=40
    )
)
def test_the_count_is_what_is_there(policy: Policy, steps: list[tuple[str, int, bool, int]]) -> None:
    line, there = Waiters(Fairness(policy=policy)), set[str]()
    for index, (tenant, rank, leaves, cost) in enumerate(steps):
        name = f"{tenant}{index}"
        line.push(name, rank=rank, program=str(index % 3))
        there.add(name)
        line.charge(tenant, cost)
        if leaves:
            gone = min(there)
            there.remove(gone)
            line.line.remove(line.requests[gone])

    assert len(line.line) == len(there) == sum(line.line.num_waiting(TenantId(tenant)) for tenant in "abc")
    assert {request.id for request in line.line.waiting()} == there
    assert sorted(line.order()) == sorted(there)


@given(
    steps=st.lists(st.tuples(st.sampled_from("abcd"), st.booleans(), st.integers(0, 3000)), max_size=60),
    credit=st.integers(0, 2000),
    refill=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_a_lift_never_lowers_a_counter_and_credit_never_exceeds_its_bound(
    steps: list[tuple[str, bool, int]], credit: int, refill: float
) -> None:
    line = Waiters(Fairness(policy="vtc-pc", credit=credit, credit_refill=refill))
    for index, (tenant, serves, cost) in enumerate(steps):
        account = line.line.account(TenantId(tenant), 1.0)
        before, was_backlogged = account.counter, account.is_backlogged
        line.push(f"{tenant}{index}")
        assert account.counter >= before
        if was_backlogged:
            assert account.counter == before
        else:
            assert account.counter >= line.line.turns.virtual - credit * MILLI
        if serves:
            line.serve(cost)


def test_counters_that_have_grown_large_are_made_small_without_a_change_of_order() -> None:
    line = waiters("vtc", "a1", "b1", "c1")
    for tenant, cost in (("a", 2**51 + 20), ("b", 2**51 + 10), ("c", 2**51 + 30)):
        line.line.account(TenantId(tenant), 1.0).charge(cost)

    line.push("d1")

    assert line.line.accounts[TenantId("b")].counter == 0
    assert line.line.accounts[TenantId("d")].counter == 0
    assert line.order() == ["b1", "d1", "a1", "c1"]


@pytest.mark.parametrize(
    ("figures", "problem"),
    [
        ({}, None),
        ({"threshold": 0}, "threshold is 0; choose from 1 to 1e+09"),
        ({"credit_refill": 1.5}, "credit_refill is 1.5; choose from 0 to 1"),
        ({"targets": (0.0,)}, "targets must all be longer than 0 seconds"),
        ({"policy": "best"}, "policy is 'best'; choose fcfs, drr, vtc, vtc-pc or priority"),
    ],
)
def test_a_wrong_figure_is_named_with_what_to_do(figures: dict[str, object], problem: str | None) -> None:
    assert Fairness(**figures).problem() == problem  # type: ignore[arg-type]


def test_a_class_that_was_not_there_under_another_policy_begins_at_the_time_that_it_had() -> None:
    line = Line(Fairness(policy="vtc"))
    line.turns.virtual = 5_000
    line.fairness = Fairness(policy="priority")
    newcomer = line.account(TenantId("new"), 1.0)
    line.turns.arrive(newcomer, 0)
    assert newcomer.counter == 5_000
