"""The breaker of one worker."""

import pytest

from routing.breaker import Breaker


@pytest.fixture
def breaker() -> Breaker:
    return Breaker()


@pytest.fixture
def tripped(breaker: Breaker) -> Breaker:
    for _ in range(Breaker.THRESHOLD):
        breaker.on_start()
        breaker.on_failure(100.0, was_trial=False)
    return breaker


def test_one_failure_changes_nothing(breaker: Breaker) -> None:
    breaker.on_failure(100.0, was_trial=False)

    assert breaker.allows(100.0)
    assert breaker.open_until is None


def test_failures_count_only_in_a_row(breaker: Breaker) -> None:
    for _ in range(5):
        breaker.on_failure(100.0, was_trial=False)
        breaker.on_success()

    assert breaker.allows(100.0)


def test_two_failures_in_a_row_open_it_for_a_quarter_of_a_second(tripped: Breaker) -> None:
    assert not tripped.allows(100.24)
    assert tripped.allows(100.25)
    assert tripped.open_until == 100.25


def test_after_the_cool_down_one_trial_is_let_through(tripped: Breaker) -> None:
    assert tripped.on_start()

    assert not tripped.allows(200.0)


def test_a_good_trial_closes_it(tripped: Breaker) -> None:
    tripped.on_start()
    tripped.on_success()

    assert tripped.allows(100.3)
    assert not tripped.on_start()


def test_each_failed_trial_doubles_the_cool_down_up_to_a_bound(tripped: Breaker) -> None:
    waits, now = [], 100.25
    for _ in range(8):
        tripped.on_start()
        tripped.on_failure(now, was_trial=True)
        assert tripped.open_until is not None
        waits.append(tripped.open_until - now)
        now = tripped.open_until

    assert waits == pytest.approx([0.5, 1, 2, 4, 8, 10, 10, 10])


def test_success_forgets_the_long_cool_down(tripped: Breaker) -> None:
    tripped.on_start()
    tripped.on_failure(101.0, was_trial=True)
    tripped.on_success()
    for _ in range(2):
        tripped.on_failure(200.0, was_trial=False)

    assert tripped.open_until == 200.25


def test_failures_of_older_legs_do_not_double_it(tripped: Breaker) -> None:
    for _ in range(5):
        tripped.on_failure(100.1, was_trial=False)

    assert tripped.open_until == pytest.approx(100.35)


def test_a_trial_without_result_frees_the_place_for_another(tripped: Breaker) -> None:
    tripped.on_start()
    tripped.on_inconclusive(was_trial=True)

    assert tripped.allows(100.3)


def test_only_the_trial_itself_frees_its_place(tripped: Breaker) -> None:
    tripped.on_start()
    tripped.on_inconclusive(was_trial=False)
    tripped.on_failure(100.3, was_trial=False)

    assert not tripped.allows(200.0)
