"""Stop strings that begin before a cut and end after it: wherever the text is parted, the answer ends as it would."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.drivers.seam import Seam


def told(held: str, rest: list[str], stops: list[str]) -> tuple[str, str | None]:
    seam = Seam(held, stops)
    text = ""
    for piece in ["", *rest]:
        given, stop = seam.add(piece)
        text += given
        if stop is not None:
            return text, stop
    return text + seam.close(), None


@pytest.mark.parametrize(
    ("held", "rest", "stops", "text", "stop"),
    [
        ("", ["a stop"], ["stop"], "a stop", None),  # the engine's own business
        ("a st", ["op b"], ["stop"], "a ", "stop"),
        ("a st", ["o", "p"], ["stop"], "a ", "stop"),
        ("a st", ["ay"], ["stop"], "a stay", None),
        ("a st", [], ["stop"], "a st", None),
        ("a stop b", ["c"], ["stop"], "a ", "stop"),
        ("aab", ["c"], ["abc", "b"], "aa", "b"),  # the one that is whole first
        ("nana", ["ban"], ["anab"], "n", "anab"),
    ],
)
def test_a_stop_string_that_began_before_the_cut_ends_the_answer_before_it(
    held: str, rest: list[str], stops: list[str], text: str, stop: str | None
) -> None:
    assert told(held, rest, stops) == (text, stop)


@given(
    held=st.text("ab", max_size=4),
    rest=st.lists(st.text("ab", max_size=3), max_size=5),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_no_text_is_lost_and_no_stop_string_that_begins_in_what_was_held_is_told(
    held: str, rest: list[str], stops: list[str]
) -> None:
    whole = held + "".join(rest)
    text, stop = told(held, rest, stops)
    begins = [at for stop in stops if 0 <= (at := whole.find(stop)) < len(held)]
    assert (stop is None) == (not begins)
    assert text == (whole if stop is None else whole[: len(text)])
    if stop is not None:
        assert whole.startswith(stop, len(text))
