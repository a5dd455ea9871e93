"""What prompts share: hashes at the boundaries of variables, over values."""

from hypothesis import given
from hypothesis import strategies as st

from semantic_vars.prefixes import chain, lint, segments_of
from semantic_vars.template import form_of

CHAT = {
    "messages": [
        {"role": "system", "content": "Be {{how}}."},
        {"role": "user", "content": [{"type": "text", "text": "{{x}}"}]},
    ]
}


def test_a_chat_is_divided_where_messages_and_variables_are() -> None:
    values = {"how": "kind", "x": "Hi"}
    assert segments_of(form_of(CHAT), values.__getitem__) == (
        "\x00system\x00", "Be ", "kind", ".", "\x00user\x00", "Hi",
    )  # fmt: skip


@given(st.lists(st.text()), st.lists(st.text()), st.binary(max_size=8))
def test_two_prompts_share_as_many_hashes_as_segments(one: list[str], other: list[str], salt: bytes) -> None:
    shared = 0
    while shared < min(len(one), len(other)) and one[shared] == other[shared]:
        shared += 1
    left, right = chain(one, salt), chain(other, salt)
    assert len(left) == len(one)
    assert left[:shared] == right[:shared]
    assert not set(left[shared:]) & set(right[shared:])


@given(st.lists(st.text(), min_size=1))
def test_tenants_share_no_hash(segments: list[str]) -> None:
    assert not set(chain(segments, b"one")) & set(chain(segments, b"two"))


def test_a_large_constant_behind_a_variable_is_worth_a_word() -> None:
    assert lint(form_of({"prompt": "x" * 2_000 + "{{a}}"})) is None
    told = lint(form_of({"prompt": "{{a}}" + "x" * 2_000}))
    assert told is not None
    assert "{{a}}" in told
    assert lint(form_of({"messages": [{"content": "{{a}}"}, {"content": "x" * 2_000}]})) is not None
