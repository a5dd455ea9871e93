"""What the engines said, put together, has to be what the client got: every kind of damage at a seam is told."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.questions import CHAT, Question
from tests.e2e.seams import seam_faults
from tests.e2e.stories import Story

QUESTION = Question(7, CHAT, {"messages": [{"role": "user", "content": "7. Hi"}]}, is_pinned=False, is_free=False)
RENDERED = "<|im_start|>user\n7. Hi<|im_end|>\n<|im_start|>assistant\n"


def said(*texts: str) -> str:
    return "".join(f"data: {json.dumps({'choices': [{'text': text}]})}\n\n" for text in texts)


def leg(at: float, given: str | None, *texts: str) -> dict[str, Any]:
    messages = QUESTION.body["messages"] if given is None else None
    prompt = None if given is None else RENDERED + given
    return {"at": at, "path": CHAT, "messages": messages, "prompt": prompt, "said": said(*texts)}


def faults(directory: Path, text: str, *legs: dict[str, Any], stop: list[str] | None = None) -> list[str]:
    record = directory / "record.jsonl"
    record.write_text("".join(json.dumps(one) + "\n" for one in legs))
    question = QUESTION._replace(body={**QUESTION.body, "stop": stop or []})
    return seam_faults(record, [(question, Story((text,)))])


def test_a_text_is_whole_if_each_leg_went_on_from_what_was_delivered(tmp_path: Path) -> None:
    legs = leg(3, "one two", " three"), leg(1, None, "one", " two", " not delivered"), leg(2, "one", " two", " gone")
    assert faults(tmp_path, "one two three", *legs) == []


def test_a_whole_answer_is_read_too(tmp_path: Path) -> None:
    whole = {**leg(1, None), "said": json.dumps({"choices": [{"message": {"content": "one two"}}]})}
    assert faults(tmp_path, "one two", whole) == []
    assert faults(tmp_path, "one", whole)


@pytest.mark.parametrize("text", ["one three", "one two two three", "one two  three", "one two", "one two three four"])
def test_a_text_that_is_more_or_less_or_other_than_was_said_is_told(tmp_path: Path, text: str) -> None:
    assert faults(tmp_path, text, leg(1, None, "one", " two"), leg(2, "one two", " three"))


def test_a_leg_that_was_told_to_go_on_from_something_else_is_told(tmp_path: Path) -> None:
    legs = leg(1, None, "one"), leg(2, "one 2", " three"), leg(3, "one two", " three")
    assert len(faults(tmp_path, "one two three", *legs)) == 1


def test_a_stop_string_across_a_seam_ends_the_text_though_no_engine_saw_it(tmp_path: Path) -> None:
    legs = leg(1, None, "one two."), leg(2, "one two.", " three")

    assert faults(tmp_path, "one two", *legs, stop=["four", ". "]) == []
    assert faults(tmp_path, "one two. three", *legs, stop=["four", ". "])
    assert faults(tmp_path, "one two", *legs, stop=["four"])
    assert faults(tmp_path, "one", *legs, stop=["four", ". "])
