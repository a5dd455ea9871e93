"""Old databases become new ones with their data; backups are made and put back."""

import asyncio
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import AsyncConnection

from core.chat import Usage
from core.ids import ModelName, TenantId
from core.records import Batch, LedgerLine, LegRecord, RequestRecord, Sum
from core.tenancy import Budget, Key, Rate, Tenant
from storage.sql.audit import Audit
from storage.sql.backup import BackupError, backup, pg_dump_command, pg_restore_command, restore
from storage.sql.database import Database, sqlite_url
from storage.sql.ledger import Ledger
from storage.sql.requests import Requests
from storage.sql.revisions import Revisions
from storage.sql.schema import DowngradeRefused, NewerDatabase, current, head, is_current, upgrade
from storage.sql.tables import METADATA
from storage.sql.tenants import Tenants
from tests.fakes.admin import client, opened
from tests.fakes.postgres import Postgres

_ROOT = Path(__file__).resolve().parents[2]

# What the first revision's code wrote, as it wrote it: not made by today's code.
_OLD_ROWS = (
    "UPDATE meta SET number = 7 WHERE name = 'tenants'",
    "INSERT INTO tenants VALUES ('acme', 3, false, 'standard', '[\"m\"]', NULL, '{\"rpm\": 5}', "
    '\'[{"amount": 9, "unit": "usd", "period": "day"}]\', \'{}\', \'[]\', \'{}\')',
    "INSERT INTO keys VALUES ('k1', 2, 'acme', 'the key', {digest}, 'sk-fb-ab', NULL, NULL, NULL, '{}', '[]', "
    "'interactive', NULL, 50.5, 10.25)",
    "INSERT INTO ledger VALUES (20000, 'acme', 'k1', 'ann', 'm', 2, 1, 30, 4, 0, 1000000000000)",
    "INSERT INTO booked_batches VALUES ('b1', 99.5)",
    "INSERT INTO requests (id, time, tenant, key, model, status, record) VALUES ('r1', 1000.5, 'acme', 'k1', 'm', 200, "
    "{record})",
    "INSERT INTO audit VALUES ('a1', 5.5, 'ann', 'admin', 'keys.create', 'k1', 201, '{\"x\": [1]}')",
    "INSERT INTO revisions VALUES ('config', 1, '{\"queue.max\": 5}', 'ann', 6.5, 'why', 'applied', NULL)",
)


_OLD_TENANT = (
    "id, version, is_suspended, max_class, models, endpoints, rate, budgets, end_user, end_user_budgets, ceilings"
)
_OLD_RECORD = (
    b'{"time":1000.5,"id":"r1","endpoint":"/v1/embeddings","status":200,"duration_s":0.25,"tenant":"acme","key":"k1",'
    b'"model":"m","attempts":1,"queue_s":0.5,"usage":{"prompt_tokens":30,"completion_tokens":4,"cached_tokens":0},'
    b'"cost":77,"legs":[{"worker":"m-0","model":"m","at_s":0.5,"duration_s":0.25,"cause":"done"}]}'
)


def _literal(data: bytes, database: Database) -> str:
    return f"x'{data.hex()}'" if database.is_sqlite else f"'\\x{data.hex()}'"


async def _make_old(database: Database, revision: str = "0001") -> None:
    """Make a database of an old revision, with data of the first."""
    await upgrade(database, to=revision)
    digest, record = _literal(b"key", database), _literal(_OLD_RECORD, database)

    async def fill(connection: AsyncConnection) -> None:
        for row in _OLD_ROWS:
            await connection.exec_driver_sql(row.replace("{digest}", digest).replace("{record}", record))

    await database.write(fill)


@pytest.mark.parametrize("revision", ["0001", "0002"])
async def test_an_old_database_becomes_a_new_one_with_its_data(database_url: str, revision: str) -> None:
    async with Database(database_url, timeout_s=20.0) as database:
        await _make_old(database, revision)
        assert not await is_current(database)
        assert await upgrade(database) == (revision, head())
        assert await is_current(database)

        tenants, tenant = Tenants(database), TenantId("acme")
        snapshot = await tenants.snapshot()
        assert snapshot.version == 7
        assert snapshot.tenants == (
            Tenant(
                id=tenant,
                models=frozenset({ModelName("m")}),
                rate=Rate(rpm=5),
                budgets=(Budget(9, "usd", "day"),),
                max_class="standard",
            ),
        )
        assert snapshot.keys == (
            Key("k1", "the key", tenant, b"key", prefix="sk-fb-ab", revoked_at=50.5, created_at=10.25),
        )
        old = RequestRecord(
            time=1000.5,
            id="r1",
            endpoint="/v1/embeddings",
            status=200,
            duration_s=0.25,
            tenant=tenant,
            key="k1",
            model="m",
            attempts=1,
            queue_s=0.5,
            usage=Usage(30, 4, 0),
            cost=77,
            legs=(LegRecord("m-0", "m", 0.5, 0.25, "done"),),
        )
        new = RequestRecord(time=2000.0, id="r2", endpoint="e", status=200, duration_s=1.0, traceparent="00-a-b-01")
        ledger, line = Ledger(database), LedgerLine(20000, tenant, "k1", "ann", "m", input_tokens=1)
        await ledger.book(Batch("b1", (line,), ()))  # booked before the upgrade
        await ledger.book(Batch("b2", (line,), (new,)))
        assert await Requests(database).search() == (new, old)
        assert await ledger.sums(20000, 20000) == (Sum(tenant, "k1", "ann", tokens=35, cost=10**12),)
        assert [entry.detail for entry in await Audit(database).search()] == [{"x": [1]}]
        latest = await Revisions(database).latest("config")
        assert latest is not None
        assert latest.overlay == {"queue.max": 5}


