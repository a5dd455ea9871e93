"""The rows of a batch: read and checked, before anything runs."""

import json
from typing import Any

import pytest

from core.batches import BatchRow, RowError
from core.chat import Endpoint
from core.errors import InvalidRequest
from gateway.batches.rows import MOST_ROWS, InvalidRows, Plan, read
from semantic_vars.calls import Embed, Llm, Workflow
from semantic_vars.events import Start
from semantic_vars.executor import Executor
from semantic_vars.graph import USUAL
from tests.unit.semantic_vars.runs import Guess


def row(custom_id: str, content: str = "Say one.", **more: Any) -> dict[str, Any]:
    body = {"model": "m", "messages": [{"role": "user", "content": content}], **more}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def planned(*rows: Any, endpoint: Endpoint = Endpoint.CHAT, most: int = MOST_ROWS) -> Plan:
    lines = [one if isinstance(one, bytes) else json.dumps(one).encode() for one in rows]
    return read(b"\n".join(lines), endpoint, depth=64, most=most)


def refused(*rows: Any, **more: Any) -> list[tuple[str, int | None, str | None]]:
    """Return code, line and field of each error."""
    with pytest.raises(InvalidRows) as caught:
        planned(*rows, **more)
    assert all(error.message for error in caught.value.errors)
    return [(error.code, error.line, error.param) for error in caught.value.errors]


def messages(*rows: Any, **more: Any) -> str:
    with pytest.raises(InvalidRows) as caught:
        planned(*rows, **more)
    return " ".join(error.message for error in caught.value.errors)


def test_rows_become_calls_that_run_as_one_graph() -> None:
    plan = planned(row("a"), row("request-2", "After {{a.output_text}}"), row("9", "{{request-2.output_text}}"))
    assert [call.id for call in plan.calls] == ["a", "_row_2", "_row_3"]
    assert plan.rows == {"a": BatchRow("a", "m"), "_row_2": BatchRow("request-2", "m"), "_row_3": BatchRow("9", "m")}
    assert isinstance(second := plan.calls[1], Llm)
    assert second.request["messages"][0]["content"] == "After {{a}}"
    started = Executor(Workflow(calls=plan.calls, outputs=tuple(plan.rows)), Guess(), bounds=USUAL).begin(0.0)
    assert [effect.call for effect in started if isinstance(effect, Start)] == ["a"]


def test_every_row_is_of_the_class_batch_whatever_it_says() -> None:
    (call,) = planned(row("a", forebay={"class": "interactive", "session": "s"})).calls
    assert isinstance(call, Llm)
    assert call.request["forebay"] == {"class": "batch", "session": "s"}


def test_blank_lines_count_and_are_no_rows() -> None:
    assert planned(b"", row("a-1"), b"  \r", row("b-1")).rows.keys() == {"_row_2", "_row_4"}


def test_a_custom_id_that_looks_like_our_own_name_for_another_row_is_not_taken_for_it() -> None:
    plan = planned(row("_row_2"), row("x y"), row("c", "{{_row_2.output_text}}"))
    assert [call.id for call in plan.calls] == ["_row_1", "_row_2", "c"]
    assert isinstance(third := plan.calls[2], Llm)
    assert third.request["messages"][0]["content"] == "{{_row_1}}"


def test_rows_of_completions_and_of_embeddings() -> None:
    completion = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"model": "m", "prompt": "x"}}
    (call,) = planned(completion, endpoint=Endpoint.COMPLETIONS).calls
    assert isinstance(call, Llm)
    embedding = {"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": {"model": "m", "input": ["x"]}}
    (call,) = planned(embedding, endpoint=Endpoint.EMBEDDINGS).calls
    assert isinstance(call, Embed)
    embedding["body"] = {"model": "m", "input": "{{a.output_text}}"}
    assert refused(embedding, endpoint=Endpoint.EMBEDDINGS) == [("no_output_text", 1, "body")]


def test_a_file_without_rows_or_with_too_many_is_no_batch() -> None:
    assert refused(b"\n\n") == [("empty_file", None, None)]
    assert refused(row("a"), row("b"), row("c"), most=2) == [("too_many_rows", None, None)]
    assert "3 rows, and a batch may hold 2" in messages(row("a"), row("b"), row("c"), most=2)


