"""Where prompts begin as others may, and what is told of those that cannot be shared."""

from semantic_vars.prefixes import Beginning, Segments, lint
from semantic_vars.template import form_of


def test_a_large_constant_behind_a_variable_is_worth_a_word() -> None:
    assert lint(form_of({"prompt": "x" * 2_000 + "{{a}}"})) is None
    told = lint(form_of({"prompt": "{{a}}" + "x" * 2_000}))
    assert told is not None
    assert "{{a}}" in told
    assert lint(form_of({"messages": [{"content": "{{a}}"}, {"content": "x" * 2_000}]})) is not None


def beginnings_of(request: object, **values: object) -> tuple[Beginning, ...]:
    form, segments = form_of(request), Segments()
    form.fill(values.__getitem__, segments)
    return segments.beginnings(form)


def test_prompts_are_hashed_where_variables_end_over_what_they_hold() -> None:
    one = beginnings_of({"prompt": "{{doc}} Q: {{q}}"}, doc="d" * 500, q="why?")
    other = beginnings_of({"prompt": "{{text}} Q: {{ask}}"}, text="d" * 500, ask="how?")

    assert [beginning.size for beginning in one] == [500, 504, 508]
    assert one[:2] == other[:2]
    assert one[2] != other[2]


def test_roles_and_parts_of_messages_count_and_short_beginnings_do_not() -> None:
    system = {"role": "system", "content": "s" * 400}
    one = beginnings_of({"messages": [system, {"role": "user", "content": [{"type": "text", "text": "{{a}}"}]}]}, a="x")
    other = beginnings_of({"messages": [{**system, "role": "user"}, {"role": "user", "content": "{{a}}"}]}, a="x")

    assert len(one) == len(other) == 2
    assert one[0] != other[0]
    assert beginnings_of({"prompt": "s" * 399}) == ()


def test_of_many_beginnings_the_first_and_the_last_are_kept() -> None:
    found = beginnings_of({"prompt": "s" * 400 + "".join(f"{{{{a{n}}}}}." for n in range(20))},
                          **{f"a{n}": "x" for n in range(20)})  # fmt: skip

    assert len(found) == 8
    assert found[0].size == 400
    assert found[-1].size == 440
