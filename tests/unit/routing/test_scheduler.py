"""The scheduler's rules, one by one."""

import pytest

from routing.fairness.policy import Fairness
from routing.scheduler import BUSY_PAUSE_S, Abort, Cause, FirstToken, LegEnded, Limits, Reject, Tokens, WorkerView
from tests.fakes.workers import view
from tests.unit.routing.world import World, aborts, rejects, starts


def gone(worker: str = "m-0") -> WorkerView:
    return view(worker, ready=False, may_return=False)


def away(worker: str = "m-0") -> WorkerView:
    return view(worker, ready=False, may_return=True)


def test_a_request_starts_at_once_where_there_is_room() -> None:
    world = World(view())

    assert starts(world.submit("a")) == [("a", "m-0")]


def test_a_request_waits_where_there_is_none() -> None:
    world = World(view())
    world.submit("a")

    assert world.submit("b") == []
    assert world.waiting == {"b"}


def test_the_worker_with_the_fewest_outstanding_tokens_is_chosen() -> None:
    world = World(view("m-0", slots=2), view("m-1", slots=2))
    world.submit("long", tokens=100)
    world.submit("short", tokens=10)

    assert starts(world.submit("next")) == [("next", "m-1")]


def test_delivered_tokens_are_no_longer_outstanding() -> None:
    world = World(view("m-0", slots=2), view("m-1", slots=2))
    world.submit("long", tokens=100)
    world.submit("short", tokens=10)

    world.tokens("long/0", 95)

    assert starts(world.submit("next")) == [("next", "m-0")]


def test_a_worker_whose_memory_is_nearly_full_gets_nothing_until_there_is_room() -> None:
    world = World(view("m-0", slots=9, kv_tokens=1000))
    world.submit("a", prompt=600, tokens=1000)
    world.tokens("a/0", 140)
    assert starts(world.submit("b", prompt=5)) == [("b", "m-0")]
    world.tokens("a/0", 20)

    assert world.submit("c", prompt=5) == []
    assert starts(world.end("b/0")) == []
    assert starts(world.end("a/0")) == [("c", "m-0")]


def test_a_worker_always_has_room_for_one_whatever_its_memory() -> None:
    world = World(view("m-0", slots=2, kv_tokens=100))

    assert starts(world.submit("long", prompt=500, tokens=600)) == [("long", "m-0")]
    assert world.submit("next") == []


def test_what_an_engine_has_in_its_cache_already_takes_no_more_of_its_memory() -> None:
    world = World(view("m-0", slots=100, kv_tokens=1000))
    for number in range(60):
        world.submit(f"r{number}", prompt=500, tokens=600)
        world.first_token(f"r{number}/0", prefilled=5)
        world.end(f"r{number}/0")

    for number in range(12):
        assert starts(world.submit(f"s{number}", prompt=500, tokens=600)) == [(f"s{number}", "m-0")]


def test_nobody_is_cut_where_the_slot_could_not_be_used_for_want_of_memory() -> None:
    eager = Fairness(threshold=10, credit=1000, quantum=4, waste_share=1.0, waste_burst=10_000)
    world = World(view("m-0", slots=2, kv_tokens=1000), fairness=eager)
    for name, tenant, prompt in (("huge", "other", 700), ("small", "hog", 10)):
        world.submit(name, tenant, prompt=prompt, tokens=5000, pinned=False)
        world.first_token(f"{name}/0", prefilled=prompt)
    world.tokens("huge/0", 100)
    world.tokens("small/0", 500)  # its tenant is further ahead, but without it there would be no room either
    world.now += 1.0

    assert aborts(world.submit("light", "light", prompt=5)) == [("huge/0", "preempted")]


def test_an_ill_worker_gets_what_no_healthy_one_can_take() -> None:
    world = World(view("m-0", healthy=False), view("m-1"))

    assert starts(world.submit("a") + world.submit("b")) == [("a", "m-1"), ("b", "m-0")]


def test_a_model_without_workers_rejects_at_once() -> None:
    assert rejects(World().submit("a")) == [("a", "no_healthy_worker")]


def test_requests_wait_for_a_worker_that_may_return_and_get_it() -> None:
    world = World(away())
    assert world.submit("a") == []

    assert starts(world.worker(view(incarnation=1))) == [("a", "m-0")]


def test_all_that_wait_are_rejected_when_the_last_worker_is_gone_for_good() -> None:
    world = World(view("m-0"), view("m-1"))
    for index in range(5):
        world.submit(f"r{index}", f"tenant{index % 2}")
    assert world.worker(gone("m-1")) == []

    effects = world.worker(gone("m-0"))

    assert sorted(rejects(effects)) == [(f"r{index}", "no_healthy_worker") for index in (2, 3, 4)]


