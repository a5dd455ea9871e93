"""Background responses without a gateway: what a body means, what it refers to, and the run that it becomes."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import InvalidRequest, UnknownId, UnsupportedParameter
from gateway.responses import references
from gateway.responses.asked import (
    OUTPUT,
    Conversation,
    Question,
    asked_of,
    conversation_of,
    references_of,
    workflow_of,
)  # fmt: skip
from gateway.responses.ids import id_of, is_id, message_of, run_of
from gateway.responses.question import MOST_REFERENCES, read_question, refers_to_others
from semantic_vars import template
from semantic_vars.calls import Workflow
from semantic_vars.events import Ended, Put, Request, Resolved, Start
from semantic_vars.executor import Executor
from tests.unit.semantic_vars.runs import Guess, llm, workflow

A, B = "resp_" + "a" * 32, "resp_" + "b" * 32


def question(body: dict[str, Any] | None = None, /, **more: Any) -> Question:
    asked = {"model": "m", "input": "Hello", "background": True, **(body or {}), **more}
    return read_question(asked, {}, Conversation())


def messages(**more: Any) -> Any:
    """Return the messages that a body means, less the templates' quotes."""
    return template.form_of(question(**more).chat["messages"]).fill(lambda name: f"<{name}>")


def refusal(**more: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        question(**more)
    return caught.value


# --- ids


def test_a_response_is_its_run_under_another_name() -> None:
    assert run_of(id_of("run_" + "0" * 32)) == "run_" + "0" * 32
    assert message_of("run_1") == "msg_1"


@pytest.mark.parametrize(
    "wrong", ["", "resp_", "resp_" + "g" * 32, "run_" + "a" * 32, A + "a", A + "\n", "resp_" + "A" * 32]
)
def test_what_can_be_no_id_is_an_unknown_one(wrong: str) -> None:
    assert not is_id(wrong)
    with pytest.raises(UnknownId, match="there is no response"):
        run_of(wrong)


# --- references


def filled(text: str, **values: Any) -> str:
    reading = references.read(text, "input")
    told = template.parse(reading.template).fill(values.__getitem__)
    assert isinstance(told, str)
    return told


@given(st.text(st.sampled_from("{}\"'| a\n\\")) | st.text())
def test_braces_are_text(text: str) -> None:
    if '{{"{{"}}' not in text and "{{'{{'}}" not in text and '{{ "' not in text and "{{ '" not in text:
        assert filled(text) == text
        assert not references.read(text, "input").references


@given(st.text(st.sampled_from("{} a"), max_size=6), st.text(st.sampled_from("{} a"), max_size=6), st.text())
def test_what_a_response_has_said_is_put_in_as_it_is(before: str, after: str, said: str) -> None:
    text = f"{before}{{{{{A}.output_text}}}}{after}"
    assert filled(text, **{A: said}) == before + said + after


def test_braces_of_a_reference_may_be_meant_as_text() -> None:
    text = '{{"{{"}}' + A + ".output_text}}"
    assert filled(text) == f"{{{{{A}.output_text}}}}"
    assert not references.refers(text)


def test_long_rows_of_braces_are_text() -> None:
    assert filled("{" * 5001) == "{" * 5001


def test_a_reference_may_be_transformed_and_is_text_in_the_end() -> None:
    said = '{"a": [1, "}}"]}'
    assert filled(f"{{{{ {A}.output_text | json('$.a') }}}}", **{A: said}) == '[1,"}}"]'
    assert filled(f"{{{{{A}.output_text | json('$.a') | join('}}}}')}}}}", **{A: said}) == "1}}}}"


def test_what_only_looks_like_a_reference_is_text() -> None:
    for text in ("{{resp_data.items}}", "{{ resp_x }}", "{{resp_", "{resp_x.output_text}", "{{x.output_text}}"):
        assert filled(text) == text
        assert not references.refers(text)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (f"{{{{{A}.output_text", "never closed"),
        (f"{{{{{A}.output}}}}", "is referred to as"),
        (f"{{{{{A}}}}}", "is referred to as"),
        (f"{{{{{A}.output_text x}}}}", "is referred to as"),
        (f"{{{{{A}.output_text | nothing}}}}", "no transform 'nothing'"),
        (f"{{{{{A}.output_text | json(}}}}", "no transform"),
    ],
)
def test_a_reference_that_cannot_be_read_is_refused(text: str, told: str) -> None:
    error = refusal(input=text)
    assert told in error.message
    assert error.param == "input"


def test_an_id_of_any_shape_is_a_reference_that_will_not_be_found() -> None:
    assert question(input="{{resp_68a1.output_text}}").references == ("resp_68a1",)


