"""How often an engine is asked what it has kept of an answer that was cut."""

from engines.drivers.keeping import Keeping


def asked(keeping: Keeping, num: int, *, context: int = 1000, prefilled: int = 8) -> int:
    """Let so many answers go on, and return for how many of them the engine was asked."""
    times = 0
    for _ in range(num):
        if keeping.asks_now():
            times += 1
            keeping.learn(context, prefilled)
    return times


def test_an_engine_that_keeps_all_is_asked_for_the_first_few_and_then_for_every_eighth() -> None:
    keeping = Keeping()
    assert asked(keeping, 4) == 4
    assert asked(keeping, 80) == 10
    assert keeping.expected == 8


def test_an_engine_that_forgets_is_asked_each_time() -> None:
    assert asked(Keeping(), 20, prefilled=900) == 20


def test_an_engine_that_begins_to_forget_is_asked_again_from_the_first_time_that_it_shows() -> None:
    keeping = Keeping()
    asked(keeping, 20)
    keeping.learn(1000, 700)  # the end of a stream tells it, too
    assert asked(keeping, 4) == 4
    assert keeping.expected < 20, "what comes after a change counts anew"


def test_a_short_context_of_which_a_block_is_lost_was_kept() -> None:
    keeping = Keeping()
    assert asked(keeping, 20, context=40, prefilled=31) < 20
