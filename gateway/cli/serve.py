"""``forebay serve``: the production entrance."""

from pathlib import Path

import click

from gateway.app import Ready
from gateway.cli.config import DEFAULT_FILE, load_settings, summary
from gateway.cli.fetching import with_local_sources
from gateway.cli.serving import ensure_ports_free, serve_settings
from gateway.settings import environment


@click.command()
@click.option(
    "--config", "-c", "path", type=click.Path(path_type=Path, dir_okay=False), default=DEFAULT_FILE, show_default=True
)
def serve(path: Path) -> None:
    """Run the gateway as a settings file says, until SIGTERM or Ctrl-C.

    Exit status: 2 for bad settings, 1 if it cannot run (a port in use, say), 0 after an orderly stop.

    \b
    Example:
      forebay init && forebay serve -c forebay.yaml
    """
    settings = load_settings(path)
    ensure_ports_free(settings)

    def on_ready(ready: Ready) -> None:
        click.echo(f"Forebay is ready: {ready.data_url} (admin {ready.admin_url}); {summary(settings)}", err=True)

    serve_settings(with_local_sources(settings, environment()), on_ready=on_ready)