@pytest.mark.parametrize("revision", ["0001", "0002"])
async def test_tenants_of_an_old_database_have_equal_shares_until_they_are_given_others(
    database_url: str, revision: str, tmp_path: Path
) -> None:
    async with Database(database_url, timeout_s=20.0) as database:
        await _make_old(database, revision)
    settings = {"url": database_url, "timeout": 20}
    async with opened(tmp_path / "gateway", database=settings) as (app, services), client(app) as admin:
        assert services.directory.keyring.tenants[TenantId("acme")].weight == 1.0
        tag = (await admin.get("/admin/v1/tenants/acme")).headers["etag"]
        done = await admin.put("/admin/v1/tenants/acme", json={"weight": 2.5}, headers={"if-match": tag})
        assert (done.status_code, done.json()["weight"]) == (200, 2.5)
        assert services.directory.keyring.tenants[TenantId("acme")].weight == 2.5

        # A gateway of the version before may still write while others are upgraded.
        async def write_as_before(connection: AsyncConnection) -> None:
            row = _OLD_ROWS[1].replace("VALUES", f"({_OLD_TENANT}) VALUES")
            await connection.exec_driver_sql(row.replace("acme", "beta"))

        await services.database.write(write_as_before)
        assert (await admin.get("/admin/v1/tenants/beta")).json()["weight"] == 1.0
    async with Database(database_url, timeout_s=20.0) as database:
        for older in ("0002", "0001"):
            with pytest.raises(DowngradeRefused, match="forebay db restore"):
                await upgrade(database, to=older)
        found = {row.value.id: row.value.weight for row in await Tenants(database).tenants()}
        assert found == {"acme": 2.5, "beta": 1.0}


async def test_the_revisions_lead_to_the_tables_that_the_code_knows(database: Database) -> None:
    def differences(connection: Connection) -> object:
        return compare_metadata(MigrationContext.configure(connection, opts={"compare_type": True}), METADATA)

    assert await database.read(lambda connection: connection.run_sync(differences)) == []


async def test_an_upgrade_that_is_done_does_nothing(database: Database) -> None:
    assert await upgrade(database) == (head(), head())


async def test_tables_never_go_back(database: Database) -> None:
    with pytest.raises(DowngradeRefused, match="forebay db restore"):
        await upgrade(database, to="0001")
    assert await is_current(database)


async def test_a_newer_database_is_refused(database: Database) -> None:
    await database.write(lambda connection: connection.execute(text("UPDATE alembic_version SET version_num = '9999'")))
    for act in (upgrade(database), is_current(database)):
        with pytest.raises(NewerDatabase, match="Run the version that wrote them"):
            await act
    assert await current(database) == "9999"


async def test_an_upgrade_that_fails_changes_nothing(database_url: str) -> None:
    async with Database(database_url, timeout_s=20.0) as database:
        await _make_old(database)
        # In the way of the second revision's last step: its first one must not stay.
        in_the_way = text("CREATE INDEX ix_requests_tenant ON requests (tenant)")
        await database.write(lambda connection: connection.execute(in_the_way))
        with pytest.raises(Exception, match="ix_requests_tenant"):
            await upgrade(database)
        assert await current(database) == "0001"
        drop = text("DROP INDEX ix_requests_tenant")
        await database.write(lambda connection: connection.execute(drop))
        await upgrade(database)
        assert await is_current(database)


async def test_several_gateways_that_start_at_once_upgrade_once(database_url: str) -> None:
    program = (
        "import asyncio, sys\n"
        "from storage.sql.database import Database\n"
        "from storage.sql.schema import upgrade\n"
        "async def go():\n"
        "    async with Database(sys.argv[1], timeout_s=20.0) as database:\n"
        "        sys.stdin.read()\n"  # all of them together
        "        print(await upgrade(database))\n"
        "asyncio.run(go())\n"
    )
    started = [
        await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            program,
            database_url,
            cwd=_ROOT,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        for _ in range(3)
    ]
    said = [out.decode().strip() for out, _ in await asyncio.gather(*(process.communicate(b"") for process in started))]
    assert sorted(said) == sorted([f"(None, '{head()}')"] + [f"('{head()}', '{head()}')"] * 2)


