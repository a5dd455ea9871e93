"""Prompts with holes: what is read, what is put in, and what is refused."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import InvalidRequest
from semantic_vars.template import form_of, parse
from semantic_vars.values import Value


def filled(text: str, **values: Value) -> Value:
    return parse(text).fill(values.__getitem__)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Say {{a}}!", "Say x!"),
        ("{{ a }}{{a}}", "xx"),
        ("{{n}}", 3),
        ("{{n}} ", "3 "),
        ("{{l}}", [1, 2]),
        ("of {{l}}", "of [1,2]"),
        ("{{none}}.", "."),
        ('{{"{{"}}a}}', "{{a}}"),
        ("{{l | item(1)}}", 2),
        ("{{ l | join( ' | ' ) }}", "1 | 2"),
        ("{{a | equals('}}')}}", False),
        ("a { b } c", "a { b } c"),
        ("{ {a} }", "{ {a} }"),
    ],
)
def test_holes_are_filled(text: str, expected: Value) -> None:
    assert filled(text, a="x", n=3, l=[1, 2], none=None) == expected


@pytest.mark.parametrize(
    "text",
    ["{{", "{{a", "{{}}", "{{1a}}", "{{a b}}", "{{a | }}", "{{a | unknown}}", "{{a | join}}", "{{a | join(1)}}",
     "{{a | join(b)}}", "{{a | join('x'}}", "{{a | regex('(', 0)}}", "{{a | json('$..x')}}",
     "{{a|json(" + "(" * 3000 + "}}", "{{a | json(" + "[" * 900 + ")}}"],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_with_a_reason(text: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        parse(text)
    assert raised.value.message


@given(st.text(), st.text())
def test_a_value_is_put_in_as_it_is_whatever_it_holds(before: str, value: str) -> None:
    quoted = before.replace("{{", '{{"{{"}}')
    assert filled(quoted + "\n{{a}}", a=value) == before + "\n" + value
    assert parse("<{{a}}>").fill({"a": value}.__getitem__) == f"<{value}>"


@given(st.text())
def test_any_text_is_read_or_refused(text: str) -> None:
    with suppress(InvalidRequest):
        parse(text)


def test_the_segments_of_a_prompt_end_where_variables_do() -> None:
    assert parse("Sum: {{a}}\nNow {{b}}").segments({"a": "x", "b": 2}.__getitem__) == ["Sum: ", "x", "\nNow ", "2"]


def test_a_form_is_filled_everywhere_inside_and_knows_its_names() -> None:
    form = form_of({"messages": [{"role": "user", "content": "{{a}}"}], "n": 1, "x": ["{{b}}"]})
    assert form.names == {"a", "b"}
    assert form.fill({"a": "A", "b": [2]}.__getitem__) == {
        "messages": [{"role": "user", "content": "A"}], "n": 1, "x": [[2]],
    }  # fmt: skip


@pytest.mark.parametrize(
    "step", ["equals({[1]: 2})", "choose({'*': 1j})", "equals({1, 2})", "equals(b'x')", "choose({1: 2})"]
)
def test_arguments_that_are_no_json_are_refused(step: str) -> None:
    with pytest.raises(InvalidRequest, match="not literal arguments"):
        parse(f"{{{{a | {step}}}}}")
