"""Step times from measurements."""

import random

import pytest

from routing.simulator.engine import StepTime
from routing.simulator.fit import Step, TooFewSteps, fit

TRUE = StepTime(base=0.02, per_sequence=0.001, per_kv_token=2e-6, per_prefill_token=0.0002)


def steps(noise: float, step: StepTime = TRUE) -> list[Step]:
    rng = random.Random(1)
    found = []
    for _ in range(60):
        batch, kv, prefill = rng.randrange(1, 24), rng.randrange(100, 40_000), rng.choice((0, 0, 128, 512))
        seconds = step.seconds(batch, kv, prefill) * (1 + rng.uniform(-noise, noise))
        found.append(Step(batch, kv, prefill, seconds))
    return found


def test_exact_steps_give_the_four_numbers_back() -> None:
    found = fit(steps(0.0))
    for name in StepTime.__struct_fields__:
        assert getattr(found.step, name) == pytest.approx(getattr(TRUE, name), rel=1e-6)
    assert found.mape == pytest.approx(0.0, abs=1e-9)
    assert (found.num_used, found.num_held_out) == (40, 20)
    assert found.is_good


def test_noise_shows_in_the_error_of_the_steps_held_out() -> None:
    found = fit(steps(0.1))
    assert 0.02 < found.mape < 0.1
    assert found.is_good
    assert not fit(steps(0.6)).is_good


def test_a_number_that_would_be_negative_is_zero() -> None:
    found = fit(steps(0.0, StepTime(base=0.05, per_sequence=-0.0005, per_kv_token=0.0, per_prefill_token=0.0002)))
    assert min(getattr(found.step, name) for name in StepTime.__struct_fields__) == 0.0


def test_too_few_steps_are_no_fit() -> None:
    with pytest.raises(TooFewSteps, match="at least 8"):
        fit(steps(0.0)[:7])
