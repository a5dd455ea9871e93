"""Graphs that cannot run are refused before anything runs, and the error names call and variable."""

import re
from typing import Any

import msgspec
import pytest

from core.errors import InvalidRequest
from semantic_vars.calls import Workflow
from semantic_vars.graph import USUAL, Bounds, Reader
from tests.unit.semantic_vars.runs import llm, workflow

LOOP = {"kind": "loop", "id": "l", "state": {"s": 1}, "calls": [], "next": {"s": 2}, "until": True, "result": "{{s}}"}


def nested(depth: int) -> dict[str, Any]:
    body = {"calls": [nested(depth - 1)] if depth else [], "result": "x"}
    return {"kind": "workflow", "id": f"w{depth}", "inputs": {}, "body": body}


def read(given: Workflow, bounds: Bounds = USUAL) -> Any:
    return Reader(bounds).nodes(given.calls, frozenset(given.variables))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([llm("a", "{{b}}"), llm("b", "{{c}}"), llm("c", "{{a}}")], "circle, each for the next: 'a' → 'b' → 'c' → 'a'"),
        ([llm("a", "{{a}}")], "'a' → 'a'"),
        ([llm("a", "x", output="v"), llm("b", "y", output="v")], "'v': 'a' and 'b'"),
        ([llm("a", "x"), llm("a", "y")], "two calls have the id 'a'"),
        ([llm("a", "{{nowhere}}")], "call 'a' uses the variable 'nowhere'"),
        ([llm("a", "x", needs=["nowhere"])], "call 'a' uses the variable 'nowhere'"),
        ([llm("a", "x", foreach="{{nowhere}}")], "call 'a' uses the variable 'nowhere'"),
        ([llm("a", "{{item}}")], "'item'"),
        ([llm("a", "x {{")], "call 'a': a hole is never closed"),
        ([llm("a-b", "x")], "'a-b' is no name"),
        ([llm("a", "x", output="given")], "writes the variable 'given', which is there already"),
        ([LOOP], "call 'l': a loop needs max_iterations"),
        ([LOOP | {"max_iterations": 10**9}], "of 1 to 1000"),
        ([LOOP | {"max_iterations": 1, "next": {"t": 1}}], "lacks s, t"),
        ([LOOP | {"max_iterations": 1, "result": "{{b}}"}], "call 'l': its result uses the variable 'b'"),
        ([LOOP | {"max_iterations": 1, "calls": [llm("b", "{{c}}")]}], "call 'l': call 'b' uses the variable 'c'"),
        ([{"kind": "race", "id": "r", "of": [{"result": 1}], "first": 2}], "call 'r': first is 2, of 1"),
        ([nested(9)], "more than 8 deep"),
    ],
)
def test_what_cannot_run_is_refused(given: list[dict[str, Any]], told: str) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(told)):
        read(workflow(*given, variables={"given": {"value": 1}}))


def test_a_graph_of_too_many_calls_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="more than 3 calls"):
        read(workflow(*(llm(f"c{n}", "x") for n in range(4))), Bounds(calls=3))


@pytest.mark.parametrize(
    "given",
    [
        {"kind": "llm", "id": "a"},
        {"kind": "code", "id": "a"},
        {"kind": "llm", "id": "a", "request": {}, "colour": "red"},
        {"kind": "llm", "id": "a", "request": {}, "max_parallel": 0},
        {"kind": "llm", "id": "a", "request": {}, "retry": {"max": 1_000}},
        {"kind": "tool", "id": "a", "server": {"type": "python"}},
    ],
)
def test_what_is_no_call_is_refused_where_it_is_read(given: dict[str, Any]) -> None:
    with pytest.raises(msgspec.ValidationError, match=re.escape("$.calls[0]")):
        workflow(given)


def test_a_body_knows_what_it_takes_from_around_it() -> None:
    body = {"calls": [llm("b", "{{s}}{{outer}}")], "next": {"s": "{{b}}"}, "until": "{{stop}}"}
    (node, *_) = read(workflow(LOOP | body | {"max_iterations": 2}, llm("outer", "x"), llm("stop", "x")))
    assert (node.inputs, node.captured) == (frozenset(), {"outer", "stop"})


@pytest.mark.parametrize("messages", ["Say one.", "Say {{a}}.", 5, None, {"role": "user"}])
def test_messages_are_a_list_or_one_hole(messages: object) -> None:
    call = {"kind": "llm", "id": "b", "request": {"model": "m", "messages": messages}}
    given = workflow(call, variables={"a": {"value": "x"}})
    with pytest.raises(InvalidRequest, match="call 'b': messages has to be a list"):
        Reader(USUAL).nodes(given.calls, frozenset(given.variables))
