"""``forebay requests``: the log of what was served. It never holds what was asked or answered."""

from typing import Any

import click

from gateway.cli.admin import PAST, Admin, as_json, asks, at, clock, fields, listed, money, report, span, tenant


@click.group()
def requests() -> None:
    """Search the request log. It holds who asked for what and how it went, never the words.

    \b
    Examples:
      forebay requests ls --min-status 500 --since 1h
      forebay requests show req_0123456789abcdef
    """


@requests.command(name="ls")
@tenant
@click.option("--key", help="Only this key's, by its id.")
@click.option("--model", help="Only those of this model.")
@click.option("--error", help="Only those that ended with this error's code.")
@click.option("--min-status", type=click.IntRange(100, 599), help="Only those with this HTTP status or a higher one.")
@click.option("--since", type=PAST, help="Only those after this time, or in the last: 1h.")
@click.option("--until", type=PAST, help="Only those before this time.")
@click.option("--limit", "most", default=50, show_default=True, type=click.IntRange(min=1), help="How many at most.")
@asks
@as_json
def list_requests(admin: Admin, *, most: int, as_json: bool, **filters: Any) -> None:
    """List requests, newest first.

    \b
    Example:
      forebay requests ls --tenant acme --error queue_timeout --since 24h
    """
    found = admin.items(at("requests"), most=most, **filters)
    heading = ["TIME (UTC)", "ID", "TENANT", "ENDPOINT", "MODEL", "STATUS", "ERROR", "TOOK", "QUEUED", "TRIES", "USD"]
    report(found, as_json=as_json, text=lambda: listed(heading, found, _row, none="no such requests"))


@requests.command()
@click.argument("request_id", metavar="ID")
@asks
@as_json
def show(admin: Admin, request_id: str, *, as_json: bool) -> None:
    """Show all that is kept of one request. `forebay why ID` tells it in words.

    \b
    Example:
      forebay requests show req_0123456789abcdef
    """
    found = admin.value(admin.get(at("requests", request_id)))
    report(found, as_json=as_json, text=lambda: _shown(found))


def _shown(request: dict[str, Any]) -> str:
    used = request["usage"] or {}
    legs = [
        f"{leg['worker']} ({leg['model']}) at {span(leg['at_s'])} for {span(leg['duration_s'])}: {leg['cause']}"
        + ("" if leg["recomputed"] is None else f", {leg['recomputed']} tokens computed again")
        for leg in request["legs"]
    ]
    return fields(
        {
            "request": request["id"],
            "time (UTC)": clock(request["time"]),
            "endpoint": request["endpoint"] + (", streamed" if request["stream"] else ""),
            "status": request["status"],
            "error": request["error"],
            "tenant": request["tenant"],
            "key": request["key"],
            "end user": request["end_user"],
            "model": request["model"],
            "asked for": request["asked_model"],
            "class": request["urgency"],
            "took": span(request["duration_s"]),
            "queued": span(request["queue_s"]),
            "first byte": span(request["first_byte_s"]),
            "our part": span(request["overhead_s"]),
            "input tokens": used.get("prompt_tokens"),
            "of them cached": used.get("cached_tokens"),
            "output tokens": used.get("completion_tokens"),
            "USD": money(request["usd"]),
            "session": request["session"],
            "program": request["program"],
            "run": request["run"],
            "stage": request["stage"],
            "client's retry": request["client_retry"],
            "trace": request["traceparent"],
            **{f"leg {number}": leg for number, leg in enumerate(legs, 1)},
        }
    )


def _row(one: dict[str, Any]) -> list[object]:
    return [
        clock(one["time"]),
        one["id"],
        one["tenant"],
        one["endpoint"],
        one["model"],
        one["status"],
        one["error"],
        span(one["duration_s"]),
        span(one["queue_s"]),
        one["attempts"],
        money(one["usd"]),
    ]
