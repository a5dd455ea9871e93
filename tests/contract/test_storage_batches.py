"""Files and batches, on SQLite and on PostgreSQL."""

from typing import Any

import msgspec
import pytest

from core.batches import BatchRecord, BatchRow, FileRecord, RowError
from core.ids import TenantId
from core.workflows import RunEvent, RunRecord
from storage.sql.batches import Batches
from storage.sql.database import Conflict, Database, Missing
from storage.sql.erasure import erase
from storage.sql.files import PART, Files
from storage.sql.workflows import Change, Workflows

ANN = "ann"


def _file(number: int, **more: Any) -> FileRecord:
    values = {"tenant": TenantId("t"), "name": "rows.jsonl", "purpose": "batch", "size": 3, **more}
    return FileRecord(id=f"file-{number}", created_at=float(number), **values)


def _batch(number: int, **more: Any) -> BatchRecord:
    values = {"tenant": TenantId("t"), "key": "k", "input_file": "file-1", "endpoint": "/v1/embeddings", **more}
    return BatchRecord(id=f"batch_{number}", created_at=float(number), expires_at=number + 86_400.0, **values)


def _run(number: int, **more: Any) -> RunRecord:
    values = {"tenant": TenantId("t"), "key": "k", "graph": b"{}", **more}
    return RunRecord(id=f"run_{number}", created_at=float(number), updated_at=float(number), **values)


@pytest.fixture
def files(database: Database) -> Files:
    return Files(database)


@pytest.fixture
def batches(database: Database) -> Batches:
    return Batches(database)


@pytest.fixture
def workflows(database: Database) -> Workflows:
    return Workflows(database)


async def _content(files: Files, file: str) -> bytes:
    parts: list[bytes] = []
    while (part := await files.part(file, len(parts))) is not None:
        parts.append(part)
    return b"".join(parts)


async def test_a_file_comes_back_as_it_went_in(files: Files) -> None:
    content = bytes(range(256)) * 4096 * 6 + b"the end"
    record = _file(1, name="é\u3042.jsonl", end_user=ANN, size=len(content))
    await files.keep(record, content)
    assert await files.file("file-1") == record
    assert await _content(files, "file-1") == content
    assert len(await files.part("file-1", 0) or b"") == PART
    await files.keep(_file(2, size=0), b"")
    assert await files.file("file-2") == _file(2, size=0)
    assert await files.part("file-2", 0) is None


async def test_a_file_that_is_not_whole_is_shown_to_nobody_and_can_be_begun_again(files: Files) -> None:
    for content in (b"first", b"second"):
        await files.begin(_file(1))
        assert await files.append("file-1", 0, content) == 1
        assert await files.file("file-1") is None
        assert await files.search("t") == ()
    assert await _content(files, "file-1") == b"second"
    await files.keep(_file(2), b"abc")
    with pytest.raises(Conflict):
        await files.begin(_file(2))


async def test_nothing_is_added_to_a_file_that_is_gone(files: Files) -> None:
    await files.begin(_file(1))
    assert await files.delete("file-1")
    assert not await files.delete("file-1")
    with pytest.raises(Conflict):
        await files.append("file-1", 0, b"more")


async def test_files_are_found_by_tenant_and_purpose_in_either_order_and_in_pages(files: Files) -> None:
    for number in range(4):
        await files.keep(_file(number, purpose="batch_output" if number == 2 else "batch"), b"abc")
    await files.keep(_file(9, tenant=TenantId("other")), b"abc")
    assert [one.id for one in await files.search("t", limit=2)] == ["file-3", "file-2"]
    assert [one.id for one in await files.search("t", after=(2.0, "file-2"))] == ["file-1", "file-0"]
    assert [one.id for one in await files.search("t", after=(2.0, "file-2"), oldest_first=True)] == ["file-3"]
    assert [one.id for one in await files.search("t", purpose="batch_output")] == ["file-2"]


