"""Turns: round-robin between tenants, first come first served inside one."""

from hypothesis import given
from hypothesis import strategies as st

from core.ids import RequestId, TenantId
from routing.fairness import TenantQueues


def queues(*names: str) -> TenantQueues:
    """Return queues of requests such as ``a1``: the first of tenant ``a``."""
    made = TenantQueues()
    for name in names:
        made.push(TenantId(name[0]), RequestId(name))
    return made


def turns(waiting: TenantQueues) -> list[str]:
    order: list[str] = []
    while (turn := waiting.first(lambda _: True)) is not None:
        waiting.serve(*turn)
        order.append(turn[1])
    return order


def test_tenants_take_turns() -> None:
    assert turns(queues("a1", "a2", "a3", "b1", "c1", "b2")) == ["a1", "b1", "c1", "a2", "b2", "a3"]


def test_a_request_pushed_to_the_front_has_the_next_turn() -> None:
    waiting = queues("a1", "b1", "b2")
    waiting.push(TenantId("b"), RequestId("b0"), front=True)

    assert turns(waiting) == ["b0", "a1", "b1", "b2"]


def test_who_is_not_due_is_passed_over_and_keeps_its_place() -> None:
    waiting = queues("a1", "a2", "b1")

    assert waiting.first(lambda request: request != "a1") == ("a", "a2")
    assert waiting.first(lambda request: request[0] != "a") == ("b", "b1")
    assert waiting.first(lambda _: False) is None
    assert turns(waiting) == ["a1", "b1", "a2"]


def test_a_request_leaves_from_wherever_it_stands() -> None:
    waiting = queues("a1", "a2", "a3", "b1")
    waiting.remove(TenantId("a"), RequestId("a2"))

    assert (len(waiting), waiting.num_waiting(TenantId("a"))) == (3, 2)
    assert turns(waiting) == ["a1", "b1", "a3"]


def test_what_does_not_wait_is_not_removed() -> None:
    waiting = queues("a1")
    waiting.remove(TenantId("a"), RequestId("a9"))
    waiting.remove(TenantId("z"), RequestId("a1"))

    assert len(waiting) == 1


def test_a_tenant_that_was_served_empty_comes_back_at_the_end() -> None:
    waiting = queues("a1", "b1", "c1")
    waiting.serve(TenantId("a"), RequestId("a1"))
    waiting.push(TenantId("a"), RequestId("a2"))

    assert turns(waiting) == ["b1", "c1", "a2"]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans(), st.booleans()), max_size=40))
def test_the_count_is_what_is_there(steps: list[tuple[str, bool, bool]]) -> None:
    waiting, there = TenantQueues(), set[tuple[str, str]]()
    for index, (tenant, is_front, leaves) in enumerate(steps):
        name = f"{tenant}{index}"
        waiting.push(TenantId(tenant), RequestId(name), front=is_front)
        there.add((tenant, name))
        if leaves:
            gone = min(there)
            there.remove(gone)
            waiting.remove(TenantId(gone[0]), RequestId(gone[1]))

    assert len(waiting) == len(there) == sum(waiting.num_waiting(TenantId(tenant)) for tenant in "abc")
    assert sorted(turns(waiting)) == sorted(name for _, name in there)


def test_inside_a_tenant_the_most_urgent_goes_first_and_equals_in_order_of_arrival() -> None:
    waiting = TenantQueues()
    for name, rank in (("a-batch", 2), ("a-standard", 1), ("a-now", 0), ("a-now-too", 0)):
        waiting.push(TenantId("a"), RequestId(name), rank=rank)

    assert turns(waiting) == ["a-now", "a-now-too", "a-standard", "a-batch"]


def test_urgency_moves_no_tenant_before_another() -> None:
    waiting = TenantQueues()
    waiting.push(TenantId("a"), RequestId("a-batch"), rank=2)
    waiting.push(TenantId("b"), RequestId("b-now"), rank=0)

    assert turns(waiting) == ["a-batch", "b-now"]
