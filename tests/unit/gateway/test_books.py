"""What was spent is booked once, whatever happens to the database or to us."""

import asyncio
import contextlib
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

from core.chat import Usage
from core.records import Batch, RequestRecord
from gateway import books as books_module
from gateway.books import Books

DAY = 86_400.0


def record(number: int = 0, **more: Any) -> RequestRecord:
    fields = {"time": DAY, "id": f"req_{number}", "endpoint": "/v1/chat/completions", "status": 200, "duration_s": 0.1,
              "tenant": "acme", "key": "k", "model": "big", "usage": Usage(10, 5, 4), "cost": 7}  # fmt: skip
    return msgspec.convert({**fields, **more}, RequestRecord)


class FakeLedger:
    """Books like the real one: a batch's id counts once."""

    def __init__(self) -> None:
        self.batches: dict[str, Batch] = {}
        self.is_away = False
        self.loses_answers = False
        self.hangs = False
        self.crashes_at: int | None = None
        self.crashes_after_commit = False

    async def book(self, batch: Batch) -> None:
        if self.hangs:
            await asyncio.Event().wait()
        if self.is_away:
            raise OSError("away")
        is_last = len(self.batches) == self.crashes_at
        if not is_last or self.crashes_after_commit:
            self.batches.setdefault(batch.id, batch)
        if is_last:
            raise asyncio.CancelledError
        if self.loses_answers:
            raise OSError("the connection broke after the commit")

    @property
    def requests(self) -> int:
        return sum(line.requests for batch in self.batches.values() for line in batch.lines)

    @property
    def cost(self) -> int:
        return sum(line.cost for batch in self.batches.values() for line in batch.lines)


def books(ledger: FakeLedger, directory: Path, **more: Any) -> Books:
    dropped = more.pop("dropped", [])
    return Books(
        ledger.book, directory / "ledger.pending", **{"sample": lambda: 1.0, "on_dropped": dropped.append, **more}
    )


async def spooled(directory: Path, *, batches: int) -> None:
    """Let the loop turn until so many batches are in the spool."""
    path = directory / "ledger.pending"
    async with asyncio.timeout(10):
        while not (path.exists() and path.read_bytes().count(b"\n") == batches):  # noqa: ASYNC110 - a thread writes it
            await asyncio.sleep(0)


async def test_requests_of_one_subject_become_one_line_and_a_record_each(tmp_path: Path) -> None:
    ledger = FakeLedger()
    home = books(ledger, tmp_path)
    for number in range(3):
        home.add(record(number))
    home.add(record(3, status=502, error="upstream_error", usage=None, cost=0))
    await home.flush()

    (batch,) = ledger.batches.values()
    (line,) = batch.lines
    assert (line.day, line.requests, line.errors, line.cost) == (1, 4, 1, 21)
    assert (line.input_tokens, line.output_tokens, line.cached_tokens) == (30, 15, 12)
    assert [kept.id for kept in batch.records] == ["req_0", "req_1", "req_2", "req_3"]


async def test_end_users_have_lines_of_their_own_where_they_are_told_apart(tmp_path: Path) -> None:
    ledger = FakeLedger()
    home = books(ledger, tmp_path)
    home.add(record(end_user="ann"), end_user="ann")
    home.add(record(end_user="bob"))
    await home.flush()

    (batch,) = ledger.batches.values()
    assert [line.end_user for line in batch.lines] == ["ann", ""]


async def test_a_request_that_no_key_was_known_for_is_logged_and_not_charged(tmp_path: Path) -> None:
    ledger = FakeLedger()
    home = books(ledger, tmp_path)
    home.add(record(tenant=None, key=None, status=401, error="invalid_api_key"))
    await home.flush()

    (batch,) = ledger.batches.values()
    assert (batch.lines, len(batch.records)) == ((), 1)


async def test_sampling_leaves_out_records_of_good_requests_and_nothing_of_the_ledger(tmp_path: Path) -> None:
    ledger = FakeLedger()
    home = books(ledger, tmp_path, sample=lambda: 0.5, draw=iter([0.4, 0.6, 0.2]).__next__)
    for number in range(3):
        home.add(record(number))
    home.add(record(3, status=500, error="internal"))
    await home.flush()

    (batch,) = ledger.batches.values()
    assert [kept.id for kept in batch.records] == ["req_0", "req_2", "req_3"]
    assert ledger.requests == 4


async def test_while_the_database_is_away_everything_waits_and_is_told_once(tmp_path: Path) -> None:
    ledger = FakeLedger()
    home = books(ledger, tmp_path)
    ledger.is_away = True
    with capture_logs() as told:
        for number in range(5):
            home.add(record(number))
            await home.flush()
    assert ([line["event"] for line in told], home.is_away) == (["database_away"], True)

    ledger.is_away = False
    await home.flush()
    assert (ledger.requests, home.num_waiting, (tmp_path / "ledger.pending").exists()) == (5, 0, False)


