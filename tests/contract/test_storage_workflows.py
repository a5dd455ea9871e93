"""Runs of workflows, on SQLite and on PostgreSQL."""

import asyncio
from typing import Any

import pytest

from core.ids import TenantId
from core.workflows import RunEvent, RunRecord
from storage.sql.database import Conflict, Database
from storage.sql.workflows import Change, Workflows


def _run(number: int, **more: Any) -> RunRecord:
    values = {"tenant": TenantId("t"), "key": "k", "graph": b'{"calls":[]}', **more}
    return RunRecord(id=f"run_{number}", created_at=float(number), updated_at=float(number), **values)


def _events(run: str, *numbers: int) -> tuple[RunEvent, ...]:
    return tuple(RunEvent(run, number, b'{"number":%d}' % number) for number in numbers)


@pytest.fixture
def workflows(database: Database) -> Workflows:
    return Workflows(database)


async def test_a_run_comes_back_as_it_went_in(workflows: Workflows) -> None:
    run = _run(1, end_user="é\u3042", app="a", idempotency="once", digest="d", graph=bytes(range(256)))
    assert await workflows.accept(run) == run
    assert await workflows.run(run.id) == run
    assert await workflows.run("another") is None


async def test_a_submission_that_comes_again_is_the_first_one(workflows: Workflows) -> None:
    first = _run(1, idempotency="once")
    await workflows.accept(first)
    assert await workflows.accept(_run(2, idempotency="once")) == first
    of_another = _run(3, idempotency="once", tenant=TenantId("other"))
    assert await workflows.accept(of_another) == of_another
    assert await workflows.accept(_run(4)) == _run(4)
    assert await workflows.accept(_run(5)) == _run(5), "without a key nothing is the same"


async def test_of_submissions_at_the_same_time_one_is_accepted(workflows: Workflows) -> None:
    seen = await asyncio.gather(*(workflows.accept(_run(number, idempotency="once")) for number in range(5)))
    assert len({run.id for run in seen}) == 1
    assert len(await workflows.search("t")) == 1


async def test_events_come_back_in_their_order_and_in_pages(workflows: Workflows) -> None:
    await workflows.accept(_run(1))
    await workflows.write([Change("run_1", _events("run_1", 1, 2), "running", 2.0)])
    await workflows.write([Change("run_1", _events("run_1", 3), "done", 3.0)])
    assert await workflows.events("run_1") == _events("run_1", 1, 2, 3)
    assert await workflows.events("run_1", after=1, limit=1) == _events("run_1", 2)
    run = await workflows.run("run_1")
    assert run is not None
    assert (run.state, run.updated_at) == ("done", 3.0)


async def test_who_is_not_the_owner_any_more_writes_nothing(workflows: Workflows) -> None:
    for number in (1, 2):
        await workflows.accept(_run(number))
    await workflows.write([Change("run_1", _events("run_1", 1), "running", 2.0)])
    with pytest.raises(Conflict):
        await workflows.write(
            [
                Change("run_2", _events("run_2", 1), "done", 3.0),
                Change("run_1", _events("run_1", 1), "failed", 3.0),
            ]
        )
    assert await workflows.events("run_2") == ()
    assert {run.state for run in await workflows.search("t")} == {"running"}


async def test_runs_are_found_by_tenant_newest_first_and_in_pages(workflows: Workflows) -> None:
    for number in range(5):
        await workflows.accept(_run(number))
    await workflows.accept(_run(9, tenant=TenantId("other")))
    pages = []
    after: tuple[float, str] | None = None
    while found := await workflows.search("t", after=after, limit=2):
        pages.append([run.id for run in found])
        after = (found[-1].created_at, found[-1].id)
    assert pages == [["run_4", "run_3"], ["run_2", "run_1"], ["run_0"]]
    await workflows.write([Change("run_3", (), "done", 9.0)])
    assert [run.id for run in await workflows.search("t", state="done")] == ["run_3"]


async def test_runs_that_ended_long_ago_are_forgotten_with_their_events(workflows: Workflows) -> None:
    for number, state in ((1, "running"), (2, "done"), (3, "failed"), (4, "done")):
        await workflows.accept(_run(number))
        await workflows.write([Change(f"run_{number}", _events(f"run_{number}", 1), state, float(number))])  # type: ignore[arg-type]
    assert await workflows.prune(4.0, chunk=1) == 2
    assert [run.id for run in await workflows.search("t")] == ["run_4", "run_1"]
    assert await workflows.events("run_2") == ()
    assert await workflows.events("run_1") == _events("run_1", 1)


async def test_a_run_has_one_owner_until_the_lease_is_over(workflows: Workflows) -> None:
    for number in range(3):
        await workflows.accept(_run(number, owner="a", leased_until=10.0))
    await workflows.write([Change("run_2", (), "done", 5.0)])
    assert await workflows.claim("b", now=9.0, until=20.0) == ()
    assert [run.id for run in await workflows.claim("a", now=9.0, until=20.0)] == ["run_0", "run_1"]
    assert await workflows.claim("b", now=19.0, until=30.0) == ()
    taken = await workflows.claim("b", now=21.0, until=30.0)
    assert [(run.id, run.owner, run.leased_until) for run in taken] == [("run_0", "b", 30.0), ("run_1", "b", 30.0)]
    assert await workflows.claim("a", now=22.0, until=40.0) == ()


async def test_a_run_that_has_ended_is_opened_again_by_one(workflows: Workflows) -> None:
    await workflows.accept(_run(1, owner="a", leased_until=10.0))
    assert not await workflows.reopen("run_1", "b", 20.0)
    await workflows.write([Change("run_1", (), "done", 5.0)])
    assert await workflows.reopen("run_1", "b", 20.0)
    assert not await workflows.reopen("run_1", "a", 20.0)
    assert [run.id for run in await workflows.claim("b", now=9.0, until=20.0)] == ["run_1"]
