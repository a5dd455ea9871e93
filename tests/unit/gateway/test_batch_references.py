"""References from a row of a batch to another: what is one, and what stays the text that it was."""

import time
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import InvalidRequest
from gateway.batches.references import translated
from semantic_vars.template import form_of

ANSWER = 'an answer with {{b.output_text}} and "quotes"'


def told(value: Any) -> Any:
    """Return what a value comes to, where the row `a-1` (in the graph: `_row_1`) has answered."""
    names = {"a-1": "_row_1", "b": "b"}
    return form_of(translated(value, names.__getitem__)).fill({"_row_1": ANSWER, "b": '{"n": [7]}'}.__getitem__)


def test_a_reference_is_what_the_row_has_answered_and_that_is_data() -> None:
    assert told("{{a-1.output_text}}") == ANSWER
    assert told("Before {{ a-1.output_text }} after") == f"Before {ANSWER} after"
    assert told({"messages": [{"content": "{{b.output_text}}{{a-1.output_text}}"}]}) == {
        "messages": [{"content": '{"n": [7]}' + ANSWER}]
    }


def test_transforms_stand_behind_it() -> None:
    assert told("{{b.output_text | json('$.n[0]')}}") == 7
    assert told("{{b.output_text|regex('n(\"): ', 1) | strip}}!") == '"!'
    assert told("{{b.output_text | choose({'x': '}}', '*': 'y'})}}") == "y"


@pytest.mark.parametrize(
    "text",
    [
        "no braces", "{{name}}", "{{ user.name }}", "{{{", "}}", "{{", "{", "{{a-1.output_texts}}",
        "{{a b.output_text}}", "\\frac{{1}}{{2}}", '{{"a"}}', "{% if x %}{{ x | upper }}{% endif %}",
        "{{{{b.output}}}}",
    ],
)  # fmt: skip
def test_other_braces_are_text(text: str) -> None:
    assert told(text) == text
    assert told(f"{text}{{{{a-1.output_text}}}}{text}") == text + ANSWER + text


def test_a_reference_that_is_meant_as_text_has_its_braces_in_quotes() -> None:
    assert told('{{"{{"}}b.output_text}}') == "{{b.output_text}}"
    assert told("{{ '{{' }}b.output_text}} {{b.output_text}}") == '{{b.output_text}} {"n": [7]}'


@given(st.text(alphabet="{}'\" |x\\"))
def test_no_text_without_a_reference_is_changed_but_for_quoted_braces(text: str) -> None:
    if '"{{"' not in text and "'{{'" not in text:
        assert told(text) == text


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{{b.output_text", "never closed"),
        ("{{b.output_text | json('}}", "is no transform"),
        ("{{b.output_text.n}}", "behind output_text come"),
        ("{{b.output_text json('$.n')}}", "behind output_text come"),
        ("{{b.output_text | nothing}}", "no transform 'nothing'"),
        ("{{b.output_text | json(1)}}", "takes a text"),
    ],
)
def test_a_reference_that_cannot_be_read_is_told(text: str, why: str) -> None:
    with pytest.raises(InvalidRequest, match=why):
        told(text)


@pytest.mark.parametrize("piece", ["{{b.output_text | '", "{{'{{'}}", "{{" + " " * 50, "{{b.output_text}}"[:-1] + " "])
def test_a_hostile_text_takes_no_longer_than_its_length_allows(piece: str) -> None:
    began = time.process_time()
    with suppress(InvalidRequest):
        translated(piece * 20_000, lambda row: row)
    assert time.process_time() - began < 2


def test_any_number_of_braces_in_a_row_stays_text() -> None:
    braces = "{" * 5_001
    assert told(braces + " {{b.output_text}}") == braces + ' {"n": [7]}'
