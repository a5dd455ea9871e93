"""Nouns: ids, errors, calls and clocks."""

import time

import msgspec
import pytest

from core import errors
from core.chat import Call, Timeouts
from core.clock import Clock, SystemClock
from core.errors import ForebayError, UpstreamBusy, UpstreamError, WorkerLost
from core.ids import new_request_id
from tests.fakes.clock import ManualClock
from tests.fakes.drivers import call


def classes() -> list[type[ForebayError]]:
    return [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, ForebayError)]


def test_request_ids_are_long_and_never_the_same() -> None:
    made = {new_request_id() for _ in range(1000)}

    assert len(made) == 1000
    assert all(made_id.startswith("req_") and len(made_id) == 36 for made_id in made)


def test_the_tree_in_the_docstring_is_the_tree_of_classes() -> None:
    assert errors.__doc__ is not None
    drawn = {line.split("── ")[1].split()[0] for line in errors.__doc__.splitlines() if "── " in line}

    assert drawn == {kind.__name__ for kind in classes()} - {"ForebayError"}


@pytest.mark.parametrize("kind", classes())
def test_an_error_keeps_what_it_was_given(kind: type[ForebayError]) -> None:
    given = {"param": "n", "code": "special", "retry_after": 2.0}

    error = kind("why", **given, status=418) if issubclass(kind, UpstreamError) else kind("why", **given)  # type: ignore[arg-type] # mixed kinds

    assert (str(error), error.message, error.param) == ("why", "why", "n")
    assert (error.specific_code, error.retry_after) == ("special", 2.0)


def test_an_error_has_its_classs_code_unless_it_was_given_one() -> None:
    assert WorkerLost("x").specific_code == "worker_lost"
    assert UpstreamBusy("x", status=429, code="slow_down").specific_code == "slow_down"


def test_what_a_call_may_cost_is_prompt_and_answer() -> None:
    assert call(prompt_tokens=7, max_tokens=20).tokens_estimate == 27


def test_a_call_travels_as_json() -> None:
    sent = call(timeouts=Timeouts(total=1.0), fallbacks=("other",))

    assert msgspec.json.decode(msgspec.json.encode(sent), type=Call) == sent


def test_the_systems_clock_is_the_machines() -> None:
    clock: Clock = SystemClock()

    assert abs(clock.monotonic() - time.monotonic()) < 1
    assert abs(clock.wall() - time.time()) < 1


def test_a_manual_clock_moves_when_told_to() -> None:
    clock: Clock = (manual := ManualClock(10.0))
    manual.advance(2.5)

    assert (clock.monotonic(), clock.wall()) == (12.5, 12.5)
