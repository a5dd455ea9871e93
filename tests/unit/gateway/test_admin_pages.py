"""Pages of lists in memory, and the cursors between them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import InvalidRequest
from gateway.api.admin.pages import cursor_of, page_of, place_of


@given(
    st.sets(st.text(alphabet=st.characters(exclude_categories=["Cs", "Cc"]), max_size=8), max_size=30),
    st.integers(1, 7),
)
def test_walking_the_pages_meets_everything_once_and_in_order(names: set[str], limit: int) -> None:
    seen: list[str] = []
    page, after = page_of(list(names), str, None, limit)
    seen += page
    while after is not None:
        page, after = page_of(list(names), str, after, limit)
        assert page
        seen += page
    assert seen == sorted(names)


def test_what_goes_between_two_pages_moves_nothing() -> None:
    _, after = page_of(["a", "b", "c", "d"], str, None, 2)
    assert page_of(["c", "d"], str, after, 2)[0] == ["c", "d"]


def test_a_cursor_gives_back_the_place_it_was_made_of() -> None:
    assert place_of(cursor_of((1.5, "req_é")), tuple[float, str]) == (1.5, "req_é")


@pytest.mark.parametrize("place", [[2**31], ["a\0"], "text", None])
def test_a_place_that_no_database_takes_is_refused(place: object) -> None:
    with pytest.raises(InvalidRequest, match="cursor"):
        place_of(cursor_of(place), list[int | str])
