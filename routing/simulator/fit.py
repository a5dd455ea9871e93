"""From measured steps to the four numbers of a step's time, and how wrong they are on steps that were held back."""

from collections.abc import Sequence

import msgspec

from routing.simulator.engine import StepTime

MAPE_LIMIT = 0.15
"""The mean absolute error above which a fit supports no claim (the gate of BLIS, inference-sim)."""


class Step(msgspec.Struct, frozen=True):
    """A measured step: how many sequences gained a token, tokens in memory, prompt tokens computed, and its seconds."""

    batch: float
    kv: float
    prefill: float
    seconds: float


class Fit(msgspec.Struct, frozen=True):
    """The numbers, and their mean absolute percentage error (0.1: 10 %) on the ``num_held_out`` steps not fitted to."""

    step: StepTime
    mape: float
    num_used: int
    num_held_out: int

    @property
    def is_good(self) -> bool:
        """Whether results with it may be claimed for the engine measured."""
        return self.mape <= MAPE_LIMIT


class TooFewSteps(Exception):
    """Fewer than eight steps: four numbers and their error need more."""


def fit(steps: Sequence[Step]) -> Fit:
    """Fit by least squares of the relative error, no number below 0; every third step is held out to measure the error.

    Raises ``TooFewSteps``.
    """
    if len(steps) < 8:
        raise TooFewSteps(f"{len(steps)} steps were measured; at least 8 are needed")
    held_out = list(steps[2::3])
    used = [one for index, one in enumerate(steps) if index % 3 != 2]
    found = _not_negative(used)
    return Fit(step=found, mape=mape(found, held_out), num_used=len(used), num_held_out=len(held_out))


def mape(step: StepTime, steps: Sequence[Step]) -> float:
    """Return the mean of |predicted - measured| / measured."""
    wrong = (abs(step.seconds(one.batch, one.kv, one.prefill) - one.seconds) / one.seconds for one in steps)
    return sum(wrong) / len(steps)


def _not_negative(steps: Sequence[Step]) -> StepTime:
    """Drop the most negative number and fit the others again until none is."""
    terms = [0, 1, 2, 3]
    while True:
        found = _least_squares(steps, terms)
        worst = min(terms, key=lambda term: found[term])
        if found[worst] >= 0:
            return StepTime(*found)
        terms.remove(worst)


def _least_squares(steps: Sequence[Step], terms: list[int]) -> list[float]:
    """Solve the normal equations of the chosen terms by elimination, columns scaled to the same size."""
    rows = [[(1.0, one.batch, one.kv, one.prefill)[term] / one.seconds for term in terms] for one in steps]
    scales = [max(1e-30, *(abs(row[column]) for row in rows)) for column in range(len(terms))]
    scaled = [[value / scale for value, scale in zip(row, scales, strict=True)] for row in rows]
    size = len(terms)
    system = [
        [sum(row[i] * row[j] for row in scaled) + (1e-12 if i == j else 0.0) for j in range(size)]
        + [sum(row[i] for row in scaled)]
        for i in range(size)
    ]
    for i in range(size):
        pivot = max(range(i, size), key=lambda row: abs(system[row][i]))
        system[i], system[pivot] = system[pivot], system[i]
        for j in range(size):
            if j != i:
                factor = system[j][i] / system[i][i]
                system[j] = [a - factor * b for a, b in zip(system[j], system[i], strict=True)]
    found = [0.0] * 4
    for i, term in enumerate(terms):
        found[term] = system[i][size] / system[i][i] / scales[i]
    return found
