"""The ledger, the request log and erasure, on SQLite and on PostgreSQL."""

import asyncio
import itertools
from collections.abc import Iterable

import pytest
from sqlalchemy import func, select

from core.chat import Usage
from core.ids import TenantId
from core.records import Batch, LedgerLine, LegRecord, RequestRecord, Sum
from core.tenancy import Key
from storage.sql.database import Database
from storage.sql.erasure import erase
from storage.sql.ledger import Dimension, Ledger, Used
from storage.sql.requests import Requests
from storage.sql.tables import booked_batches
from storage.sql.tenants import Tenants
from storage.sql.types import LARGEST_AMOUNT
from tests.fakes.clock import ManualClock

_ids = itertools.count()


def _batch(lines: Iterable[LedgerLine] = (), records: Iterable[RequestRecord] = (), id: str = "") -> Batch:
    return Batch(id=id or f"b{next(_ids)}", lines=tuple(lines), records=tuple(records))


def _line(
    day: int = 1, tenant: str = "acme", key: str = "k1", end_user: str = "", model: str = "m", n: int = 1, **more: int
) -> LedgerLine:
    amounts = {"errors": 0, "input_tokens": 10 * n, "output_tokens": n, "cached_tokens": 0, "cost": 100 * n, **more}
    return LedgerLine(day=day, tenant=TenantId(tenant), key=key, end_user=end_user, model=model, requests=n, **amounts)


def _record(id: str, time: float = 0.0, **more: object) -> RequestRecord:
    values: dict[str, object] = {"endpoint": "/v1/chat/completions", "status": 200, "duration_s": 0.5, **more}
    return RequestRecord(time=time, id=id, **values)  # type: ignore[arg-type]


@pytest.fixture
def ledger(database: Database) -> Ledger:
    return Ledger(database)


@pytest.fixture
def requests(database: Database) -> Requests:
    return Requests(database)


async def test_lines_of_the_same_subject_add_up(ledger: Ledger) -> None:
    await ledger.book(_batch([_line(n=2), _line(n=5, end_user="u")]))
    await ledger.book(_batch([_line(n=3, errors=1)]))
    assert set(await ledger.sums(1, 1)) == {
        Sum(TenantId("acme"), "k1", "", tokens=55, cost=500),
        Sum(TenantId("acme"), "k1", "u", tokens=55, cost=500),
    }
    assert await ledger.usage(first_day=0, last_day=9) == (
        Used(requests=10, errors=1, input_tokens=100, output_tokens=10, cost=1000),
    )


async def test_a_batch_that_comes_twice_counts_once(ledger: Ledger, requests: Requests) -> None:
    batch = _batch([_line()], [_record("r1")])
    for _ in range(3):
        await ledger.book(batch)
    assert await ledger.sums(0, 9) == (Sum(TenantId("acme"), "k1", "", tokens=11, cost=100),)
    assert len(await requests.search()) == 1


async def test_batches_of_several_gateways_at_once_lose_nothing(ledger: Ledger) -> None:
    batches = [_batch([_line(model=f"m{number % 3}"), _line(end_user="u")]) for number in range(20)]
    await asyncio.gather(*(ledger.book(batch) for batch in [*batches, *batches]))
    (total,) = await ledger.usage(first_day=0, last_day=9)
    assert (total.requests, total.cost) == (40, 4000)


async def test_an_empty_batch_is_booked(ledger: Ledger) -> None:
    await ledger.book(_batch())
    assert await ledger.sums(0, 9) == ()
    assert await ledger.usage(first_day=0, last_day=9) == (Used(),)


async def test_sums_are_of_the_days_that_were_asked_for(ledger: Ledger) -> None:
    await ledger.book(_batch(_line(day=day, n=day) for day in (1, 2, 3, 4)))
    assert [entry.cost for entry in await ledger.sums(2, 3)] == [500]


@pytest.mark.parametrize(
    ("group_by", "expected"),
    [
        ([], [(10, None)]),
        (["day"], [(3, 1), (7, 2)]),
        (["tenant"], [(7, "acme"), (3, "zeta")]),
        (["model"], [(6, "big"), (4, "small")]),
    ],
)
async def test_usage_is_grouped(ledger: Ledger, group_by: list[Dimension], expected: list[tuple[int, object]]) -> None:
    await ledger.book(
        _batch(
            [
                _line(day=1, model="small", n=1),
                _line(day=1, model="big", n=2),
                _line(day=2, tenant="zeta", model="small", n=3),
                _line(day=2, end_user="u", model="big", n=4),
            ]
        )
    )
    rows = await ledger.usage(group_by, first_day=0, last_day=9)
    assert [(row.requests, getattr(row, group_by[0]) if group_by else None) for row in rows] == expected


