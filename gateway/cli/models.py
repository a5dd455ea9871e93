"""``forebay models``: what is on offer, at what price, and how busy it is."""

from typing import Any

import click

from gateway.cli.admin import Admin, as_json, asks, at, listed, report


@click.group()
def models() -> None:
    """See the models on offer.

    \b
    Example:
      forebay models ls
    """


@models.command(name="ls")
@asks
@as_json
def list_models(admin: Admin, *, as_json: bool) -> None:
    """List models: prices in USD per million tokens, workers that are ready, requests that run and wait.

    \b
    Example:
      forebay models ls
    """
    found = admin.items(at("models"))
    heading = ["MODEL", "ALIASES", "FALLBACKS", "INPUT USD", "OUTPUT USD", "CONTEXT", "READY", "RUNNING", "WAITING"]
    report(found, as_json=as_json, text=lambda: listed(heading, found, _row, none="no models"))


def _row(one: dict[str, Any]) -> list[object]:
    return [
        one["name"],
        one["aliases"],
        one["fallbacks"],
        one["price"]["input_usd"],
        one["price"]["output_usd"],
        one["context_tokens"],
        f"{one['ready']}/{len(one['workers'])}",
        f"{one['running']}/{one['slots']}",
        one["waiting"],
    ]
