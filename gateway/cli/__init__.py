"""The ``forebay`` command: one module per group of verbs, joined here."""

from importlib.metadata import PackageNotFoundError, version

import click

from gateway.cli.audit import audit
from gateway.cli.budgets import budgets
from gateway.cli.config import check, config, init
from gateway.cli.db import db
from gateway.cli.demo import demo
from gateway.cli.doctor import doctor
from gateway.cli.fairness import fairness
from gateway.cli.fetch import fetch
from gateway.cli.keys import keys
from gateway.cli.models import models
from gateway.cli.policies import policies
from gateway.cli.requests import requests
from gateway.cli.run import run
from gateway.cli.serve import serve
from gateway.cli.simulate import simulate
from gateway.cli.tenants import tenants
from gateway.cli.top import top
from gateway.cli.usage import usage
from gateway.cli.why import why
from gateway.cli.workers import workers

_EPILOG = "Start with `forebay run`. Each command has its own --help with an example."


@click.group(epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def main() -> None:
    """Forebay: a gateway and cache layer in front of large language models."""


@click.command(name="version")
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


_LOCAL = (run, serve, init, check, config, doctor, fetch, db, demo, simulate, show_version)
_OF_A_RUNNING_GATEWAY = (workers, models, top, why, requests, usage, budgets, tenants, keys, policies, fairness, audit)

for command in (*_LOCAL, *_OF_A_RUNNING_GATEWAY):
    main.add_command(command)
