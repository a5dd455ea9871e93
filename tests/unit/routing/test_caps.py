"""While somebody reads an answer, its worker is not so full that the tokens come late."""

import pytest

from routing.fairness.policy import Fairness
from routing.scheduler.pace import Pace
from tests.fakes.workers import view
from tests.unit.routing.world import World, starts

STEP_S = 0.01  # a leg


def seen(world: World, *workers: str) -> World:
    """Let the scheduler know that a token takes 10 ms for each leg beside which it is made."""
    for worker in workers or ("m-0",):
        pace = world.scheduler._books.workers[view(worker).id].pace
        for num in range(1, Pace.ENOUGH + 1):
            pace.observe_step(num, STEP_S * num)
    return world


def filled(world: World, num: int) -> list[str]:
    return [name for n in range(num) for name, _ in starts(world.submit(f"bulk{n}", timeout=60.0))]


def test_the_legs_that_meet_a_target_are_read_off_the_line() -> None:
    pace = Pace()
    assert pace.most_legs(1.0) is None
    for num in range(1, Pace.ENOUGH + 1):
        pace.observe_step(num, 0.005 + STEP_S * num)

    assert pace.most_legs(0.046) == 4
    assert pace.most_legs(0.001) == 1


def test_a_worker_with_an_urgent_leg_is_given_no_more_than_meets_the_target() -> None:
    world = seen(World(view("m-0", slots=8), fairness=Fairness(step_target=0.0301)))
    world.submit("chat", urgent=True)

    assert filled(world, 6) == ["bulk0", "bulk1"]
    assert starts(world.end("chat/0")) == [(f"bulk{n}", "m-0") for n in range(2, 6)]


def test_one_beside_the_urgent_ones_is_always_given() -> None:
    world = seen(World(view("m-0", slots=8), fairness=Fairness(step_target=0.001)))
    world.submit("chat", urgent=True)

    assert filled(world, 6) == ["bulk0"]


@pytest.mark.parametrize("target", [0.0, 60.0])
def test_without_a_target_that_binds_all_slots_are_given(target: float) -> None:
    world = seen(World(view("m-0", slots=8), fairness=Fairness(step_target=target)))
    world.submit("chat", urgent=True)

    assert len(filled(world, 9)) == 7


def test_before_anything_is_known_of_a_worker_all_slots_are_given() -> None:
    world = World(view("m-0", slots=8), fairness=Fairness(step_target=0.001))
    world.submit("chat", urgent=True)

    assert len(filled(world, 9)) == 7


def test_urgent_requests_go_where_the_fewest_places_are_lost() -> None:
    world = seen(World(view("m-0", slots=8), view("m-1", slots=8), fairness=Fairness(step_target=0.0401)), "m-0", "m-1")
    assert starts(world.submit("chat", tokens=1000, urgent=True)) == [("chat", "m-0")]

    assert starts(world.submit("talk", tokens=10, urgent=True)) == [("talk", "m-0")]
    assert starts(world.submit("bulk", tokens=10)) == [("bulk", "m-1")]