async def test_a_batch_whose_commit_nobody_heard_of_counts_once(tmp_path: Path) -> None:
    ledger = FakeLedger()
    home = books(ledger, tmp_path)
    ledger.loses_answers = True
    home.add(record(0))
    await home.flush()
    home.add(record(1))
    ledger.loses_answers = False
    await home.flush()

    assert (ledger.requests, ledger.cost) == (2, 14)


async def test_what_was_not_booked_survives_a_crash(tmp_path: Path) -> None:
    ledger = FakeLedger()
    home = books(ledger, tmp_path)
    ledger.loses_answers = True  # the first is booked, and nobody knows
    home.add(record(0))
    await home.flush()
    ledger.is_away = True
    home.add(record(1))
    await home.flush()
    del home

    ledger.is_away = ledger.loses_answers = False
    async with books(ledger, tmp_path):
        pass
    assert (ledger.requests, ledger.cost) == (2, 14)


async def test_what_a_database_that_hangs_has_not_confirmed_survives_a_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Books, "SPOOL_INTERVAL_S", 0.0)
    ledger = FakeLedger()
    ledger.hangs = True
    home = books(ledger, tmp_path)
    home.add(record(0))
    flush = asyncio.create_task(home.flush())
    await spooled(tmp_path, batches=1)
    home.add(record(1))
    await spooled(tmp_path, batches=2)
    flush.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await flush

    ledger.hangs = False
    async with books(ledger, tmp_path):
        pass
    assert (ledger.requests, ledger.cost) == (2, 14)
    assert not (tmp_path / "ledger.pending").exists()


async def test_a_disk_that_takes_its_time_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    has_time, replace = threading.Event(), books_module._replace

    def replace_late(path: Path, content: bytes) -> None:
        assert has_time.wait(10)
        replace(path, content)

    monkeypatch.setattr(books_module, "_replace", replace_late)
    ledger = FakeLedger()
    ledger.is_away = True
    home = books(ledger, tmp_path)
    home.add(record(0))
    flush = asyncio.create_task(home.flush())
    for _ in range(100):
        await asyncio.sleep(0)
    assert not flush.done()
    has_time.set()
    await flush

    assert (tmp_path / "ledger.pending").read_bytes().count(b"\n") == 1


@pytest.mark.parametrize("is_booked", [True, False])
async def test_a_crash_in_the_second_batch_after_an_outage_loses_and_doubles_nothing(
    tmp_path: Path, is_booked: bool
) -> None:
    ledger = FakeLedger()
    home = books(ledger, tmp_path)
    ledger.is_away = True
    home.add(record(0))
    await home.flush()
    home.add(record(1))
    await home.flush()

    ledger.is_away, ledger.crashes_at, ledger.crashes_after_commit = False, 1, is_booked
    with contextlib.suppress(asyncio.CancelledError):
        await home.flush()
    del home

    ledger.crashes_at = None
    async with books(ledger, tmp_path):
        pass
    assert (ledger.requests, ledger.cost) == (2, 14)


async def test_a_spool_that_cannot_be_read_is_told_and_the_books_open(tmp_path: Path) -> None:
    (tmp_path / "ledger.pending").write_bytes(b"half a li")
    with capture_logs() as told:
        async with books(FakeLedger(), tmp_path):
            pass

    assert told[0]["event"] == "spool_unreadable"


async def test_records_that_do_not_fit_are_counted_and_their_cost_is_booked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Books, "MAX_RECORDS", 3)
    ledger, dropped = FakeLedger(), list[int]()
    home = books(ledger, tmp_path, dropped=dropped)
    for number in range(5):
        home.add(record(number))
    await home.flush()

    assert (sum(dropped), ledger.requests) == (2, 5)


async def test_leaving_books_what_is_left(tmp_path: Path) -> None:
    ledger = FakeLedger()
    async with books(ledger, tmp_path) as home:
        home.add(record())

    assert ledger.requests == 1


async def test_a_record_that_the_database_refuses_holds_up_neither_the_ledger_nor_us(tmp_path: Path) -> None:
    ledger, dropped = FakeLedger(), list[int]()

    async def book(batch: Batch) -> None:
        if batch.records:
            raise ValueError("what is that?")
        await ledger.book(batch)

    home = Books(book, tmp_path / "ledger.pending", sample=lambda: 1.0, on_dropped=dropped.append)
    home.add(record())
    with capture_logs() as told:
        await home.flush()
    assert (told[0]["event"], dropped) == ("batch_refused", [1])

    await home.flush()
    assert (ledger.requests, home.num_waiting) == (1, 0)


async def test_half_a_spool_of_a_process_that_died_is_not_left_behind(tmp_path: Path) -> None:
    (tmp_path / "ledger.draft").write_bytes(b"who used what")

    async with books(FakeLedger(), tmp_path):
        assert not (tmp_path / "ledger.draft").exists()