def _with_tenant(path: Path, name: str) -> None:
    async def work() -> None:
        async with Database(sqlite_url(path)) as database:
            await upgrade(database)
            await Tenants(database).put_tenant(Tenant(id=TenantId(name)))

    asyncio.run(work())


def _tenants_in(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as connection:
        return [name for (name,) in connection.execute("SELECT id FROM tenants ORDER BY id")]


async def test_a_backup_is_made_while_the_database_is_in_use(tmp_path: Path) -> None:
    path, target = tmp_path / "forebay.db", tmp_path / "copy.db"
    async with Database(sqlite_url(path)) as database:
        await upgrade(database)
        tenants = Tenants(database)
        await tenants.put_tenant(Tenant(id=TenantId("a")))

        async def hold(connection: AsyncConnection) -> None:
            await connection.execute(text("DELETE FROM tenants"))
            await asyncio.to_thread(backup, path, target)

        await database.write(hold)
    assert _tenants_in(target) == ["a"]
    assert sorted(os.listdir(tmp_path)) == ["copy.db", "forebay.db"]


async def test_a_database_in_use_is_not_replaced(tmp_path: Path) -> None:
    path, copy = tmp_path / "forebay.db", tmp_path / "copy.db"
    async with Database(sqlite_url(path)) as database:
        await upgrade(database)
        await asyncio.to_thread(backup, path, copy)
        with pytest.raises(BackupError, match="in use; stop the gateway"):
            await asyncio.to_thread(restore, copy, path)
        assert await is_current(database)
    await asyncio.to_thread(restore, copy, path)


def test_a_broken_or_missing_database_is_replaced(tmp_path: Path) -> None:
    path, copy = tmp_path / "forebay.db", tmp_path / "copy.db"
    _with_tenant(path, "a")
    backup(path, copy)
    path.write_bytes(b"broken " * 1000)
    (tmp_path / "forebay.db-wal").write_bytes(b"stale")
    restore(copy, path)
    assert _tenants_in(path) == ["a"]
    restore(copy, tmp_path / "new" / "forebay.db")
    assert _tenants_in(tmp_path / "new" / "forebay.db") == ["a"]


def test_what_is_no_good_backup_is_not_restored(tmp_path: Path) -> None:
    path = tmp_path / "forebay.db"
    _with_tenant(path, "a")
    (tmp_path / "text").write_bytes(b"no database " * 1000)
    sqlite3.connect(tmp_path / "other.db").close()
    with closing(sqlite3.connect(tmp_path / "other.db")) as other:
        other.execute("CREATE TABLE t (x)")
    backup(path, tmp_path / "newer.db")
    with closing(sqlite3.connect(tmp_path / "newer.db")) as newer:
        newer.execute("UPDATE alembic_version SET version_num = '9999'")
        newer.commit()
    for name, error in (
        ("text", BackupError),
        ("other.db", BackupError),
        ("none", BackupError),
        ("newer.db", NewerDatabase),
    ):
        with pytest.raises(error):
            restore(tmp_path / name, path)
    assert _tenants_in(path) == ["a"]
    assert not list(tmp_path.glob(".*"))


def test_a_backup_overwrites_nothing(tmp_path: Path) -> None:
    _with_tenant(tmp_path / "forebay.db", "a")
    (tmp_path / "copy.db").write_text("precious")
    with pytest.raises(BackupError, match="exists"):
        backup(tmp_path / "forebay.db", tmp_path / "copy.db")
    assert (tmp_path / "copy.db").read_text() == "precious"


async def test_postgres_is_backed_up_and_restored_by_the_commands_that_we_name(
    postgres: Postgres, tmp_path: Path
) -> None:
    environment = {"PATH": f"{postgres.programs}:/usr/bin:/bin", "PGPASSWORD": "secret"}

    def run(command: str) -> None:
        subprocess.run(["bash", "-c", command], env=environment, check=True, capture_output=True)

    target = tmp_path / "my copy.dump"
    async with Database(postgres.new_database(), timeout_s=20.0) as database:
        await upgrade(database)
        tenants = Tenants(database)
        await tenants.put_tenant(Tenant(id=TenantId("before")))
        await asyncio.to_thread(run, pg_dump_command(database, target))
        await tenants.put_tenant(Tenant(id=TenantId("after")))
    async with database:
        await asyncio.to_thread(run, pg_restore_command(database, target))
        assert [row.value.id for row in await Tenants(database).tenants()] == ["before"]
        assert await is_current(database)
