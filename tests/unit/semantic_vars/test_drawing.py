"""Drawings show every call and every edge, say how things stand, and let no text out of its place."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from semantic_vars.calls import Llm, Workflow
from semantic_vars.drawing import INK, LINE, as_json, mermaid, svg
from semantic_vars.graph import Bounds, Node, Reader
from semantic_vars.template import form_of
from tests.unit.semantic_vars.graphs import workflows
from tests.unit.semantic_vars.runs import llm, workflow

SVG = "{http://www.w3.org/2000/svg}"
_NODE = re.compile(r' *(?:subgraph )?(n\d+) ?\(?\["([^"]*)"\]\)?')
_EDGE = re.compile(r' *(n\d+) -->\|"([^"]*)"\| (n\d+)')
_FRAME = re.compile(
    r' *(?:flowchart LR|direction LR|end|subgraph n\d+b\d+ \["[a-z0-9]*"\]|classDef [a-z]+ .*|class [n\d,]+ [a-z]+)'
)


def read(given: Workflow) -> tuple[Node, ...]:
    return Reader(Bounds()).nodes(given.calls, frozenset(given.variables))


def drawn(*given: Mapping[str, Any], states: Mapping[str, str] | None = None) -> dict[str, dict[str, Any]]:
    """Return the boxes of a workflow over the variable ``given``, by id."""
    nodes = read(workflow(*given, variables={"given": {"value": "g"}}))
    return {one["id"]: one for one in as_json(nodes, states or {})["nodes"]}


def levels(nodes: Sequence[Node], within: str | None = None) -> Iterator[tuple[str | None, Sequence[Node]]]:
    """Yield all calls that stand beside each other, with the id of the call that they are within."""
    yield within, nodes
    for node in nodes:
        for block in node.blocks:
            yield from levels(block.nodes, node.call.id)


def is_call(box: Mapping[str, Any]) -> bool:
    return box["kind"] not in {"variable", "result"}


def named(code: str) -> str:
    """Return a text of a Mermaid drawing as it is read."""
    return re.sub(r"#(\d+);", lambda found: chr(int(found[1])), code)


def parts(root: ElementTree.Element, key: str) -> list[ElementTree.Element]:
    return [one for one in root.iter(f"{SVG}g") if key in one.attrib]


Shown = tuple[list[str], set[tuple[str, str, str]]]
"""Ids of boxes, and edges: from, to, variable."""


def in_json(nodes: Sequence[Node], states: Mapping[str, str]) -> Shown:
    said = as_json(nodes, states)
    edges = [(one["from"], one["to"], one["variable"]) for one in said["edges"]]
    assert len(edges) == len(set(edges))
    return sorted(one["id"] for one in said["nodes"]), set(edges)


def in_svg(nodes: Sequence[Node], states: Mapping[str, str]) -> Shown:
    root = ElementTree.fromstring(svg(nodes, states))
    given = [one.attrib for one in parts(root, "data-to")]
    edges = [(one["data-from"], one["data-to"], one["data-variable"]) for one in given]
    assert len(edges) == len(set(edges))
    return sorted(one.attrib["data-path"] for one in parts(root, "data-path")), set(edges)


def in_mermaid(nodes: Sequence[Node], states: Mapping[str, str]) -> tuple[list[str], list[tuple[str, str, str]]]:
    """Return the texts of boxes, and edges by the names that the drawing gives to boxes."""
    boxes: list[str] = []
    edges: list[tuple[str, str, str]] = []
    for line in mermaid(nodes, states).splitlines():
        if edge := _EDGE.fullmatch(line):
            edges.append((edge[1], edge[3], named(edge[2])))
        elif box := _NODE.fullmatch(line):
            assert box[1] == f"n{len(boxes)}"
            boxes.append(named(box[2]))
        else:
            assert _FRAME.fullmatch(line), line
    return boxes, edges


@given(given=workflows())
def test_every_call_and_every_edge_is_in_each_drawing(given: Workflow) -> None:
    nodes = read(given)
    ids, edges = in_json(nodes, {})
    boxes = {one["id"]: one for one in as_json(nodes, {})["nodes"]}
    assert len(boxes) == len(ids)

    made = {
        (one["name"], one["within"] and boxes[one["within"]]["name"]): one for one in boxes.values() if is_call(one)
    }
    wanted = 0
    for within, beside in levels(nodes):
        makers = {node.call.variable: node.call.id for node in beside}
        for node in beside:
            box = made[node.call.id, within]
            into = [(boxes[source], variable) for source, target, variable in edges if target == box["id"]]
            assert {variable for _, variable in into} == node.uses
            for source, variable in into:
                assert source["name"] == makers.get(variable, variable)
                assert is_call(source) == (variable in makers)
                assert (source["within"], source["body"]) == (box["within"], box["body"])
            wanted += 1
    assert wanted == len(made) == sum(map(is_call, boxes.values()))

    assert in_svg(nodes, {}) == (ids, edges)
    texts, arrows = in_mermaid(nodes, {})
    order = [*boxes]
    assert [text.partition("<br/>")[0] for text in texts] == [boxes[one]["name"] for one in order]
    assert {(order[int(a[1:])], order[int(b[1:])], variable) for a, b, variable in arrows} == edges
    assert len(arrows) == len(edges)


Rect = tuple[float, float, float, float]
"""Left, top, right, bottom."""


def rect_of(group: ElementTree.Element) -> Rect:
    rect = group.find(f"{SVG}rect")
    assert rect is not None
    x, y, width, height = (float(rect.attrib[name]) for name in ("x", "y", "width", "height"))
    return x, y, x + width, y + height


def inside(group: ElementTree.Element, key: str) -> list[ElementTree.Element]:
    return [one for one in group.findall(f"{SVG}g") if key in one.attrib]


def body_of(path: str) -> str:
    return path[: path.rfind("/") + 1]


def steps(edge: ElementTree.Element) -> Iterator[tuple[str, Rect]]:
    """Yield the straight parts (``H``) and the bends (``C``) of an edge, by their ends."""
    x = y = 0.0
    for letter, numbers in re.findall(r"([MHC])([^MHC]*)", edge.findall(f"{SVG}path")[0].attrib["d"]):
        given = [float(one) for one in numbers.split()]
        to_x, to_y = (given[0], y) if letter == "H" else (given[-2], given[-1])
        yield letter, (x, y, to_x, to_y)
        x, y = to_x, to_y


@given(given=workflows())
def test_boxes_are_inside_of_theirs_and_beside_all_others(given: Workflow) -> None:
    root = ElementTree.fromstring(svg(read(given), {}))

    def check(group: ElementTree.Element, around: Rect) -> None:
        taken: list[Rect] = []
        for one in inside(group, "data-path"):
            mine = rect_of(one)
            assert around[0] <= mine[0] < mine[2] <= around[2] + 0.2
            assert around[1] <= mine[1] < mine[3] <= around[3] + 0.2
            for other in taken:
                assert mine[2] < other[0] or other[2] < mine[0] or mine[3] < other[1] or other[3] < mine[1]
            taken.append(mine)
            check(one, mine)

    check(root, (0.0, 0.0, float(root.attrib["width"]), float(root.attrib["height"])))


@given(given=workflows())
def test_edges_go_to_the_right_and_past_all_boxes_but_their_own(given: Workflow) -> None:
    root = ElementTree.fromstring(svg(read(given), {}))
    for group in (root, *parts(root, "data-path")):
        rects = {one.attrib["data-path"]: rect_of(one) for one in inside(group, "data-path")}
        for edge in inside(group, "data-to"):
            source, target = rects[edge.attrib["data-from"]], rects[edge.attrib["data-to"]]
            ways = [*steps(edge)]
            assert abs(ways[0][1][2] - source[2]) < 0.2
            assert source[1] < ways[0][1][3] < source[3]
            assert abs(ways[-1][1][2] - target[0]) < 0.2
            assert target[1] < ways[-1][1][3] < target[3]
            for letter, (x, y, to_x, to_y) in ways[1:]:
                assert x <= to_x
                for path, (left, top, right, bottom) in rects.items():
                    if body_of(path) != body_of(edge.attrib["data-to"]):
                        continue  # another body of the same call, which is above or below
                    if letter == "C":  # between layers
                        assert to_x <= left + 0.2 or right <= x + 0.2
                    else:
                        assert y == to_y
                        assert to_x <= left or right <= x + 0.2 or not top <= y <= bottom


@given(given=workflows(), data=st.data())
def test_no_text_breaks_out_of_a_drawing(given: Workflow, data: st.DataObject) -> None:
    hostile = st.one_of(
        st.text(),
        st.sampled_from([
            '"/><script>alert(1)</script>', "]]></svg>", "&amp;&#x0;", '"] --> x["', "done;style", "\x00\x1b[2J\ufffe",
            "%%{init: {}}%%", "`**x**`", "#quot;", "<br/>", "\nend\nclick n0 call x()",
        ]),
    )  # fmt: skip
    text = data.draw(hostile.filter(lambda one: "{{" not in one))
    calls = [
        msgspec.structs.replace(one, request={**one.request, "model": text}) if isinstance(one, Llm) else one
        for one in given.calls
    ]
    nodes = read(msgspec.structs.replace(given, calls=tuple(calls)))
    ids, edges = in_json(nodes, {})
    states = {one: data.draw(hostile) for one in (*ids, text)}

    drawing = svg(nodes, states)

    assert in_svg(nodes, states) == (ids, edges)
    root = ElementTree.fromstring(drawing)
    assert {one.tag for one in root.iter()} <= {SVG + name for name in ("svg", "title", "g", "rect", "path", "text")}
    assert {name for one in root.iter() for name in one.attrib if name.startswith(("on", "style", "href"))} == set()
    boxes, arrows = in_mermaid(nodes, states)  # every line is one that a drawing has
    assert (len(boxes), len(arrows)) == (len(ids), len(edges))


def test_names_that_nobody_checked_stay_in_their_place_too() -> None:
    name = '"><script>&'
    form = form_of("x")
    node = Node(Llm(id=name, request={"model": "m"}), form, None, (), frozenset({"a<b"}), frozenset())

    root = ElementTree.fromstring(svg([node], {name: "done"}))

    assert [one.attrib["data-path"] for one in parts(root, "data-path")] == ["$a<b", name]
    assert in_mermaid([node], {})[0] == ["a<b", f"{name}<br/>llm · m"]


def test_a_call_says_what_it_is_and_how_it_stands() -> None:
    given = [
        llm("part", "{{item}}", foreach="{{given}}"),
        {"kind": "tool", "id": "find", "server": {"type": "mcp", "url": "http://h/?secret", "tool": "search"}},
        {"kind": "tool", "id": "ask", "server": {"type": "client", "tool": "human"}},
        {"kind": "tool", "id": "post", "server": {"type": "http", "url": "http://h/?secret"}},
        {"kind": "race", "id": "r", "first": 1, "of": [{"result": "x"}, {"result": "y"}]},
    ]
    boxes = drawn(*given, states={"part": "running", "find": "done", "given": "done"})

    assert [(one["name"], one["kind"], one["note"], one["state"]) for one in boxes.values()] == [
        ("given", "variable", "", "done"),
        ("part", "llm", "for each m", "running"),
        ("find", "tool", "search", "done"),
        ("ask", "tool", "human", None),
        ("post", "tool", "", None),
        ("r", "race", "first 1 of 2", None),
        ("result", "result", "", None),
        ("result", "result", "", None),
    ]
    assert "secret" not in svg(read(workflow(*given, variables={"given": {"value": []}})), {})


def test_what_is_made_many_times_is_drawn_once_and_counted() -> None:
    body = {"calls": [llm("x", "{{s}}")], "result": "{{x}}"}
    one, other = ({"calls": [llm("x", text)], "result": "{{x}}"} for text in "ab")
    given: list[dict[str, Any]] = [
        {
            "kind": "loop", "id": "l", "state": {"s": 1}, "calls": body["calls"], "next": {"s": 2}, "until": False,
            "result": "{{x}}", "max_iterations": 9,
        },
        {"kind": "race", "id": "r", "of": [one, other]},
        {"kind": "workflow", "id": "w", "foreach": [1, 2], "inputs": {"s": "{{item}}"}, "body": body},
        llm("m", "{{item}}", foreach=[1, 2, 3]),
    ]  # fmt: skip
    boxes = drawn(
        *given,
        states={
            "l": "running", "l#0/x": "done", "l#1/x": "done", "l#2/x": "running", "l#2/": "pending",
            "r#0/x": "cancelled", "r#1/x": "done",
            "w[0]": "done", "w[0]/x": "done", "w[1]/x": "failed",
            "m": "done", "m[0]": "done", "m[1]": "skipped", "m[2]": "done",
            "unknown#0/x": "done", "l#0/x/y": "failed", "a b": "done", "": "done",
        },
    )  # fmt: skip

    stands = {path: (one["state"], one["times"]) for path, one in boxes.items() if one["kind"] == "llm"}
    assert stands == {
        "l#*/x": ("running", {"running": 1, "done": 2}),
        "r#0/x": ("cancelled", {}),
        "r#1/x": ("done", {}),
        "w[*]/x": ("failed", {"failed": 1, "done": 1}),
        "m": ("done", {"skipped": 1, "done": 2}),
    }
    assert (boxes["w"]["state"], boxes["w"]["times"]) == ("done", {"done": 1})
    assert (boxes["r#1/x"]["within"], boxes["r#1/x"]["body"]) == ("r", "1")


def test_a_branch_shows_both_its_bodies() -> None:
    then = {"calls": [llm("y", "{{given}}")], "result": "{{y}}"}
    branch = {"kind": "branch", "id": "b", "if": "{{given}}", "then": then, "else": {"result": "none"}}
    boxes = drawn(branch, states={"b#then/y": "done"})

    assert [(path, one["body"]) for path, one in boxes.items()] == [
        ("$given", None), ("b", None), ("b#then/$given", "then"), ("b#then/y", "then"), ("b#then/", "then"),
        ("b#else/", "else"),
    ]  # fmt: skip
    assert boxes["b#then/y"]["state"] == "done"


def test_states_are_classes_of_mermaid() -> None:
    nodes = read(workflow(llm("a", "x"), llm("b", "{{a}}"), llm("c", "{{a}}")))

    lines = mermaid(nodes, {"a": "done", "b": "done", "c": "of no kind"}).splitlines()

    assert "  class n0,n1 done" in lines
    assert "  class n2 other" in lines
    assert '  n0 -->|"a"| n1' in lines


def test_a_graph_without_calls_is_drawn() -> None:
    assert as_json([], {}) == {"nodes": [], "edges": []}
    assert mermaid([], {}) == "flowchart LR\n"
    assert ElementTree.fromstring(svg([], {})).tag == f"{SVG}svg"


def test_edges_past_very_many_layers_are_drawn_without_lanes() -> None:
    chain = [llm("c0", "x"), *(llm(f"c{number}", f"{{{{c{number - 1}}}}}{{{{c0}}}}") for number in range(1, 300))]

    drawing = svg(read(workflow(*chain)), {})

    assert len(parts(ElementTree.fromstring(drawing), "data-to")) == 299 + 298
    assert len(drawing) < 1_000 * 600


def test_a_long_chain_and_a_wide_map_are_drawn() -> None:
    chain = [llm("c0", "x"), *(llm(f"c{number}", f"{{{{c{number - 1}}}}}") for number in range(1, 2_000))]
    nodes = read(workflow(*chain))

    assert len(in_svg(nodes, {f"c{number}": "done" for number in range(2_000)})[1]) == 1_999
    boxes = as_json(read(workflow(llm("m", "{{item}}", foreach=[]))), {f"m[{n}]": "done" for n in range(10_000)})
    assert boxes["nodes"][0]["times"] == {"done": 10_000}


def _luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _contrast(one: str, other: str) -> float:
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_texts_are_readable_on_light_and_dark_backgrounds() -> None:
    assert min(_contrast(LINE, "#ffffff"), _contrast(LINE, "#000000")) > 4.4
    states = ("pending", "waiting", "running", "done", "failed", "skipped", "cancelled", "other")
    calls = [llm(state, "x") for state in states]
    root = ElementTree.fromstring(svg(read(workflow(*calls)), {state: state for state in states}))
    fills = {one.attrib["fill"] for one in root.iter(f"{SVG}rect")}
    assert len(fills) == len(states) - 1  # skipped is dashed
    assert all(_contrast(INK, fill) > 7 for fill in fills)


def test_what_is_critical_has_a_thick_border_and_says_so() -> None:
    loop = {
        "kind": "loop", "id": "l", "state": {"s": "{{given}}"}, "calls": [llm("b", "{{s}}")], "next": {"s": "{{b}}"},
        "until": True, "result": "{{b}}", "max_iterations": 3,
    }  # fmt: skip
    nodes = read(
        workflow(loop, llm("m", "{{item}}", foreach=["{{l}}"]), llm("o", "x"), variables={"given": {"value": 1}})
    )
    critical = frozenset({"l#2/b", "m[7]", "given"})
    boxes = as_json(nodes, {}, critical)["nodes"]
    assert {one["id"] for one in boxes if one["critical"]} == {"l#*/b", "m", "$given"}
    root = ElementTree.fromstring(svg(nodes, {}, critical))
    thick = {one.attrib["data-path"] for one in parts(root, "data-path") if one[1].attrib["stroke-width"] == "5"}
    assert thick == {"l#*/b", "m", "$given"}
    assert "on the critical path" in (parts(root, "data-path")[0][0].text or "")
    drawn = mermaid(nodes, {}, critical)
    assert len(re.search(r"class ([n\d,]+) critical", drawn)[1].split(",")) == 3  # type: ignore[index]
    assert "critical" not in mermaid(nodes, {})
