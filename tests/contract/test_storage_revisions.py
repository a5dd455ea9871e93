"""Audit and revisions, on SQLite and on PostgreSQL."""

import asyncio
from typing import Any

import pytest

from core.records import AuditEntry, Revision
from storage.sql.audit import Audit
from storage.sql.database import Conflict, Database, Missing
from storage.sql.revisions import Revisions


def _entry(number: int, **more: Any) -> AuditEntry:
    values = {"actor": "ann", "role": "admin", "action": "keys.create", "target": "k1", "outcome": 201, **more}
    return AuditEntry(time=float(number // 2), id=f"a{number}", **values)


def _revision(number: int, resource: str = "config", **more: Any) -> Revision:
    return Revision(resource, number, {"queue.max": number}, "ann", 1000.5, **more)


@pytest.fixture
def audit(database: Database) -> Audit:
    return Audit(database)


@pytest.fixture
def revisions(database: Database) -> Revisions:
    return Revisions(database)


async def test_an_entry_comes_back_as_it_went_in(audit: Audit) -> None:
    entry = _entry(1, detail={"before": {"rpm": None}, "after": {"rpm": [1, 2.5, "é\0"]}}, target="/" * 5000)
    await audit.add(entry)
    assert await audit.search() == (entry,)
    with pytest.raises(Conflict):
        await audit.add(entry)


async def test_entries_are_found_newest_first_and_in_pages(audit: Audit) -> None:
    for number in range(5):
        await audit.add(_entry(number))
    pages = []
    after: tuple[float, str] | None = None
    while found := await audit.search(after=after, limit=2):
        pages.append([entry.id for entry in found])
        after = (found[-1].time, found[-1].id)
    assert pages == [["a4", "a3"], ["a2", "a1"], ["a0"]]


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        ({"actor": "bob"}, ["a1"]),
        ({"action": "tenants.delete"}, ["a2"]),
        ({"target": "k2"}, ["a2"]),
        ({"since": 1.0}, ["a2"]),
        ({"until": 1.0}, ["a1", "a0"]),
        ({"actor": "' OR ''='"}, []),
    ],
)
async def test_entries_are_found_by_what_they_are(
    audit: Audit, conditions: dict[str, Any], expected: list[str]
) -> None:
    await audit.add(_entry(0))
    await audit.add(_entry(1, actor="bob"))
    await audit.add(_entry(2, action="tenants.delete", target="k2"))
    assert [entry.id for entry in await audit.search(**conditions)] == expected


async def test_a_revision_comes_back_as_it_went_in(revisions: Revisions) -> None:
    revision = _revision(1, note="why\0", state="canary", expires_at=2000.25)
    await revisions.add(revision)
    assert await revisions.revision("config", 1) == _revision(1, note="why\ufffd", state="canary", expires_at=2000.25)
    assert await revisions.revision("config", 2) is None
    assert await revisions.latest("fairness") is None


async def test_numbers_count_within_a_resource_without_gaps(revisions: Revisions) -> None:
    await revisions.add(_revision(1))
    await revisions.add(_revision(2))
    await revisions.add(_revision(1, "fairness"))
    for number in (1, 2, 4):
        with pytest.raises(Conflict):
            await revisions.add(_revision(number))
    latest = await revisions.latest("config")
    assert latest is not None
    assert latest.number == 2


async def test_of_two_revisions_with_one_number_one_is_kept(revisions: Revisions) -> None:
    outcomes = await asyncio.gather(*(revisions.add(_revision(1)) for _ in range(6)), return_exceptions=True)
    assert outcomes.count(None) == 1
    assert sum(isinstance(outcome, Conflict) for outcome in outcomes) == 5


async def test_revisions_are_listed_newest_first_and_in_pages(revisions: Revisions) -> None:
    for number in range(1, 6):
        await revisions.add(_revision(number))
    assert [one.number for one in await revisions.list("config", limit=3)] == [5, 4, 3]
    assert [one.number for one in await revisions.list("config", after=3)] == [2, 1]


async def test_a_revisions_state_changes_and_others_notice(revisions: Revisions) -> None:
    before = await revisions.version()
    await revisions.add(_revision(1, state="canary", expires_at=5.0))
    added = await revisions.version()
    await revisions.set_state("config", 1, "applied")
    assert before < added < await revisions.version()
    assert await revisions.latest("config") == _revision(1)
    with pytest.raises(Missing):
        await revisions.set_state("config", 2, "applied")