async def test_usage_comes_in_pages_and_is_filtered(ledger: Ledger) -> None:
    await ledger.book(_batch(_line(day=day, key=key) for day in (1, 2) for key in "abc"))
    pages = []
    after: tuple[int | str, ...] | None = None
    while rows := await ledger.usage(["day", "key"], first_day=1, last_day=2, after=after, limit=4):
        pages.append([(row.day, row.key) for row in rows])
        after = (rows[-1].day or 0, rows[-1].key or "")
    assert pages == [[(1, "a"), (1, "b"), (1, "c"), (2, "a")], [(2, "b"), (2, "c")]]
    (filtered,) = await ledger.usage(["key"], first_day=1, last_day=2, key="b", tenant="acme", model="m", end_user="")
    assert (filtered.key, filtered.requests) == ("b", 2)
    assert await ledger.usage(["key"], first_day=1, last_day=2, tenant="x' OR '1'='1") == ()


async def test_absurd_amounts_stop_at_the_largest_and_nothing_else_suffers(ledger: Ledger) -> None:
    for _ in range(3):
        await ledger.book(_batch([_line(n=10**30), _line(key="k2")]))
    sums = {entry.key: entry for entry in await ledger.sums(0, 9)}
    assert sums["k1"].cost == LARGEST_AMOUNT
    assert sums["k2"].cost == 300


async def test_a_record_comes_back_as_it_went_in(ledger: Ledger, requests: Requests) -> None:
    full = RequestRecord(
        time=1234.567891,
        id="r1",
        endpoint="/v1/chat/completions",
        status=499,
        duration_s=1.25,
        tenant=TenantId("acme"),
        key="k1",
        model="m",
        asked_model="alias",
        worker="m-0",
        stream=True,
        attempts=2,
        queue_s=0.5,
        first_byte_s=0.75,
        overhead_s=0.001,
        usage=Usage(5, 6, 1),
        cost=10**15,
        error="worker_lost",
        end_user="Zoë 🦉",
        session="s",
        program="p",
        run="r",
        stage="t",
        client_retry="1",
        traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        legs=(LegRecord("m-0", "m", 0.1, 0.2, "worker_lost"), LegRecord("m-1", "m", 0.4, 0.9, "done")),
    )
    plain = _record("r2")
    await ledger.book(_batch(records=[full, plain]))
    assert await requests.request("r1") == full
    assert await requests.request("r2") == plain
    assert await requests.request("r3") is None


async def test_whatever_a_client_makes_up_can_be_kept(ledger: Ledger, requests: Requests) -> None:
    nasty = "a\0b\ud800" + "é" * 100_000
    await ledger.book(
        _batch(
            [_line(end_user=nasty), _line(model=nasty)],
            [
                _record(
                    "r1", end_user=nasty, session=nasty, asked_model=nasty, usage=Usage(10**30, 1, 0), attempts=10**12
                )
            ],
        )
    )
    found = await requests.request("r1")
    assert found is not None
    assert found.end_user is not None
    assert found.end_user.startswith("a\ufffdb?")
    assert await requests.search(error="none") == ()
    assert len(await ledger.usage(["end_user"], first_day=1, last_day=1, end_user=nasty)) == 1


async def test_of_an_id_that_comes_twice_all_records_are_kept_and_the_newest_is_shown(
    ledger: Ledger, requests: Requests
) -> None:
    await ledger.book(_batch(records=[_record("r1", time=1.0), _record("r1", time=3.0, status=500)]))
    await ledger.book(_batch(records=[_record("r1", time=2.0)]))
    found = await requests.request("r1")
    assert found is not None
    assert found.status == 500
    assert len(await requests.search()) == 3