def test_references_are_found_in_every_text_of_a_body() -> None:
    hole = f"{{{{{A}.output_text}}}}"
    assert refers_to_others({"input": hole})
    assert refers_to_others({"instructions": hole})
    assert refers_to_others({"input": [{"role": "user", "content": [{"type": "input_text", "text": hole}]}]})
    assert refers_to_others({"input": [{"role": "user", "content": hole}]})
    assert not refers_to_others({"input": ["{{x}}", 1, None, {"content": {"text": 5}}], "metadata": {"a": hole}})


def test_so_many_references_are_refused() -> None:
    text = "".join(f"{{{{resp_{number:032x}.output_text}}}}" for number in range(MOST_REFERENCES + 1))
    assert f"refers to {MOST_REFERENCES + 1} responses" in refusal(input=text).message


# --- what a body means


def test_a_text_and_instructions_are_a_chat() -> None:
    asked = question(instructions="Be short.", max_output_tokens=9, temperature=0.5, top_p=1, user="u")
    assert asked.chat == {
        "model": "m", "temperature": 0.5, "top_p": 1, "user": "u", "max_tokens": 9, "forebay": {"class": "standard"},
        "messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hello"}],
    }  # fmt: skip


def test_messages_of_all_roles_and_parts_are_a_chat() -> None:
    given = [
        {"role": "developer", "content": "D"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "one"}]},
        {
            "id": "msg_1", "type": "message", "role": "assistant", "status": "completed",
            "content": [{"type": "output_text", "text": "two", "annotations": [], "logprobs": []}],
        },
        {"role": "user", "content": [{"type": "input_text", "text": "{"}, {"type": "input_text", "text": "{x}}"}]},
    ]  # fmt: skip
    assert messages(input=given) == [
        {"role": "system", "content": "D"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": [{"type": "text", "text": "{"}, {"type": "text", "text": "{x}}"}]},
    ]


def test_a_schema_is_a_response_format_and_its_texts_are_no_templates() -> None:
    schema = {"type": "object", "description": "{{x}}", "properties": {"a": {"const": "{{"}}}
    form = {"type": "json_schema", "name": "n", "schema": schema, "strict": True, "description": None}
    asked = question(text={"format": form})
    told = template.form_of(asked.chat["response_format"]).fill(dict[str, str]().__getitem__)
    assert told == {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
    assert asked.asked.format == form
    assert question(text={"format": {"type": "json_object"}}).chat["response_format"] == {"type": "json_object"}
    for nothing in (None, {}, {"format": None}, {"format": {"type": "text"}}):
        assert "response_format" not in question(text=nothing).chat


@pytest.mark.parametrize(
    ("tier", "options", "told"),
    [
        (None, {}, "standard"), ("flex", {}, "batch"), ("priority", {}, "interactive"), ("auto", {}, "standard"),
        ("flex", {"class": "standard"}, "standard"),
    ],
)  # fmt: skip
def test_it_is_as_urgent_as_any_other_request(tier: str | None, options: dict[str, str], told: str) -> None:
    body = {"model": "m", "input": "x", "service_tier": tier}
    assert read_question(body, options, Conversation()).chat["forebay"]["class"] == told


def test_fields_that_ask_for_nothing_are_taken() -> None:
    question(
        tools=[], tool_choice="auto", truncation="disabled", include=[], parallel_tool_calls=False, store=True,
        stream=False, prompt=None, conversation=None, top_logprobs=0, reasoning=None, metadata=None, text=None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "web_search"}]), ("tool_choice", "required"), ("truncation", "auto"), ("conversation", "c"),
        ("include", ["x"]), ("prompt", {"id": "p"}), ("reasoning", {"effort": "low"}), ("top_logprobs", False),
        ("parallel_tool_calls", 1), ("nonsense", 1), ("stream_options", {"include_obfuscation": True}), ("seed", 1),
    ],
)  # fmt: skip
def test_what_no_chat_can_be_told_is_refused_by_name(field: str, value: Any) -> None:
    error = refusal(**{field: value})
    assert (type(error), error.param) == (UnsupportedParameter, field)


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"input": None}, "input"), ({"input": []}, "input"), ({"input": 5}, "input"), ({"input": ["x"]}, "input[0]"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": [], "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": []}]}, "input[0].content"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
        ({"input": [{"role": "user", "content": [{"type": []}]}]}, "input[0].content[0]"),
        ({"input": [{"role": "user", "content": ["x"]}]}, "input[0].content[0]"),
        ({"input": [{"type": "function_call_output"}]}, "input[0]"), ({"instructions": 5}, "instructions"),
        ({"store": False}, "store"), ({"model": 5}, "model"), ({"temperature": 3}, "temperature"),
        ({"temperature": True}, "temperature"), ({"top_p": "1"}, "top_p"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": True}, "max_output_tokens"), ({"metadata": []}, "metadata"),
        ({"metadata": {"a": 1}}, "metadata"), ({"metadata": {"a" * 65: ""}}, "metadata"),
        ({"metadata": {"a": "b" * 513}}, "metadata"), ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
        ({"text": "x"}, "text"), ({"text": {"verbosity": "low"}}, "text"), ({"text": {"format": {}}}, "text.format"),
        ({"text": {"format": {"type": []}}}, "text.format"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format"),
    ],
)  # fmt: skip
def test_what_is_malformed_is_refused_by_its_place(more: dict[str, Any], param: str) -> None:
    assert refusal(**more).param == param


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=9,
)
FIELDS = ["model", "input", "instructions", "text", "metadata", "tools", "stream", "temperature", "max_output_tokens"]


