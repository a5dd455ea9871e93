"""``forebay init``, ``check`` and ``config``: write a settings file, tell whether one is right, and what it says."""

import json
from pathlib import Path

import click
import msgspec

from gateway import revisions
from gateway.auth import new_admin_key, new_key
from gateway.cli.admin import Admin, asks
from gateway.cli.common import ADMIN_KEY, LOCAL_KEY, Fault, SettingsFault, kept_key, table
from gateway.cli.common import state_dir as default_state_dir
from gateway.cli.live_config import LIVE, changes_by
from gateway.cli.machine import default_threads, num_cores
from gateway.settings import Declared, Settings, SettingsError, environment, read

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
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def check(path: Path, *, as_json: bool) -> None:
    """Tell whether a settings file is right; exit status 2 if not. Nothing is started.

    \b
    Example:
      forebay check -c forebay.yaml
    """
    try:
        settings = load_settings(path)
    except SettingsFault as fault:
        if as_json:
            click.echo(json.dumps({"is_right": False, "faults": fault.message.splitlines()}, indent=2))
        raise
    if as_json:
        click.echo(json.dumps({"is_right": True, "faults": []}, indent=2))
    else:
        click.echo(f"{path} is right: {summary(settings)}.")


def load_settings(path: Path) -> Settings:
    """Return the settings in a file. Raises ``Fault`` with exit code 2 and every fault in it."""
    return read_settings(path).settings


def read_settings(path: Path) -> Declared:
    """Return what a file and the environment say. Raises ``Fault`` like ``load_settings``."""
    try:
        return read(path, environment())
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


@click.group()
def config() -> None:
    """Look at settings: what a file and the environment say, what differs between two files, what a file may say.

    \b
    Example:
      forebay config show --effective
    """


_file = click.option(
    "--config", "-c", "path", type=click.Path(path_type=Path, dir_okay=False), default=DEFAULT_FILE, show_default=True
)
_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@config.command(name="show")
@_file
@click.option("--effective", is_flag=True, help="Defaults too, not only what the file and the environment say.")
@_as_json
def show(path: Path, *, effective: bool, as_json: bool) -> None:
    """Show what a file and the environment say, each value with who said it. Secrets are shown as ***.

    \b
    Example:
      forebay config show --effective
    """
    found = revisions.values(_effective(path))
    chosen = [value for value in found if effective or value.source != "default"]
    if as_json:
        click.echo(json.dumps([msgspec.to_builtins(value) for value in chosen], indent=2))
        return
    rows = [[value.path, json.dumps(value.value, ensure_ascii=False), value.source] for value in chosen]
    click.echo(table([["KEY", "VALUE", "SOURCE"], *rows]))


@config.command(name="diff")
@click.argument("other", required=False, type=click.Path(path_type=Path, dir_okay=False))
@_file
@asks
@_as_json
def diff(admin: Admin, other: Path | None, path: Path, *, as_json: bool) -> None:
    """Tell what would change if the file OTHER took the place of the settings file. Exit status 1 if anything would.

    Without OTHER: what would change if the running gateway read the settings file now. What overlays hold stays, and a
    secret that is another one is not seen.

    \b
    Examples:
      forebay config diff new.yaml -c forebay.yaml
      forebay config diff
    """
    new = _effective(other or path)
    changes = changes_by(new, admin) if other is None else revisions.diff(_effective(path), new)
    if as_json:
        click.echo(json.dumps([msgspec.to_builtins(change) for change in changes], indent=2))
    elif changes:
        rows = [[one.path, json.dumps(one.before), json.dumps(one.after), one.source] for one in changes]
        click.echo(table([["KEY", "FROM", "TO", "SOURCE"], *rows]))
    else:
        click.echo("Nothing differs.")
    if changes:
        click.get_current_context().exit(1)


def _effective(path: Path) -> revisions.Effective:
    return revisions.effective(read_settings(path), {})


@config.command(name="schema")
def schema() -> None:
    """Print the JSON schema of a settings file, for editors.

    \b
    Example:
      forebay config schema > forebay.schema.json
    """
    click.echo(json.dumps(Settings.model_json_schema(), indent=2))


for verb in LIVE:
    config.add_command(verb)
