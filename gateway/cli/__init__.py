"""The ``forebay`` command: one module per group of verbs, joined here."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

import click

_EPILOG = "Start with `forebay run`. Each command has its own --help with an example."
_MODULES = {  # where each verb lives
    "audit": "audit",
    "budgets": "budgets",
    "check": "config",
    "config": "config",
    "db": "db",
    "demo": "demo",
    "doctor": "doctor",
    "fairness": "fairness",
    "fetch": "fetch",
    "init": "config",
    "keys": "keys",
    "models": "models",
    "policies": "policies",
    "requests": "requests",
    "run": "run",
    "runs": "runs",
    "serve": "serve",
    "simulate": "simulate",
    "tenants": "tenants",
    "top": "top",
    "usage": "usage",
    "why": "why",
    "workers": "workers",
}


class _Verbs(click.Group):
    """Imports a verb when it is asked for: what talks to a running gateway starts without all that a gateway needs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all verbs."""
        return sorted([*_MODULES, *self.commands])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a verb, or None for a name that is none."""
        module = _MODULES.get(cmd_name)
        if module is None:
            return super().get_command(ctx, cmd_name)
        command: click.Command = getattr(import_module(f"gateway.cli.{module}"), cmd_name)
        return command


@click.group(
    cls=_Verbs, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
def main() -> None:
    """Forebay: a gateway and cache layer in front of large language models."""


@main.command(name="version")
def show_version() -> None:
    """Print the version.

    \b
    Example:
      forebay version
    """
    try:
        click.echo(f"forebay {version('forebay-server')}")
    except PackageNotFoundError:
        click.echo("forebay (run from its source folder, not installed)")
