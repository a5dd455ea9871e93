"""How benchmarks end, and what the clock of a busy machine's engine says."""

import os
import signal
import time
from collections.abc import Callable, Iterator

import pytest

from benchmarks.loopback.cache import Missing
from benchmarks.loopback.processes import Failed
from benchmarks.reporting import exit_status
from benchmarks.step_time import CHUNK, Point, Thread


@pytest.fixture(autouse=True)
def _own_handler() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def missing() -> bool:
    raise Missing("there is no compiler")


def failed() -> bool:
    raise Failed("it did not answer")


def ended() -> bool:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)  # the signal ends it at once
    return True


@pytest.mark.parametrize(
    ("bench", "status", "said"),
    [
        (lambda: True, 0, ""),
        (lambda: False, 1, ""),
        (missing, 2, "some: there is no compiler\n"),
        (failed, 2, "some: it did not answer\n"),
        (ended, 130, "some: cut off\n"),
    ],
)
def test_the_exit_status_says_whether_targets_were_held_and_why_nothing_was_measured(
    bench: Callable[[], bool], status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_status("some", bench) == status
    assert capsys.readouterr().err == said


def test_an_engines_clock_is_no_faster_than_the_walls_and_it_runs_no_longer_than_its_clock() -> None:
    thread = Thread(os.getpid())
    walls, clock, ran = time.perf_counter(), thread.clock(), thread.ran()
    sum(number * number for number in range(10**6))
    ran, clock, walls = thread.ran() - ran, thread.clock() - clock, time.perf_counter() - walls

    assert ran > 0
    assert clock <= walls + 0.05
    assert ran <= clock + 0.05


def test_a_prompt_of_several_chunks_is_as_many_steps_and_its_memory_grows_with_them() -> None:
    step = Point(2 * CHUNK).step(1.0)

    assert (step.batch, step.prefill, step.kv) == (0.5, CHUNK, 1.5 * CHUNK)
    assert Point(100, batch=3).step(1.0).batch == 3
