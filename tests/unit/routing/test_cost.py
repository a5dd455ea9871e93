"""What a worker's legs tell of what its time goes into."""

import math

import pytest

from routing.scheduler.cost import Cost


def worked(
    shared_s: float, token_s: float, *, prompt: int = 200, answer: int = 50, batches: tuple[int, ...] = (1, 4)
) -> Cost:
    """Return what is known after legs that came in batches: prompts one by one, then answers side by side."""
    cost, now = Cost(), 0.0
    for num in batches:
        for _ in range(num):
            cost.start(now)
        for _ in range(num):
            now += shared_s + prompt * token_s
            cost.begin(now)
            cost.computed(prompt)
        for _ in range(answer):
            cost.deliver(num)
            now += shared_s + num * token_s
        for _ in range(num):
            cost.end(now, has_begun=True)
    return cost


@pytest.mark.parametrize(("shared_s", "token_s"), [(0.0, 0.01), (0.02, 0.001), (0.01, 0.0001)])
@pytest.mark.parametrize("batches", [(1, 4), (2, 8, 8), (1, 1)])
def test_of_an_engine_that_works_as_assumed_the_best_number_of_legs_is_told(
    shared_s: float, token_s: float, batches: tuple[int, ...]
) -> None:
    best = worked(shared_s, token_s, batches=batches).best_legs(20, prompt=200, answer=50)
    expected = math.sqrt(20 * 50 * shared_s / (250 * token_s))
    assert best == pytest.approx(expected, rel=0.05, abs=0.1)


def test_tokens_of_answers_that_cost_more_than_those_of_prompts_are_seen_once_the_number_of_legs_changes() -> None:
    def after(*batches: int) -> float:
        cost, now = Cost(), 0.0
        for num in batches:
            for _ in range(num):
                cost.start(now)
                now += 2.0
                cost.begin(now)
                cost.computed(200)
            for _ in range(50):
                cost.deliver(num)
                now += num * 0.04
            for _ in range(num):
                cost.end(now, has_begun=True)
        best = cost.best_legs(20, prompt=200, answer=50)
        assert best is not None
        return best

    assert after(1, 1) > 1.0
    assert after(3, 3) == 0.0  # fewer are to be tried
    assert after(3, 1) < 0.1


def test_nothing_is_told_of_an_engine_that_does_not_tell_what_it_computes() -> None:
    cost = Cost()
    cost.start(0.0)
    cost.begin(1.0)
    cost.deliver(500)
    cost.end(5.0, has_begun=True)
    assert cost.best_legs(20, prompt=200, answer=50) is None


def test_as_long_as_prompts_never_pause_one_leg_is_best_so_that_they_do() -> None:
    cost = Cost()
    cost.start(0.0)
    cost.start(0.0)
    cost.begin(1.0)
    cost.computed(200)
    cost.deliver(500)
    assert cost.best_legs(20, prompt=200, answer=50) == 0.0


def test_short_prompts_alone_tell_nothing() -> None:
    assert worked(0.02, 0.0001, prompt=1, batches=(8,) * 10).best_legs(20, prompt=200, answer=50) is None


def test_what_was_long_ago_counts_little() -> None:
    cost, now = worked(0.0, 0.01), 100.0
    for _ in range(1000):  # the same worker has a better engine now
        cost.start(now)
        now += 0.02 + 0.2
        cost.begin(now)
        cost.computed(2000)
        for _ in range(50):
            cost.deliver(1)
            now += 0.0201
        cost.end(now, has_begun=True)
    best = cost.best_legs(20, prompt=200, answer=50)
    assert best == pytest.approx(math.sqrt(20 * 50 * 0.02 / (250 * 0.0001)), rel=0.05)


def test_of_a_worker_that_stays_full_nothing_is_told_after_a_while() -> None:
    cost, now = Cost(), 0.0
    cost.start(now)
    told = []
    for _ in range(40):  # another prompt always comes before the one before it is done
        cost.start(now)
        now += 1.0
        cost.begin(now)
        cost.computed(200)
        cost.deliver(10)
        told.append(cost.best_legs(20, prompt=200, answer=50))
    assert told[0] == 0.0
    assert told[-1] is None


def test_nothing_is_told_while_answers_come_whole() -> None:
    cost = worked(0.02, 0.001)
    assert cost.best_legs(20, prompt=200, answer=50)
    cost.start(100.0)
    cost.end(105.0, has_begun=False)
    cost.computed(200)
    cost.pass_over()
    assert cost.best_legs(20, prompt=200, answer=50) is None
    for number in range(Cost.WHOLE):
        cost.start(110.0 + number)
        cost.begin(110.2 + number)
        cost.computed(200)
        cost.end(110.5 + number, has_begun=True)
    assert cost.best_legs(20, prompt=200, answer=50) is not None
