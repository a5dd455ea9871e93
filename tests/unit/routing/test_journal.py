"""The journal of one request."""

import pytest

from core.chat import Usage
from core.errors import IdleTimeout, WorkerLost
from routing.journal import Journal
from tests.fakes.drivers import call


@pytest.fixture
def journal() -> Journal:
    return Journal(call(prompt_tokens=7))


def test_frames_stand_in_the_order_they_came(journal: Journal) -> None:
    for frame in (b"one", b"", b"two"):
        journal.append(frame, 1)

    assert (journal.frames, journal.num_bytes, journal.num_tokens) == ([b"one", b"two"], 6, 3)


def test_what_lies_undelivered_is_the_difference(journal: Journal) -> None:
    journal.append(b"123456", 1)
    journal.num_delivered_bytes += 4

    assert journal.num_undelivered_bytes == 2


def test_every_change_is_announced(journal: Journal) -> None:
    seen: list[int] = []
    journal.on_change = lambda: seen.append(journal.num_bytes)

    journal.append(b"ab", 1)
    journal.append(b"", 0)
    journal.complete()

    assert seen == [2, 2, 2]


def test_nothing_is_metered_of_an_answer_that_never_began(journal: Journal) -> None:
    assert journal.metered == Usage()


def test_without_the_engines_count_the_estimate_and_the_seen_tokens_are_metered(journal: Journal) -> None:
    journal.append(b"x", 3)

    assert journal.metered == Usage(prompt_tokens=7, completion_tokens=3)


def test_of_a_complete_answer_the_engines_count_wins(journal: Journal) -> None:
    journal.append(b"x", 3)
    journal.usage = Usage(prompt_tokens=5, completion_tokens=2, cached_tokens=4)
    journal.complete()

    assert journal.metered is journal.usage


def test_of_a_cut_answer_what_was_seen_after_the_engines_last_count_is_metered_too(journal: Journal) -> None:
    journal.usage = Usage(prompt_tokens=5, completion_tokens=1, cached_tokens=4)
    journal.append(b"x", 3)
    journal.fail(WorkerLost("gone"))

    assert journal.metered == Usage(prompt_tokens=5, completion_tokens=3, cached_tokens=4)


def test_the_first_error_counts(journal: Journal) -> None:
    first = WorkerLost("gone")
    journal.fail(first)
    journal.fail(IdleTimeout("later"))

    assert (journal.error, journal.has_ended, journal.is_complete) == (first, True, False)


def test_a_complete_answer_cannot_fail(journal: Journal) -> None:
    journal.complete()
    journal.fail(WorkerLost("too late"))

    assert (journal.error, journal.has_ended) == (None, True)
