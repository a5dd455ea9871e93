"""Tenants and keys, on SQLite and on PostgreSQL."""

import asyncio

import pytest

from core.chat import Endpoint
from core.ids import ModelName, TenantId
from core.tenancy import Budget, Ceilings, Key, Rate, Tenant
from storage.sql.database import Conflict, Database, Missing
from storage.sql.tenants import Row, Tenants

FULL = Tenant(
    id=TenantId("acme"),
    is_suspended=True,
    models=frozenset({ModelName("small"), ModelName("large")}),
    endpoints=frozenset({Endpoint.CHAT, Endpoint.EMBEDDINGS}),
    rate=Rate(rpm=10, parallel=2),
    budgets=(Budget(10**18, "usd", "month"), Budget(5, "tokens", "total")),
    end_user=Rate(tpm=7),
    end_user_budgets=(Budget(1, "tokens", "day"),),
    ceilings=Ceilings(body=1000),
    max_class="batch",
    weight=2.5,
)
PLAIN = Tenant(id=TenantId("plain"), models=frozenset())


def _key(id: str = "k1", tenant: str = "acme", **more: object) -> Key:
    values: dict[str, object] = {"id": id, "name": f"the {id}", "tenant": tenant, "digest": id.encode() * 16}
    return Key(**{**values, **more})  # type: ignore[arg-type]


@pytest.fixture
def tenants(database: Database) -> Tenants:
    return Tenants(database)


async def test_a_tenant_comes_back_as_it_went_in(tenants: Tenants) -> None:
    for tenant in (FULL, PLAIN):
        await tenants.put_tenant(tenant, expected=0)
    assert await tenants.tenant("acme") == Row(FULL, 1)
    assert await tenants.tenant("plain") == Row(PLAIN, 1)
    assert await tenants.tenant("nobody") is None


async def test_a_key_comes_back_as_it_went_in(tenants: Tenants) -> None:
    key = _key(
        role="policy",
        prefix="sk-fb-abc",
        models=frozenset({ModelName("m")}),
        endpoints=frozenset({Endpoint.CHAT}),
        rate=Rate(tpm=5),
        budgets=(Budget(3, "usd", "week"),),
        max_class="standard",
        expires_at=1234.5,
        created_at=1000.25,
    )
    await tenants.add_key(key)
    assert await tenants.key("k1") == Row(key, 1)
    assert await tenants.key("k2") is None


async def test_a_tenant_is_made_once(tenants: Tenants) -> None:
    await tenants.put_tenant(PLAIN, expected=0)
    with pytest.raises(Conflict):
        await tenants.put_tenant(PLAIN, expected=0)


async def test_a_tenant_is_replaced_only_at_the_version_that_was_read(tenants: Tenants) -> None:
    await tenants.put_tenant(PLAIN, expected=0)
    changed = Tenant(id=PLAIN.id, is_suspended=True)
    assert (await tenants.put_tenant(changed, expected=1)).version == 2
    with pytest.raises(Conflict):
        await tenants.put_tenant(PLAIN, expected=1)
    assert await tenants.tenant("plain") == Row(changed, 2)


async def test_a_tenant_that_is_not_there_is_not_at_any_version(tenants: Tenants) -> None:
    with pytest.raises(Conflict):
        await tenants.put_tenant(PLAIN, expected=3)


async def test_without_an_expected_version_a_tenant_is_made_or_replaced(tenants: Tenants) -> None:
    assert (await tenants.put_tenant(PLAIN)).version == 1
    assert (await tenants.put_tenant(PLAIN)).version == 2


async def test_of_many_writers_at_once_one_wins(tenants: Tenants) -> None:
    await tenants.put_tenant(PLAIN, expected=0)
    outcomes = await asyncio.gather(*(tenants.put_tenant(PLAIN, expected=1) for _ in range(8)), return_exceptions=True)
    assert [row.version for row in outcomes if isinstance(row, Row)] == [2]
    assert sum(isinstance(outcome, Conflict) for outcome in outcomes) == 7


async def test_every_change_is_seen_in_the_version_and_no_refused_one_is(tenants: Tenants) -> None:
    seen = [await tenants.version()]

    async def changed() -> bool:
        seen.append(await tenants.version())
        return seen[-1] > seen[-2]

    await tenants.put_tenant(FULL)
    assert await changed()
    await tenants.add_key(_key())
    assert await changed()
    await tenants.change_key(_key(rate=Rate(rpm=1)))
    assert await changed()
    await tenants.rotate_key("k1", _key("k2"), overlap_s=1.0, now=0.0)
    assert await changed()
    await tenants.revoke_key("k2", 5.0)
    assert await changed()
    await tenants.delete_tenant("acme")
    assert await changed()
    with pytest.raises(Conflict):
        await tenants.put_tenant(FULL, expected=9)
    assert not await changed()


