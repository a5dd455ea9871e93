"""S4: what a tenant or an end user has asked can be erased, and then it is in no store any more, nor comes back."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
from redis import Redis

from core.chat import CallContext, Endpoint, Usage
from core.errors import UnknownId
from core.ids import TenantId
from core.records import Batch, LedgerLine, RequestRecord
from core.tenancy import Budget, Rate
from gateway.runs.live import LiveRun
from gateway.services import Services
from semantic_vars.calls import Workflow
from tests.e2e.asking import ask, logged, until
from tests.fakes import drivers
from tests.fakes.admin import OPERATOR, client, opened
from tests.fakes.engine import FakeEngine
from tests.fakes.gateway import GatewayProcess, attached
from tests.fakes.postgres import Postgres
from tests.fakes.redis import RedisServer
from tests.fakes.tenancy import principal, tenant

V1 = "/admin/v1"
ANN, BOB = "canary-of-ann", "canary-of-bob"


def files_with(text: str, folder: Path) -> list[str]:
    """Return the files that hold a text: the database with its log, the spool, what the gateway and engines wrote."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return [path.name for path in files if text.encode() in path.read_bytes()]


def finish(services: Services, end_user: str, tenant: str = "filed") -> None:
    """Have a request end that is not booked yet."""
    record = RequestRecord(
        time=services.clock.wall(),
        id=f"req_{end_user}",
        endpoint="/v1/chat/completions",
        status=200,
        duration_s=1.0,
        tenant=TenantId(tenant),
        key="file:app",
        model="small",
        end_user=end_user,
        session=f"session-{end_user}",
        cost=5,
    )
    services.books.add(record, end_user=end_user)


async def used(admin: Any) -> list[tuple[str, int]]:
    body = (await admin.get(f"{V1}/usage", params={"by": "tenant"})).json()
    return [(row["tenant"], row["requests"]) for row in body["data"]]


async def test_an_end_user_that_is_erased_is_in_no_file_and_does_not_come_back(tmp_path: Path) -> None:
    async with opened(tmp_path) as (app, services), client(app) as admin:
        finish(services, ANN)
        await services.books.flush()
        finish(services, ANN)
        finish(services, BOB)
        assert files_with(ANN, tmp_path)
        answer = await admin.post(f"{V1}/tenants/filed:erase", json={"end_user": ANN})
        assert (answer.status_code, answer.json()) == (200, {"records": 2})
        assert files_with(ANN, tmp_path) == []
        assert files_with(BOB, tmp_path)
        assert await used(admin) == [("filed", 3)]
        again = await admin.post(f"{V1}/tenants/filed:erase", json={"end_user": ANN})
        assert again.json() == {"records": 0}
    assert files_with(ANN, tmp_path) == []


async def test_a_tenant_that_is_erased_leaves_amounts_and_its_declaration(tmp_path: Path) -> None:
    async with opened(tmp_path) as (app, services), client(app) as admin:
        for name in (ANN, BOB):
            finish(services, name)
        finish(services, "someone", tenant="other")
        assert (await admin.post(f"{V1}/tenants/filed:erase")).json() == {"records": 2}
        assert files_with("canary-", tmp_path) == []
        assert await used(admin) == [("filed", 2), ("other", 1)]
        assert (await admin.get(f"{V1}/tenants/filed")).status_code == 200
        assert (await admin.get(f"{V1}/requests")).json()["data"][0]["tenant"] == "other"


async def test_a_tenant_that_is_deleted_already_can_be_erased(tmp_path: Path) -> None:
    async with opened(tmp_path) as (app, services), client(app) as admin:
        made = await admin.post(f"{V1}/tenants", json={"id": "gone"})
        finish(services, ANN, tenant="gone")
        await admin.delete(f"{V1}/tenants/gone", headers={"if-match": made.headers["etag"]})
        assert (await admin.post(f"{V1}/tenants/gone:erase")).json() == {"records": 1}
        assert files_with(ANN, tmp_path) == []


