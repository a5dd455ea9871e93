"""Taking a slot from who is ahead for who is behind, and giving it back: the rules, one by one."""

import msgspec
import pytest

from core.ids import ModelName, RequestId, WorkerId
from routing.fairness.account import Place
from routing.fairness.policy import Fairness, Policy
from tests.fakes.workers import view
from tests.unit.routing.world import World, aborts, rejects, starts

EAGER = Fairness(threshold=10, credit=1000, quantum=4, penalty=5, waste_share=1.0, waste_burst=10_000)


def hogged(slots: int = 1, *, tokens: int = 40, fairness: Fairness = EAGER, pinned: bool = False) -> World:
    """Return a world whose slots are all taken by one tenant's answers, which have come some way."""
    world = World(view(slots=slots), fairness=fairness)
    for index in range(slots):
        world.submit(f"hog{index}", "hog", tokens=1000, prompt=10, pinned=pinned)
        world.first_token(f"hog{index}/0")
        world.tokens(f"hog{index}/0", tokens)
    world.advance(1.0)
    return world


def test_a_tenant_that_is_behind_takes_the_slot_of_one_that_is_ahead() -> None:
    world = hogged()

    assert aborts(world.submit("light", "light", prompt=5)) == [("hog0/0", "preempted")]
    assert starts(world.let_go()) == [("light", "m-0")]


def test_who_was_cut_goes_on_when_it_is_its_turn_again_and_nobody_notices() -> None:
    world = hogged()
    world.submit("light", "light", prompt=5)
    world.let_go()

    assert starts(world.end("light/0")) == [("hog0", "m-0")]
    world.end("hog0/1")
    assert world.ended == {"light": "leg", "hog0": "leg"}


def test_who_was_cut_waits_before_the_rest_of_its_program_and_behind_the_tenants_that_are_behind() -> None:
    world = hogged()
    world.submit("hog-next", "hog", prompt=10)
    world.now += EAGER.interval
    world.submit("light0", "light", prompt=5)
    world.submit("light1", "light", prompt=5)
    world.let_go()

    order = [starts(world.end("light0/0")), starts(world.end("light1/0")), starts(world.end("hog0/1"))]

    assert order == [[("light1", "m-0")], [("hog0", "m-0")], [("hog-next", "m-0")]]


def test_who_was_cut_waits_as_long_as_it_takes() -> None:
    world = hogged()
    world.submit("light", "light", prompt=5)
    world.let_go()

    assert world.advance(1e6) == []
    assert starts(world.end("light/0")) == [("hog0", "m-0")]


def test_the_slot_that_comes_free_is_for_whom_it_was_freed() -> None:
    world = hogged()
    world.submit("light", "light", prompt=5)
    world.submit("behind-all", "new", prompt=5, weight=9.0)
    assert world.place("light") is Place.CLAIMING

    assert starts(world.let_go()) == [("light", "m-0")]


def test_a_slot_that_comes_free_elsewhere_is_taken_first() -> None:
    world = hogged(2)
    world.submit("light", "light", prompt=5)
    (cut,) = world.cuts

    other = next(leg for leg in world.legs() if leg != cut)
    assert starts(world.end(other)) == [("light", "m-0")]
    assert starts(world.let_go()) == [(cut.partition("/")[0], "m-0")]


def test_a_claimant_that_goes_away_leaves_the_slot_to_whose_turn_it_is() -> None:
    world = hogged()
    world.submit("light", "light", prompt=5)
    world.cancel("light")

    assert starts(world.let_go()) == [("hog0", "m-0")]


def test_nobody_is_cut_before_the_difference_is_worth_it() -> None:
    world = hogged(tokens=4, fairness=msgspec.structs.replace(EAGER, threshold=20))
    assert aborts(world.submit("light", "light", prompt=5)) == []  # 10 + 2·4 = 18 ahead
    world.now += EAGER.interval
    assert aborts(world.tokens("hog0/0", 3)) == []  # 24, and to go on may cost a quarter of 17
    world.now += EAGER.interval

    assert aborts(world.tokens("hog0/0", 1)) == [("hog0/0", "preempted")]


