"""Runs of workflows, on SQLite and on PostgreSQL."""

import asyncio
from typing import Any

import pytest

from core.ids import TenantId
from core.workflows import RunAnswer, RunEvent, RunLetter, RunRecord
from storage.sql.database import Conflict, Database
from storage.sql.workflows import Change, Workflows

OWNER = "a"


def _run(number: int, **more: Any) -> RunRecord:
    values = {"tenant": TenantId("t"), "key": "k", "graph": b'{"calls":[]}', "owner": OWNER, **more}
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
    await workflows.write(OWNER, [Change("run_1", _events("run_1", 1, 2), "running", 2.0)])
    await workflows.write(OWNER, [Change("run_1", _events("run_1", 3), "done", 3.0)])
    assert await workflows.events("run_1") == _events("run_1", 1, 2, 3)
    assert await workflows.events("run_1", after=1, limit=1) == _events("run_1", 2)
    run = await workflows.run("run_1")
    assert run is not None
    assert (run.state, run.updated_at) == ("done", 3.0)


async def test_no_event_is_written_twice_nor_anything_beside_it(workflows: Workflows) -> None:
    for number in (1, 2):
        await workflows.accept(_run(number))
    await workflows.write(OWNER, [Change("run_1", _events("run_1", 1), "running", 2.0)])
    with pytest.raises(Conflict):
        await workflows.write(
            OWNER,
            [
                Change("run_2", _events("run_2", 1), "done", 3.0),
                Change("run_1", _events("run_1", 1), "failed", 3.0),
            ],
        )
    assert await workflows.events("run_2") == ()
    assert {run.state for run in await workflows.search("t")} == {"running"}


async def test_who_is_not_the_owner_any_more_writes_nothing(workflows: Workflows) -> None:
    await workflows.accept(_run(1, owner="a", leased_until=1.0))
    await workflows.accept(_run(2, owner="b"))
    for change in (Change("run_2", _events("run_2", 1), "running", 2.0), Change("run_2", (), "done", 2.0)):
        with pytest.raises(Conflict):
            await workflows.write("a", [Change("run_1", _events("run_1", 1), "done", 2.0), change])
    assert await workflows.events("run_1") == await workflows.events("run_2") == ()
    assert {run.state for run in await workflows.search("t")} == {"running"}
    with pytest.raises(Conflict):
        await workflows.write("a", [Change("of which nobody knows", (), "done", 2.0)])


async def test_a_batch_of_any_size_is_written_whole(workflows: Workflows) -> None:
    for number in (1, 2):
        await workflows.accept(_run(number))
    numbers = range(1, 1235)
    changes = [Change(f"run_{number}", _events(f"run_{number}", *numbers), "running", 2.0) for number in (1, 2)]
    await workflows.write(OWNER, changes)
    for number in (1, 2):
        seen: list[RunEvent] = []
        while page := await workflows.events(f"run_{number}", after=len(seen)):
            seen += page
        assert tuple(seen) == _events(f"run_{number}", *numbers)


async def test_news_are_a_run_without_its_graph_and_what_has_happened_since(workflows: Workflows) -> None:
    await workflows.accept(_run(1))
    await workflows.write(OWNER, [Change("run_1", _events("run_1", 1, 2, 3), "done", 3.0)])
    news = await workflows.news("run_1", after=1, limit=1)
    assert news is not None
    assert (news.record.state, news.record.graph) == ("done", b"")
    assert (news.events, news.has_more) == (_events("run_1", 2), True)
    rest = await workflows.news("run_1", after=2)
    assert rest is not None
    assert (rest.events, rest.has_more) == (_events("run_1", 3), False)
    assert await workflows.news("run_2", after=0) is None


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
    await workflows.write(OWNER, [Change("run_3", (), "done", 9.0)])
    assert [run.id for run in await workflows.search("t", state="done")] == ["run_3"]


async def test_runs_that_ended_long_ago_are_forgotten_with_their_events(workflows: Workflows) -> None:
    for number, state in ((1, "running"), (2, "done"), (3, "failed"), (4, "done")):
        await workflows.accept(_run(number))
        await workflows.write(OWNER, [Change(f"run_{number}", _events(f"run_{number}", 1), state, float(number))])  # type: ignore[arg-type]
    assert await workflows.prune(4.0, chunk=1) == 2
    assert [run.id for run in await workflows.search("t")] == ["run_4", "run_1"]
    assert await workflows.events("run_2") == ()
    assert await workflows.events("run_1") == _events("run_1", 1)


