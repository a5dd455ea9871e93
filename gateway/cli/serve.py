"""``forebay serve``: the production entrance."""

from pathlib import Path

import click

from gateway.app import Ready
from gateway.cli.config import DEFAULT_FILE, read_settings, summary
from gateway.cli.serving import ensure_ports_free, serve_settings
from gateway.live import Live
from gateway.settings import environment, read


@click.command()
@click.option(
    "--config", "-c", "path", type=click.Path(path_type=Path, dir_okay=False), default=DEFAULT_FILE, show_default=True
)
def serve(path: Path) -> None:
    """Run the gateway as a settings file says, until SIGTERM or Ctrl-C.

    Exit status: 2 for bad settings, 1 if it cannot run (a port in use, say), 0 after an orderly stop.

    A change of the file is applied while it runs, at once and on SIGHUP; a file with a fault changes nothing and is
    told of in the log.

    \b
    Example:
      forebay init && forebay serve -c forebay.yaml
    """
    declared = read_settings(path)
    ensure_ports_free(declared.settings)

    def on_ready(ready: Ready) -> None:
        what = summary(declared.settings)
        click.echo(f"Forebay is ready: {ready.data_url} (admin {ready.admin_url}); {what}", err=True)

    live = Live(declared, read=lambda: read(path, environment()), watched=path)
    serve_settings(live, on_ready=on_ready)
