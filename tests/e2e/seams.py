"""Whether each stream is exactly what its engines said, put together where they were cut; no engine has to be exact
for that, as it has to be where whole answers are compared."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.e2e.asking import event_of
from tests.e2e.questions import CHAT, Question
from tests.e2e.stories import Story

_ANSWER_BEGINS = "<|im_start|>assistant\n"  # the chat template of SmolLM2


def seam_faults(record: Path, told: Sequence[tuple[Question, Story]]) -> list[str]:
    """Return what was lost, doubled or altered, in words.

    A leg's prompt holds what its engine was told to go on from. The last leg's with what its engine answered has to be
    all of the client's text, but for a stop string that an engine did not see because it lies across a seam: there the
    text ends. Every other leg's has to be how that begins.
    """
    lines = sorted((json.loads(line) for line in record.read_text().splitlines()), key=lambda line: line["at"])
    faults = []
    for question, story in told:
        legs = [line for line in lines if _is_about(question, line)]
        if story.error is not None or question.is_pinned or not legs:
            continue
        (text,) = story.texts
        name = f"{question.number} of {len(legs)} legs"
        whole = _given(question, legs[-1]) + _said(legs[-1])
        for number, leg in enumerate(legs):
            given = _given(question, leg)
            if not whole.startswith(given):
                faults.append(f"{name}: leg {number} was told to go on from {given!r}, the engines said {whole!r}")
        if _before_stop(question, whole) != text:
            faults.append(f"{name}: the engines said {whole!r}, the client has {text!r}")
    return faults


def _before_stop(question: Question, text: str) -> str:
    stops = question.body.get("stop", ())
    return min(
        (text.partition(stop)[0] for stop in ([stops] if isinstance(stops, str) else stops)), key=len, default=text
    )


def _asked(question: Question) -> str:
    body = question.body
    return str(body["messages"][-1]["content"] if question.path == CHAT else body["prompt"])


def _is_about(question: Question, line: dict[str, Any]) -> bool:
    if line["messages"]:
        return bool(line["messages"][-1]["content"] == _asked(question))
    prompt, asked = str(line["prompt"]), _asked(question)
    if question.path == CHAT:
        return f"user\n{asked}<|im_end|>" in prompt
    return prompt.startswith(asked)


def _given(question: Question, line: dict[str, Any]) -> str:
    if line["messages"]:
        return ""
    prompt = str(line["prompt"])
    return prompt.partition(_ANSWER_BEGINS)[2] if question.path == CHAT else prompt.removeprefix(_asked(question))


def _said(line: dict[str, Any]) -> str:
    said: str = line["said"]
    events = [json.loads(said)] if said.startswith("{") else [event_of(frame) for frame in said.encode().split(b"\n\n")]
    text = ""
    for event in events:
        for choice in (event or {}).get("choices", ()):
            text += choice.get("text") or (choice.get("delta") or choice.get("message") or {}).get("content") or ""
    return text