async def test_old_files_are_forgotten_with_their_pieces(files: Files) -> None:
    for number in range(4):
        await files.keep(_file(number), b"abc")
    assert await files.prune(2.0, chunk=1) == 2
    assert [one.id for one in await files.search("t")] == ["file-3", "file-2"]
    assert await files.part("file-1", 0) is None


async def test_a_batch_is_accepted_once_under_a_key_of_its_tenant(batches: Batches) -> None:
    first = _batch(1, idempotency="once")
    assert await batches.accept(first) == first
    assert await batches.accept(_batch(2, idempotency="once")) == first
    of_another = _batch(3, idempotency="once", tenant=TenantId("other"))
    assert await batches.accept(of_another) == of_another
    assert [await batches.accept(_batch(number)) for number in (4, 5)] == [_batch(4), _batch(5)]
    assert await batches.batch("batch_2") is None


async def test_a_batch_comes_back_as_it_went_in(batches: Batches) -> None:
    batch = _batch(1, end_user=ANN, metadata={"é": "\u3042\0"}, errors=(RowError("c", "m", 3, "p"), RowError("d", "n")))
    await batches.accept(batch)
    assert await batches.batch("batch_1") == batch
    assert await batches.batch("batch_2") is None
    assert await batches.rows("batch_1") == {}


async def test_a_batch_is_changed_by_its_owner_and_in_the_states_that_are_named(batches: Batches) -> None:
    await batches.accept(_batch(1, owner="a"))
    rows = {"x": BatchRow("x-1", "m")}
    values = {"state": "in_progress", "total": 1, "rows": rows, "in_progress_at": 7.5}
    assert await batches.change("batch_1", "b", ("validating",), values) is None
    assert await batches.change("batch_1", "a", ("in_progress",), values) is None
    changed = await batches.change("batch_1", "a", ("validating",), values)
    assert changed == await batches.batch("batch_1")
    assert changed is not None
    assert (changed.state, changed.total, changed.in_progress_at) == ("in_progress", 1, 7.5)
    assert await batches.rows("batch_1") == rows
    failed = await batches.change(
        "batch_1", "a", ("in_progress",), {"state": "failed", "errors": (RowError("c", "m"),)}
    )
    assert failed is not None
    assert failed.errors == (RowError("c", "m"),)


async def test_a_batch_can_be_cancelled_until_its_results_are_written(batches: Batches) -> None:
    states = ("validating", "in_progress", "finalizing", "completed", "cancelling")
    for number, state in enumerate(states):
        await batches.accept(_batch(number, state=state))
    cancelled = [await batches.cancel(f"batch_{number}", 9.0) for number in range(len(states))]
    assert [one and (one.state, one.cancelling_at) for one in cancelled] == [
        ("cancelling", 9.0), ("cancelling", 9.0), None, None, None,
    ]  # fmt: skip


async def test_a_batch_and_its_files_are_finished_together_or_not_at_all(batches: Batches, files: Files) -> None:
    await batches.accept(_batch(1, owner="a", state="finalizing"))
    await files.begin(_file(1, purpose="batch_output", size=0))
    values = {"state": "completed", "ended_at": 9.0, "output_file": "file-1", "completed": 1}
    with pytest.raises(Missing):
        await batches.finish("batch_1", "b", values, {"file-1": 5})
    assert await files.file("file-1") is None
    finished = await batches.finish("batch_1", "a", values, {"file-1": 5})
    assert (finished.state, finished.output_file, finished.completed) == ("completed", "file-1", 1)
    assert await files.file("file-1") == _file(1, purpose="batch_output", size=5)
    with pytest.raises(Missing):
        await batches.finish("batch_1", "a", values, {})