async def test_what_a_run_of_an_erased_end_user_held_is_in_no_file(tmp_path: Path) -> None:
    calls = [
        {"kind": "transform", "id": "a", "value": f"said by {ANN}"},
        {"kind": "transform", "id": "b", "value": "{{o}}"},
    ]
    given = msgspec.convert({"calls": calls, "variables": {"o": {"open": True}}}, Workflow)
    who = principal(of=tenant("filed"))
    async with opened(tmp_path) as (app, services), client(app) as admin:
        run = (await services.runs.submit(who, given, end_user=ANN)).id
        found = await services.runs.find(who, run)
        assert isinstance(found, LiveRun), "it waits for its open variable"
        await found.durable()
        assert files_with(ANN, tmp_path)
        assert (await admin.post(f"{V1}/tenants/filed:erase", json={"end_user": ANN})).status_code == 200
        assert files_with(ANN, tmp_path) == []
        with pytest.raises(UnknownId):
            await services.runs.find(who, run)
    assert files_with(ANN, tmp_path) == []


async def test_what_a_batch_of_an_erased_end_user_held_is_in_no_file(tmp_path: Path) -> None:
    words = "words-of-a-canary"  # a request that ends now has a record, with a name and no words
    body = {"model": "small", "input": words}
    row = {"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": body}
    async with opened(tmp_path) as (app, services), client(app) as admin:
        who = services.directory.keyring.principal("file:app", services.clock.wall())
        file = await services.files.keep(who, "rows.jsonl", "batch", msgspec.json.encode(row), end_user=ANN)
        batch = await services.batches.submit(who, file.id, Endpoint.EMBEDDINGS, metadata={"of": words})
        assert batch.end_user == ANN, "whose the file is"

        async def is_under_way() -> bool:
            return (await services.batches.find(who, batch.id)).run is not None

        await until(is_under_way, "the batch has its run")
        assert files_with(words, tmp_path)
        assert (await admin.post(f"{V1}/tenants/filed:erase", json={"end_user": ANN})).status_code == 200
        assert files_with(words, tmp_path) == []
        with pytest.raises(UnknownId):
            await services.batches.find(who, batch.id)
        with pytest.raises(UnknownId):
            await services.files.find(who, file.id)
    assert files_with(words, tmp_path) == []


async def test_one_gateway_is_asked_and_all_that_share_its_stores_have_forgotten(
    postgres: Postgres, tmp_path: Path
) -> None:
    acme = tenant(end_user=Rate(rpm=9, tpm=900), end_user_budgets=(Budget(900, "tokens", "month"),))
    call = msgspec.structs.replace(drivers.call(), context=CallContext(tenant=acme.id, end_user=ANN))
    with RedisServer() as redis:
        stores = {"database": {"url": postgres.new_database(), "timeout": 20}, "redis": {"url": redis.url}}
        async with opened(tmp_path / "a", **stores) as (app, _), opened(tmp_path / "b", **stores) as (_, other):
            admitted = await other.admission.admit(principal(of=acme), call)
            assert admitted is not None
            assert len(names_in(redis, ANN)) == 3
            other.admission.settle(admitted, Usage(5, 5), 7)
            finish(other, ANN, tenant="acme")
            async with client(app) as admin:
                done = await admin.post(f"{V1}/tenants/acme:erase", json={"end_user": ANN})
                assert (done.status_code, done.json()) == (200, {"records": 1})
                await other.books.flush()
                assert (await admin.get(f"{V1}/requests")).json()["data"] == []
                assert await used(admin) == [("acme", 1)]
                assert names_in(redis, ANN) == []

                redis.kill()
                answer = await admin.post(f"{V1}/tenants/acme:erase", json={"end_user": ANN})
                assert (answer.status_code, answer.json()["error"]["code"]) == (503, "limits_unavailable")


def names_in(redis: RedisServer, text: str) -> list[str]:
    """Return the keys of a Redis that hold a text."""
    with Redis(port=redis.port, decode_responses=True) as asking:
        return [name for name in asking.scan_iter() if text in name]


async def test_what_an_earlier_process_left_unbooked_is_erased_too(tmp_path: Path) -> None:
    lines = (LedgerLine(day=1, tenant=TenantId("filed"), key="k", end_user=ANN, model="m", requests=1, cost=7),)
    spool = msgspec.json.Encoder().encode_lines([Batch("b1", lines, ()), Batch("b2", lines, ())])
    (tmp_path / "ledger.pending").write_bytes(spool)
    async with opened(tmp_path) as (app, _), client(app) as admin:
        assert (await admin.post(f"{V1}/tenants/filed:erase", json={"end_user": ANN})).status_code == 200
        assert files_with(ANN, tmp_path) == []
    assert files_with(ANN, tmp_path) == []


