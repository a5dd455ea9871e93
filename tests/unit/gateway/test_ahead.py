"""When beginnings of prompts are computed ahead of their calls."""

from core.chat import Usage
from core.ids import ModelName
from gateway.runs.ahead import BURST, PAUSE_S, SHARE, Ahead
from tests.fakes.clock import ManualClock

M, OTHER = ModelName("m"), ModelName("n")


def test_no_more_is_computed_ahead_than_a_share_of_what_is_used() -> None:
    ahead = Ahead(ManualClock())
    assert ahead.begin(("run", "a"), M, BURST)
    assert not ahead.begin(("run", "b"), M, 1)
    assert ahead.begin(("run", "b"), OTHER, 1)

    ahead.used(("run", "c"), M, Usage(900, 100))

    assert ahead.begin(("run", "b"), M, int(SHARE * 1000))
    assert not ahead.begin(("run", "d"), M, 1)


def test_where_it_was_of_no_use_it_pauses() -> None:
    clock = ManualClock()
    ahead = Ahead(clock)
    for number in range(8):
        assert ahead.begin(("run", str(number)), M, 100)
        ahead.used(("run", str(number)), M, Usage(1000, 10, cached_tokens=100 if number < 3 else 0))

    assert not ahead.begin(("run", "x"), M, 100)
    clock.advance(PAUSE_S)
    assert ahead.begin(("run", "x"), M, 100)


def test_where_it_is_of_use_it_goes_on() -> None:
    ahead = Ahead(ManualClock())
    for number in range(50):
        assert ahead.begin(("run", str(number)), M, 100)
        ahead.used(("run", str(number)), M, Usage(10_000, 10, cached_tokens=0 if number % 2 else 50))
