"""Line charts: as SVG inside one self-contained HTML page, written here; as PNG where matplotlib is installed."""

import html
import importlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

_WIDTH, _HEIGHT = 560, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 12, 28, 44
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # told apart by all eyes
_STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 2em auto; max-width: 1180px; padding: 0 1em; color: #222 }
svg { background: #fff; margin: 0 8px 8px 0 } svg text { font: 11px system-ui, sans-serif; fill: #333 }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: 2px 10px; text-align: right }
td:first-child, th:first-child, td:nth-child(2), th:nth-child(2) { text-align: left }
tr:nth-child(even) { background: #f4f4f4 } ul { color: #555 }
"""


class Line(msgspec.Struct, frozen=True):
    """A named line through points in order of x."""

    name: str
    points: Sequence[tuple[float, float]]


class Chart(msgspec.Struct, frozen=True):
    """Lines over the same axes. ``is_log``: the x axis is logarithmic, and points at or below 0 are left out."""

    title: str
    x: str
    y: str
    lines: Sequence[Line]
    is_log: bool = False


class NoMatplotlib(Exception):
    """PNG was asked for, and what draws it is not installed."""


def page(title: str, charts: Sequence[Chart], rows: Sequence[Sequence[str]], notes: Sequence[str]) -> str:
    """Return an HTML page that needs nothing else: charts, a table (its first row the heading), notes."""
    heading, *body = ([html.escape(cell) for cell in row] for row in rows)
    lines = ["<tr>" + "".join(f"<th>{cell}</th>" for cell in heading) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in body]
    return "\n".join(
        [
            "<!doctype html>",
            f'<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>',
            f"<style>{_STYLE}</style></head><body>",
            f"<h1>{html.escape(title)}</h1>",
            *(svg(chart) for chart in charts),
            "<table>",
            *lines,
            "</table>",
            "<ul>",
            *(f"<li>{html.escape(note)}</li>" for note in notes),
            "</ul></body></html>",
            "",
        ]
    )


def svg(chart: Chart) -> str:
    """Return the chart as one SVG element."""
    drawn = [_drawable(line, is_log=chart.is_log) for line in chart.lines]
    points = [point for line in drawn for point in line] or [(0.0, 0.0)]
    low, high = min(x for x, _ in points), max(x for x, _ in points)
    top = max(1e-9, *(y for _, y in points))
    across, up = max(high - low, 1e-9), _HEIGHT - _TOP - _BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        return _LEFT + (x - low) / across * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - y / top * up

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" role="img">',
        f"<title>{html.escape(chart.title)}</title>",
        f'<text x="{_LEFT}" y="16" font-weight="bold">{html.escape(chart.title)}</text>',
        f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 6}" text-anchor="middle">{html.escape(chart.x)}</text>',
        f'<text transform="translate(12 {_HEIGHT / 2}) rotate(-90)" text-anchor="middle">{html.escape(chart.y)}</text>',
    ]
    for part in range(5):
        x, y = low + across * part / 4, top * part / 4
        left, height = place(x, y)
        shown = 10**x if chart.is_log else x
        parts += [
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{height:.1f}" y2="{height:.1f}" stroke="#ddd"/>',
            f'<text x="{_LEFT - 6}" y="{height + 4:.1f}" text-anchor="end">{y:.3g}</text>',
            f'<text x="{left:.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{shown:.3g}</text>',
        ]
    for index, (line, found) in enumerate(zip(chart.lines, drawn, strict=True)):
        colour = _COLOURS[index % len(_COLOURS)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in found))
        beside = _TOP + 12 + 14 * index
        parts += [
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>',
            f'<text x="{_LEFT + 10}" y="{beside}" style="fill:{colour}">{html.escape(line.name)}</text>',
        ]
    return "".join([*parts, "</svg>"])


def write_png(charts: Sequence[Chart], path: Path) -> None:
    """Draw the charts below one another into a PNG file. Raises ``NoMatplotlib``, ``OSError``."""
    try:
        canvas: Any = importlib.import_module("matplotlib.backends.backend_agg")
        figures: Any = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise NoMatplotlib from error
    figure = figures.Figure(figsize=(8, 4 * len(charts)), layout="constrained")
    canvas.FigureCanvasAgg(figure)
    for axes, chart in zip(figure.subplots(len(charts), squeeze=False)[:, 0], charts, strict=True):
        for index, line in enumerate(chart.lines):
            x, y = [point[0] for point in line.points], [point[1] for point in line.points]
            axes.plot(x, y, label=line.name, color=_COLOURS[index % len(_COLOURS)])
        axes.set(title=chart.title, xlabel=chart.x, ylabel=chart.y, xscale="log" if chart.is_log else "linear")
        axes.legend()
    figure.savefig(path, format="png")


def _drawable(line: Line, *, is_log: bool) -> list[tuple[float, float]]:
    """The points as they are placed, no more of them than can be told apart."""
    every = len(line.points) // 500 + 1
    points = [*line.points[::every], *line.points[-1:]]
    return [(math.log10(x), y) for x, y in points if x > 0] if is_log else points
