"""A database that is there, slow, gone or none: what callers see of it."""

import asyncio
import sqlite3
import stat
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import insert, select, text
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.ext.asyncio import AsyncConnection

from core.ids import TenantId
from core.records import Batch, LedgerLine, RequestRecord
from core.tenancy import Tenant
from storage.sql.database import BadUrl, Conflict, Database, StorageUnavailable, sqlite_url
from storage.sql.erasure import erase
from storage.sql.ledger import Ledger
from storage.sql.schema import current, upgrade
from storage.sql.tables import meta
from storage.sql.tenants import Tenants
from tests.fakes.postgres import Postgres

_SECRET = "hunter2-canary"


@pytest.fixture
def server(postgres: Postgres) -> Iterator[Postgres]:
    """The server, which is up again afterwards."""
    yield postgres
    postgres.kill()
    postgres.start()


@pytest.mark.parametrize(
    "url",
    [
        "",
        "forebay.db",
        "sqlite://",
        "sqlite:///x.db?mode=memory",
        "mysql://u:hunter2-canary@h/d",
        "postgresql://u:hunter2-canary@h",
        "postgresql+psycopg://u:hunter2-canary@h/d",
        "postgresql://u:hunter2-canary@h/d?options=-csearch_path",
        "postgresql://u:hunter2-canary@h:port/d",
    ],
)
def test_an_address_that_is_none_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(BadUrl) as caught:
        Database(url)
    assert _SECRET not in str(caught.value)


async def test_no_address_and_no_error_shows_the_password() -> None:
    async with Database(f"postgresql://u:{_SECRET}@127.0.0.1:1/d", timeout_s=5.0) as database:
        with pytest.raises(StorageUnavailable) as caught:
            await current(database)
        assert _SECRET not in f"{caught.value}{database.address}{database.bare_address}"
        assert "127.0.0.1:1/d" in str(caught.value)


async def test_a_file_is_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "forebay.db"
    async with Database(sqlite_url(path)) as database:
        await upgrade(database)
        modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
    assert modes == {"forebay.db": 0o600, "forebay.db-wal": 0o600, "forebay.db-shm": 0o600}
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


async def test_a_file_that_cannot_be_made_is_an_unavailable_database(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageUnavailable, match="cannot open the database"):
        async with Database(sqlite_url(tmp_path / "file" / "forebay.db")):
            pass


async def test_a_file_that_is_no_database_is_an_unavailable_database(tmp_path: Path) -> None:
    (tmp_path / "forebay.db").write_bytes(b"no database " * 1000)
    async with Database(sqlite_url(tmp_path / "forebay.db")) as database:
        with pytest.raises(StorageUnavailable, match="not a database"):
            await current(database)


async def test_what_is_undone_leaves_nothing(database: Database) -> None:
    async def half(connection: AsyncConnection) -> None:
        await connection.execute(insert(meta).values(name="half", number=1))
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        await database.write(half)
    query = select(meta.c.number).where(meta.c.name == "half")
    assert await database.read(lambda connection: connection.scalar(query)) is None


async def test_a_row_that_exists_is_a_conflict(database: Database) -> None:
    twin = insert(meta).values(name="tenants", number=1)
    with pytest.raises(Conflict):
        await database.write(lambda connection: connection.execute(twin))


async def test_what_takes_too_long_is_given_up_and_the_next_one_works(database: Database) -> None:
    async def slow(connection: AsyncConnection) -> None:
        await connection.execute(select(meta))
        await asyncio.Event().wait()

    began = time.monotonic()
    with pytest.raises(StorageUnavailable, match="did not answer"):
        await database.write(slow, timeout_s=0.1)
    assert time.monotonic() - began < 5.0
    await Tenants(database).put_tenant(Tenant(id=TenantId("a")))


async def test_a_caller_that_goes_away_leaves_no_transaction_behind(database: Database) -> None:
    began = asyncio.Event()

    async def endless(connection: AsyncConnection) -> None:
        await connection.execute(insert(meta).values(name="endless", number=1))
        began.set()
        await asyncio.Event().wait()

    caller = asyncio.create_task(database.write(endless))
    await began.wait()
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    await database.write(lambda connection: connection.execute(insert(meta).values(name="endless", number=2)))


async def test_more_callers_than_connections_wait_for_their_turn(database_url: str) -> None:
    async with Database(database_url, pool=2, timeout_s=20.0) as database:
        await upgrade(database)
        tenants = Tenants(database)
        assert await asyncio.gather(*(tenants.version() for _ in range(40))) == [1] * 40


