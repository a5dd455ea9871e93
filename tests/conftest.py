"""Databases for tests: SQLite in a file, and a real PostgreSQL that is started once, when the first test wants it."""

import gc
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from storage.sql.database import Database, sqlite_url
from storage.sql.schema import upgrade
from tests.fakes.postgres import Postgres


@pytest.fixture(scope="module", autouse=True)
def _spare_what_is_old_the_collector() -> None:
    """Keep what earlier modules left out of the collector's way: going through all of it holds every timeout of a test
    up for the better part of a second, and on a busy machine for seconds."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    with Postgres() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of an empty database, of each kind in turn."""
    if request.param == "sqlite":
        return sqlite_url(tmp_path / "state" / "forebay.db")
    server: Postgres = request.getfixturevalue("postgres")
    return server.new_database()


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """An empty database with its tables, of each kind in turn."""
    async with Database(database_url, timeout_s=20.0) as opened:
        await upgrade(opened)
        yield opened