def test_nobody_is_cut_while_more_was_wasted_than_should() -> None:
    world = hogged(fairness=msgspec.structs.replace(EAGER, waste_share=0.0))
    world.submit("light", "light", prompt=5)
    world.let_go()
    world.end("light/0")
    world.first_token("hog0/1", prefilled=5001)
    world.tokens("hog0/1", 40)
    world.now += EAGER.interval

    assert aborts(world.submit("again", "light", prompt=5)) == []
    assert world.scheduler.waste_left(ModelName("m")) == -1


@pytest.mark.parametrize("reason", ["pinned", "quantum", "nearly done", "policy", "draining"])
def test_a_leg_is_not_cut_if(reason: str) -> None:
    fairness = msgspec.structs.replace(
        EAGER, quantum=41 if reason == "quantum" else 4, policy="vtc" if reason == "policy" else "vtc-pc"
    )
    world = hogged(tokens=40, fairness=fairness, pinned=reason == "pinned")
    if reason == "nearly done":
        world.tokens("hog0/0", 948)
    if reason == "draining":
        world.worker(view(draining=True))

    assert aborts(world.submit("light", "light", prompt=5)) == []


def test_a_tenant_does_not_take_a_slot_from_itself() -> None:
    assert aborts(hogged().submit("more", "hog", prompt=5)) == []


def test_at_most_two_are_cut_in_one_decision_and_the_next_is_an_interval_later() -> None:
    world = hogged(6)
    cut = [leg for name in ("a", "b", "c") for leg in aborts(world.submit(name, name, prompt=5))]
    assert len(cut) == 1  # the first alone: nobody else waited then

    world.let_go()
    cut = aborts(world.tokens(world.legs()[0], 1))
    assert cut == []
    world.now += EAGER.interval
    assert len(aborts(world.tokens(world.legs()[0], 1))) == 2


def test_a_worker_that_has_not_let_go_of_two_is_not_asked_for_more() -> None:
    world = hogged(6)
    for name in ("a", "b", "c", "d"):
        world.submit(name, name, prompt=5)
    for _ in range(4):
        world.now += EAGER.interval
        world.tokens("hog0/0", 1)

    assert len(world.cuts) == 2


def test_a_slot_that_a_cancelled_answer_leaves_is_waited_for() -> None:
    world = hogged(2)
    world.cancel("hog0")

    assert aborts(world.submit("light", "light", prompt=5)) == []
    assert starts(world.end("hog0/0", "aborted")) == [("light", "m-0")]


def test_the_cheapest_of_the_tenant_furthest_ahead_is_cut_and_who_was_cut_before_is_spared() -> None:
    world = World(view(slots=3), fairness=EAGER)
    for name, tenant, prompt in (("long", "hog", 300), ("short", "hog", 10), ("other", "other", 10)):
        world.submit(name, tenant, tokens=1000, prompt=prompt, pinned=False)
        world.first_token(f"{name}/0")
        world.tokens(f"{name}/0", 40)
    world.now += 1.0

    assert aborts(world.submit("light", "light", prompt=5)) == [("short/0", "preempted")]


def test_going_on_is_not_charged_to_the_tenant_but_to_the_budget() -> None:
    world = hogged()
    world.submit("light", "light", prompt=5)
    world.let_go()
    world.end("light/0")
    before = {tenant.tenant: tenant.attained for tenant in world.scheduler.fairness_view(ModelName("m")).tenants}

    world.first_token("hog0/1", prefilled=50)

    values = world.scheduler.fairness_view(ModelName("m"))
    assert {tenant.tenant: tenant.attained for tenant in values.tenants} == before
    assert (values.wasted_tokens, values.lost_tokens) == (50, 0)


def test_an_answer_that_is_whole_and_cut_twice_leaves_nothing_held_in_the_budget() -> None:
    world = hogged()
    for time, light in enumerate(("first", "second")):
        world.submit(light, light, prompt=5)
        world.let_go()
        world.end(f"{light}/0")
        world.tokens(f"hog0/{time + 1}", 40)  # its engine tells of no first token
        world.advance(1.0)
    world.end("hog0/2")

    assert world.scheduler._books.models[ModelName("m")].line.waste.held == 0