def test_a_full_queue_rejects_and_says_when_to_come_again() -> None:
    world = World(view(), limits=Limits(queue=2, queue_per_tenant=2))
    for name in ("running", "first", "second"):
        world.submit(name)

    (reject,) = world.submit("third", "another")

    assert reject == Reject(request=reject.request, why="queue_full", retry_after=1.0)  # type: ignore[union-attr]


def test_a_tenants_full_queue_leaves_room_for_others() -> None:
    world = World(view(), limits=Limits(queue=9, queue_per_tenant=1))
    world.submit("running")
    world.submit("first")

    assert rejects(world.submit("second")) == [("second", "queue_full")]
    assert world.submit("third", "another") == []


def test_a_request_that_has_waited_long_enough_is_rejected() -> None:
    world = World(view())
    world.submit("running")
    world.submit("a", timeout=5.0)
    assert world.scheduler.next_wakeup() == world.now + 5.0

    assert world.advance(4.9) == []
    assert rejects(world.advance(0.1)) == [("a", "queue_timeout")]


def test_the_reason_is_the_worker_if_there_was_none_all_the_while() -> None:
    world = World(away())
    world.submit("a", timeout=5.0)

    assert rejects(world.advance(5.0)) == [("a", "no_healthy_worker")]


@pytest.mark.parametrize("cause", ["busy", "broken", "lost", "timed_out", "unreachable"])
def test_before_the_first_byte_another_worker_is_tried(cause: Cause) -> None:
    world = World(view("m-0"), view("m-1"))
    world.submit("a")

    assert starts(world.end("a/0", cause)) == [("a", "m-1")]


@pytest.mark.parametrize("cause", ["refused", "broken", "lost", "timed_out", "busy", "unreachable", "aborted"])
def test_after_the_first_byte_nothing_is_tried_again(cause: Cause) -> None:
    world = World(view("m-0"), view("m-1"))
    world.submit("a")
    world.first_token("a/0")

    assert rejects(world.end("a/0", cause)) == [("a", "failed")]


def test_what_an_engine_refuses_is_not_tried_again() -> None:
    world = World(view("m-0"), view("m-1"))
    world.submit("a", "t", "m", "n")

    assert rejects(world.end("a/0", "refused")) == [("a", "failed")]


def test_attempts_are_bounded() -> None:
    world = World(view(), limits=Limits(attempts=3))
    world.submit("a")
    world.end("a/0", "busy", 0.0)
    world.end("a/1", "busy", 0.0)

    assert rejects(world.end("a/2", "busy", 0.0)) == [("a", "failed")]


def test_a_leg_that_no_worker_saw_is_no_attempt() -> None:
    world = World(*(view(f"m-{index}") for index in range(5)), limits=Limits(attempts=1))
    world.submit("a")

    for leg in range(4):
        assert starts(world.end(f"a/{leg}", "unreachable")) == [("a", f"m-{leg + 1}")]
    assert rejects(world.end("a/4", "broken")) == [("a", "failed")]


def test_a_worker_that_is_never_reached_costs_no_more_than_the_queue_timeout() -> None:
    world = World(view())
    world.submit("a", timeout=5.0)

    for _ in range(100):
        for leg in world.legs():
            world.end(leg, "unreachable")
        world.advance(0.1)

    assert world.ended == {"a": "queue_timeout"}


def test_a_retried_request_goes_before_those_that_wait() -> None:
    world = World(view())
    world.submit("first", "x")
    world.submit("second", "y")
    world.submit("third", "x")

    assert starts(world.end("first/0", "lost")) == [("first", "m-0")]


def test_an_engines_advice_is_followed_before_the_retry() -> None:
    world = World(view())
    world.submit("a")
    world.end("a/0", "busy", 3.0)
    assert world.scheduler.next_wakeup() == world.now + 3.0

    assert world.advance(2.9) == []
    assert starts(world.advance(0.1)) == [("a", "m-0")]


def test_a_busy_engine_without_advice_is_left_alone_a_little_longer_each_time() -> None:
    world = World(view())
    world.submit("a")
    world.end("a/0", "busy")
    assert world.advance(BUSY_PAUSE_S * 0.9) == []
    assert starts(world.advance(BUSY_PAUSE_S * 0.1)) == [("a", "m-0")]

    world.end("a/1", "busy")

    assert world.advance(BUSY_PAUSE_S * 1.9) == []
    assert starts(world.advance(BUSY_PAUSE_S * 0.2)) == [("a", "m-0")]


def test_another_worker_is_tried_at_once_when_one_is_busy() -> None:
    world = World(view(), view("m-1"))
    world.submit("a")

    assert starts(world.end("a/0", "busy")) == [("a", "m-1")]


