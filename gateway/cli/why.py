"""``forebay why``: what became of one request, in words."""

import shutil
import textwrap
from collections.abc import Iterator
from typing import Any

import click

from gateway.cli.admin import Admin, as_json, asks, at, clock, report
from gateway.cli.http import printable

_WIDEST = 100


@click.command()
@click.argument("request_id", metavar="ID")
@asks
@as_json
def why(admin: Admin, request_id: str, *, as_json: bool) -> None:
    """Tell in a paragraph how a request was served: who asked, what it waited for, what was tried, what it cost.

    Below it stand the decisions about it with their figures, as far as the gateway still remembers them (UTC). A
    request that runs or waits has only these. ID is what the answer had in its header `x-request-id`.

    \b
    Example:
      forebay why req_0123456789abcdef
    """
    decision = admin.value(admin.get(at("decisions", request_id)))
    report(decision, as_json=as_json, text=lambda: "\n".join(_lines(decision)))


def _lines(decision: dict[str, Any]) -> Iterator[str]:
    yield paragraph(str(decision.get("summary", "")), _width())
    if steps := decision.get("steps"):
        yield ""
    for step in steps or ():
        yield paragraph(f"{clock(step['time'])}  {step['text']}", _width())


def paragraph(text: str, width: int) -> str:
    """Return text in lines of at most ``width`` signs, ids and names left whole."""
    return textwrap.fill(printable(text), width, break_long_words=False, break_on_hyphens=False)


def _width() -> int:
    return min(_WIDEST, shutil.get_terminal_size((_WIDEST, 24)).columns)
