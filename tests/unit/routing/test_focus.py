"""Runs end one after another where an engine gains little by running them beside each other."""

import pytest

from core.chat import Prefix, Role
from core.ids import WorkerId
from routing.fairness.account import Place
from routing.fairness.policy import Fairness
from routing.scheduler.cost import Cost
from tests.fakes.workers import view
from tests.unit.routing.test_cost import worked
from tests.unit.routing.world import M, World, starts

OLD, YOUNG = Role(10.0, 2.0, is_followed=True), Role(1.0, 1.0)
ALONE, TOGETHER = worked(0.0, 0.01), worked(0.05, 0.0001)
"""Engines that gain nothing by batches, and much."""


def world_of(cost: Cost, *names: str, slots: int = 4, fairness: Fairness | None = None) -> World:
    world = World(*(view(name, slots=slots) for name in names or ("m-0",)), fairness=fairness or Fairness())
    for worker in world.scheduler._books.workers.values():
        worker.cost = cost
    return world


def test_a_later_run_waits_for_an_earlier_one_where_the_engine_gains_nothing_by_both() -> None:
    world = world_of(ALONE)
    world.submit("old", program="old", role=OLD, tokens=100, prompt=50)
    assert starts(world.submit("young", program="young", role=YOUNG, tokens=100, prompt=50)) == []
    assert starts(world.submit("old1", program="old", role=OLD, tokens=100, prompt=50)) == [("old1", "m-0")]
    assert starts(world.end("old/0")) == []
    assert starts(world.end("old1/0")) == []  # the slot is kept for the next call of the run
    assert starts(world.advance(0.1)) == [("young", "m-0")]


@pytest.mark.parametrize("fairness", [Fairness(focus=False), Fairness(run_order=False), Fairness(policy="fcfs")])
def test_it_does_not_wait_where_that_is_switched_off_or_makes_no_sense(fairness: Fairness) -> None:
    world = world_of(ALONE, fairness=fairness)
    world.submit("old", program="old", role=OLD, tokens=100, prompt=50)
    assert starts(world.submit("young", program="young", role=YOUNG, tokens=100, prompt=50)) == [("young", "m-0")]


@pytest.mark.parametrize("cost", [TOGETHER, Cost()])
def test_it_does_not_wait_where_the_engine_gains_by_batches_or_nothing_is_known(cost: Cost) -> None:
    world = world_of(cost)
    world.submit("old", program="old", role=OLD, tokens=100, prompt=50)
    assert starts(world.submit("young", program="young", role=YOUNG, tokens=100, prompt=50)) == [("young", "m-0")]


def test_a_worker_of_which_nothing_is_known_is_taken_to_be_like_another() -> None:
    world = world_of(ALONE, "m-0", "m-1")
    world.scheduler._books.workers[WorkerId("m-0")].cost = Cost()
    world.submit("old", program="old", role=OLD, tokens=100, prompt=50)
    world.submit("old1", program="old", role=OLD, tokens=100, prompt=50)
    assert starts(world.submit("young", program="young", role=YOUNG, tokens=100, prompt=50)) == []


def test_who_waits_for_a_run_holds_up_nobody_else() -> None:
    world = world_of(ALONE)
    world.submit("old", program="old", role=OLD, tokens=100, prompt=50)
    assert starts(world.submit("young", program="young", role=YOUNG, tokens=100, prompt=50)) == []
    assert starts(world.submit("chat", tokens=100, prompt=50)) == [("chat", "m-0")]
    assert starts(world.submit("theirs", "other", program="x", role=YOUNG, tokens=100, prompt=50)) == [
        ("theirs", "m-0")
    ]
    assert world.place("young") is Place.TURN


def test_it_takes_no_slot_from_another_tenant_meanwhile() -> None:
    world = world_of(ALONE, fairness=Fairness(threshold=1, quantum=1))
    world.submit("old", program="old", role=OLD, tokens=9000, prompt=50)
    world.submit("rich", "other", tokens=9000, prompt=50, pinned=False)
    world.submit("young", program="young", role=YOUNG, tokens=9000, prompt=50)
    world.first_token("rich/0")
    for _ in range(20):
        world.advance(1.0)
        world.tokens("rich/0", 100)
    assert world.num_cuts == 0


