"""Random workflows for property tests: every kind of call, nested, over variables that are there."""

from typing import Any

from hypothesis import strategies as st

from semantic_vars.calls import Workflow
from tests.unit.semantic_vars.runs import llm, workflow

_ON_ERROR = st.sampled_from(["fail", "fail", "skip", "default"])
DEPTH = 2


@st.composite
def workflows(draw: st.DrawFn) -> Workflow:
    """Return a workflow of up to six calls beside each other."""
    names = ["given"]
    made = []
    for number in range(draw(st.integers(1, 6))):
        made.append(draw(a_call(f"c{number}", tuple(names), DEPTH)))
        names.append(f"c{number}")
    return workflow(*made, variables={"given": {"value": "g"}})


@st.composite
def a_call(draw: st.DrawFn, name: str, names: tuple[str, ...], depth: int) -> dict[str, Any]:
    """Return a call of this name over these variables."""
    kinds = ["llm", "llm", "llm", "transform", "map"]
    if depth:
        kinds += ["branch", "loop", "workflow"]
    kind = draw(st.sampled_from(kinds))
    used = draw(st.lists(st.sampled_from(names), max_size=3, unique=True))
    text = name + "".join(f"({{{{{one}}}}})" for one in used)
    common: dict[str, Any] = {"on_error": draw(_ON_ERROR), "default": f"no {name}"}
    match kind:
        case "llm":
            return llm(name, text, **common)
        case "transform":
            return {"kind": "transform", "id": name, "value": {"x": text}, **common}
        case "map":
            items = draw(st.lists(st.sampled_from(["p", "q", "r"]), max_size=4))
            most = draw(st.integers(1, 3))
            return llm(name, text + "{{item}}{{index}}", foreach=items, max_parallel=most, **common)
        case "branch":
            call: dict[str, Any] = {
                "kind": "branch",
                "id": name,
                "if": f"{{{{{draw(st.sampled_from(names))} | text | contains('1')}}}}",
            }
            call |= {"then": draw(a_body(f"{name}t", names, depth - 1)), **common}
            return call | ({"else": draw(a_body(f"{name}e", names, depth - 1))} if draw(st.booleans()) else {})
        case "workflow":
            body = draw(a_body(f"{name}w", (*names, f"{name}in"), depth - 1))
            call = {"kind": "workflow", "id": name, "inputs": {f"{name}in": text}, "body": body, **common}
            return call | ({"foreach": ["p", "q"]} if draw(st.booleans()) else {})
        case _:
            body = draw(a_body(f"{name}l", (*names, f"{name}s"), depth - 1))
            return {
                "kind": "loop", "id": name, "state": {f"{name}s": text}, "calls": body["calls"],
                "next": {f"{name}s": body["result"]}, "until": "{{" + f"{name}s | text | contains('2')" + "}}",
                "result": body["result"], "max_iterations": draw(st.integers(1, 3)), **common,
            }  # fmt: skip


@st.composite
def a_body(draw: st.DrawFn, prefix: str, names: tuple[str, ...], depth: int) -> dict[str, Any]:
    """Return a body of one or two calls, of which the last is the result."""
    made: list[dict[str, Any]] = []
    for number in range(draw(st.integers(1, 2))):
        around = (*names, *(one["id"] for one in made))
        made.append(draw(a_call(f"{prefix}{number}", around, depth)))
    return {"calls": made, "result": f"{{{{{made[-1]['id']}}}}}"}
