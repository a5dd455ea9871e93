"""What an answer says, however it was sent, and everything that is wrong with the way in which it was sent."""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from tests.e2e.asking import event_of
from tests.e2e.questions import CHAT, Question

_NEVER_ASKED_FOR = ("token_ids", "prompt_token_ids")
DONE = b"data: [DONE]"


class Story(NamedTuple):
    """``texts``, ``finishes`` and ``roles`` (how often one was told: llama.cpp forgets it where the first token ends
    inside of a letter) stand for the choices; ``error`` is the code of the error that ended the answer, and
    ``legs`` how many runs it is said to have taken. ``faults`` are offences against the wire's rules, in words."""

    texts: tuple[str, ...] = ()
    finishes: tuple[str | None, ...] = ()
    roles: tuple[int, ...] = ()
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    error: str | None = None
    legs: int | None = None
    faults: tuple[str, ...] = ()


def story_of(question: Question, status: int, body: bytes) -> Story:
    """Return what an answer says. Nothing is raised: what cannot be read is a fault."""
    if status != 200 or not question.streams:
        return _of_whole(question, status, body)
    return _Reading(question).read(body)


def differences(story: Story, undisturbed: Story) -> list[str]:
    """Return how two answers to one question differ in what they say: in words, and nothing if they do not."""
    found = []
    for at, (text, other) in enumerate(zip(story.texts, undisturbed.texts, strict=False)):
        if text != other:
            begin = next(
                (i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other))
            )
            here, there = text[begin : begin + 30], other[begin : begin + 30]
            found.append(f"text {at} differs from letter {begin} of {len(other)} on: {here!r}, undisturbed {there!r}")
    for name in ("finishes", "roles", "completion_tokens", "prompt_tokens"):
        mine, others = getattr(story, name), getattr(undisturbed, name)
        if mine != others:
            found.append(f"{name}: {mine}, undisturbed {others}")
    if len(story.texts) != len(undisturbed.texts):
        found.append(f"{len(story.texts)} choices, undisturbed {len(undisturbed.texts)}")
    return found


def _of_whole(question: Question, status: int, body: bytes) -> Story:
    try:
        answer = json.loads(body)
    except ValueError:
        return Story(faults=(f"status {status}, and no JSON: {body[:80]!r}",))
    if status != 200:
        return Story(error=str(answer.get("error", {}).get("code")), faults=(f"status {status}: {body[:200]!r}",))
    choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
    texts = tuple(
        (choice["message"]["content"] if question.path == CHAT else choice["text"]) or "" for choice in choices
    )
    usage, faults = answer.get("usage"), [*_unasked(answer, question)]
    faults += _wrong_usage(usage, question) if usage else ["a whole answer without usage"]
    finishes = tuple(choice["finish_reason"] for choice in choices)
    return Story(texts, finishes, (), *_metered(usage), faults=tuple(faults))