async def test_progress_is_the_batch_and_what_has_happened_to_its_run(batches: Batches, workflows: Workflows) -> None:
    await batches.accept(_batch(1))
    progress = await batches.progress("batch_1", 0)
    assert progress is not None
    assert (progress.batch, progress.has_run, progress.events) == (_batch(1), False, ())
    await batches.change("batch_1", "", ("validating",), {"run": "run_1"})
    await workflows.accept(_run(1))
    events = tuple(RunEvent("run_1", number, b"{}") for number in (1, 2, 3))
    await workflows.write("", [Change("run_1", events, "running", 2.0)])
    progress = await batches.progress("batch_1", 1, limit=1)
    assert progress is not None
    assert (progress.has_run, progress.events) == (True, events[1:2])
    assert await batches.progress("batch_2", 0) is None


async def test_open_batches_are_counted_for_their_tenant(batches: Batches) -> None:
    await batches.accept(_batch(1))
    await batches.accept(_batch(2, state="cancelling"))
    await batches.accept(_batch(3, state="completed"))
    await batches.accept(_batch(4, tenant=TenantId("other")))
    assert await batches.num_open("t") == 2


async def test_a_batch_without_a_run_has_one_owner_until_the_lease_is_over(batches: Batches) -> None:
    await batches.accept(_batch(2, owner="a", leased_until=10.0))
    await batches.accept(_batch(1, owner="a", leased_until=10.0))
    await batches.accept(_batch(3, owner="a", leased_until=10.0, state="completed"))
    assert await batches.claim("b", 9.0, 20.0) == ()
    assert [one.id for one in await batches.claim("a", 9.0, 20.0)] == ["batch_1", "batch_2"]
    assert await batches.claim("b", 19.0, 30.0) == ()
    assert {one.owner for one in await batches.claim("b", 21.0, 30.0)} == {"b"}


async def test_who_has_the_run_has_the_batch(batches: Batches, workflows: Workflows) -> None:
    await workflows.accept(_run(1, owner="b", leased_until=99.0))
    await batches.accept(_batch(1, owner="a", leased_until=99.0, state="in_progress", run="run_1"))
    assert await batches.claim("a", 9.0, 20.0) == ()
    assert [one.owner for one in await batches.claim("b", 9.0, 20.0)] == ["b"]
    await workflows.write("b", [Change("run_1", (), "done", 9.0)])
    assert await batches.claim("a", 10.0, 20.0) == ()
    assert [one.owner for one in await batches.claim("a", 21.0, 30.0)] == ["a"], "nobody holds it any more"


async def test_batches_are_found_by_tenant_newest_first_and_in_pages(batches: Batches) -> None:
    for number in range(3):
        await batches.accept(_batch(number))
    await batches.accept(_batch(9, tenant=TenantId("other")))
    assert [one.id for one in await batches.search("t", limit=2)] == ["batch_2", "batch_1"]
    assert [one.id for one in await batches.search("t", after=(1.0, "batch_1"))] == ["batch_0"]


async def test_batches_that_ended_long_ago_are_forgotten(batches: Batches) -> None:
    for number in range(4):
        await batches.accept(_batch(number, state="completed", ended_at=float(number)))
    await batches.accept(_batch(9))
    assert await batches.prune(2.0, chunk=1) == 2
    assert [one.id for one in await batches.search("t")] == ["batch_9", "batch_3", "batch_2"]


async def test_batches_and_files_of_an_erased_end_user_are_gone(
    database: Database, batches: Batches, files: Files
) -> None:
    for number, end_user in ((1, ANN), (2, "bob")):
        await batches.accept(_batch(number, end_user=end_user))
        await files.keep(_file(number, end_user=end_user), b"abc")
    await files.begin(_file(3, end_user=ANN))
    await files.append("file-3", 0, b"not whole yet")
    other = msgspec.structs.replace(_file(4, end_user=ANN), tenant=TenantId("other"))
    await files.keep(other, b"abc")
    await erase(database, "t", ANN)
    assert [one.id for one in await batches.search("t")] == ["batch_2"]
    assert [one.id for one in await files.search("t")] == ["file-2"]
    assert [await files.part(f"file-{number}", 0) for number in (1, 2, 3)] == [None, b"abc", None]
    await erase(database, "t")
    assert (await batches.search("t"), await files.search("t")) == ((), ())
    assert await files.file("file-4") == other