def outcome_of(body: dict[str, Any]) -> Question | InvalidRequest:
    try:
        return read_question(body, {}, Conversation())
    except InvalidRequest as error:
        return error


@given(st.dictionaries(st.sampled_from(FIELDS), JSON))
def test_any_json_is_a_question_or_an_invalid_request(body: dict[str, Any]) -> None:
    outcome = outcome_of(body)
    if isinstance(outcome, InvalidRequest):
        assert 0 < len(outcome.message) < 500
    else:
        assert asked_of(kept(workflow_of(outcome))) == outcome.asked


# --- the run that it becomes


def kept(given: Workflow) -> Workflow:
    return msgspec.json.decode(msgspec.json.encode(given), type=Workflow)


def test_what_was_asked_is_read_from_its_run() -> None:
    asked = question(
        instructions="I", metadata={"a": "b"}, temperature=1, stream=True, input=f"{{{{{A}.output_text}}}}"
    )
    run = kept(workflow_of(asked))
    assert asked_of(run) == asked.asked
    assert references_of(run) == (A,)
    assert run.outputs == (OUTPUT,)


def test_a_workflow_of_somebody_elses_is_no_response() -> None:
    whole = msgspec.to_builtins(workflow_of(question()))
    assert asked_of(msgspec.convert(whole, Workflow)) is not None
    changes: list[dict[str, Any]] = [
        {"app": "mine"}, {"outputs": []}, {"variables": {}}, {"calls": []}, {"variables": {"request": {"value": 5}}},
        {"calls": [{"kind": "llm", "id": "output", "request": {"model": "m", "prompt": "x"}}]},
    ]  # fmt: skip
    for change in changes:
        assert asked_of(msgspec.convert(whole | change, Workflow)) is None
    assert asked_of(workflow(llm("output", "x"))) is None


def test_its_call_starts_when_all_are_there_that_it_refers_to() -> None:
    part = {"type": "input_text", "text": f"{{{{{B}.output_text | json('$.a')}}}}"}
    content = [part, {"type": "input_text", "text": "!"}]
    asked = question(instructions=f"As {{{{{A}.output_text}}}} says", input=[{"role": "user", "content": content}])
    run = Executor(kept(workflow_of(asked)), Guess())
    assert not [one for one in run.begin(0.0) if isinstance(one, Start)]
    assert not [one for one in run.on(Put(A, "{{" + B + "}}"), 0.0) if isinstance(one, Start)]
    (start,) = [one for one in run.on(Put(B, '{"a": {"b": 1}}'), 0.0) if isinstance(one, Start)]
    assert isinstance(start.work, Request)
    assert start.work.body["messages"] == [
        {"role": "system", "content": "As {{" + B + "}} says"},
        {"role": "user", "content": [{"type": "text", "text": '{"b":1}'}, {"type": "text", "text": "!"}]},
    ]


def test_it_fails_with_what_it_refers_to() -> None:
    run = Executor(workflow_of(question(input=f"{{{{{A}.output_text}}}}")), Guess())
    run.begin(0.0)
    effects = run.on(Put(A, failure="broken: it broke"), 0.0)
    (failure,) = [one.outcome.failure for one in effects if isinstance(one, Resolved) and one.variable == OUTPUT]
    assert failure is not None
    assert failure.code == "upstream_failed"
    assert A in failure.message
    assert "it broke" in failure.message
    assert any(isinstance(one, Ended) for one in effects)


def test_a_conversation_goes_on_without_the_instructions_before() -> None:
    first = question(instructions="I", input=f"{{{{{B}.output_text}}}}, {{{{x}}}}")
    before = conversation_of(A, first.asked, kept(workflow_of(first)))
    second = read_question({"model": "m", "instructions": "J", "input": "And?"}, {}, before)
    assert second.references == (B, A)
    assert template.form_of(second.chat["messages"]).fill({A: "a", B: "b"}.__getitem__) == [
        {"role": "system", "content": "J"},
        {"role": "user", "content": "b, {{x}}"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "And?"},
    ]
    third = conversation_of("resp_" + "c" * 32, second.asked, kept(workflow_of(second)))
    assert [one["role"] for one in third.messages] == ["user", "assistant", "user", "assistant"]
    assert json.dumps(third.messages).count("resp_") == 3
