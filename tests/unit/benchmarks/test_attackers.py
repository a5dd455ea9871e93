"""What attackers cost is told with an interval that knows of turns."""

import random

import pytest

from benchmarks.attackers import ratio
from benchmarks.loopback.processes import Failed


def turns(num: int, *, factor: float = 1.0, slow: int = 0) -> list[list[float]]:
    """Turns of latencies around a tenth of a second; the first ``slow`` of them are five times as slow."""
    draw = random.Random(num)
    scale = [5.0 if number < slow else factor for number in range(num)]
    return [[each * draw.uniform(0.09, 0.11) for _ in range(160)] for each in scale]


def test_the_same_on_both_sides_is_one() -> None:
    found = ratio(turns(6), turns(7))

    assert found.low <= 1.0 <= found.high
    assert found.high - found.low < 0.1


def test_what_is_slower_is_told_to_be() -> None:
    assert ratio(turns(6, factor=1.3), turns(7)).low > 1.2


def test_one_bad_second_of_the_machine_widens_the_interval_and_decides_nothing() -> None:
    found = ratio(turns(6, slow=1), turns(7))

    assert found.low < 1.1
    assert found.high > 4


def test_too_few_answers_are_no_percentile() -> None:
    with pytest.raises(Failed, match="more rounds"):
        ratio(turns(1), turns(7))
