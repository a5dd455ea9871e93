"""``forebay fetch``: a model into the cache, to run without a network later."""

import click

from gateway.cli.fetching import fetch_model
from gateway.cli.plan import DEFAULT_MODEL
from gateway.settings import environment


@click.command()
@click.argument("model", default=DEFAULT_MODEL)
def fetch(model: str) -> None:
    """Download MODEL into the cache without running it, and print where its file is.

    \b
    Example:
      forebay fetch Qwen/Qwen2.5-3B-Instruct-GGUF
    """
    click.echo(fetch_model(model, environment()))