def test_advice_that_is_too_long_ends_the_tries() -> None:
    world = World(view(), view("n-0"), limits=Limits(max_retry_after=10.0))
    world.submit("a", "t", "m", "n")

    assert starts(world.end("a/0", "busy", 11.0)) == [("a", "n-0")]
    assert rejects(world.end("a/1", "busy", 11.0)) == [("a", "failed")]


def test_a_request_that_has_to_wait_for_its_time_blocks_neither_its_tenant_nor_others() -> None:
    world = World(view())
    world.submit("later", "x")
    world.end("later/0", "busy", 5.0)

    assert starts(world.submit("same", "x")) == [("same", "m-0")]
    world.submit("other", "y")
    assert starts(world.end("same/0")) == [("other", "m-0")]


def test_fallbacks_are_used_in_order() -> None:
    world = World(view("m-0"), view("n-0"), view("o-0"), limits=Limits(attempts=1))
    world.submit("a", "t", "m", "n", "o")

    assert starts(world.end("a/0", "broken")) == [("a", "n-0")]
    assert starts(world.end("a/1", "lost")) == [("a", "o-0")]
    assert rejects(world.end("a/2", "timed_out")) == [("a", "failed")]


def test_a_full_queue_a_missing_worker_and_a_long_wait_lead_to_the_fallback() -> None:
    world = World(view("m-0"), view("n-0", slots=9), limits=Limits(queue=1))
    world.submit("running")
    world.submit("waiting", "t", "m", "n", timeout=5.0)

    assert starts(world.submit("full", "t", "m", "n")) == [("full", "n-0")]
    assert starts(world.submit("missing", "t", "gone", "n")) == [("missing", "n-0")]
    assert starts(world.advance(5.0)) == [("waiting", "n-0")]


def test_a_fallback_that_is_gone_too_ends_the_request_once() -> None:
    world = World(away("m-0"), gone("n-0"))
    world.submit("a", "t", "m", "n", "m")

    assert rejects(world.worker(gone("m-0"))) == [("a", "no_healthy_worker")]


def test_a_cancelled_request_that_waits_is_forgotten() -> None:
    world = World(view())
    world.submit("running")
    world.submit("a")

    assert world.cancel("a") == []
    assert world.end("running/0") == []
    assert world.scheduler.next_wakeup() is None


def test_a_cancelled_legs_slot_is_taken_until_it_has_ended() -> None:
    world = World(view())
    world.submit("a")
    world.submit("b")

    (abort,) = world.cancel("a")

    assert abort == Abort(leg=world.legs()[0], why="cancelled")
    assert world.scheduler.num_running(view().id) == 1
    assert starts(world.end("a/0", "aborted")) == [("b", "m-0")]


def test_a_second_cancel_says_nothing() -> None:
    world = World(view())
    world.submit("a")
    world.cancel("a")

    assert world.cancel("a") == []


def test_news_of_a_leg_that_has_ended_says_nothing() -> None:
    world = World(view())
    world.submit("a")
    leg = world.legs()[0]
    world.end(leg)

    late = (
        FirstToken(leg=leg, now=world.now),
        Tokens(leg=leg, num=1, now=world.now),
        LegEnded(leg=leg, cause="lost", now=world.now),
    )

    assert [world.feed(event) for event in late] == [[], [], []]


def test_a_worker_that_fails_twice_rests_until_its_trial() -> None:
    world = World(view(slots=2), limits=Limits(attempts=1))
    for name in ("a", "b"):
        world.submit(name)
        world.end(f"{name}/0", "broken")
    world.submit("c")
    world.submit("d")
    assert not world.running

    assert starts(world.advance(0.25)) == [("c", "m-0")]
    assert starts(world.end("c/0")) == [("d", "m-0")]


def test_a_worker_that_was_started_anew_is_trusted_at_once() -> None:
    world = World(view(), limits=Limits(attempts=1))
    for name in ("a", "b"):
        world.submit(name)
        world.end(f"{name}/0", "lost")
    world.submit("c")

    assert starts(world.worker(view(incarnation=1))) == [("c", "m-0")]


def test_what_a_dead_incarnation_left_is_not_held_against_the_new_one() -> None:
    world = World(view(slots=3), limits=Limits(attempts=1))
    for name in ("a", "b"):
        world.submit(name)
    world.worker(view(slots=3, incarnation=1))
    for name in ("a", "b"):
        world.end(f"{name}/0", "lost")

    assert starts(world.submit("c")) == [("c", "m-0")]


def test_a_worker_may_hold_more_than_a_bound_that_was_lowered_and_gets_nothing_until_it_fits() -> None:
    world = World(view(slots=2))
    for name in ("a", "b", "c"):
        world.submit(name)
    world.worker(view(slots=1))

    assert world.end("a/0") == []
    assert starts(world.end("b/0")) == [("c", "m-0")]
