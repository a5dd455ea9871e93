"""``forebay init`` and ``forebay check``: write a settings file, and tell whether one is right."""

from pathlib import Path

import click

from gateway.auth import new_admin_key, new_key
from gateway.cli.common import ADMIN_KEY, LOCAL_KEY, Fault, SettingsFault, kept_key
from gateway.cli.common import state_dir as default_state_dir
from gateway.cli.machine import default_threads, num_cores
from gateway.settings import Settings, SettingsError, environment, load

DEFAULT_FILE = Path("forebay.yaml")

_TEMPLATE = Path(__file__).with_name("forebay.yaml.in")


@click.command()
@click.argument("path", type=click.Path(path_type=Path, dir_okay=False), default=DEFAULT_FILE)
@click.option("--force", is_flag=True, help="Overwrite the file if it exists.")
def init(path: Path, *, force: bool) -> None:
    """Write a commented settings file that works as it is; PATH is forebay.yaml unless given.

    Makes a local key and an admin key in the state folder, if there are none, and refers to them.

    \b
    Example:
      forebay init && forebay serve -c forebay.yaml
    """
    if path.exists() and not force:
        raise Fault(f"{path} exists; `forebay init {path} --force` overwrites it.")
    state = default_state_dir(environment()).absolute()
    kept_key(state, LOCAL_KEY, new_key)
    kept_key(state, ADMIN_KEY, new_admin_key)
    try:
        path.write_text(example(state, threads=default_threads(num_cores())), encoding="utf-8")
    except OSError as error:
        raise Fault(f"cannot write {path}: {error.strerror}") from error
    click.echo(f"Wrote {path}. Keys are in {state}.")
    click.echo(f"Next: forebay serve -c {path}")


def example(state: Path, *, threads: int) -> str:
    """Return the example file for keys in ``state``. Raises ``Fault`` for a path that YAML or ``${file:…}`` garbles."""
    if any(sign in str(state) for sign in ":}\"'\\#\n"):
        raise Fault(
            f"the path {state} has a sign that a settings file cannot hold; set FOREBAY_STATE to another folder."
        )
    text = _TEMPLATE.read_text(encoding="utf-8")
    return text.replace("@STATE@", str(state)).replace("@THREADS@", str(threads))


@click.command()
@click.option(
    "--config", "-c", "path", type=click.Path(path_type=Path, dir_okay=False), default=DEFAULT_FILE, show_default=True
)
def check(path: Path) -> None:
    """Tell whether a settings file is right; exit status 2 if not. Nothing is started.

    \b
    Example:
      forebay check -c forebay.yaml
    """
    settings = load_settings(path)
    click.echo(f"{path} is right: {summary(settings)}.")


def load_settings(path: Path) -> Settings:
    """Return the settings in a file. Raises ``Fault`` with exit code 2 and every fault in it."""
    try:
        return load(path, environment())
    except SettingsError as error:
        raise SettingsFault(str(error)) from error


def summary(settings: Settings) -> str:
    """Return in a line what the settings start."""
    num_workers = sum(worker.replicas for model in settings.models.values() for worker in model.workers)
    parts = [
        _counted(len(settings.models), "model"),
        _counted(num_workers, "worker"),
        _counted(len(settings.keys), "key"),
    ]
    return f"{', '.join(parts)}, port {settings.server.port}, admin port {settings.admin.port}"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
