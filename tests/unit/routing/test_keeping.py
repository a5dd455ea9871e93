"""A slot is kept for a moment for the call that follows in a run."""

from core.chat import Role
from routing.fairness.policy import Fairness
from routing.scheduler.keeping import KEPT_S
from tests.fakes.workers import view
from tests.unit.routing.world import World, starts

STEP, LAST = Role(10.0, 2.0, is_followed=True), Role(10.0, 1.0)


def begun(**rest: object) -> World:
    """An old run has the only slot, and a call of a younger one waits."""
    world = World(view("m-0", slots=1), **rest)  # type: ignore[arg-type] # as the world takes it
    world.submit("old0", program="old", role=STEP)
    world.submit("young", program="young", role=Role(1.0, 1.0))
    return world


def test_the_call_that_follows_finds_the_slot_of_the_one_before() -> None:
    world = begun()
    assert starts(world.end("old0/0")) == []

    assert starts(world.submit("old1", program="old", role=LAST)) == [("old1", "m-0")]
    assert starts(world.end("old1/0")) == [("young", "m-0")]


def test_it_is_kept_for_a_moment_only() -> None:
    world = begun()
    world.end("old0/0")

    assert starts(world.advance(KEPT_S)) == [("young", "m-0")]
    assert starts(world.submit("old1", program="old", role=LAST)) == []


def test_nothing_is_kept_after_the_last_call_or_from_older_runs_other_classes_other_tenants_and_no_runs() -> None:
    young = Role(1.0, 1.0)
    for last, waits, tenant, rank in (
        (LAST, young, "t", 0), (STEP, Role(60.0, 1.0), "t", 0), (STEP, young, "other", 0), (STEP, young, "t", 1),
        (STEP, None, "t", 0),
    ):  # fmt: skip
        world = World(view("m-0", slots=1))
        world.submit("old0", program="old", role=last)
        world.submit("waits", tenant, program="waits", role=waits, rank=rank)

        assert starts(world.end("old0/0")) == [("waits", "m-0")]


def test_nothing_is_kept_where_the_order_of_runs_is_switched_off_or_the_call_failed() -> None:
    assert starts(begun(fairness=Fairness(run_order=False)).end("old0/0")) == [("young", "m-0")]
    assert starts(begun().end("old0/0", "refused")) == [("young", "m-0")]


def test_nothing_is_kept_where_all_come_first_come_first_served() -> None:
    world = World(view("m-0", slots=1), fairness=Fairness(policy="fcfs"))
    world.submit("old0", program="old", role=Role(0.0, 2.0, is_followed=True))
    world.submit("next", program="next", role=Role(0.0, 60.0, run_s=60.0))

    assert starts(world.end("old0/0")) == [("next", "m-0")]
