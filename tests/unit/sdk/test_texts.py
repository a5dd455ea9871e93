"""Variables in plain texts: the gateway reads what was meant, and nobody can make it read something else."""

import subprocess
import sys
from typing import Any

import pytest
from forebay.workflows import _texts
from hypothesis import given
from hypothesis import strategies as st

from semantic_vars.template import parse
from semantic_vars.transforms import transform_of

TEXTS = st.text(st.sampled_from("{}\"'|\\ a\n\ue000\ue001sv:1"), max_size=12)
ARGUMENTS = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


@given(text=TEXTS)
def test_the_gateway_reads_an_escaped_text_as_it_was(text: str) -> None:
    assert parse(_texts.escaped(text)).fill(lambda name: "") == text


@given(parts=st.lists(TEXTS, min_size=2, max_size=4))
def test_texts_around_variables_are_read_as_they_were(parts: list[str]) -> None:
    marked = "".join(f"{part}{_texts.mark(place)}" for place, part in enumerate(parts))

    divided = _texts.divide(marked)
    told = "".join(
        f"{{{{v{part}}}}}" if isinstance(part, int) else _texts.escaped(part, is_before_hole=True) for part in divided
    )

    filled = [part if isinstance(part, str) else f"<v{part}>" for part in divided]
    assert "".join(filled) == "".join(f"{part}<v{place}>" for place, part in enumerate(parts))
    template = parse(f"{told}.")
    assert "".join(template.segments(lambda name: f"<{name}>")) == "".join(filled) + "."


@given(value=ARGUMENTS)
def test_an_argument_is_read_as_the_value_that_it_was(value: Any) -> None:
    template = parse(f"{{{{v | equals({_texts.literal(value)})}}}}")

    hole = template.parts[0]
    assert not isinstance(hole, str)
    assert hole.transforms == (transform_of("equals", (value,)),)


@given(text=TEXTS)
def test_a_text_without_marks_has_one_part(text: str) -> None:
    assert _texts.divide(text) == ([text] if text else [])


def test_a_mark_of_another_process_is_text() -> None:
    told = subprocess.run(
        [sys.executable, "-c", "from forebay.workflows._texts import mark; print(ascii(mark(1)))"],
        capture_output=True,
        text=True,
        check=True,
    )
    other = told.stdout.strip().strip("'").encode().decode("unicode_escape")

    assert other.startswith("\ue000sv:")
    assert _texts.divide(other) == [other]
    assert _texts.divide(_texts.mark(1)) == [1]


@pytest.mark.parametrize("value", [float("nan"), {1, 2}, object(), b"x"])
def test_what_the_gateway_cannot_read_is_no_argument(value: object) -> None:
    with pytest.raises(TypeError, match="an argument of a transform is"):
        _texts.literal(value)
