"""Which worker gets the next request."""

from hypothesis import given
from hypothesis import strategies as st

from core.ids import WorkerId
from routing.placement import Candidate, choose


def candidate(worker: str, tokens: int = 0, *, healthy: bool = True, tried: bool = False) -> Candidate:
    return Candidate(worker=WorkerId(worker), outstanding_tokens=tokens, is_healthy=healthy, was_tried=tried)


CANDIDATES = st.builds(
    candidate, st.text("ab", min_size=1), st.integers(0, 3), healthy=st.booleans(), tried=st.booleans()
)


def test_nobody_is_chosen_from_nobody() -> None:
    assert choose([]) is None


def test_the_least_loaded_is_chosen() -> None:
    assert choose([candidate("a", 5), candidate("b", 3), candidate("c", 4)]) == "b"


def test_equals_are_told_apart_by_name() -> None:
    assert choose([candidate("b"), candidate("a")]) == "a"


def test_health_comes_before_load_and_before_what_was_tried() -> None:
    assert choose([candidate("a", healthy=False), candidate("b", 9, tried=True)]) == "b"


def test_a_worker_that_failed_this_request_comes_after_a_busier_one() -> None:
    assert choose([candidate("a", tried=True), candidate("b", 9)]) == "b"


def test_if_all_are_ill_one_is_chosen_all_the_same() -> None:
    assert choose([candidate("a", 2, healthy=False), candidate("b", 1, healthy=False)]) == "b"


@given(st.lists(CANDIDATES, min_size=1), st.randoms())
def test_the_order_of_the_candidates_does_not_matter(candidates: list[Candidate], random: st.DataObject) -> None:
    chosen = choose(candidates)
    random.shuffle(candidates)  # type: ignore[attr-defined] # hypothesis types it as data

    assert choose(candidates) == chosen