async def test_a_snapshot_holds_everything_and_its_version(tenants: Tenants) -> None:
    await tenants.put_tenant(FULL)
    await tenants.put_tenant(PLAIN)
    await tenants.add_key(_key())
    revoked = (await tenants.revoke_key("k1", 77.0)).value
    snapshot = await tenants.snapshot()
    assert snapshot.version == await tenants.version()
    assert set(snapshot.tenants) == {FULL, PLAIN}
    assert snapshot.keys == (revoked,)


async def test_tenants_and_keys_come_in_pages(tenants: Tenants) -> None:
    for name in "dbca":
        await tenants.put_tenant(Tenant(id=TenantId(name)))
        await tenants.add_key(_key(f"k-{name}", tenant="a" if name in "ab" else "c"))
    first = await tenants.tenants(limit=3)
    assert [row.value.id for row in first] == ["a", "b", "c"]
    assert [row.value.id for row in await tenants.tenants(after="c", limit=3)] == ["d"]
    assert [row.value.id for row in await tenants.keys(limit=2)] == ["k-a", "k-b"]
    assert [row.value.id for row in await tenants.keys("c", after="k-c")] == ["k-d"]


async def test_a_tenant_goes_with_its_keys(tenants: Tenants) -> None:
    await tenants.put_tenant(FULL)
    await tenants.add_key(_key())
    await tenants.add_key(_key("other", tenant="plain"))
    with pytest.raises(Conflict):
        await tenants.delete_tenant("acme", expected=2)
    await tenants.delete_tenant("acme", expected=1)
    assert await tenants.tenant("acme") is None
    assert [row.value.id for row in await tenants.keys()] == ["other"]
    with pytest.raises(Missing):
        await tenants.delete_tenant("acme")


@pytest.mark.parametrize("twin", [_key("k1", digest=b"another"), _key("k2", digest=b"k1" * 16)])
async def test_ids_and_digests_of_keys_are_unique(tenants: Tenants, twin: Key) -> None:
    await tenants.add_key(_key())
    with pytest.raises(Conflict):
        await tenants.add_key(twin)
    with pytest.raises(Conflict):
        await tenants.rotate_key("k1", twin, overlap_s=1.0, now=0.0)
    assert await tenants.key("k1") == Row(_key(), 1)


async def test_changing_a_key_leaves_its_secret_and_its_tenant(tenants: Tenants) -> None:
    await tenants.add_key(_key(created_at=5.0))
    changed = await tenants.change_key(
        _key(tenant="thief", digest=b"mine", created_at=9.0, name="new", rate=Rate(rpm=1), expires_at=8.0), expected=1
    )
    assert changed == Row(_key(name="new", created_at=5.0, rate=Rate(rpm=1), expires_at=8.0), 2)
    assert await tenants.key("k1") == changed


async def test_a_key_is_changed_only_at_the_version_that_was_read(tenants: Tenants) -> None:
    await tenants.add_key(_key())
    with pytest.raises(Conflict):
        await tenants.change_key(_key(), expected=2)
    with pytest.raises(Missing):
        await tenants.change_key(_key("k9"))


async def test_a_revoked_key_stays_revoked(tenants: Tenants) -> None:
    await tenants.add_key(_key())
    revoked = await tenants.revoke_key("k1", 50.0)
    assert revoked.value.revoked_at == 50.0
    assert await tenants.revoke_key("k1", 60.0) == revoked
    with pytest.raises(Conflict):
        await tenants.change_key(_key())
    with pytest.raises(Conflict):
        await tenants.rotate_key("k1", _key("k2"), overlap_s=1.0, now=0.0)
    with pytest.raises(Missing):
        await tenants.revoke_key("k2", 60.0)


async def test_a_rotated_key_holds_for_the_overlap(tenants: Tenants) -> None:
    await tenants.add_key(_key())
    assert await tenants.rotate_key("k1", _key("k2"), overlap_s=60.0, now=100.0) == Row(_key("k2"), 1)
    assert await tenants.key("k1") == Row(_key(expires_at=160.0), 2)


async def test_rotation_never_lengthens_the_life_of_a_key(tenants: Tenants) -> None:
    await tenants.add_key(_key(expires_at=110.0))
    await tenants.rotate_key("k1", _key("k2"), overlap_s=60.0, now=100.0)
    found = await tenants.key("k1")
    assert found is not None
    assert found.value.expires_at == 110.0


@pytest.mark.parametrize("name", ["x'; DROP TABLE tenants; --", "a\0b", "\ud800", "%", "é" * 5000])
async def test_a_name_is_never_more_than_a_name(tenants: Tenants, name: str) -> None:
    await tenants.put_tenant(PLAIN)
    assert await tenants.tenant(name) is None
    assert await tenants.keys(name, after=name) == ()
    assert await tenants.tenant("plain") is not None