async def test_requests_are_found_newest_first_and_in_pages(ledger: Ledger, requests: Requests) -> None:
    await ledger.book(_batch(records=[_record(f"r{number}", time=float(number // 2)) for number in range(7)]))
    pages = []
    after: tuple[float, str] | None = None
    while found := await requests.search(after=after, limit=3):
        pages.append([record.id for record in found])
        after = (found[-1].time, found[-1].id)
    assert pages == [["r6", "r5", "r4"], ["r3", "r2", "r1"], ["r0"]]


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        ({"tenant": "a"}, ["r2", "r0"]),
        ({"key": "k1"}, ["r1", "r0"]),
        ({"model": "m"}, ["r1"]),
        ({"min_status": 400}, ["r2", "r1"]),
        ({"min_status": 400, "max_status": 499}, ["r1"]),
        ({"error": "queue_full"}, ["r2"]),
        ({"since": 1.0}, ["r2", "r1"]),
        ({"until": 1.0}, ["r0"]),
        ({"tenant": "a", "since": 1.0, "until": 9.0}, ["r2"]),
        ({"tenant": "' OR 1=1 --"}, []),
        ({"min_status": 10**30}, []),
    ],
)
async def test_requests_are_found_by_what_they_are(
    ledger: Ledger, requests: Requests, conditions: dict[str, object], expected: list[str]
) -> None:
    await ledger.book(
        _batch(
            records=[
                _record("r0", time=0.0, tenant="a", key="k1"),
                _record("r1", time=1.0, tenant="b", key="k1", model="m", status=404),
                _record("r2", time=2.0, tenant="a", key="k2", status=503, error="queue_full"),
            ]
        )
    )
    assert [record.id for record in await requests.search(**conditions)] == expected  # type: ignore[arg-type]


async def test_old_records_are_forgotten_in_chunks(ledger: Ledger, requests: Requests) -> None:
    await ledger.book(_batch(records=[_record(f"r{number}", time=float(number)) for number in range(25)]))
    assert await requests.prune(20.0, now=0.0, chunk=7) == 20
    assert {record.time for record in await requests.search()} == {20.0, 21.0, 22.0, 23.0, 24.0}
    assert await requests.prune(20.0, now=0.0) == 0


async def test_marks_of_batches_go_after_a_day_and_revoked_keys_after_thirty(database: Database) -> None:
    day = 86_400
    clock = ManualClock(100.0 * day)
    tenants, requests = Tenants(database), Requests(database)
    for name, revoked_at in (("old", 50.0), ("young", 80.0), ("holds", None)):
        await tenants.add_key(Key(id=name, name=name, tenant=TenantId("a"), digest=name.encode()))
        if revoked_at is not None:
            await tenants.revoke_key(name, revoked_at * day)
    await Ledger(database, clock).book(_batch())
    clock.advance(1.5 * day)
    await Ledger(database, clock).book(_batch())
    await requests.prune(0.0, now=clock.wall())
    assert [row.value.id for row in await tenants.keys()] == ["holds", "young"]
    count = select(func.count()).select_from(booked_batches)
    assert await database.read(lambda connection: connection.scalar(count)) == 1


async def test_an_erased_end_user_leaves_only_amounts(database: Database, ledger: Ledger, requests: Requests) -> None:
    await ledger.book(
        _batch(
            [
                _line(n=1),
                _line(n=2, end_user="ann"),
                _line(n=4, end_user="bob"),
                _line(n=8, tenant="b", end_user="ann"),
            ],
            [
                _record("r1", tenant="acme", end_user="ann"),
                _record("r2", tenant="acme", end_user="bob"),
                _record("r3", tenant="b", end_user="ann"),
            ],
        )
    )
    assert await erase(database, "acme", "ann") == 1
    rows = await ledger.usage(["tenant", "end_user"], first_day=0, last_day=9)
    assert [(row.tenant, row.end_user, row.requests) for row in rows] == [
        ("acme", "", 3),
        ("acme", "bob", 4),
        ("b", "ann", 8),
    ]
    assert {record.id for record in await requests.search()} == {"r2", "r3"}


async def test_an_erased_tenant_leaves_only_amounts(database: Database, ledger: Ledger, requests: Requests) -> None:
    lines = [_line(n=2, end_user="ann"), _line(n=4, end_user="bob"), _line(n=1, model="other", end_user="ann")]
    records = [_record(f"r{number}", tenant="acme", end_user="ann") for number in range(5)]
    await ledger.book(_batch(lines, [*records, _record("kept", tenant="b")]))
    assert await erase(database, "acme", chunk=2) == 5
    rows = await ledger.usage(["end_user", "model"], first_day=0, last_day=9)
    assert [(row.end_user, row.model, row.requests) for row in rows] == [("", "m", 6), ("", "other", 1)]
    assert [record.id for record in await requests.search()] == ["kept"]
    assert await erase(database, "acme") == 0


async def test_a_large_batch_is_booked_whole(ledger: Ledger, requests: Requests) -> None:
    records = [_record(f"r{number:05}", time=float(number), tenant="acme") for number in range(5000)]
    await ledger.book(_batch([_line(end_user=f"u{number}") for number in range(1000)], records))
    (last,) = await requests.search(limit=1)
    assert last.id == "r04999"