async def test_a_locked_file_is_an_unavailable_database(tmp_path: Path) -> None:
    url = sqlite_url(tmp_path / "forebay.db")
    async with Database(url) as one, Database(url, timeout_s=0.2) as other:
        await upgrade(one)

        async def hold(connection: AsyncConnection) -> None:
            with pytest.raises(StorageUnavailable, match=r"locked|did not answer"):
                await Tenants(other).put_tenant(Tenant(id=TenantId("a")))
            assert await Tenants(other).version() == 1  # readers do not wait for writers

        await one.write(hold)
        assert (await Tenants(other).put_tenant(Tenant(id=TenantId("a")))).version == 1


async def test_a_database_without_its_tables_is_as_good_as_away(database_url: str) -> None:
    is_ready = False
    async with Database(database_url, timeout_s=20.0) as database:
        tenants = Tenants(database.once(lambda: is_ready))
        for work in (tenants.version, tenants.snapshot, lambda: tenants.put_tenant(Tenant(id=TenantId("a")))):
            with pytest.raises(StorageUnavailable, match="since the start"):
                await work()
        await upgrade(database)
        is_ready = True
        assert (await tenants.put_tenant(Tenant(id=TenantId("a")))).version == 1


async def test_an_erasure_that_a_reader_keeps_from_the_file_is_told(tmp_path: Path) -> None:
    async with Database(sqlite_url(tmp_path / "forebay.db"), timeout_s=0.5) as database:
        await upgrade(database)
        with closing(sqlite3.connect(tmp_path / "forebay.db")) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT * FROM meta").fetchall()
            await Tenants(database).put_tenant(Tenant(id=TenantId("a")))
            with pytest.raises(StorageUnavailable, match="reads from"):
                await database.overwrite()
        await database.overwrite()


async def test_nothing_of_an_erased_end_user_is_left_in_a_file(tmp_path: Path) -> None:
    names = [f"canary-{number}" for number in range(300)]
    tenant = TenantId("acme")
    async with Database(sqlite_url(tmp_path / "forebay.db"), timeout_s=20.0) as database:
        await upgrade(database)
        lines = [LedgerLine(day=1, tenant=tenant, key="k", end_user=name, model="m", requests=1) for name in names]
        records = [
            RequestRecord(time=1.0, id=name, endpoint="e", status=200, duration_s=1.0, tenant=tenant, end_user=name)
            for name in names
        ]
        await Ledger(database).book(Batch("b", tuple(lines), tuple(records)))
        await erase(database, "acme")
        assert _files_with(b"canary-", tmp_path) == []


async def test_a_server_that_hangs_keeps_nobody_waiting(server: Postgres) -> None:
    async with Database(server.new_database(), pool=2, timeout_s=0.5) as database:
        await upgrade(database)
        tenants = Tenants(database)
        server.pause()
        began = time.monotonic()
        outcomes = await asyncio.gather(*(tenants.version() for _ in range(20)), return_exceptions=True)
        assert all(isinstance(outcome, StorageUnavailable) for outcome in outcomes)
        assert time.monotonic() - began < 3.0
        server.resume()
        assert await _patiently(tenants) == 1


async def test_a_server_that_hangs_does_not_keep_us_from_leaving(server: Postgres) -> None:
    async with Database(server.new_database(), pool=2, timeout_s=0.3) as database:
        await upgrade(database)
        server.pause()
        with pytest.raises(StorageUnavailable):
            await current(database)
        began = time.monotonic()
    assert time.monotonic() - began < 10.0


async def test_a_server_that_was_killed_is_used_again_when_it_is_back(server: Postgres) -> None:
    async with Database(server.new_database(), timeout_s=5.0) as database:
        await upgrade(database)
        tenants = Tenants(database)
        await tenants.put_tenant(Tenant(id=TenantId("a")))
        server.kill()
        for _ in range(3):
            with pytest.raises(StorageUnavailable):
                await tenants.version()
        server.start()
        assert await _patiently(tenants) == 2
        assert await tenants.tenant("a") is not None


async def test_our_own_mistakes_are_not_taken_for_an_outage(postgres: Postgres) -> None:
    async with Database(postgres.new_database(), timeout_s=5.0) as database:
        with pytest.raises(ProgrammingError):
            await database.read(lambda connection: connection.execute(text("SELECT nonsense")))


def _files_with(text: bytes, folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if text in path.read_bytes()]


async def _patiently(tenants: Tenants) -> int:
    """Return the version as soon as the database gives it."""
    while True:
        try:
            return await tenants.version()
        except StorageUnavailable:
            await asyncio.sleep(0.05)
