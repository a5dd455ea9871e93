"""What transforms make of a value, what they refuse, and that they are bounded."""

import time

import pytest

from core.errors import InvalidRequest
from semantic_vars import transforms
from semantic_vars.transforms import MAX_BYTES, TransformError, transform_of
from semantic_vars.values import Value

PEOPLE = [{"name": "Ann", "ok": True}, {"name": "Bo", "ok": False}]


@pytest.mark.parametrize(
    ("name", "arguments", "value", "expected"),
    [
        ("all", ("$.ok",), PEOPLE, False),
        ("any", ("$.ok",), PEOPLE, True),
        ("choose", ({"yes": 1, "*": 2},), " yes ", 1),
        ("choose", ({"yes": 1, "*": 2},), "no", 2),
        ("code", (), "Here:\n```python\nx = 1\n```\nDone.", "x = 1"),
        ("contains", ("b",), "abc", True),
        ("equals", (2,), 2, True),
        ("item", (-1,), [1, 2], 2),
        ("join", (", ",), ["a", 1, None], "a, 1, "),
        ("json", ("$[*].name",), PEOPLE, ["Ann", "Bo"]),
        ("json", ("$.a['b c'][0]",), '{"a": {"b c": [7]}}', 7),
        ("json", ("$",), "```json\n[1]\n```", [1]),
        ("length", (), "abc", 3),
        ("lines", (), "a\n\n b\n", ["a", " b"]),
        ("lower", (), "AbC", "abc"),
        ("matches", (r"^\d+$",), "12", True),
        ("not", (), [], True),
        ("regex", (r"score: (\d+)", 1), "The score: 42.", "42"),
        ("split", (",",), "a,b", ["a", "b"]),
        ("strip", (), " a ", "a"),
        ("text", (), {"a": 1}, '{"a":1}'),
        ("truncate", (2,), "abc", "ab"),
    ],
)
def test_every_transform_does_what_it_says(
    name: str, arguments: tuple[Value, ...], value: Value, expected: Value
) -> None:
    assert transform_of(name, arguments)(value) == expected


def test_every_transform_is_tested_above() -> None:
    (mark,) = test_every_transform_does_what_it_says.pytestmark  # type: ignore[attr-defined]
    assert {one[0] for one in mark.args[1]} == set(transforms._USES)


@pytest.mark.parametrize(
    ("name", "arguments", "value"),
    [
        ("json", ("$.x",), "no JSON"),
        ("json", ("$.x",), {"y": 1}),
        ("json", ("$[3]",), [1]),
        ("json", ("$[*]",), {"y": 1}),
        ("item", (5,), [1]),
        ("join", (",",), "text"),
        ("lines", (), 3),
        ("code", (), "no code"),
        ("regex", ("x", 0), "abc"),
        ("regex", ("a", 4), "abc"),
        ("choose", ({"a": 1},), "b"),
        ("length", (), 3),
        ("join", ("x" * 1_000,), [""] * 100_000),
        ("split", ("a",), "a" * 200_000),
    ],
)
def test_what_a_transform_cannot_take_is_an_error_that_says_why(
    name: str, arguments: tuple[Value, ...], value: Value
) -> None:
    with pytest.raises(TransformError) as raised:
        transform_of(name, arguments)(value)
    assert str(raised.value)


def test_a_result_that_is_too_large_is_an_error() -> None:
    with pytest.raises(TransformError, match="bytes"):
        transform_of("text", ())("x" * (MAX_BYTES + 1))


def test_a_pattern_that_would_take_for_ever_elsewhere_takes_no_time() -> None:
    began = time.process_time()
    assert transform_of("matches", (r"^(a+)+$",))("a" * 50_000 + "b") is False
    assert time.process_time() - began < 5


@pytest.mark.parametrize("pattern", [r"(?=a)", r"(a)\1", "(" * 50, "a" * 2_000, "(a{1000}){1000}"])
def test_patterns_that_are_not_re2s_or_too_large_are_refused(pattern: str) -> None:
    with pytest.raises(InvalidRequest):
        transform_of("matches", (pattern,))
