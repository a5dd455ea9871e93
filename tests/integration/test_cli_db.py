"""``forebay db``, on real databases."""

import asyncio
import json
import sqlite3
import stat
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from core.ids import TenantId
from core.tenancy import Tenant
from gateway.cli import main
from storage.sql.database import Database, StorageUnavailable, sqlite_url
from storage.sql.schema import current, head, upgrade
from storage.sql.tenants import Tenants


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a state folder, to be in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FOREBAY_STATE", "state")
    return tmp_path / "state"


def _forebay(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["db", *arguments])


def _with_tenant(path: Path, name: str) -> None:
    async def work() -> None:
        async with Database(sqlite_url(path)) as database:
            await upgrade(database)
            await Tenants(database).put_tenant(Tenant(id=TenantId(name)))

    asyncio.run(work())


def _tenants_in(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as connection:
        return [name for (name,) in connection.execute("SELECT id FROM tenants ORDER BY id")]


def test_the_cli_makes_backs_up_and_restores(state: Path) -> None:
    assert json.loads(_forebay("upgrade", "--json").output)["revision"] == head()
    path = state / "forebay.db"
    _with_tenant(path, "before")
    done = _forebay("backup", "copy.db")
    assert done.exit_code == 0, done.output
    assert stat.S_IMODE(Path("copy.db").stat().st_mode) == 0o600
    _with_tenant(path, "after")
    assert _tenants_in(path) == ["after", "before"]
    done = _forebay("restore", "copy.db", "--json")
    assert done.exit_code == 0, done.output
    assert _tenants_in(path) == ["before"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert json.loads(_forebay("current", "--json").output) == {
        "database": "sqlite:///state/forebay.db",
        "revision": head(),
        "newest": head(),
        "is_current": True,
    }


@pytest.mark.parametrize("verb", ["current", "backup x.db"])
def test_the_cli_says_that_there_is_no_database_and_makes_none(state: Path, verb: str) -> None:
    done = _forebay(*verb.split())
    assert done.exit_code == 1
    assert "there is no database at" in done.output
    assert not state.exists()


def test_the_cli_refuses_to_downgrade_and_says_what_to_do() -> None:
    done = _forebay("downgrade")
    assert done.exit_code == 1
    assert "forebay db restore FILE" in done.output


def test_the_cli_uses_the_database_of_the_settings(state: Path) -> None:
    url = sqlite_url(Path("elsewhere.db"))
    Path("forebay.yaml").write_text(
        f"database: {{url: '{url}'}}\nmodels: {{m: {{workers: [{{engine: openai, url: 'http://127.0.0.1:1'}}]}}}}\n"
    )
    done = _forebay("upgrade")
    assert done.exit_code == 0, done.output
    assert Path("elsewhere.db").is_file()


@pytest.mark.parametrize(("verb", "program"), [("backup", "pg_dump"), ("restore", "pg_restore")])
def test_the_cli_names_the_command_for_postgres_without_the_password(state: Path, verb: str, program: str) -> None:
    Path("forebay.yaml").write_text(
        "database: {url: 'postgresql://me:hunter2@db.example:5433/forebay'}\n"
        "models: {m: {workers: [{engine: openai, url: 'http://127.0.0.1:1'}]}}\n"
    )
    done = _forebay(verb, "x.dump")
    assert done.exit_code == 1
    assert f"{program} --" in done.output
    assert "postgresql://me@db.example:5433/forebay" in done.output
    assert "hunter2" not in done.output


def test_the_cli_says_when_the_database_is_away(state: Path) -> None:
    Path("forebay.yaml").write_text(
        "database: {url: 'postgresql://me:hunter2@127.0.0.1:1/forebay'}\n"
        "models: {m: {workers: [{engine: openai, url: 'http://127.0.0.1:1'}]}}\n"
    )
    done = _forebay("current")
    assert done.exit_code == 1
    assert "cannot be reached" in done.output
    assert "hunter2" not in done.output
    with pytest.raises(StorageUnavailable):
        asyncio.run(current(Database("postgresql://me@127.0.0.1:1/forebay")))
