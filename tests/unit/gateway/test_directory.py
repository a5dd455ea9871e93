"""Keys are in memory; the database is watched, and its absence changes nothing for who is known."""

import pytest
from structlog.testing import capture_logs

from core.errors import InvalidKey, KeysUnavailable
from core.tenancy import Key, Stored
from gateway.directory import Directory
from tests.fakes.tenancy import key, tenant

NOW = 1.0
FILE = key("fbk_declared_in_the_file", id="file:a")


class FakeStore:
    def __init__(self, *keys: Key) -> None:
        self.stored = Stored(1, (tenant("db"),), keys)
        self.is_away = False
        self.num_snapshots = 0

    async def version(self) -> int:
        if self.is_away:
            raise OSError("away")
        return self.stored.version

    async def snapshot(self) -> Stored:
        self.num_snapshots += 1
        return self.stored


def directory(store: FakeStore, *keys: Key) -> Directory:
    return Directory(lambda: Stored(0, (tenant(),), keys or (FILE,)), store.version, store.snapshot)


def asks(secret: str) -> dict[bytes, bytes]:
    return {b"api-key": secret.encode()}


async def test_keys_of_the_file_and_of_the_database_hold_side_by_side() -> None:
    home = directory(FakeStore(key("fbk_of_the_database", tenant="db")))
    await home.refresh()

    assert home.keyring.identify(asks("fbk_of_the_database"), NOW).tenant == "db"
    assert home.keyring.identify(asks("fbk_declared_in_the_file"), NOW).tenant == "acme"
    with pytest.raises(InvalidKey):
        home.keyring.identify(asks("fbk_of_nobody"), NOW)


async def test_where_both_name_a_tenant_the_file_wins() -> None:
    store = FakeStore()
    store.stored = Stored(1, (tenant(is_suspended=True),), ())
    home = directory(store)
    await home.refresh()

    assert not home.keyring.tenants[tenant().id].is_suspended


async def test_the_database_is_read_again_only_after_a_change() -> None:
    store = FakeStore()
    home = directory(store)
    for _ in range(3):
        await home.refresh()
    assert store.num_snapshots == 1

    store.stored = Stored(2, (tenant("db"),), (key("fbk_of_the_database", tenant="db"),))
    await home.refresh()
    assert home.keyring.identify(asks("fbk_of_the_database"), NOW).tenant == "db"


async def test_while_the_database_is_away_known_keys_hold_and_unknown_ones_are_unavailable() -> None:
    store = FakeStore(key("fbk_of_the_database", tenant="db"))
    home = directory(store)
    await home.refresh()
    store.is_away = True
    with capture_logs() as told:
        for _ in range(3):
            await home.refresh()

    assert home.keyring.identify(asks("fbk_of_the_database"), NOW).tenant == "db"
    with pytest.raises(KeysUnavailable):
        home.keyring.identify(asks("fbk_of_nobody"), NOW)
    assert [line["event"] for line in told] == ["directory_away"]

    store.is_away = False
    await home.refresh()
    with pytest.raises(InvalidKey):
        home.keyring.identify(asks("fbk_of_nobody"), NOW)


async def test_a_gateway_that_starts_without_its_database_knows_the_files_keys() -> None:
    store = FakeStore()
    store.is_away = True
    home = directory(store)
    await home.refresh()

    assert home.keyring.identify(asks("fbk_declared_in_the_file"), NOW).tenant == "acme"
    with pytest.raises(KeysUnavailable):
        home.keyring.identify(asks("fbk_of_nobody"), NOW)
