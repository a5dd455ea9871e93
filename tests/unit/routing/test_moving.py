"""Answers that move while they run: off a worker that drains, and from a full worker to an empty one."""

import pytest

from core.ids import ModelName, RequestId, WorkerId
from routing.fairness.policy import Fairness
from routing.scheduler.pace import Pace
from tests.fakes.workers import view
from tests.unit.routing.world import World, aborts, starts

GENEROUS = Fairness(quantum=4, waste_share=1.0)


def begun(world: World, *names: str, tokens: int = 500, delivered: int = 50, pinned: bool = False) -> None:
    for name in names:
        world.submit(name, name, tokens=tokens, prompt=10, pinned=pinned)
        world.first_token(f"{name}/0", prefilled=10)
        world.tokens(f"{name}/0", delivered)


def test_a_draining_worker_gets_nothing_and_its_answers_go_on_elsewhere_two_at_a_time() -> None:
    world = World(view("m-0", slots=3), view("m-1", slots=8, ready=False, may_return=True))
    begun(world, "a", "b", "c")
    world.worker(view("m-1", slots=8))

    cut = aborts(world.worker(view("m-0", slots=3, draining=True)))
    assert cut == [("a/0", "drained"), ("b/0", "drained")]
    assert starts(world.submit("new", "new")) == [("new", "m-1")]

    first = world.end("a/0", "aborted", can_resume=True)
    assert starts(first) == [("a", "m-1")]
    assert aborts(first) == [("c/0", "drained")]
    assert [start for effects in (world.let_go(),) for start in starts(effects)] == [("b", "m-1"), ("c", "m-1")]


def test_what_is_pinned_stays_on_a_draining_worker() -> None:
    world = World(view("m-0"), view("m-1"))
    begun(world, "a", pinned=True)

    assert aborts(world.worker(view("m-0", draining=True))) == []


def test_a_draining_worker_keeps_its_answers_until_another_has_room() -> None:
    world = World(view("m-0"), view("m-1"))
    begun(world, "a", "b")
    assert aborts(world.worker(view("m-0", draining=True))) == []

    assert aborts(world.end("b/0")) == [("a/0", "drained")]
    assert starts(world.let_go()) == [("a", "m-1")]


def drained_under_a_backlog(slots: int = 2) -> World:
    """Return a world with a full worker that drains, another that is full, and two requests that wait."""
    world = World(view("m-0", slots=slots), view("m-1", slots=slots))
    begun(world, *(f"{name}{number}" for number in range(slots) for name in "ab"))
    world.submit("c", "c")
    world.submit("d", "d")
    assert aborts(world.worker(view("m-0", slots=slots, draining=True))) == []
    return world


def on(world: World, worker: str) -> list[str]:
    """Return the legs on a worker."""
    return [leg for leg, start in world.running.items() if start.worker == worker]


def test_what_drains_takes_the_next_slot_that_comes_free_elsewhere_before_those_that_wait() -> None:
    world = drained_under_a_backlog()
    drains, stays = on(world, "m-0"), on(world, "m-1")

    for leg, done in zip(drains, stays, strict=True):
        effects = world.end(done)
        assert (aborts(effects), starts(effects)) == ([(leg, "drained")], [])
        assert starts(world.let_go()) == [(leg.partition("/")[0], "m-1")]
    assert [name for leg in on(world, "m-1") for name, _ in starts(world.end(leg))] == ["c", "d"]
    assert world.num_running(WorkerId("m-0")) == 0


def test_who_lost_its_worker_goes_on_before_what_drains() -> None:
    world = World(view("m-0"), view("m-1"), view("m-2"))
    begun(world, "a", "b", "c")
    world.worker(view("m-0", draining=True))
    world.worker(view("m-2", ready=False, may_return=True))
    world.end("c/0", "lost", can_resume=True)

    assert starts(world.end("b/0")) == [("c", "m-1")]
    assert aborts(world.end("c/1")) == [("a/0", "drained")]


def test_what_drains_stays_where_it_is_if_no_other_worker_could_take_it() -> None:
    for others in ((), (view("m-1", ready=False, may_return=True),), (view("m-1", healthy=False),)):
        world = World(view("m-0"), *others)
        begun(world, "a")
        (leg,) = world.legs()
        busy = world.running[leg].worker
        effects = world.worker(view(busy, draining=True))
        world.submit("b", "b", pinned=False)

        assert aborts(effects) == []
        world.advance(20.0)
        world.end(leg)
        assert world.ended == {"a": "leg"}


