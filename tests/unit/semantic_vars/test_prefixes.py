"""What is told of prompts that cannot be shared."""

from semantic_vars.prefixes import lint
from semantic_vars.template import form_of


def test_a_large_constant_behind_a_variable_is_worth_a_word() -> None:
    assert lint(form_of({"prompt": "x" * 2_000 + "{{a}}"})) is None
    told = lint(form_of({"prompt": "{{a}}" + "x" * 2_000}))
    assert told is not None
    assert "{{a}}" in told
    assert lint(form_of({"messages": [{"content": "{{a}}"}, {"content": "x" * 2_000}]})) is not None
