"""The worker's state machine, driven by events under a clock that the test turns."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.driver import Health
from engines.spec import Lifecycle
from engines.worker import ILL_FOR_GOOD_S, IllegalEvent, Life, State
from tests.fakes.clock import ManualClock

TIMES = Lifecycle(fall=3, rise=2, backoff_base=0.5, backoff_max=4.0, backoff_reset=60.0)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def life(clock: ManualClock) -> Life:
    return Life(TIMES, clock)


@pytest.fixture
def ready(life: Life) -> Life:
    life.start_began()
    life.became_ready()
    return life


def probe(life: Life, *answers: Health) -> None:
    for answer in answers:
        life.probed(answer)


def test_a_worker_begins_stopped_and_may_start_at_once(life: Life) -> None:
    assert (life.state, life.start_delay, life.healthy, life.restarts) == (State.STOPPED, 0.0, False, 0)


def test_a_worker_goes_through_its_states_in_order(life: Life) -> None:
    seen = []
    for event in (life.start_began, life.became_ready, life.drain_began, life.stopped):
        event()
        seen.append(life.state)

    assert seen == [State.STARTING, State.READY, State.DRAINING, State.STOPPED]


def test_since_is_the_time_of_the_last_change_of_state(ready: Life, clock: ManualClock) -> None:
    clock.advance(5)
    probe(ready, "ok")
    assert ready.since == 1000.0

    ready.drain_began()

    assert ready.since == 1005.0


def test_a_worker_is_healthy_from_the_moment_it_is_ready(ready: Life) -> None:
    assert ready.healthy


def test_fewer_bad_probes_than_fall_change_nothing(ready: Life) -> None:
    probe(ready, "unreachable", "unhealthy", "ok", "unreachable", "loading")

    assert ready.healthy


def test_one_that_is_too_busy_for_probes_is_neither_absent_nor_ill_for_good(ready: Life, clock: ManualClock) -> None:
    for _ in range(10):
        probe(ready, "silent")
        clock.advance(10)

    assert not ready.healthy
    assert not ready.is_out_of_reach
    assert not ready.is_ill_for_good


def test_fall_bad_probes_in_a_row_make_it_unhealthy_and_leave_it_ready(ready: Life) -> None:
    probe(ready, "unreachable", "unhealthy", "loading")

    assert (ready.healthy, ready.state) == (False, State.READY)


def test_it_takes_rise_good_probes_in_a_row_to_be_healthy_again(ready: Life) -> None:
    probe(ready, "unreachable", "unreachable", "unreachable", "ok", "unreachable", "ok")
    assert not ready.healthy

    probe(ready, "ok")

    assert ready.healthy


def test_no_number_of_failed_probes_takes_a_ready_worker_away(ready: Life, clock: ManualClock) -> None:
    for _ in range(1000):
        probe(ready, "unreachable")
        clock.advance(10)

    assert ready.state is State.READY
    assert not ready.is_ill_for_good


def test_a_worker_that_only_says_it_is_ill_is_ill_for_good_in_the_end(ready: Life, clock: ManualClock) -> None:
    probe(ready, "unhealthy", "unhealthy", "unhealthy")
    assert not ready.is_ill_for_good

    clock.advance(ILL_FOR_GOOD_S)

    assert ready.is_ill_for_good


@pytest.mark.parametrize("answer", ["ok", "loading", "silent", "unreachable"])
def test_any_other_answer_starts_the_count_of_illness_anew(ready: Life, clock: ManualClock, answer: Health) -> None:
    probe(ready, "unhealthy", "unhealthy", "unhealthy")
    clock.advance(ILL_FOR_GOOD_S - 1)
    probe(ready, answer, "unhealthy", "unhealthy", "unhealthy")
    clock.advance(2)

    assert not ready.is_ill_for_good


def test_a_single_answer_of_illness_is_not_for_good_however_old(ready: Life, clock: ManualClock) -> None:
    probe(ready, "unhealthy")
    clock.advance(ILL_FOR_GOOD_S * 2)

    assert not ready.is_ill_for_good


def test_an_endpoint_is_out_of_reach_after_fall_silent_probes(ready: Life) -> None:
    probe(ready, "unreachable", "unreachable", "unhealthy", "unreachable", "unreachable")
    assert not ready.is_out_of_reach

    probe(ready, "unreachable")

    assert ready.is_out_of_reach


def test_each_crash_in_a_row_doubles_the_back_off_up_to_its_bound(life: Life, clock: ManualClock) -> None:
    delays = []
    for _ in range(6):
        life.start_began()
        life.crashed("no such model")
        delays.append(life.start_delay)
        clock.advance(life.start_delay)

    assert delays == [0.5, 1.0, 2.0, 4.0, 4.0, 4.0]


def test_a_failed_worker_tells_why_and_when_it_will_be_tried_again(life: Life, clock: ManualClock) -> None:
    life.start_began()
    life.crashed("no such model")
    assert (life.state, life.last_error, life.next_start_at) == (State.FAILED, "no such model", 1000.5)

    clock.advance(0.5)
    life.start_began()

    assert (life.start_delay, life.next_start_at, life.restarts) == (0.0, None, 1)


def test_a_worker_that_was_ready_for_long_enough_begins_its_back_off_anew(life: Life, clock: ManualClock) -> None:
    for _ in range(4):
        life.start_began()
        life.crashed("first")
    life.start_began()
    life.became_ready()
    clock.advance(TIMES.backoff_reset)

    life.crashed("second")

    assert life.start_delay == TIMES.backoff_base


def test_a_worker_that_crashes_soon_after_it_was_ready_keeps_backing_off(life: Life, clock: ManualClock) -> None:
    for _ in range(3):
        life.start_began()
        life.became_ready()
        clock.advance(TIMES.backoff_reset - 1)
        life.crashed("again")

    assert life.start_delay == 2.0


def test_an_operators_start_forgets_the_back_off(life: Life) -> None:
    for _ in range(5):
        life.start_began()
        life.crashed("wrong path")

    life.start_requested()
    assert life.start_delay == 0.0

    life.start_began()
    life.crashed("still wrong")
    assert life.start_delay == TIMES.backoff_base


def test_a_thousand_crashes_do_not_overflow_the_back_off(life: Life) -> None:
    for _ in range(2000):
        life.crashed("x")

    assert life.start_delay == TIMES.backoff_max


def test_a_drain_can_be_called_off(ready: Life) -> None:
    ready.drain_began()
    ready.drain_called_off()

    assert (ready.state, ready.healthy) == (State.READY, True)


def test_a_worker_that_never_was_ready_cannot_come_back_from_a_drain(life: Life) -> None:
    life.start_began()
    life.drain_began()

    with pytest.raises(IllegalEvent):
        life.drain_called_off()


def test_a_stopped_worker_cannot_become_ready_without_a_start(life: Life) -> None:
    with pytest.raises(IllegalEvent, match="stopped cannot become ready"):
        life.became_ready()


def test_a_new_start_forgets_what_probes_said_of_the_last_one(ready: Life) -> None:
    probe(ready, "unreachable", "unreachable", "unreachable")
    ready.crashed("gone")
    ready.start_began()
    ready.became_ready()
    probe(ready, "unreachable", "unreachable")

    assert ready.healthy


@given(st.lists(st.sampled_from(["ok", "loading", "silent", "unhealthy", "unreachable"]), max_size=60))
def test_health_follows_the_runs_of_equal_answers(answers: list[Health]) -> None:
    life = Life(TIMES, ManualClock())
    life.start_began()
    life.became_ready()
    expected = True
    for end, answer in enumerate(answers, start=1):
        life.probed(answer)
        if end >= TIMES.fall and "ok" not in answers[end - TIMES.fall : end]:
            expected = False
        elif end >= TIMES.rise and set(answers[end - TIMES.rise : end]) == {"ok"}:
            expected = True
        assert life.healthy is expected