def test_an_engine_that_tells_late_is_paid_for_as_expected_and_then_for_what_it_did() -> None:
    world = hogged()
    world.submit("light", "light", prompt=5)
    world.let_go()
    world.end("light/0")

    world.first_token("hog0/1")
    expected = world.scheduler.fairness_view(ModelName("m")).wasted_tokens
    world.tokens("hog0/1", 5)
    world.end("hog0/1", prefilled=50)

    assert 0 < expected < 50
    assert world.scheduler.fairness_view(ModelName("m")).wasted_tokens == 50


def test_going_on_after_a_failure_costs_neither_the_tenant_nor_the_budget() -> None:
    world = World(view("m-0"), view("m-1"))
    world.submit("a", pinned=False, tokens=100, prompt=10)
    world.first_token("a/0", prefilled=10)
    world.tokens("a/0", 20)

    assert starts(world.end("a/0", "lost", can_resume=True)) == [("a", "m-1")]
    world.first_token("a/1", prefilled=30)

    values = world.scheduler.fairness_view(ModelName("m"))
    assert (values.tenants[0].attained, values.wasted_tokens, values.lost_tokens, values.recovered) == (50, 0, 30, 1)


def test_a_prompt_is_charged_at_the_start_and_settled_to_what_was_computed() -> None:
    world = World(view())
    world.submit("a", prompt=100, tokens=200)
    (tenant,) = world.scheduler.fairness_view(ModelName("m")).tenants
    assert tenant.attained == 100

    world.first_token("a/0", prefilled=16)
    world.tokens("a/0", 3)

    (tenant,) = world.scheduler.fairness_view(ModelName("m")).tenants
    assert tenant.attained == 16 + 2 * 3


def test_a_cancelled_request_has_paid_for_what_was_produced() -> None:
    world = World(view())
    world.submit("a", prompt=10, tokens=200)
    world.tokens("a/0", 20)
    world.cancel("a")
    world.end("a/0", "aborted")

    (tenant,) = world.scheduler.fairness_view(ModelName("m")).tenants
    assert tenant.attained == 10 + 2 * 20


@pytest.mark.parametrize("cause", ["lost", "broken", "timed_out", "unreachable", "busy"])
def test_a_begun_answer_that_can_go_on_does_so_elsewhere(cause: str) -> None:
    world = World(view("m-0"), view("m-1"))
    world.submit("a", pinned=False, tokens=100)
    world.first_token("a/0")

    assert starts(world.end("a/0", cause, can_resume=True)) == [("a", "m-1")]  # type: ignore[arg-type]


def test_a_pinned_answer_fails_with_its_worker() -> None:
    world = World(view("m-0"), view("m-1"))
    world.submit("a", tokens=100)
    world.first_token("a/0")

    assert rejects(world.end("a/0", "lost", can_resume=True)) == [("a", "failed")]


def test_a_begun_answer_never_goes_on_with_another_model() -> None:
    world = World(view("m-0"), view("n-0"))
    world.submit("a", "t", "m", "n", pinned=False, tokens=100)
    world.first_token("a/0")
    world.end("a/0", "lost", can_resume=True)
    world.end("a/1", "lost", can_resume=True)
    world.advance(0.25)

    assert rejects(world.end("a/2", "lost", can_resume=True)) == [("a", "failed")]


def test_who_lost_its_worker_goes_before_all_that_wait() -> None:
    world = World(view(slots=2), fairness=EAGER)
    for name in ("a", "b"):
        world.submit(name, name, pinned=False, tokens=100)
        world.first_token(f"{name}/0")
    world.submit("c", "c")
    world.worker(view(slots=2, ready=False, may_return=True))
    for name in ("a", "b"):
        world.end(f"{name}/0", "lost", can_resume=True)
    world.advance(0.3)

    assert [name for name, _ in starts(world.worker(view(slots=2, incarnation=1)))] == ["a", "b"]


