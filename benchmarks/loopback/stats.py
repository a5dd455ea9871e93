"""Medians with intervals, and nothing finer than what the samples bear."""

import random
import statistics
from collections.abc import Sequence
from typing import NamedTuple

RESAMPLES = 2000
P99_SAMPLES = 300


class Interval(NamedTuple):
    """A median over rounds and the 95 % bootstrap interval of it."""

    middle: float
    low: float
    high: float

    def show(self, digits: int = 2) -> str:
        """As text, `middle [low–high]`."""
        return f"{self.middle:,.{digits}f} [{self.low:,.{digits}f}–{self.high:,.{digits}f}]"


def interval(values: Sequence[float]) -> Interval:
    """Median of `values` with the percentile bootstrap's 95 % interval; of three values or fewer, all of their range.

    The draws are seeded, so the same values always give the same interval.
    """
    draw = random.Random(len(values))
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(RESAMPLES))
    cut = RESAMPLES // 40
    return Interval(statistics.median(values), medians[cut], medians[-1 - cut])


def p99(values: Sequence[float]) -> float | None:
    """The 99th percentile, or None where there are fewer samples than it needs."""
    if len(values) < P99_SAMPLES:
        return None
    return sorted(values)[len(values) * 99 // 100]
