"""``forebay db``: the database's tables, backups, and putting a backup back."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import click

from gateway.cli.common import Fault, state_dir
from gateway.cli.config import DEFAULT_FILE, load_settings
from gateway.settings import environment
from storage.sql import backup as copies
from storage.sql import schema
from storage.sql.backup import BackupError
from storage.sql.database import FILE_NAME, BadUrl, Database, StorageUnavailable, sqlite_url
from storage.sql.schema import DowngradeRefused, NewerDatabase

T = TypeVar("T")

_config = click.option(
    "--config",
    "-c",
    "config",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The settings that name the database.  [default: forebay.yaml if there is one, else the state folder's file]",
)
_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group()
def db() -> None:
    """Look at the database's tables, bring them up to date, back up and restore.

    \b
    Examples:
      forebay db current
      forebay db backup forebay-2026-11-22.db
    """


@db.command()
@_config
@_as_json
def current(config: Path | None, *, as_json: bool) -> None:
    """Print the revision of the tables, and the newest that this version knows.

    \b
    Example:
      forebay db current --json
    """
    database = _database(config)
    revision = _run(database, schema.current)
    _reported(lambda: schema.refuse_newer(revision))
    if as_json:
        report = {"database": database.address, "revision": revision, "newest": schema.head()}
        click.echo(json.dumps({**report, "is_current": revision == schema.head()}))
    elif revision == schema.head():
        click.echo(f"{database.address}: revision {revision}, up to date")
    else:
        click.echo(
            f"{database.address}: revision {revision or 'none'}, newest {schema.head()}; run `forebay db upgrade`"
        )


@db.command()
@_config
@_as_json
def upgrade(config: Path | None, *, as_json: bool) -> None:
    """Bring the tables up to date, making them if there are none. Does nothing where they are.

    \b
    Example:
      forebay db backup before.db && forebay db upgrade
    """
    database = _database(config, may_be_new=True)
    before, after = _run(database, schema.upgrade)
    if as_json:
        click.echo(json.dumps({"database": database.address, "before": before, "revision": after}))
    elif before == after:
        click.echo(f"{database.address}: revision {after}, up to date already")
    else:
        click.echo(f"{database.address}: from revision {before or 'none'} to {after}")


@db.command()
def downgrade() -> None:
    """Refused: tables only go forward. Restore a backup from before the upgrade.

    \b
    Example:
      forebay db restore before.db
    """
    raise Fault(
        "tables are never downgraded. Stop the gateway, restore a backup from before the upgrade with "
        "`forebay db restore FILE`, and run the version of Forebay that made it."
    )


@db.command()
@click.argument("target", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False))
@_config
@_as_json
def backup(target: Path, config: Path | None, *, as_json: bool) -> None:
    """Copy a SQLite database into a new FILE, readable by you alone; the gateway may run meanwhile.

    \b
    Example:
      forebay db backup forebay-$(date +%F).db
    """
    database = _database(config)
    if (path := database.path) is None:
        raise Fault(
            f"a PostgreSQL database is backed up by its own tool:\n\n  {copies.pg_dump_command(database, target)}"
        )
    _reported(lambda: copies.backup(path, target))
    size = target.stat().st_size
    if as_json:
        click.echo(json.dumps({"database": database.address, "backup": str(target), "bytes": size}))
    else:
        click.echo(
            f"{path} is copied to {target} ({size} bytes). It holds hashes of keys and who asked when: keep it safe."
        )


@db.command()
@click.argument("source", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False))
@_config
@_as_json
def restore(source: Path, config: Path | None, *, as_json: bool) -> None:
    """Put the backup FILE in the place of a SQLite database. The gateway has to be stopped; what is there is lost.

    \b
    Example:
      forebay db restore forebay-2026-11-22.db
    """
    database = _database(config, may_be_new=True)
    if (path := database.path) is None:
        command = copies.pg_restore_command(database, source)
        raise Fault(
            f"a PostgreSQL database is restored by its own tool. Stop every gateway that uses it, then:\n\n  {command}"
        )
    _reported(lambda: copies.restore(source, path))
    if as_json:
        click.echo(json.dumps({"database": database.address, "restored": str(source)}))
    else:
        click.echo(f"{path} is what it was in {source}. The gateway brings older tables up to date when it starts.")


def _database(config: Path | None, *, may_be_new: bool = False) -> Database:
    """Return the database of the settings, or of the state folder where there are none."""
    if config is None and DEFAULT_FILE.exists():
        config = DEFAULT_FILE
    if config is None:
        url = sqlite_url(state_dir(environment()) / FILE_NAME)
    else:
        settings = load_settings(config)
        own = settings.database.url
        url = own.get_secret_value() if own is not None else sqlite_url(settings.state_dir / FILE_NAME)
    database = _reported(lambda: Database(url, pool=1))
    if database.path is not None and not may_be_new and not database.path.exists():
        raise Fault(f"there is no database at {database.path} yet; the gateway makes one when it starts.")
    return database


def _run(database: Database, work: Callable[[Database], Awaitable[T]]) -> T:
    async def opened() -> T:
        async with database:
            return await work(database)

    return _reported(lambda: asyncio.run(opened()))


def _reported(act: Callable[[], T]) -> T:
    try:
        return act()
    except (BackupError, BadUrl, DowngradeRefused, NewerDatabase, StorageUnavailable) as error:
        raise Fault(str(error)) from error