def test_all_wrong_lines_are_told_with_their_numbers() -> None:
    no_method = {name: value for name, value in row("b").items() if name != "method"}
    assert refused(b"{", row("a"), b'"x"', no_method, {**row("c"), "custom_id": 5}) == [
        ("invalid_json_line", 1, None),
        ("invalid_type", 3, None),
        ("missing_required_parameter", 4, "method"),
        ("invalid_type", 5, "custom_id"),
    ]


@pytest.mark.parametrize(
    ("wrong", "code", "param"),
    [
        ({"method": "GET"}, "invalid_method", "method"),
        ({"url": "/v1/embeddings"}, "invalid_url", "url"),
        ({"custom_id": ""}, "invalid_custom_id", "custom_id"),
        ({"custom_id": "x" * 513}, "invalid_custom_id", "custom_id"),
        ({"body": {"messages": [{}]}}, "missing_required_parameter", "body.model"),
        ({"body": {"model": "{{a.output_text}}", "messages": [{}]}}, "missing_required_parameter", "body.model"),
        ({"body": {"model": "m", "messages": "{{a.output_text}}"}}, "missing_required_parameter", "body.messages"),
        ({"body": {"model": "m", "messages": []}}, "missing_required_parameter", "body.messages"),
        ({"body": {"model": "m", "messages": [{}], "stream": True}}, "unsupported_parameter", "body.stream"),
        ({"body": {"model": "m", "messages": [{}], "n": 2}}, "unsupported_parameter", "body.n"),
        ({"body": {"model": "m", "messages": [{}], "tools": [{}]}}, "unsupported_parameter", "body.tools"),
        ({"body": {"model": "m", "messages": [{}], "logprobs": True}}, "unsupported_parameter", "body.logprobs"),
        ({"body": {"model": "m", "messages": [{}], "forebay": 1}}, "invalid_type", "body.forebay"),
    ],
)
def test_a_row_that_cannot_be_answered_is_told(wrong: dict[str, Any], code: str, param: str) -> None:
    assert refused(row("z"), {**row("a"), **wrong}) == [(code, 2, param)]


def test_what_changes_nothing_may_stand_in_a_row() -> None:
    assert planned(row("a", n=1, stream=False, logprobs=False, tools=[], modalities=["text"], top_logprobs=None))


def test_many_prompts_in_one_row_are_refused() -> None:
    body = {"model": "m", "prompt": ["x", "y"]}
    completion = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
    assert refused(completion, endpoint=Endpoint.COMPLETIONS) == [("unsupported_parameter", 1, "body.prompt")]


def test_two_rows_of_one_name_are_refused() -> None:
    assert refused(row("a"), row("b"), row("a")) == [("duplicate_custom_id", 3, "custom_id")]


def test_a_row_that_nobody_knows_is_told_by_its_name() -> None:
    assert refused(row("a", "{{nobody.output_text}}")) == [("unknown_row", 1, "body")]
    assert "'nobody'" in messages(row("a", "{{nobody.output_text}}"))


def test_a_template_that_cannot_be_read_is_told_with_its_line() -> None:
    assert refused(row("a"), row("b", "{{a.output_text | nothing}}")) == [("invalid_reference", 2, "body")]


def test_rows_that_wait_for_each_other_are_refused() -> None:
    circle = (row("x"), row("a-1", "{{b.output_text}}"), row("b", "{{x.output_text}} {{a-1.output_text}}"))
    ((code, line, param),) = refused(*circle)
    assert (code, param) == ("circular_reference", "body")
    assert line in {2, 3}
    assert "'a-1' → 'b' → 'a-1'" in messages(*circle) or "'b' → 'a-1' → 'b'" in messages(*circle)
    assert refused(row("a", "{{a.output_text}}")) == [("circular_reference", 1, "body")]


def test_no_more_than_a_hundred_errors_are_told() -> None:
    assert len(refused(*[b"{"] * 150)) == 100


def test_a_line_that_nests_too_deep_is_no_row() -> None:
    deep = json.dumps(row("a")).encode().replace(b'"Say one."', b"[" * 100 + b"]" * 100)
    assert refused(deep) == [("invalid_json_line", 1, None)]


def test_errors_are_values() -> None:
    assert InvalidRows([RowError("c", "m")]).errors == (RowError("c", "m"),)
    assert not issubclass(InvalidRows, InvalidRequest)