async def test_a_run_has_one_owner_until_the_lease_is_over(workflows: Workflows) -> None:
    for number in range(3):
        await workflows.accept(_run(number, owner="a", leased_until=10.0))
    await workflows.write(OWNER, [Change("run_2", (), "done", 5.0)])
    assert await workflows.claim("b", now=9.0, until=20.0) == ()
    assert [run.id for run in await workflows.claim("a", now=9.0, until=20.0)] == ["run_0", "run_1"]
    assert await workflows.claim("b", now=19.0, until=30.0) == ()
    taken = await workflows.claim("b", now=21.0, until=30.0)
    assert [(run.id, run.owner, run.leased_until) for run in taken] == [("run_0", "b", 30.0), ("run_1", "b", 30.0)]
    assert await workflows.claim("a", now=22.0, until=40.0) == ()


async def test_of_claimed_runs_only_those_are_read_that_are_not_known(workflows: Workflows) -> None:
    for number in range(3):
        await workflows.accept(_run(number, owner="a", leased_until=10.0))
    taken = await workflows.claim("a", now=9.0, until=20.0, known={"run_0", "run_2"})
    assert [run.id for run in taken] == ["run_1"]
    assert taken[0].graph == b'{"calls":[]}'
    assert await workflows.claim("b", now=19.0, until=30.0) == (), "all of them were claimed"


async def test_a_run_that_has_ended_is_opened_again_by_one(workflows: Workflows) -> None:
    await workflows.accept(_run(1, owner="a", leased_until=10.0))
    assert not await workflows.reopen("run_1", "b", 20.0)
    await workflows.write(OWNER, [Change("run_1", (), "done", 5.0)])
    assert await workflows.reopen("run_1", "b", 20.0)
    assert not await workflows.reopen("run_1", "a", 20.0)
    assert [run.id for run in await workflows.claim("b", now=9.0, until=20.0)] == ["run_1"]


async def test_a_letter_is_there_until_it_is_answered_and_then_its_answer(workflows: Workflows) -> None:
    for number in (1, 2):
        await workflows.accept(_run(number))
    first, second = await workflows.send("run_1", b"x"), await workflows.send("run_1", b"y")
    await workflows.send("run_2", b"z")
    assert await workflows.with_letters() == {"run_1", "run_2"}
    assert await workflows.letters(["run_1"]) == (RunLetter(first, "run_1", b"x"), RunLetter(second, "run_1", b"y"))
    assert await workflows.answered(first) == ("running", False)
    answer = RunAnswer(first, b"done")
    await workflows.write(OWNER, [Change("run_1", _events("run_1", 1), "done", 2.0, (answer,))])
    assert await workflows.answered(first) == ("done", True)
    assert await workflows.letters(["run_1"]) == (RunLetter(second, "run_1", b"y"),)
    assert await workflows.take_back(first) == answer
    assert await workflows.answered(first) is None


async def test_an_answer_and_what_comes_of_the_letter_are_kept_together_or_not_at_all(workflows: Workflows) -> None:
    await workflows.accept(_run(1))
    number = await workflows.send("run_1", b"x")
    change = Change("run_1", _events("run_1", 1), "done", 2.0, (RunAnswer(number, b"done"),))
    with pytest.raises(Conflict):
        await workflows.write("b", [change])
    assert await workflows.answered(number) == ("running", False)
    assert await workflows.take_back(number) is None
    with pytest.raises(Conflict):
        await workflows.write(OWNER, [change])
    assert await workflows.events("run_1") == (), "who has sent it was told that it is not done"


async def test_a_letter_is_answered_once(workflows: Workflows) -> None:
    await workflows.accept(_run(1))
    number = await workflows.send("run_1", b"x")
    await workflows.write(OWNER, [Change("run_1", (), "running", 2.0, (RunAnswer(number, b"done"),))])
    with pytest.raises(Conflict):
        await workflows.write(OWNER, [Change("run_1", (), "running", 2.0, (RunAnswer(number, b"other"),))])
    assert await workflows.take_back(number) == RunAnswer(number, b"done")


async def test_the_number_of_a_letter_is_never_given_again(workflows: Workflows) -> None:
    await workflows.accept(_run(1))
    first = await workflows.send("run_1", b"x")
    await workflows.take_back(first)
    assert await workflows.send("run_1", b"y") > first


async def test_a_letter_is_for_a_run_and_goes_with_it(workflows: Workflows) -> None:
    with pytest.raises(Conflict):
        await workflows.send("run_1", b"x")
    await workflows.accept(_run(1))
    number = await workflows.send("run_1", b"x")
    await workflows.write(OWNER, [Change("run_1", (), "done", 2.0)])
    assert await workflows.prune(3.0) == 1
    assert await workflows.with_letters() == frozenset()
    assert await workflows.answered(number) is None
    assert await workflows.take_back(number) is None
