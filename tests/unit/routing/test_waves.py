"""Prompts that begin alike: where they are placed, and who waits for whom."""

from core.chat import Prefix
from core.ids import WorkerId
from routing.fairness.account import Place
from routing.fairness.policy import Fairness
from routing.scheduler.pace import Pace
from tests.fakes.workers import view
from tests.unit.routing.world import M, World, starts

HEAD, OTHER = Prefix(1, 1000), Prefix(2, 1000)
SHORT = Prefix(3, 100)


def submit(world: World, name: str, *prefixes: Prefix, prompt: int = 1100, program: str = "") -> list[tuple[str, str]]:
    return starts(world.submit(name, tokens=prompt + 50, prompt=prompt, prefixes=prefixes, program=program))


def test_the_first_computes_a_long_beginning_and_the_others_follow_its_first_token() -> None:
    world = World(view("m-0", slots=4, kv_tokens=100_000))
    assert submit(world, "a", HEAD) == [("a", "m-0")]
    assert submit(world, "b", HEAD) == []
    assert submit(world, "c", HEAD) == []
    assert submit(world, "other", OTHER) == [("other", "m-0")]
    assert world.place("b") is Place.FOLLOWING

    assert starts(world.first_token("a/0")) == [("b", "m-0"), ("c", "m-0")]
    assert submit(world, "e", HEAD) == []  # there is no room


def test_where_the_leader_fails_the_next_one_leads() -> None:
    world = World(view("m-0", slots=4, kv_tokens=100_000))
    for name in "abc":
        submit(world, name, HEAD)

    assert starts(world.end("a/0", "refused")) == [("b", "m-0")]
    assert world.place("c") is Place.FOLLOWING
    assert starts(world.tokens("b/0", 1)) == [("c", "m-0")]


def test_who_follows_may_leave_and_gives_up_in_time() -> None:
    world = World(view("m-0", slots=4, kv_tokens=100_000))
    for name in "abc":
        submit(world, name, HEAD)

    world.cancel("b")
    world.advance(31.0)

    assert world.ended == {"b": "cancel", "c": "queue_timeout"}
    assert world.first_token("a/0") == []


def test_nobody_waits_for_what_is_soon_computed_or_for_slots_that_share_nothing() -> None:
    world = World(view("m-0", slots=2, kv_tokens=100_000))
    assert [submit(world, name, SHORT) for name in "ab"] == [[("a", "m-0")], [("b", "m-0")]]
    world = World(view("m-0", slots=2))
    assert [submit(world, name, HEAD) for name in "ab"] == [[("a", "m-0")], [("b", "m-0")]]
    world = World(view("m-0", slots=2, kv_tokens=100_000), fairness=Fairness(waves=False))
    assert [submit(world, name, HEAD) for name in "ab"] == [[("a", "m-0")], [("b", "m-0")]]


def test_what_lies_in_a_cache_draws_those_that_begin_alike() -> None:
    world = World(view("m-0", slots=3), view("m-1", slots=3))
    assert submit(world, "a", HEAD) == [("a", "m-0")]
    assert submit(world, "b", OTHER) == [("b", "m-1")]
    assert submit(world, "c", HEAD) == [("c", "m-0")]
    assert submit(world, "d", OTHER) == [("d", "m-1")]


def test_what_lies_in_a_cache_draws_nobody_where_that_is_switched_off() -> None:
    world = World(view("m-0", slots=3), view("m-1", slots=3), fairness=Fairness(affinity=False))
    assert submit(world, "a", HEAD) == [("a", "m-0")]
    assert submit(world, "b", HEAD) == [("b", "m-1")]


def test_a_group_spreads_over_workers_as_they_fill() -> None:
    world = World(view("m-0", slots=8), view("m-1", slots=8))
    pace = world.scheduler._books.workers[WorkerId("m-0")].pace
    pace.observe_prefill(1000, 1.0)
    for num in range(1, Pace.ENOUGH + 1):
        pace.observe_step(num, 0.009 * num)
    assert submit(world, "leader", HEAD) == [("leader", "m-0")]
    world.first_token("leader/0")

    placed = [submit(world, f"a{number}", HEAD)[0][1] for number in range(8)]

    assert placed[:2] == ["m-0", "m-0"]  # a leg more costs half of what the beginning does
    assert placed.count("m-1") == 4, "both hold it now"


def test_a_deadline_that_leaves_no_slack_goes_before_the_turn_of_others() -> None:
    world = World(view("m-0", slots=1), fairness=Fairness(rescue_share=1.0))
    world.submit("running", "a")
    for name in ("first", "second"):
        world.submit(name, "a", timeout=60.0)
    world.submit("late", "a", timeout=60.0, deadline=10.0)
    world.advance(1.0)
    assert starts(world.end("running/0")) == [("first", "m-0")]
    world.advance(6.0)

    assert starts(world.end("first/0")) == [("late", "m-0")]


def test_deadlines_of_those_that_have_gone_are_forgotten() -> None:
    world = World(view("m-0", slots=1))
    for number in range(1000):
        world.submit(f"r{number}", "a", deadline=1e6)
        world.cancel(f"r{number}")

    assert len(world.scheduler._books.models[M].line._rescue._heap) <= 128