async def test_nothing_is_said_to_be_erased_while_the_database_is_away(tmp_path: Path) -> None:
    away = {"url": "postgresql://u:secret@127.0.0.1:9/x", "timeout": 1}
    async with opened(tmp_path, database=away) as (app, services), client(app) as admin:
        finish(services, ANN)
        answer = await admin.post(f"{V1}/tenants/filed:erase")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "database_unavailable")


async def test_who_erased_is_recorded_and_whom_is_not(tmp_path: Path) -> None:
    async with opened(tmp_path) as (app, _), client(app) as admin, client(app, OPERATOR) as operator:
        assert (await operator.post(f"{V1}/tenants/filed:erase", json={"end_user": ANN})).status_code == 403
        await admin.post(f"{V1}/tenants/filed:erase", json={"end_user": ANN})
        entries = (await admin.get(f"{V1}/audit")).json()["data"]
    assert [(entry["actor"], entry["action"], entry["target"], entry["outcome"]) for entry in entries] == [
        ("admin", "erase_tenant", "filed", 200),
        ("operator", "erase_tenant", "filed", 403),
    ]
    assert entries[0]["detail"].items() >= {"of": "end_user", "records": 0}.items()
    assert files_with(ANN, tmp_path) == []


@pytest.mark.parametrize("body", [{"end_user": ""}, {"end_user": "x" * 257}, {"end_user": 5}, {"user": ANN}, []])
async def test_whom_to_erase_has_to_be_clear(tmp_path: Path, body: Any) -> None:
    async with opened(tmp_path) as (app, services), client(app) as admin:
        finish(services, ANN)
        assert (await admin.post(f"{V1}/tenants/filed:erase", json=body)).status_code == 400
        await services.books.flush()
        assert len((await admin.get(f"{V1}/requests")).json()["data"]) == 1


async def test_after_an_erasure_no_file_of_a_running_gateway_names_the_end_user() -> None:
    async with FakeEngine(model="fake", tokens=4) as engine:
        tenants = {"test": {"end_users": {"limits": {"rpm": 100}}}}
        log = {"level": "debug"}
        async with GatewayProcess({"fake": attached(engine.url)}, tenants=tenants, log=log) as gateway:
            body = {"model": "fake", "messages": [{"role": "user", "content": f"I am {ANN}."}], "user": ANN}
            named = {**body, "forebay": {"session": f"session-{ANN}"}}
            for number in range(3):
                answer = await ask(gateway, "/v1/chat/completions", named, headers={"x-request-id": f"erased-{number}"})
                assert answer.status == 200
            await logged(gateway, "erased-2")
            assert files_with(ANN, gateway.directory)
            done = await gateway.admin("POST", "/admin/v1/tenants/test:erase", {"end_user": ANN})
            assert done == {"records": 3}
            assert files_with(ANN, gateway.directory) == []
            gateway.terminate()
            await gateway.wait()
            assert files_with(ANN, gateway.directory) == []


async def test_a_call_of_a_run_that_is_under_way_at_an_erasure_is_booked_before_it() -> None:
    async with (
        FakeEngine(model="fake", tokens=400, itl_ms=20) as engine,
        GatewayProcess({"fake": attached(engine.url)}, log={"level": "debug"}) as gateway,
    ):
        request = {"model": "fake", "messages": [{"role": "user", "content": f"I am {ANN}."}]}
        given = {"calls": [{"kind": "llm", "id": "a", "request": request}]}
        assert (await ask(gateway, "/v1/workflows", given, headers={"x-forebay-end-user": ANN})).status == 202
        await engine.until(running=1)
        done = await gateway.admin("POST", "/admin/v1/tenants/test:erase", {"end_user": ANN})
        assert done == {"records": 1}
        gateway.terminate()
        await gateway.wait()
        assert files_with(ANN, gateway.directory) == []