def test_a_slot_is_kept_for_an_answer_on_its_way() -> None:
    world = World(view("m-0"), view("m-1"))
    begun(world, "a")
    assert aborts(world.worker(view("m-0", draining=True))) == [("a/0", "drained")]

    assert world.submit("new", "new") == []
    assert starts(world.let_go()) == [("a", "m-1")]
    assert starts(world.end("a/1")) == [("new", "m-1")]


def test_a_slot_that_was_kept_is_given_free_when_the_answer_is_cancelled_or_done() -> None:
    for ends_by in ("cancel", "done"):
        world = World(view("m-0"), view("m-1"))
        begun(world, "a")
        world.worker(view("m-0", draining=True))
        world.submit("new", "new")

        if ends_by == "cancel":
            world.cancel("a")
            effects = world.end("a/0", "aborted", can_resume=True)
        else:
            effects = world.end("a/0", "done")

        assert starts(effects) == [("new", "m-1")]


def uneven(tokens: int = 4000, delivered: int = 1000) -> World:
    """Return a world with four answers on one worker, and an empty one; both are known to slow down under load."""
    world = World(view("m-0", slots=4), view("m-1", slots=4, ready=False, may_return=True), fairness=GENEROUS)
    begun(world, "a", "b", "c", "d", tokens=tokens, delivered=delivered)
    source = world.scheduler._books.workers[WorkerId("m-0")]
    for load in (1, 2, 3, 4) * 3:
        source.pace.observe_step(load, 0.01 * load)
        source.pace.observe_prefill(100, 0.01)
    world.advance(1.0)
    return world


def test_an_answer_moves_to_an_empty_worker_if_that_gains_more_than_it_costs() -> None:
    world = uneven()

    assert aborts(world.worker(view("m-1", slots=4))) == [("a/0", "migrated")]
    assert starts(world.let_go()) == [("a", "m-1")]
    (_, told) = (decision.text for decision in world.scheduler.explain(RequestId("a"))[-2:])
    assert told == "resumed a of tenant a on m-1 after 0.00 s"
    assert world.scheduler.fairness_view(ModelName("m")).migrations == 1


def test_an_answer_does_not_move_for_less_than_it_costs() -> None:
    assert aborts(uneven(delivered=5).worker(view("m-1", slots=4))) == []


def test_an_answer_does_not_move_while_somebody_waits() -> None:
    world = uneven()
    world.submit("e", "e")

    assert aborts(world.worker(view("m-1"))) == []


def test_an_answer_does_not_move_to_a_worker_that_has_prompts_to_do() -> None:
    world = uneven()
    moved = aborts(world.worker(view("m-1", slots=4)))
    world.let_go()
    world.advance(1.0)

    assert len(moved) == 1
    assert aborts(world.worker(view("m-1", slots=4))) == []


def test_the_load_is_evened_out_and_then_left_alone() -> None:
    world = uneven()
    moved = aborts(world.worker(view("m-1", slots=4)))
    for _ in range(10):
        for name, _ in starts(world.let_go()):
            world.first_token(f"{name}/1")
        world.advance(1.0)
        moved += aborts(world.worker(view("m-1", slots=4)))

    assert len(moved) == 2
    assert (world.num_running(WorkerId("m-0")), world.num_running(WorkerId("m-1"))) == (2, 2)


def test_pace_is_a_line_through_what_was_seen_and_nothing_before_enough_was() -> None:
    pace = Pace()
    assert pace.step(3) is None
    for load in (1, 2, 4, 8, 8, 4, 2, 1):
        pace.observe_step(load, 0.02 + 0.003 * load)

    assert pace.step(6) == pytest.approx(0.038)
    assert pace.prefill(10) is None


def test_pace_that_was_seen_at_one_load_only_says_that_load_costs_nothing() -> None:
    pace = Pace()
    for _ in range(9):
        pace.observe_step(4, 0.05)

    assert [pace.step(1), pace.step(8)] == pytest.approx([0.05, 0.05])


def test_who_has_a_slot_kept_for_it_starts_there_whoever_came_back_before_it() -> None:
    world = World(view("m-0", slots=2), view("m-1"))
    world.submit("b", pinned=False)
    world.submit("a", pinned=False)
    world.submit("c")
    (there,) = (leg for leg, start in world.running.items() if start.worker == "m-1")
    world.worker(view("m-0", slots=2, draining=True))
    (cut,) = aborts(world.end(there))
    (left,) = (leg for leg, start in world.running.items() if leg != cut[0])
    assert starts(world.end(left, "lost")) == [], "its place is taken"

    assert starts(world.end(cut[0], "aborted", can_resume=True)) == [(cut[0].partition("/")[0], "m-1")]
