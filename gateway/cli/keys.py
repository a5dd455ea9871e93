"""``forebay keys``: the local key, and new ones."""

import hashlib

import click

from gateway.auth import new_key
from gateway.cli.common import LOCAL_KEY, Fault, state_dir
from gateway.settings import environment


@click.group()
def keys() -> None:
    """Show the local key, make new keys.

    \b
    Examples:
      forebay keys show-local
      forebay keys new
    """


@keys.command()
def show_local() -> None:
    """Print the key that `forebay run` made.

    \b
    Example:
      curl localhost:8411/v1/models -H "Authorization: Bearer $(forebay keys show-local)"
    """
    path = state_dir(environment()) / LOCAL_KEY
    try:
        key = path.read_text(encoding="utf-8").strip()
    except FileNotFoundError as error:
        raise Fault(f"no key in {path} yet. `forebay run` or `forebay init` makes one.") from error
    except OSError as error:
        raise Fault(f"cannot read {path}: {error.strerror}") from error
    click.echo(key)


@keys.command()
def new() -> None:
    """Make a key and print it with its SHA-256 for the settings file. It is kept nowhere.

    \b
    Example:
      forebay keys new
    """
    key = new_key()
    digest = hashlib.sha256(key.encode()).hexdigest()
    click.echo(f"key     {key}")
    click.echo(f"sha256  {digest}")
    click.echo("\nGive the key to the application; it is not kept here. Put the hash into forebay.yaml:\n")
    click.echo(f'keys:\n  - name: my-app\n    tenant: my-team\n    sha256: "{digest}"')
