"""Drawings of a run's graph: as Mermaid, as SVG, and as JSON for those who draw themselves.

Calls are boxes, and so are their bodies, one inside of another; variables are what the edges say. A variable that no
call beside makes (given, from around, of a loop's state) is a small box at the edge of where it is used. A body that
runs many times is drawn once: its calls have ``*`` for the number in their path.

States are texts by the paths of a run (``part[3]``, ``loop#0/revise``). All texts are taken for hostile.
"""

import html
import re
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import msgspec

from semantic_vars import calls
from semantic_vars.graph import Block, Node
from semantic_vars.template import Form

_STEP = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(\[\d+\])?(?:#([a-z0-9]+))?")
_RANK = ("running", "failed", "waiting", "pending", "cancelled", "skipped", "done")
_NOTE = 40  # characters


class Edge(msgspec.Struct, frozen=True):
    """A variable, from what makes it to what uses it; both by their paths."""

    source: str
    target: str
    variable: str


class Box(msgspec.Struct, frozen=True):
    """A call, by its kind; or a ``variable`` that is not made here, or the ``result`` of a body.

    ``times``: how often a call that is made many times is in each state; ``state`` is then what matters most of it.
    ``is_critical``: the run has taken as long as it has because of it.
    """

    path: str
    kind: str
    name: str
    note: str = ""
    state: str = ""
    times: Mapping[str, int] = {}
    bodies: "tuple[Area, ...]" = ()
    is_critical: bool = False

    @property
    def subtitle(self) -> str:
        """What it is and how it is."""
        return " · ".join(part for part in (self.kind, self.note, self.state) if part)

    @property
    def told(self) -> str:
        """All that is known of it."""
        times = ", ".join(f"{number} {state}" for state, number in self.times.items())
        critical = "on the critical path" if self.is_critical else ""
        return ": ".join(part for part in (self.path, self.subtitle, times, critical) if part)


class Area(msgspec.Struct, frozen=True):
    """What stands beside each other: the calls of a run, or of one body of a call, which ``name`` is."""

    path: str
    name: str
    boxes: tuple[Box, ...]
    edges: tuple[Edge, ...]


def as_json(nodes: Sequence[Node], states: Mapping[str, str], critical: frozenset[str] = frozenset()) -> dict[str, Any]:
    """Return ``nodes``, each ``within`` a call's ``body`` or none, and the ``edges`` between them."""
    boxes: list[dict[str, Any]] = []
    edges: list[dict[str, str]] = []

    def add(area: Area, within: str | None) -> None:
        for box in area.boxes:
            boxes.append(
                {
                    "id": box.path,
                    "kind": box.kind,
                    "name": box.name,
                    "note": box.note,
                    "state": box.state or None,
                    "times": dict(box.times),
                    "critical": box.is_critical,
                    "within": within,
                    "body": area.name or None,
                }
            )
            for body in box.bodies:
                add(body, box.path)
        edges.extend({"from": one.source, "to": one.target, "variable": one.variable} for one in area.edges)

    add(area_of(nodes, states, critical), None)
    return {"nodes": boxes, "edges": edges}


# What is drawn


def area_of(nodes: Sequence[Node], states: Mapping[str, str], critical: frozenset[str] = frozenset()) -> Area:
    """Return the drawing of a graph, before anything has its place."""
    prefixes = frozenset(_prefixes(nodes, ""))
    own, many = _by_place(prefixes, states)
    return _area(nodes, "", "", None, _States(own, many, frozenset(_place_of(path, prefixes) for path in critical)))


class _States(msgspec.Struct, frozen=True):
    """``own``: of what there is once; ``many``: of what is made many times, counted; ``critical``: what counted."""

    own: Mapping[str, str]
    many: Mapping[str, Counter[str]]
    critical: frozenset[str | None]

    def of(self, path: str) -> str:
        """Return the state to be shown at a place."""
        if (state := self.own.get(path)) is not None:
            return state
        return min(self.many.get(path, ()), key=_rank, default="")


def _rank(state: str) -> tuple[int, str]:
    return (_RANK.index(state) if state in _RANK else len(_RANK), state)


def _by_place(prefixes: frozenset[str], states: Mapping[str, str]) -> tuple[dict[str, str], dict[str, Counter[str]]]:
    own: dict[str, str] = {}
    many: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for path, state in states.items():
        place = _place_of(path, prefixes)
        if place == path:
            own[path] = state
        elif place is not None:
            many[place][state] += 1
    return own, many


def _place_of(path: str, prefixes: frozenset[str]) -> str | None:
    """Return where in the graph a path of a run is: with ``*`` for numbers of elements and of times."""
    place = ""
    *around, last = path.split("/")
    for step in around:
        if (found := _STEP.fullmatch(step)) is None:
            return None
        place += found[1] + ("[*]" if found[2] else "")
        if found[3]:
            place += "#*" if f"{place}#*/" in prefixes else f"#{found[3]}"
        place += "/"
    return place + found[1] if (found := _STEP.fullmatch(last)) is not None else None


def _prefixes(nodes: Sequence[Node], prefix: str) -> Iterator[str]:
    for node in nodes:
        for inner, _, block in _bodies(node, prefix):
            yield inner
            yield from _prefixes(block.nodes, inner)


def _bodies(node: Node, prefix: str) -> Iterator[tuple[str, str, Block]]:
    """Yield the paths, names and blocks of a call's bodies."""
    match node.call:
        case calls.Branch():
            names: Sequence[str] = ("#then", "#else")
        case calls.Race():
            names = [f"#{number}" for number in range(len(node.blocks))]
        case calls.Loop():
            names = ("#*",)
        case _:
            names = ("",)
    path = prefix + node.call.id + ("[*]" if node.each is not None else "")
    for name, block in zip(names, node.blocks, strict=False):  # a branch may have no else
        yield f"{path}{name}/", name.removeprefix("#").replace("*", ""), block


def _area(nodes: Sequence[Node], prefix: str, name: str, result: Form | None, states: _States) -> Area:
    makers = {node.call.variable: prefix + node.call.id for node in nodes}
    uses = [(prefix + node.call.id, node.uses) for node in nodes]
    if result is not None:
        uses.append((prefix, result.names))
    outside = sorted(frozenset[str]().union(*(names for _, names in uses)) - makers.keys())
    makers |= {variable: f"{prefix}${variable}" for variable in outside}
    boxes = [
        Box(
            makers[variable],
            "variable",
            variable,
            state="" if prefix else states.of(variable),
            is_critical=not prefix and variable in states.critical,
        )
        for variable in outside
    ]
    boxes += [_box(node, prefix, states) for node in nodes]
    if result is not None:
        boxes.append(Box(prefix, "result", "result"))
    edges = (Edge(makers[variable], user, variable) for user, names in uses for variable in sorted(names))
    return Area(prefix, name, tuple(boxes), tuple(edges))


def _box(node: Node, prefix: str, states: _States) -> Box:
    path = prefix + node.call.id
    return Box(
        path,
        str(node.call.__struct_config__.tag),
        node.call.id,
        " ".join(part for part in ("for each" if node.each is not None else "", _note(node.call)) if part),
        states.of(path),
        dict(sorted(states.many.get(path, Counter()).items(), key=lambda one: _rank(one[0]))),
        tuple(_area(block.nodes, inner, name, block.result, states) for inner, name, block in _bodies(node, prefix)),
        path in states.critical,
    )


def _note(call: calls.Call) -> str:
    match call:
        case calls.Llm() | calls.Embed():
            model = call.request.get("model")
            return _clipped(model, _NOTE) if isinstance(model, str) else ""
        case calls.Tool(server=calls.Mcp(tool=tool) | calls.Client(tool=tool)):
            return _clipped(tool, _NOTE)
        case calls.Loop():
            return f"at most {call.max_iterations} times"
        case calls.Race():
            return f"first {call.first} of {len(call.of)}"
        case _:
            return ""


def _clipped(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


# Colours, readable on light and on dark


class _Look(msgspec.Struct, frozen=True):
    fill: str
    stroke: str
    dashes: str = "none"


_PLAIN = _Look("#f6f8fa", "#737373")
_LOOKS = {
    "pending": _Look("#eceff2", "#8b949e"),
    "waiting": _Look("#fbf1cf", "#b08800"),
    "running": _Look("#d9e8fb", "#2f6fd0"),
    "done": _Look("#d7f0dd", "#2e8b57"),
    "failed": _Look("#f9d9d9", "#c93c37"),
    "skipped": _Look("#eceff2", "#8b949e", "4 3"),
    "cancelled": _Look("#f3e6d3", "#b7791f", "4 3"),
}
_THICK = 5  # pixels
INK = "#1f2328"  # on what is filled
LINE = "#737373"  # on whatever is behind the drawing: as far from white as from black


# Mermaid


_SAFE = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_ ")


def mermaid(nodes: Sequence[Node], states: Mapping[str, str], critical: frozenset[str] = frozenset()) -> str:
    """Return the graph as a Mermaid flowchart. States are classes; what is no state of ours has the class ``other``.
    What is ``critical``, by the paths of a run, has a thick border."""
    lines = ["flowchart LR"]
    names: dict[str, str] = {}
    classes: defaultdict[str, list[str]] = defaultdict(list)
    thick: list[str] = []

    def begin(indent: str, name: str, title: str) -> None:
        lines.append(f'{indent}subgraph {name} ["{title}"]')
        lines.append(f"{indent}  direction LR")  # it would turn with each level

    def add(area: Area, indent: str) -> None:
        for box in area.boxes:
            name = names[box.path] = f"n{len(names)}"
            if box.is_critical:
                thick.append(name)
            if box.state:
                classes[box.state if box.state in _LOOKS else "other"].append(name)
            if not box.bodies:
                lines.append(indent + name + _node_text(box))
                continue
            begin(indent, name, f"{_safe(box.name)}<br/>{_safe(box.subtitle)}")
            for number, body in enumerate(box.bodies):
                if len(box.bodies) == 1:
                    add(body, indent + "  ")
                    continue
                begin(indent + "  ", f"{name}b{number}", _safe(body.name))
                add(body, indent + "    ")
                lines.append(f"{indent}  end")
            lines.append(f"{indent}end")
        lines.extend(
            f'{indent}{names[edge.source]} -->|"{_safe(edge.variable)}"| {names[edge.target]}' for edge in area.edges
        )

    add(area_of(nodes, states, critical), "  ")
    for state, members in sorted(classes.items()):
        look = _LOOKS.get(state, _PLAIN)
        dashes = f",stroke-dasharray:{look.dashes}" if look.dashes != "none" else ""
        lines.append(f"  classDef {state} fill:{look.fill},stroke:{look.stroke},color:{INK}{dashes}")
        lines.append(f"  class {','.join(members)} {state}")
    if thick:
        lines.append(f"  classDef critical stroke-width:{_THICK}px")
        lines.append(f"  class {','.join(thick)} critical")
    return "\n".join(lines) + "\n"


def _node_text(box: Box) -> str:
    if box.kind in {"variable", "result"}:
        return f'(["{_safe(box.name)}"])'
    return f'["{_safe(box.name)}<br/>{_safe(box.subtitle)}"]'


def _safe(text: str) -> str:
    """Return a text in which nothing is left that Mermaid or HTML would read: all but letters and digits by number."""
    return "".join(letter if letter in _SAFE else f"#{ord(letter)};" for letter in text)


# SVG: layers from left to right (longest paths), ordered by the barycentres of their neighbours


_LETTER = 7.25  # pixels, of a fixed width at 12 pixels
_LEAF = 40
_SMALL = 24
_PAD = 12
_GAP = 14
_BETWEEN = 44  # layers
_HEAD = 42
_LABEL = 20  # characters
_TITLE = 36
_SWEEPS = 4
_LANE = 8
_MAX_LANES = 20_000  # a graph whose long edges would take more has them behind its boxes
_NO_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class _Shape(msgspec.Struct, frozen=True):
    """A box with its size, and what is in it."""

    box: Box
    width: float
    height: float
    inner: "tuple[_Layout, ...]"


_Point = tuple[float, float]
_Spot = str | tuple[str, int]
"""Where something is in a layer: a box by its path, or a lane, which leads what a box makes past a layer's boxes."""


class _Layout(msgspec.Struct, frozen=True):
    """An area with its size; ``places`` are the upper left corners of its shapes.

    ``ways`` are the points of its edges: from each to the next it goes straight on and then through a bend, in turn.
    """

    area: Area
    width: float
    height: float
    places: Sequence[tuple[_Point, _Shape]]
    ways: Sequence[Sequence[_Point]]


def svg(nodes: Sequence[Node], states: Mapping[str, str], critical: frozenset[str] = frozenset()) -> str:
    """Return the graph as an SVG document that needs nothing from outside and holds no script or style sheet.

    What is ``critical``, by the paths of a run, has a thick border. ``data-path``, and ``data-from`` and ``data-to`` of
    edges, tell what is what; what the mouse is over says more.
    """
    layout = _laid(area_of(nodes, states, critical))
    width, height = layout.width + 2 * _PAD, layout.height + 2 * _PAD
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" role="img" font-family="ui-monospace, monospace" font-size="12">',
        "<title>The graph of a workflow</title>",
    ]
    _draw(layout, _PAD, _PAD, out)
    out.append("</svg>\n")
    return "\n".join(out)


def _draw(layout: _Layout, left: float, top: float, out: list[str]) -> None:
    labelled = {box.path for box in layout.area.boxes if box.kind == "variable"}  # it says its name itself
    for edge, way in zip(layout.area.edges, layout.ways, strict=True):
        points = [(left + x, top + y) for x, y in way]
        out.append(_edge(edge, points))
        if edge.source not in labelled:  # all that it makes is this variable
            labelled.add(edge.source)
            out.append(_text(edge.variable, _LABEL, (points[0][0] + 5, points[0][1] - 4), LINE, 10))
    for (x, y), shape in layout.places:
        _draw_shape(shape, left + x, top + y, out)


def _draw_shape(shape: _Shape, x: float, y: float, out: list[str]) -> None:
    box = shape.box
    look = _LOOKS.get(box.state, _PLAIN)
    is_small = box.kind in {"variable", "result"}
    fill = _PLAIN.fill if box.bodies else look.fill
    out.append(f'<g data-path="{_xml(box.path)}" data-kind="{_xml(box.kind)}" data-state="{_xml(box.state)}">')
    out.append(f"<title>{_xml(box.told)}</title>")
    out.append(
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{shape.width:.1f}" height="{shape.height:.1f}" '
        f'rx="{_SMALL / 2 if is_small else 5}" fill="{fill}" stroke="{look.stroke}" '
        f'stroke-width="{_THICK if box.is_critical else 2 if box.state in _LOOKS else 1}" '
        f'stroke-dasharray="{look.dashes}"/>'
    )
    out.append(_text(box.name, _TITLE, (x + _PAD, y + 16), INK, 12))
    if not is_small:
        out.append(_text(box.subtitle, _TITLE, (x + _PAD, y + 31), INK, 10))
    inner_y = y + _HEAD
    for inner in shape.inner:
        if inner.area.name:
            out.append(_text(inner.area.name, _TITLE, (x + _PAD, inner_y + 10), INK, 10))
            inner_y += _GAP
        _draw(inner, x + _PAD, inner_y, out)
        inner_y += inner.height + _GAP
    out.append("</g>")


def _edge(edge: Edge, points: Sequence[_Point]) -> str:
    x, y = points[0]
    line = f"M{x:.1f} {y:.1f}"
    for (x, y), (to_x, to_y) in zip(points[1::2], points[2::2], strict=True):
        middle = (x + to_x) / 2
        line += f"H{x:.1f}C{middle:.1f} {y:.1f} {middle:.1f} {to_y:.1f} {to_x:.1f} {to_y:.1f}"
    to_x, to_y = points[-1]
    told = f"{edge.source} → {edge.target}: {edge.variable}"
    return (
        f'<g data-from="{_xml(edge.source)}" data-to="{_xml(edge.target)}" data-variable="{_xml(edge.variable)}">'
        f'<title>{_xml(told)}</title><path d="{line}" fill="none" stroke="{LINE}" stroke-width="1.5"/>'
        f'<path d="M{to_x:.1f} {to_y:.1f}l-7 -3.5v7z" fill="{LINE}"/></g>'
    )


def _text(text: str, most: int, at: tuple[float, float], colour: str, size: int) -> str:
    x, y = at
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{colour}">{_xml(_clipped(text, most))}</text>'


def _xml(text: str) -> str:
    """Return a text as it may stand in an element and in an attribute."""
    return html.escape(_NO_XML.sub("\ufffd", text))


def _laid(area: Area) -> _Layout:
    shapes = {box.path: _shaped(box) for box in area.boxes}
    labels = {
        one.source: min(len(one.variable), _LABEL) for one in area.edges if shapes[one.source].box.kind != "variable"
    }
    number = _layers(area)
    chains = _chains(area, number)
    layers = _ordered(number, chains)
    heights = [sum(_height(spot, shapes) + _GAP for spot in layer) - _GAP for layer in layers]
    tallest = max(heights, default=0.0)
    places: list[tuple[_Point, _Shape]] = []
    starts: dict[_Spot, _Point] = {}
    ends: dict[_Spot, _Point] = {}
    passed: dict[_Spot, _Point] = {}
    x = right = 0.0
    for layer, height in zip(layers, heights, strict=True):
        boxes = [shapes[spot] for spot in layer if isinstance(spot, str)]
        right = x + max(shape.width for shape in boxes)
        room = max(labels.get(shape.box.path, 0) for shape in boxes) * _LETTER * 10 / 12
        y = (tallest - height) / 2
        for spot in layer:
            tall = _height(spot, shapes)
            ends[spot], passed[spot] = (x, y + tall / 2), (right + room, y + tall / 2)
            if isinstance(spot, str):
                places.append(((x, y), shapes[spot]))
                starts[spot] = (x + shapes[spot].width, y + tall / 2)
            y += tall + _GAP
        x = right + room + _BETWEEN
    ways = [[starts[chain[0]], *(at for a, b in pairwise(chain) for at in (passed[a], ends[b]))] for chain in chains]
    return _Layout(area, right, tallest, places, ways)


def _height(spot: _Spot, shapes: Mapping[str, _Shape]) -> float:
    return shapes[spot].height if isinstance(spot, str) else _LANE


def _chains(area: Area, layer: Mapping[str, int]) -> list[list[_Spot]]:
    """Return the spots that each edge goes by; edges of one maker share theirs."""
    lengths = [layer[edge.target] - layer[edge.source] for edge in area.edges]
    has_lanes = sum(lengths) - len(lengths) <= _MAX_LANES
    return [
        [
            edge.source,
            *((edge.source, layer[edge.source] + step) for step in range(1, length if has_lanes else 1)),
            edge.target,
        ]
        for edge, length in zip(area.edges, lengths, strict=True)
    ]


def _shaped(box: Box) -> _Shape:
    words = max(len(box.name), 0 if box.kind in {"variable", "result"} else len(box.subtitle) * 10 / 12)
    width = min(words, _TITLE) * _LETTER + 2 * _PAD
    if not box.bodies:
        return _Shape(box, width, _SMALL if box.kind in {"variable", "result"} else _LEAF, ())
    inner = tuple(_laid(body) for body in box.bodies)
    width = max(width, *(one.width + 2 * _PAD for one in inner))
    return _Shape(box, width, _HEAD + sum(one.height + _GAP * (2 if one.area.name else 1) for one in inner), inner)


def _layers(area: Area) -> dict[str, int]:
    """Return how many edges the longest way to each box has; of what only has uses, as few as can be."""
    targets: defaultdict[str, list[str]] = defaultdict(list)
    unmet: Counter[str] = Counter()
    for edge in area.edges:
        targets[edge.source].append(edge.target)
        unmet[edge.target] += 1
    layer = {box.path: 0 for box in area.boxes}
    ready = deque(path for path in layer if not unmet[path])
    while ready:
        path = ready.popleft()
        for target in targets[path]:
            layer[target] = max(layer[target], layer[path] + 1)
            unmet[target] -= 1
            if not unmet[target]:
                ready.append(target)
    for box in area.boxes:
        if box.kind == "variable":
            layer[box.path] = min(layer[target] for target in targets[box.path]) - 1
    return layer


def _ordered(layer: Mapping[str, int], chains: Sequence[Sequence[_Spot]]) -> list[list[_Spot]]:
    """Return what is in each layer from top to bottom, such that few edges cross."""
    layers: list[list[_Spot]] = [[] for _ in range(max(layer.values(), default=-1) + 1)]
    for path, number in layer.items():
        layers[number].append(path)
    hops = dict.fromkeys(hop for chain in chains for hop in pairwise(chain))
    before: defaultdict[_Spot, list[_Spot]] = defaultdict(list)
    behind: defaultdict[_Spot, list[_Spot]] = defaultdict(list)
    for source, target in hops:
        if not isinstance(target, str) and target not in before:
            layers[target[1]].append(target)
        before[target].append(source)
        behind[source].append(target)
    at = {spot: place for spots in layers for place, spot in enumerate(spots)}
    for sweep in range(_SWEEPS):
        is_forth = sweep % 2 == 0
        neighbours = before if is_forth else behind
        for spots in layers if is_forth else reversed(layers):
            centre = {spot: _mean([at[one] for one in neighbours[spot]], at[spot]) for spot in spots}
            spots.sort(key=centre.__getitem__)
            at.update((spot, place) for place, spot in enumerate(spots))
    return layers


def _mean(places: Sequence[int], otherwise: float) -> float:
    return sum(places) / len(places) if places else otherwise