class _Reading:
    """Reads one stream, frame by frame."""

    def __init__(self, question: Question) -> None:
        self._question = question
        self._faults: list[str] = []
        count = question.body.get("n", 1)
        self._texts = [""] * count
        self._roles = [0] * count
        self._finishes: list[list[str]] = [[] for _ in range(count)]
        self._heads: dict[str, Any] = {}
        self._usages: list[dict[str, Any]] = []
        self._errors: list[str] = []

    def read(self, body: bytes) -> Story:
        frames = [frame for frame in body.split(b"\n\n") if not frame.startswith(b":")]
        if frames.pop() != b"":
            self._faults.append(f"the stream ends inside of a frame: {body[-60:]!r}")
        events = []
        for frame in frames:
            if frame == DONE:
                continue
            try:
                events.append(event_of(frame))
            except ValueError:
                self._faults.append(f"a frame that is no JSON: {frame[:80]!r}")
        for at, event in enumerate(events):
            self._take(event, is_last=at + 1 == len(events))
        self._judge_end(frames)
        finishes = tuple(finish[0] if finish else None for finish in self._finishes)
        usage = self._usages[-1] if self._usages else None
        error = self._errors[0] if self._errors else None
        said = tuple(self._texts), finishes, tuple(self._roles)
        return Story(*said, *_metered(usage), error, _legs(usage), tuple(self._faults))

    def _take(self, event: Any, *, is_last: bool) -> None:
        if not isinstance(event, dict):
            self._faults.append(f"a frame that is no object: {event!r}")
            return
        if event.get("error"):
            self._errors.append(str(event["error"].get("code")))
            if not is_last:
                self._faults.append("something follows the error")
            return
        for name in self._question.steady:
            if self._heads.setdefault(name, event.get(name)) != event.get(name):
                self._faults.append(f"{name} changes from {self._heads[name]!r} to {event.get(name)!r}")
        self._faults += _unasked(event, self._question)
        if event.get("usage"):
            self._usages.append(event["usage"])
            if not is_last:
                self._faults.append("something follows the usage")
        for choice in event["choices"]:
            self._take_choice(choice)

    def _take_choice(self, choice: dict[str, Any]) -> None:
        at = choice["index"]
        if at >= len(self._texts):
            self._faults.append(f"a choice {at} that was not asked for")
            return
        is_chat = self._question.path == CHAT
        text = (choice["delta"].get("content") if is_chat else choice["text"]) or ""
        if is_chat and choice["delta"].get("role"):
            self._roles[at] += 1
            if self._texts[at]:
                self._faults.append("the role comes after text")
        if text and self._finishes[at]:
            self._faults.append(f"text after the finish: {text!r}")
        self._texts[at] += text
        if choice.get("finish_reason"):
            self._finishes[at].append(choice["finish_reason"])

    def _judge_end(self, frames: list[bytes]) -> None:
        question = self._question
        num_done = frames.count(DONE)
        if self._errors:
            if len(self._errors) > 1 or num_done:
                self._faults.append(f"{len(self._errors)} errors and {num_done} [DONE]")
            return
        if num_done != 1 or frames[-1] != DONE:
            self._faults.append(f"{num_done} [DONE], the last frame is {frames[-1][:60] if frames else b''!r}")
        self._judge_numbers()
        for stop in question.body.get("stop", ()):
            if any(stop in text for text in self._texts):
                self._faults.append(f"the stop string {stop!r} is in the text")

    def _judge_numbers(self) -> None:
        question = self._question
        for at, finish in enumerate(self._finishes):
            if len(finish) != 1:
                self._faults.append(f"choice {at} has {len(finish)} finish reasons")
        if any(count > 1 for count in self._roles):
            self._faults.append(f"the role comes {self._roles} times")
        if len(self._usages) != question.wants_usage:
            self._faults.append(f"{len(self._usages)} usages, asked for {int(question.wants_usage)}")
        for usage in self._usages:
            self._faults += _wrong_usage(usage, question)
        if self._usages and self._finishes == [["length"]]:
            used, most = self._usages[-1].get("completion_tokens"), question.body["max_tokens"]
            if used != most:
                self._faults.append(f"cut for its length after {used} tokens of {most}")


def _metered(usage: dict[str, Any] | None) -> tuple[int | None, int | None]:
    return (usage.get("prompt_tokens"), usage.get("completion_tokens")) if usage else (None, None)


def _legs(usage: dict[str, Any] | None) -> int | None:
    legs = (usage or {}).get("forebay", {}).get("legs")
    return len(legs) if isinstance(legs, list) else legs


def _wrong_usage(usage: dict[str, Any], question: Question) -> Iterator[str]:
    prompt, completion, total = (usage.get(f"{name}_tokens", 0) for name in ("prompt", "completion", "total"))
    if prompt + completion != total or not prompt:
        yield f"usage does not add up: {usage}"
    if completion > question.body["max_tokens"] * question.body.get("n", 1):
        yield f"{completion} tokens, {question.body['max_tokens']} were allowed"


def _unasked(event: dict[str, Any], question: Question) -> Iterator[str]:
    if not question.body.get("return_token_ids"):
        holders = [event, *event.get("choices", ())]
        yield from (f"{name} that nobody asked for" for name in _NEVER_ASKED_FOR for one in holders if one.get(name))