def test_a_worker_without_earlier_runs_is_used() -> None:
    world = world_of(ALONE, "m-0", "m-1")
    world.submit("old", program="old", role=OLD, tokens=100, prompt=50)
    assert starts(world.submit("young", program="young", role=YOUNG, tokens=100, prompt=50)) == [("young", "m-1")]
    later = Role(0.0, 2.0)
    assert starts(world.submit("third", program="third", role=later, tokens=100, prompt=50)) == []


def test_a_call_whose_deadline_leaves_no_slack_does_not_wait() -> None:
    world = world_of(ALONE)
    world.submit("old", program="old", role=OLD, tokens=100, prompt=50)
    assert starts(world.submit("soon", program="soon", role=YOUNG, deadline=60.0, tokens=100, prompt=50)) == []
    for number in range(5):  # starts earn the right to go before one's turn
        world.submit(f"chat{number}", tokens=100, prompt=50)
        world.end(f"chat{number}/0")
    late = world.submit("late", program="late", role=YOUNG, deadline=1.0, tokens=100, prompt=50)
    assert starts(late) == [("late", "m-0")]
    assert world.place("soon") is Place.TURN


def test_where_runs_have_many_calls_before_them_more_of_them_go_side_by_side() -> None:
    cost = worked(0.01, 0.001)  # of two calls of 100 tokens one is best at a time, of 200 more are
    short, long = Role(1.0, 1.0, run_calls=1), Role(1.0, 1.0, run_calls=100)
    for role, expected in ((short, []), (long, [("young", "m-0")])):
        world = world_of(cost)
        world.submit("old", program="old", role=Role(10.0, 1.0), tokens=110, prompt=100)
        assert starts(world.submit("young", program="young", role=role, tokens=110, prompt=100)) == expected


def test_workers_that_are_gone_do_none_of_what_runs_have_before_them() -> None:
    cost, role = worked(0.01, 0.001), Role(1.0, 1.0, run_calls=3)  # of three calls one is best, of six two are
    world = world_of(cost, "m-0", "m-1")
    world.worker(view("m-1", ready=False))
    world.submit("old", program="old", role=Role(10.0, 1.0), tokens=110, prompt=100)

    assert starts(world.submit("young", program="young", role=role, tokens=110, prompt=100)) == [("young", "m-0")]


HEAD, OTHER = Prefix(1, 1000), Prefix(2, 1000)


def test_a_call_waits_for_the_full_worker_whose_cache_holds_its_prompt_if_it_is_done_sooner_there() -> None:
    world = warm_world()
    world.submit("b", program="b", role=YOUNG, prefixes=(HEAD,), tokens=1110, prompt=1100)
    assert world.place("b") is Place.TURN
    assert starts(world.submit("c", program="c", role=YOUNG, prefixes=(OTHER,), tokens=1110, prompt=1100)) == [
        ("c", "m-1")
    ]
    assert starts(world.end("a/0")) == [("b", "m-0")]


def test_it_does_not_where_that_would_take_longer_than_to_compute_it_again() -> None:
    world = warm_world(tokens=9000)
    assert starts(world.submit("b", program="b", role=YOUNG, prefixes=(HEAD,), tokens=1110, prompt=1100)) == [
        ("b", "m-1")
    ]


def test_it_waits_no_longer_than_it_could_have_gained_however_long_answers_are() -> None:
    world = warm_world(tokens=1110 + 9000)
    world.tokens("a/0", 8950)  # the rest looks like a usual answer
    assert starts(world.submit("b", program="b", role=YOUNG, prefixes=(HEAD,), tokens=1110, prompt=1100)) == []
    assert starts(world.advance(10.5)) == []

    assert starts(world.advance(1.0)) == [("b", "m-1")]


def warm_world(tokens: int = 1110) -> World:
    """The first worker, which is full, holds one beginning, and the second, which has room, holds nothing."""
    world = World(view("m-0"), view("m-1"))
    for worker in world.scheduler._books.workers.values():
        worker.pace.observe_prefill(100, 1.0)
        for _ in range(worker.pace.ENOUGH):
            worker.pace.observe_step(1, 0.1)
    assert starts(world.submit("a", prefixes=(HEAD,), tokens=tokens, prompt=1100)) == [("a", "m-0")]
    world.first_token("a/0")
    assert WorkerId("m-0") not in world.scheduler._books.models[M].with_room
    return world
