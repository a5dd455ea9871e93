"""Batches at real services, with an engine that is not there: what ends them, other than their rows being done."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sqlalchemy import delete

import gateway.batches.driver
import gateway.batches.service
from core.batches import BatchRecord, BatchState
from core.chat import Endpoint
from core.errors import ConnectionLimit, EndpointNotAllowed, UnknownId
from gateway.auth import Principal
from gateway.services import Services
from storage.sql.tables import runs
from tests.fakes.admin import opened

ENDPOINT = Endpoint.EMBEDDINGS


def rows(*names: str) -> bytes:
    return b"\n".join(
        msgspec.json.encode(
            {"custom_id": name, "method": "POST", "url": ENDPOINT.value, "body": {"model": "small", "input": "x"}}
        )
        for name in names
    )


def caller(services: Services) -> Principal:
    return services.directory.keyring.principal("file:app", services.clock.wall())


async def uploaded(services: Services, content: bytes) -> str:
    return (await services.files.keep(caller(services), "rows.jsonl", "batch", content, end_user=None)).id


async def until(services: Services, batch: str, state: BatchState) -> BatchRecord:
    for _ in range(1000):
        seen = await services.batches.find(caller(services), batch)
        if seen.state == state:
            return seen
        await asyncio.sleep(0.01)
    raise AssertionError(f"it is {seen.state} and not {state}")


async def until_run(services: Services, batch: str) -> BatchRecord:
    for _ in range(1000):
        seen = await services.batches.find(caller(services), batch)
        if seen.run is not None:
            return seen
        await asyncio.sleep(0.01)
    raise AssertionError(f"it has no run, and is {seen.state}")


async def lines(services: Services, file: str | None) -> list[Any]:
    assert file is not None
    record = await services.files.find(caller(services), file)
    content = b"".join([part async for part in services.files.content(record)])
    assert len(content) == record.size
    return [msgspec.json.decode(line) for line in content.splitlines()]


@asynccontextmanager
async def left_behind(state_dir: Path, **more: Any) -> AsyncIterator[tuple[Services, str]]:
    """Yield services that find a batch which an earlier process has accepted and not begun, and its id."""
    async with opened(state_dir) as (_, services):
        now = services.clock.wall()
        file = await uploaded(services, rows("a", "b"))
        values = {"expires_at": now + 60, "key": "file:app", "input_file": file, **more}
        batch = BatchRecord(
            id="batch_1", tenant=caller(services).tenant,
            endpoint=ENDPOINT.value, created_at=now, owner=(state_dir / "gateway.id").read_text().strip(), **values,
        )  # fmt: skip
        await services.store.batches.accept(batch)
    async with opened(state_dir) as (_, services):
        yield services, batch.id


async def test_a_batch_whose_window_ends_has_expired_with_all_rows_told(tmp_path: Path) -> None:
    async with left_behind(tmp_path, expires_at=0.0) as (services, batch):
        done = await until(services, batch, "expired")
        assert (done.total, done.completed, done.failed, done.output_file) == (2, 0, 2, None)
        told = await lines(services, done.error_file)
        assert {(line["custom_id"], line["error"]["code"]) for line in told} == {
            ("a", "batch_expired"),
            ("b", "batch_expired"),
        }


async def test_a_batch_that_was_cancelled_before_its_rows_were_read_is_cancelled(tmp_path: Path) -> None:
    async with left_behind(tmp_path, state="cancelling", cancelling_at=1.0) as (services, batch):
        done = await until(services, batch, "cancelled")
        assert (done.run, done.output_file, done.error_file) == (None, None, None)


async def test_a_batch_whose_key_holds_no_longer_fails_and_says_so(tmp_path: Path) -> None:
    async with left_behind(tmp_path, key="file:nobody") as (services, batch):
        done = await until(services, batch, "failed")
        assert [error.code for error in done.errors] == ["invalid_api_key"]


async def test_a_batch_whose_file_is_gone_fails_and_says_so(tmp_path: Path) -> None:
    async with left_behind(tmp_path, input_file="file-gone") as (services, batch):
        done = await until(services, batch, "failed")
        assert [error.code for error in done.errors] == ["input_file_not_found"]


async def test_a_batch_that_was_not_submitted_before_the_crash_is_submitted_once(tmp_path: Path) -> None:
    async with opened(tmp_path) as (_, services):
        file = await uploaded(services, rows("a"))
        batch = (await services.batches.submit(caller(services), file, ENDPOINT, metadata={})).id
        await until_run(services, batch)
        owner = (tmp_path / "gateway.id").read_text().strip()
    async with opened(tmp_path) as (_, services):
        seen = await until_run(services, batch)
        await services.store.batches.change(batch, owner, ("in_progress",), {"run": None})
    async with opened(tmp_path) as (_, services):
        assert (await until_run(services, batch)).run == seen.run
        assert len(await services.runs.search(caller(services), state=None, after=None, limit=9)) == 1


async def test_a_batch_whose_run_was_forgotten_fails_and_says_so(tmp_path: Path) -> None:
    async with opened(tmp_path) as (_, services):
        file = await uploaded(services, rows("a"))
        batch = (await services.batches.submit(caller(services), file, ENDPOINT, metadata={})).id
        await until_run(services, batch)
        await services.database.write(lambda connection: connection.execute(delete(runs)))
        assert [error.code for error in (await until(services, batch, "failed")).errors] == ["run_not_found"]


async def test_a_fault_of_ours_fails_the_batch_and_is_told_without_details(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*given: Any, **more: Any) -> Any:
        raise RuntimeError("secret details")

    monkeypatch.setattr(gateway.batches.driver, "read", read)
    async with opened(tmp_path) as (_, services):
        file = await uploaded(services, rows("a"))
        batch = (await services.batches.submit(caller(services), file, ENDPOINT, metadata={})).id
        (error,) = (await until(services, batch, "failed")).errors
        assert (error.code, "secret" in error.message) == ("internal", False)


async def test_what_may_not_be_submitted_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(tmp_path) as (_, services):
        who = caller(services)
        file = await uploaded(services, rows("a"))
        with pytest.raises(UnknownId, match="file-nobodys"):
            await services.batches.submit(who, "file-nobodys", ENDPOINT, metadata={})
        chat_only = msgspec.structs.replace(who, endpoints=frozenset({Endpoint.CHAT}))
        with pytest.raises(EndpointNotAllowed):
            await services.batches.submit(chat_only, file, ENDPOINT, metadata={})
        monkeypatch.setattr(gateway.batches.service, "MOST_OPEN", 1)
        await services.batches.submit(who, file, ENDPOINT, metadata={})
        with pytest.raises(ConnectionLimit):
            await services.batches.submit(who, file, ENDPOINT, metadata={})


async def test_a_file_is_read_piece_by_piece_and_ends_where_it_is_deleted(tmp_path: Path) -> None:
    async with opened(tmp_path) as (_, services):
        content = b"x" * (3 << 20)
        record = await services.files.find(caller(services), await uploaded(services, content))
        pieces = services.files.content(record)
        assert len(await anext(pieces)) == 1 << 20
        await services.files.delete(caller(services), record.id)
        with pytest.raises(UnknownId):
            await anext(pieces)
