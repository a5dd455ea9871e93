"""Tenants and their keys: few, read whole by every gateway, and changed by one operator at a time."""

from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

import msgspec
from sqlalchemy import RowMapping, Select, delete, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from core.tenancy import Key, Stored, Tenant
from storage.sql.counters import bump, counter, poll
from storage.sql.database import Conflict, Database, Missing
from storage.sql.paging import MAX_PAGE, bounded
from storage.sql.tables import keys, tenants

T = TypeVar("T")

_COUNTER = "tenants"
_BYTES = (bytes,)
_UNCHANGING = {"id", "tenant", "digest", "prefix", "created_at", "revoked_at"}


class Row(msgspec.Struct, Generic[T], frozen=True):
    """A value as it is stored. ``version`` counts its changes from 1."""

    value: T
    version: int


class Tenants:
    """The tenants and keys that are made while the gateway runs."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def version(self) -> int:
        """Return a number that is a higher one after every change. Reads one row."""
        return await poll(self._database, _COUNTER)

    async def snapshot(self) -> Stored:
        """Return all of them, revoked and expired keys too as long as they are kept. Reads both tables whole."""

        async def work(connection: AsyncConnection) -> Stored:
            version = await counter(connection, _COUNTER)  # first: what changes meanwhile is then read again
            tenant_rows = await connection.execute(select(tenants))
            key_rows = await connection.execute(select(keys))
            return Stored(
                version=version,
                tenants=tuple(_tenant(row).value for row in tenant_rows.mappings()),
                keys=tuple(_key(row).value for row in key_rows.mappings()),
            )

        return await self._database.read(work)

    async def tenants(self, after: str | None = None, limit: int = MAX_PAGE) -> tuple[Row[Tenant], ...]:
        """Return tenants in the order of their ids, from the one that follows ``after``."""
        query = select(tenants).order_by(tenants.c.id).limit(bounded(limit))
        if after is not None:
            query = query.where(tenants.c.id > after)
        return await self._database.read(lambda connection: _all(connection, query, _tenant))

    async def tenant(self, tenant: str) -> Row[Tenant] | None:
        """Return one, or None if there is no such tenant."""
        query = select(tenants).where(tenants.c.id == tenant)
        return next(iter(await self._database.read(lambda connection: _all(connection, query, _tenant))), None)

    async def put_tenant(self, tenant: Tenant, *, expected: int | None = None) -> Row[Tenant]:
        """Make or replace a tenant. ``expected``: the version it has to be at, 0 if there may be none, None if any
        will do. Raises ``Conflict`` with nothing changed."""
        values = _columns(tenant)
        make = self._database.insert(tenants).values(version=1, **values)
        replace = update(tenants).where(tenants.c.id == tenant.id)
        replace = replace.values(version=tenants.c.version + 1, **values)
        if expected is not None:
            replace = replace.where(tenants.c.version == expected)

        async def work(connection: AsyncConnection) -> Row[Tenant]:
            await bump(connection, _COUNTER)  # its row is what writers wait for: from here on there is only this one
            if expected == 0:
                await connection.execute(make)
                return Row(tenant, 1)
            version = await connection.scalar(replace.returning(tenants.c.version))
            if version is None and expected is None:
                await connection.execute(make)
                version = 1
            if version is None:
                raise Conflict(f"the tenant {tenant.id} is no longer at version {expected}")
            return Row(tenant, version)

        return await self._database.write(work)

    async def delete_tenant(self, tenant: str, *, expected: int | None = None) -> None:
        """Remove a tenant, and its keys, which nobody knows any more from then on. Raises ``Missing``, ``Conflict``."""
        condition = tenants.c.id == tenant
        remove = delete(tenants).where(condition)
        if expected is not None:
            remove = remove.where(tenants.c.version == expected)

        async def work(connection: AsyncConnection) -> None:
            await bump(connection, _COUNTER)
            if await connection.scalar(select(tenants.c.id).where(condition)) is None:
                raise Missing(f"there is no tenant {tenant}")
            if (await connection.execute(remove)).rowcount == 0:
                raise Conflict(f"the tenant {tenant} is no longer at version {expected}")
            await connection.execute(delete(keys).where(keys.c.tenant == tenant))

        await self._database.write(work)

    async def keys(
        self, tenant: str | None = None, after: str | None = None, limit: int = MAX_PAGE
    ) -> tuple[Row[Key], ...]:
        """Return keys, of one tenant or of all, in the order of their ids, from the one that follows ``after``."""
        query = select(keys).order_by(keys.c.id).limit(bounded(limit))
        if tenant is not None:
            query = query.where(keys.c.tenant == tenant)
        if after is not None:
            query = query.where(keys.c.id > after)
        return await self._database.read(lambda connection: _all(connection, query, _key))

    async def key(self, key: str) -> Row[Key] | None:
        """Return one by its id, or None if there is no such key."""
        return await self._database.read(lambda connection: _find_key(connection, key))

    async def add_key(self, key: Key) -> Row[Key]:
        """Keep a new key. Raises ``Conflict`` if its id or its digest is there already."""

        async def work(connection: AsyncConnection) -> Row[Key]:
            await bump(connection, _COUNTER)
            await connection.execute(insert(keys).values(version=1, **_columns(key)))
            return Row(key, 1)

        return await self._database.write(work)

    async def change_key(self, key: Key, *, expected: int | None = None) -> Row[Key]:
        """Replace what may be changed of a key: all but its secret, its tenant, and when it was made and revoked.

        Raises ``Missing``, and ``Conflict`` if it is not at version ``expected`` or is revoked.
        """
        changes = {name: value for name, value in _columns(key).items() if name not in _UNCHANGING}
        return await self._change(key.id, expected, changes)

    async def revoke_key(self, key: str, at: float, *, expected: int | None = None) -> Row[Key]:
        """Have a key hold no longer; one that is revoked already stays as it is. Raises ``Missing``, ``Conflict``."""
        found = await self.key(key)
        if found is not None and found.value.revoked_at is not None:
            return found
        return await self._change(key, expected, {"revoked_at": at})

    async def rotate_key(
        self, key: str, new_key: Key, *, overlap_s: float, now: float, expected: int | None = None
    ) -> Row[Key]:
        """Keep a new key in the place of one that holds for ``overlap_s`` more, or less if it expires before.

        Returns the new one. Raises ``Missing``, and ``Conflict`` if the old one is revoked or not at version
        ``expected``, or the new one's id or digest is there already.
        """

        async def work(connection: AsyncConnection) -> Row[Key]:
            await bump(connection, _COUNTER)
            old = await _changeable(connection, key, expected)
            ends_at = now + overlap_s
            if old.value.expires_at is not None:
                ends_at = min(ends_at, old.value.expires_at)
            await connection.execute(
                update(keys).where(keys.c.id == key).values(expires_at=ends_at, version=old.version + 1)
            )
            await connection.execute(insert(keys).values(version=1, **_columns(new_key)))
            return Row(new_key, 1)

        return await self._database.write(work)

    async def _change(self, key: str, expected: int | None, changes: Mapping[str, Any]) -> Row[Key]:
        async def work(connection: AsyncConnection) -> Row[Key]:
            await bump(connection, _COUNTER)
            old = await _changeable(connection, key, expected)
            await connection.execute(update(keys).where(keys.c.id == key).values(version=old.version + 1, **changes))
            found = await _find_key(connection, key)
            assert found is not None
            return found

        return await self._database.write(work)


async def _changeable(connection: AsyncConnection, key: str, expected: int | None) -> Row[Key]:
    found = await _find_key(connection, key)
    if found is None:
        raise Missing(f"there is no key {key}")
    if expected is not None and found.version != expected:
        raise Conflict(f"the key {key} is no longer at version {expected}")
    if found.value.revoked_at is not None:
        raise Conflict(f"the key {key} is revoked")
    return found


async def _find_key(connection: AsyncConnection, key: str) -> Row[Key] | None:
    return next(iter(await _all(connection, select(keys).where(keys.c.id == key), _key)), None)


async def _all(
    connection: AsyncConnection, query: Select[Any], make: Callable[[RowMapping], Row[T]]
) -> tuple[Row[T], ...]:
    return tuple(make(row) for row in (await connection.execute(query)).mappings())


def _columns(value: Tenant | Key) -> dict[str, Any]:
    """Return a value as its table has it: a column for each field, sets and inner values as JSON."""
    columns: dict[str, Any] = msgspec.to_builtins(value, builtin_types=_BYTES, order="sorted")
    return columns


def _tenant(row: RowMapping) -> Row[Tenant]:
    return Row(_value(row, Tenant), row["version"])


def _key(row: RowMapping) -> Row[Key]:
    return Row(_value(row, Key), row["version"])


def _value(row: RowMapping, kind: type[T]) -> T:
    return msgspec.convert({str(name): value for name, value in row.items()}, kind, builtin_types=_BYTES)