def test_every_decision_is_told_in_plain_words() -> None:
    world = hogged()
    world.submit("light", "light", prompt=5)
    world.let_go()
    world.end("light/0")

    told = [decision.text for decision in world.scheduler.explain(RequestId("hog0"))]
    assert told == [
        "preempted hog0 of tenant hog on m-0 for light of tenant light: light is 90 weighted tokens behind, "
        "threshold 10 + resume cost 12",
        "resumed hog0 of tenant hog on m-0 after 0.00 s",
    ]
    assert [decision.kind for decision in world.scheduler.explain(RequestId("light"))] == ["preempted", "started"]
    assert world.scheduler.explain(RequestId("unknown")) == ()


def test_a_model_that_nobody_asked_for_has_an_empty_view() -> None:
    world = World()

    assert world.scheduler.fairness_view(ModelName("x")).tenants == ()
    assert world.scheduler.waste_left(ModelName("x")) == 0.0
    assert World(fairness=Fairness(policy="vtc")).scheduler.waste_left(ModelName("m")) is None
    assert world.scheduler._books.models == {}


def test_a_policy_may_be_replaced_while_requests_wait() -> None:
    world = World(view(), fairness=Fairness(policy="vtc"))
    world.submit("running", "a", prompt=100)
    world.submit("second", "a", prompt=1)
    world.submit("third", "b", prompt=1)

    world.scheduler.fairness = {ModelName("m"): Fairness(policy="fcfs")}

    assert starts(world.end("running/0")) == [("second", "m-0")]
    assert world.scheduler.num_running(WorkerId("m-0")) == 1


def unread(policy: Policy = "vtc-pc") -> World:
    """Return a world whose slots are held by answers that nobody reads, with no budget for waste."""
    world = World(view(slots=3), fairness=Fairness(policy=policy, waste_share=0.0, waste_burst=1))
    for name in ("a", "b", "c"):
        world.submit(name, "slow", tokens=1000, prompt=10, pinned=name == "c")
        world.first_token(f"{name}/0", prefilled=10)
        world.tokens(f"{name}/0", 20)
        world.stall(f"{name}/0")
    return world


@pytest.mark.parametrize("policy", ["fcfs", "drr", "vtc", "vtc-pc", "priority"])
def test_slots_whose_engines_wait_for_a_reader_are_given_to_who_waits(policy: Policy) -> None:
    world = unread(policy)
    assert world.cuts == {}

    cut = [leg for name in ("x", "y", "z") for leg in aborts(world.submit(name, name, prompt=5))]

    assert cut == [("a/0", "preempted"), ("b/0", "preempted")], "the third must not be cut"
    assert starts(world.let_go()) == [("x", "m-0"), ("y", "m-0")]
    told = world.scheduler.explain(RequestId("a"))[0].text
    assert told == (
        "took the slot of a of tenant slow on m-0 for x of tenant x: the engine waited for the reader of the answer"
    )


def test_an_engine_that_comes_to_wait_for_a_reader_while_somebody_waits_gives_its_slot_at_once() -> None:
    world = World(view(), fairness=Fairness(policy="fcfs"))
    world.submit("a", "slow", tokens=1000, prompt=10, pinned=False)
    world.first_token("a/0", prefilled=10)
    world.submit("x", "x")

    assert aborts(world.stall("a/0")) == [("a/0", "preempted")]
    assert world.stall("a/0") == []
    assert starts(world.let_go()) == [("x", "m-0")]
    assert world.stall("a/0") == []


def test_the_tenant_pays_for_what_its_slow_reader_makes_an_engine_compute_again() -> None:
    world = unread()
    world.submit("x", "x", prompt=5)
    world.let_go()
    before = world.scheduler.fairness_view(ModelName("m"))
    world.end("x/0")
    world.first_token("a/1", prefilled=30)

    after = world.scheduler.fairness_view(ModelName("m"))
    assert after.tenants[0].attained == before.tenants[0].attained + 30
    assert (after.wasted_tokens, after.lost_tokens) == (0, 0)


def test_a_slow_reader_on_a_worker_that_drains_is_left_to_the_drain() -> None:
    world = unread()
    world.worker(view(slots=3, draining=True))

    assert aborts(world.submit("x", "x")) == []
