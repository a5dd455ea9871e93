"""The admin port over a real database: who may do what, what is kept of it, and how changes meet each other."""

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from structlog.testing import capture_logs

from core.chat import Usage
from core.ids import LegId, ModelName, RequestId, TenantId, WorkerId
from core.records import Batch, LedgerLine, LegRecord, RequestRecord
from gateway.api.admin.access import ACCESS, CHANGES_NOTHING
from gateway.auth import covers, digest_of
from gateway.services import Services
from routing.budgets import day_of
from routing.fairness.policy import Fairness
from routing.scheduler import Cancel, LegEnded, Scheduler, Submit, Worker, WorkerView
from tests.fakes.admin import ADMIN, DATA_KEY, HOST, OPERATOR, SECRETS, VIEWER, client, opened

V1 = "/admin/v1"
REPLACING = {"if-match": "*"}


class Port(NamedTuple):
    app: Any
    services: Services
    admin: httpx.AsyncClient


@pytest.fixture
async def port(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Port]:
    more: dict[str, Any] = {}
    if getattr(request, "param", "sqlite") == "postgres":
        more = {"database": {"url": request.getfixturevalue("postgres").new_database(), "timeout": 20}}
    async with opened(tmp_path, **more) as (app, services), client(app) as admin:
        yield Port(app, services, admin)


on_both = pytest.mark.parametrize("port", ["sqlite", "postgres"], indirect=True)
"""For the stories whose answers depend on what a database does."""


# Roles


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield method.upper(), path, operation


def filled(path: str) -> str:
    """Return the path with ids in it, of things that are not there."""
    values = {"worker_id": "small-9", "verb": "start", "number": "9", "kind": "fairness"}
    return re.sub(r"\{(\w+)(?::path)?\}", lambda match: values.get(match[1], "nobody"), path)


async def test_every_route_asks_for_the_role_that_the_document_says_and_no_less(port: Port) -> None:
    document = (await port.admin.get("/openapi.json")).json()
    checked = 0
    for method, path, operation in operations(document):
        needed = operation.get("x-forebay-role")
        if needed is None:
            assert path.startswith(("/health", "/livez", "/readyz"))
            continue
        async with client(port.app, None) as nobody:
            answer = await nobody.request(method, filled(path))
            assert answer.status_code == 401, (method, path)
        for role, secret in SECRETS.items():
            async with client(port.app, secret) as caller:
                answer = await caller.request(method, filled(path))
            is_refused = answer.status_code == 403 and answer.json()["error"]["code"] == "permission_denied"
            assert is_refused is not covers(role, needed), (role, method, path, answer.text)  # type: ignore[arg-type]
            assert answer.status_code != 401
            checked += 1
    assert checked == 4 * len(ACCESS)


async def test_the_document_names_every_route_that_has_a_role(port: Port) -> None:
    document = (await port.admin.get("/openapi.json")).json()
    named = {operation["operationId"] for _, _, operation in operations(document) if "x-forebay-role" in operation}
    assert named == set(ACCESS)
    assert set(ACCESS) >= CHANGES_NOTHING


async def test_the_document_tells_of_our_errors_only(port: Port) -> None:
    document = (await port.admin.get("/openapi.json")).json()
    assert "HTTPValidationError" not in document["components"]["schemas"]
    for _, path, operation in operations(document):
        assert "422" not in operation["responses"]
        if "x-forebay-role" in operation:
            assert {"400", "401", "403", "503"} <= set(operation["responses"]), path
            schema = operation["responses"]["401"]["content"]["application/json"]["schema"]
            assert schema == {"$ref": "#/components/schemas/Error"}


async def test_a_key_of_the_data_port_opens_nothing_here(port: Port) -> None:
    async with client(port.app, DATA_KEY) as tenant:
        assert (await tenant.get(f"{V1}/workers")).status_code == 401


async def test_an_operator_whose_key_is_in_the_database_is_let_in_until_it_is_revoked(port: Port) -> None:
    made = (await port.admin.post(f"{V1}/keys", json={"name": "bob", "tenant": "ops", "role": "viewer"})).json()
    async with client(port.app, made["secret"]) as bob:
        assert (await bob.get(f"{V1}/workers")).status_code == 200
        assert (await bob.post(f"{V1}/workers/small-0/start")).status_code == 403
        await port.admin.post(f"{V1}/keys/{made['key']['id']}:revoke")
        answer = await bob.get(f"{V1}/workers")
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "key_revoked")


# Hosts and origins


@pytest.mark.parametrize("host", ["127.0.0.1:8412", "localhost:8412", "[::1]:8412", "LOCALHOST", "gw.internal:8412"])
async def test_the_port_answers_to_its_own_names(tmp_path: Path, host: str) -> None:
    async with opened(tmp_path, admin={"allowed_hosts": ["gw.internal"]}) as (app, _), client(app, host=host) as caller:
        assert (await caller.get(f"{V1}/version")).status_code == 200


@pytest.mark.parametrize("host", ["evil.example:8412", "127.0.0.1.evil.example", "10.0.0.7:8412", "localhost.evil", ""])
@pytest.mark.parametrize("path", ["/admin/v1/version", "/metrics", "/openapi.json", "/health"])
async def test_a_foreign_host_name_is_refused_whatever_it_asks_for(port: Port, host: str, path: str) -> None:
    answer = await port.admin.get(path, headers={"host": host})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "host_not_allowed")


@pytest.mark.parametrize("origin", ["https://evil.example", "http://127.0.0.1:9999", "null", "http://localhost"])
async def test_a_page_of_another_site_is_refused(port: Port, origin: str) -> None:
    answer = await port.admin.post(f"{V1}/workers/small-0/stop", headers={"origin": origin})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "foreign_origin")
    assert "access-control-allow-origin" not in answer.headers
    preflight = await port.admin.options(f"{V1}/workers/small-0/stop", headers={"origin": origin})
    assert preflight.status_code == 403


async def test_a_page_of_the_port_itself_is_welcome(port: Port) -> None:
    assert (await port.admin.get(f"{V1}/version", headers={"origin": HOST})).status_code == 200


async def test_a_key_counts_in_a_header_only(port: Port) -> None:
    async with client(port.app, None) as browser:
        assert (await browser.get(f"{V1}/version?key={ADMIN}", headers={"cookie": f"key={ADMIN}"})).status_code == 401


# Tenants


@on_both
async def test_a_tenant_is_made_shown_replaced_and_deleted(port: Port) -> None:
    terms = {
        "models": ["s"],
        "endpoints": ["chat"],
        "limits": {"rpm": 5},
        "budgets": [{"usd": "12.50", "per": "month"}],
        "end_users": {"limits": {"parallel": 1}},
    }
    made = await port.admin.post(f"{V1}/tenants", json={"id": "acme", **terms})
    assert made.status_code == 201, made.text
    body = made.json()
    assert body["models"] == ["small"]
    assert body["budgets"] == [{"tokens": None, "usd": "12.5", "per": "month"}]
    assert body["source"] == "database"
    shown = await port.admin.get(f"{V1}/tenants/acme")
    assert shown.json() == body
    assert shown.headers["etag"] == made.headers["etag"]
    replaced = await port.admin.put(
        f"{V1}/tenants/acme", json={"suspended": True}, headers={"if-match": shown.headers["etag"]}
    )
    assert replaced.json()["suspended"] is True
    assert replaced.json()["models"] == ["*"]
    assert replaced.headers["etag"] != made.headers["etag"]
    assert port.services.directory.keyring.tenants[TenantId("acme")].is_suspended
    gone = await port.admin.delete(f"{V1}/tenants/acme", headers={"if-match": replaced.headers["etag"]})
    assert gone.status_code == 204
    assert (await port.admin.get(f"{V1}/tenants/acme")).status_code == 404


async def test_a_shown_tenant_can_be_written_back_as_it_is(port: Port) -> None:
    made = await port.admin.post(f"{V1}/tenants", json={"id": "acme", "budgets": [{"usd": 0.000001, "per": "day"}]})
    terms = {name: value for name, value in made.json().items() if name not in {"id", "source"}}
    again = await port.admin.put(f"{V1}/tenants/acme", json=terms, headers={"if-match": made.headers["etag"]})
    assert again.json() == made.json()


@pytest.mark.parametrize("method", ["put", "delete"])
async def test_a_change_has_to_name_the_state_it_was_made_from(port: Port, method: str) -> None:
    made = await port.admin.post(f"{V1}/tenants", json={"id": "acme"})
    body: dict[str, Any] = {"json": {}} if method == "put" else {}
    change = getattr(port.admin, method)
    assert (await change(f"{V1}/tenants/acme", **body)).status_code == 428
    for tag in ('"99"', "*", "nonsense"):
        assert (await change(f"{V1}/tenants/acme", headers={"if-match": tag}, **body)).status_code == 412
    assert (await change(f"{V1}/tenants/acme", headers={"if-match": made.headers["etag"]}, **body)).is_success


@on_both
async def test_of_two_changes_from_one_state_the_second_is_refused(port: Port) -> None:
    tag = (await port.admin.post(f"{V1}/tenants", json={"id": "acme"})).headers["etag"]
    answers = [
        await port.admin.put(f"{V1}/tenants/acme", json={"limits": {"rpm": n}}, headers={"if-match": tag})
        for n in (1, 2)
    ]
    assert [answer.status_code for answer in answers] == [200, 412]


@pytest.mark.parametrize("taken", ["acme", "filed"])
async def test_an_id_is_given_once(port: Port, taken: str) -> None:
    await port.admin.post(f"{V1}/tenants", json={"id": "acme"})
    assert (await port.admin.post(f"{V1}/tenants", json={"id": taken})).status_code == 409


async def test_what_the_file_declares_is_shown_and_changed_there_only(port: Port) -> None:
    tenants = {tenant["id"]: tenant for tenant in (await port.admin.get(f"{V1}/tenants")).json()["data"]}
    assert tenants["filed"]["source"] == "file"
    assert tenants["filed"]["limits"]["rpm"] == 100
    keys = {key["id"]: key for key in (await port.admin.get(f"{V1}/keys")).json()["data"]}
    assert keys["file:app"]["source"] == "file"
    for method, path in (
        ("PUT", "tenants/filed"),
        ("DELETE", "tenants/filed"),
        ("PATCH", "keys/file:app"),
        ("POST", "keys/file:app:rotate"),
        ("POST", "keys/file:app:revoke"),
    ):
        answer = await port.admin.request(method, f"{V1}/{path}", json={}, headers={"if-match": '"1"'})
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "of_file"), path
        assert "settings file" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ({"id": "../etc"}, "id"),
        ({"id": "a", "models": ["smal"]}, "models"),
        ({"id": "a", "budgets": [{"per": "day"}]}, "budgets.0"),
        ({"id": "a", "budgets": [{"usd": "NaN", "per": "day"}]}, "budgets.0.usd"),
        ({"id": "a", "budgets": [{"usd": -1, "per": "day"}]}, "budgets.0.usd"),
        ({"id": "a", "limits": {"rpm": 0}}, "limits.rpm"),
        ({"id": "a", "sudo": True}, "sudo"),
        ({"id": "a", "limits": {"rpm": 10**30}}, "limits.rpm"),
    ],
)
async def test_what_is_wrong_with_a_tenant_is_named(port: Port, body: dict[str, Any], place: str) -> None:
    answer = await port.admin.post(f"{V1}/tenants", json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == place


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"id": "\\ud800"}', b'{"\\ud800": 1, "id": "a"}', b"\xff\xfe"])
async def test_a_body_that_is_none_is_a_400_in_our_envelope(port: Port, body: bytes) -> None:
    answer = await port.admin.post(f"{V1}/tenants", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert set(answer.json()) == {"error"}


async def test_a_body_that_is_too_large_is_refused(port: Port) -> None:
    answer = await port.admin.post(f"{V1}/tenants", content=b" " * (2**20 + 1))
    assert answer.status_code == 413


# Keys


async def test_a_secret_is_shown_once_and_kept_nowhere(port: Port, tmp_path: Path) -> None:
    await port.admin.post(f"{V1}/tenants", json={"id": "acme"})
    with capture_logs() as logs:
        made = await port.admin.post(f"{V1}/keys", json={"name": "ci", "tenant": "acme"})
    assert made.status_code == 201
    assert made.headers["cache-control"] == "no-store"
    secret, key = made.json()["secret"], made.json()["key"]
    assert secret.startswith(key["prefix"])
    assert port.services.directory.keyring.keys[digest_of(secret.encode())].id == key["id"]
    for path in ("keys", f"keys/{key['id']}", "audit", "config"):
        assert secret not in (await port.admin.get(f"{V1}/{path}")).text
    assert secret not in str(logs)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]  # noqa: ASYNC240
    assert files
    for file in files:
        assert secret.encode() not in file.read_bytes(), file


async def test_a_key_needs_a_tenant_that_is_there(port: Port) -> None:
    answer = await port.admin.post(f"{V1}/keys", json={"name": "ci", "tenant": "nobody"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tenant")


@on_both
async def test_a_rotated_key_holds_beside_the_new_one_for_a_while(port: Port) -> None:
    made = (await port.admin.post(f"{V1}/keys", json={"name": "ci", "tenant": "filed", "limits": {"rpm": 3}})).json()
    rotated = await port.admin.post(f"{V1}/keys/{made['key']['id']}:rotate", json={"overlap_s": 60})
    assert rotated.status_code == 201
    new = rotated.json()
    assert new["secret"] != made["secret"]
    assert new["key"]["limits"]["rpm"] == 3
    now = port.services.clock.wall()
    for secret in (made["secret"], new["secret"]):
        headers = {b"authorization": b"Bearer " + secret.encode()}
        assert port.services.directory.keyring.identify(headers, now).tenant == "filed"
    old = (await port.admin.get(f"{V1}/keys/{made['key']['id']}")).json()
    assert old["expires_at"] is not None
    assert old["state"] == "active"


@on_both
async def test_a_key_is_changed_in_part(port: Port) -> None:
    made = await port.admin.post(
        f"{V1}/keys",
        json={"name": "ci", "tenant": "filed", "limits": {"rpm": 3}, "budgets": [{"usd": 1, "per": "day"}]},
    )
    path = f"{V1}/keys/{made.json()['key']['id']}"
    assert (await port.admin.patch(path, json={"limits": {"rpm": 9}})).status_code == 428
    changed = await port.admin.patch(path, json={"limits": {"rpm": 9}}, headers={"if-match": made.headers["etag"]})
    assert changed.json() == {**made.json()["key"], "limits": {"rpm": 9, "tpm": None, "parallel": None}}
    stale = await port.admin.patch(path, json={"name": "x"}, headers={"if-match": made.headers["etag"]})
    assert stale.status_code == 412


@on_both
async def test_a_revoked_key_stays_revoked(port: Port) -> None:
    made = await port.admin.post(f"{V1}/keys", json={"name": "ci", "tenant": "filed"})
    path = f"{V1}/keys/{made.json()['key']['id']}"
    revoked = await port.admin.post(f"{path}:revoke")
    assert revoked.json()["state"] == "revoked"
    assert (await port.admin.post(f"{path}:revoke")).json() == revoked.json()
    assert (await port.admin.post(f"{path}:rotate")).status_code == 409
    change = await port.admin.patch(path, json={"name": "x"}, headers={"if-match": revoked.headers["etag"]})
    assert change.status_code == 409


async def test_an_end_that_has_passed_is_refused(port: Port) -> None:
    body = {"name": "ci", "tenant": "filed", "expires_at": "2020-01-01T00:00:00Z"}
    answer = await port.admin.post(f"{V1}/keys", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "expires_at")


# Pages


async def test_pages_hold_every_tenant_once(port: Port) -> None:
    for number in range(7):
        await port.admin.post(f"{V1}/tenants", json={"id": f"t{number}"})
    seen, after, pages = [], None, 0
    while pages == 0 or after is not None:
        params = {"limit": 3, **({"after": after} if after else {})}
        page = (await port.admin.get(f"{V1}/tenants", params=params)).json()
        seen += [tenant["id"] for tenant in page["data"]]
        after, pages = page["next"], pages + 1
    assert seen == sorted({"filed", *(f"t{number}" for number in range(7))})
    assert pages == 3


@pytest.mark.parametrize("after", ["x", "!!!", "W10", "bnVsbA", "ImEi" * 300])
@pytest.mark.parametrize("path", ["tenants", "keys", "requests", "audit", "usage", "models", "workers", "budgets"])
async def test_a_cursor_that_is_none_is_a_400(port: Port, path: str, after: str) -> None:
    answer = await port.admin.get(f"{V1}/{path}", params={"after": after})
    assert answer.status_code == 400, answer.text


@pytest.mark.parametrize("limit", ["0", "201", "-1", "many"])
async def test_a_page_has_at_most_200_entries(port: Port, limit: str) -> None:
    assert (await port.admin.get(f"{V1}/tenants", params={"limit": limit})).status_code == 400


# Audit


@on_both
async def test_every_change_and_every_refused_one_is_recorded(port: Port) -> None:
    await port.admin.post(f"{V1}/tenants", json={"id": "acme"}, headers={"x-request-id": "req-1"})
    async with client(port.app, VIEWER) as viewer:
        await viewer.post(f"{V1}/tenants", json={"id": "mine"})
    async with client(port.app, None) as nobody:
        await nobody.delete(f"{V1}/tenants/acme")
    await port.admin.post(f"{V1}/tenants", json={"id": "!"})
    await port.admin.post(f"{V1}/workers/nobody/stop")
    await port.admin.get(f"{V1}/tenants")
    entries = (await port.admin.get(f"{V1}/audit")).json()["data"]
    told = [(entry["actor"], entry["role"], entry["action"], entry["target"], entry["outcome"]) for entry in entries]
    assert told == [
        ("admin", "admin", "act_on_worker", "nobody/stop", 404),
        ("admin", "admin", "create_tenant", "", 400),
        ("", "", "delete_tenant", "acme", 401),
        ("viewer", "viewer", "create_tenant", "", 403),
        ("admin", "admin", "create_tenant", "acme", 201),
    ]
    assert entries[-1]["detail"] == {"request_id": "req-1"}
    assert entries[2]["detail"]["code"] == "invalid_api_key"
    only = (await port.admin.get(f"{V1}/audit", params={"actor": "viewer"})).json()["data"]
    assert [entry["outcome"] for entry in only] == [403]


async def test_strangers_cannot_fill_the_record(port: Port) -> None:
    async with client(port.app, None) as nobody:
        for _ in range(80):
            await nobody.delete(f"{V1}/tenants/acme")
    entries = (await port.admin.get(f"{V1}/audit", params={"limit": 200})).json()["data"]
    assert 60 <= len(entries) < 70


# What was used


def batch(now: float) -> Batch:
    record = RequestRecord(
        time=now,
        id="req_1",
        endpoint="/v1/chat/completions",
        status=200,
        duration_s=1.5,
        tenant=TenantId("filed"),
        key="file:app",
        model="small",
        asked_model="s",
        worker="small-1",
        attempts=2,
        queue_s=0.02,
        first_byte_s=0.4,
        usage=Usage(10, 20, 4),
        cost=9_000_000,
        legs=(LegRecord("small-0", "small", 0.02, 0.1, "worker_lost"), LegRecord("small-1", "small", 0.2, 1.3, "done")),
    )
    line = LedgerLine(
        day_of(now), TenantId("filed"), "file:app", "=cmd()", "small", 3, 1, 300, 200, 0, 2_500_000_000_000
    )
    return Batch("b1", (line,), (record,))


@on_both
async def test_what_was_used_is_added_up_as_json_and_as_csv(port: Port) -> None:
    await port.services.store.ledger.book(batch(port.services.clock.wall()))
    params = {"by": ["tenant", "end_user"]}
    body = (await port.admin.get(f"{V1}/usage", params=params)).json()
    (row,) = body["data"]
    assert (row["tenant"], row["model"], row["requests"], row["usd"]) == ("filed", None, 3, "2.5")
    for wanted in ({"params": {**params, "format": "csv"}}, {"params": params, "headers": {"accept": "text/csv"}}):
        answer = await port.admin.get(f"{V1}/usage", **wanted)
        assert answer.headers["content-type"].startswith("text/csv")
        head, line = answer.text.splitlines()
        assert head.startswith("day,tenant,key,end_user")
        assert line == ",filed,,'=cmd(),,3,1,300,200,0,2.5"


async def test_too_many_days_are_refused(port: Port) -> None:
    params = {"since": "2001-01-01", "until": "2020-01-01"}
    assert (await port.admin.get(f"{V1}/usage", params=params)).status_code == 400


@on_both
async def test_a_request_is_found_and_its_way_is_told(port: Port) -> None:
    await port.services.store.ledger.book(batch(port.services.clock.wall()))
    found = (await port.admin.get(f"{V1}/requests", params={"tenant": "filed", "min_status": 200})).json()
    assert [request["id"] for request in found["data"]] == ["req_1"]
    assert (await port.admin.get(f"{V1}/requests", params={"min_status": 400})).json()["data"] == []
    shown = (await port.admin.get(f"{V1}/requests/req_1")).json()
    assert shown["usd"] == "0.000009"
    decision = (await port.admin.get(f"{V1}/decisions/req_1")).json()
    assert (decision["retries"], decision["fell_back"]) == (1, False)
    assert "waited 20 ms" in decision["summary"]
    assert "'worker_lost'" in decision["summary"]
    assert "30" not in decision["summary"]
    assert (await port.admin.get(f"{V1}/decisions/req_2")).status_code == 404


def submit(request: str, tenant: str, *, weight: float = 1.0) -> Submit:
    return Submit(
        request=RequestId(request),
        tenant=TenantId(tenant),
        models=(ModelName("small"),),
        tokens_estimate=30,
        queue_timeout=600.0,
        now=0.0,
        prompt_tokens=10,
        weight=weight,
    )


async def test_how_a_model_is_shared_is_told_with_who_waits_first(port: Port) -> None:
    scheduler = port.services.scheduler
    view = WorkerView(WorkerId("w"), ModelName("small"), True, True, True, max_inflight=1)
    scheduler.on(Worker(view, now=0.0))
    for event in (submit("r1", "acme"), submit("r2", "beta", weight=2.0), submit("r3", "beta", weight=2.0)):
        scheduler.on(event)

    (listed,) = (await port.admin.get(f"{V1}/fairness")).json()["data"]
    shown = (await port.admin.get(f"{V1}/fairness/s")).json()
    one = (await port.admin.get(f"{V1}/fairness/small", params={"limit": 1})).json()
    decision = (await port.admin.get(f"{V1}/decisions/r1")).json()

    assert (listed["model"], listed["policy"], listed["queued"], listed["tenants"]) == ("small", "vtc-pc", 2, 2)
    beta, acme = shown["shares"]
    assert (beta["tenant"], beta["weight"], beta["queued"], beta["running"]) == ("beta", 2.0, 2, 0)
    assert (acme["tenant"], acme["queued"], acme["running"], acme["attained"]) == ("acme", 0, 1, 10.0)
    assert [share["tenant"] for share in one["shares"]] == ["beta"]
    assert (await port.admin.get(f"{V1}/fairness/smal")).status_code == 404
    assert (decision["summary"], decision["status"]) == ("It has not ended.", None)

    scheduler.on(Cancel(RequestId("r2"), now=0.0))
    scheduler.on(Cancel(RequestId("r3"), now=0.0))
    scheduler.on(LegEnded(LegId("r1/0"), "done", now=0.0))


async def test_a_policy_of_fairness_reaches_the_scheduler_and_goes_again(port: Port) -> None:
    small, scheduler = ModelName("small"), port.services.scheduler
    assert isinstance(scheduler, Scheduler)
    overlay = {"models.small.fairness": {"policy": "drr", "threshold": "3k"}, "tenants.filed.weight": 2}
    applied = await port.admin.post(f"{V1}/policies/fairness:apply", json={"overlay": overlay}, headers=REPLACING)
    assert applied.status_code == 201, applied.text

    assert scheduler.fairness[small] == Fairness(policy="drr", threshold=3000)
    assert port.services.directory.keyring.tenants[TenantId("filed")].weight == 2
    shown = {
        value["path"]: value["value"] for value in (await port.admin.get(f"{V1}/policies/fairness")).json()["values"]
    }
    assert (shown["models.small.fairness.policy"], shown["tenants.filed.weight"]) == ("drr", 2)
    assert (await port.admin.get(f"{V1}/fairness/small")).json()["policy"] == "drr"
    await port.admin.post(f"{V1}/policies/fairness:rollback")
    assert scheduler.fairness[small] == Fairness()


async def test_what_a_policy_of_fairness_may_not_say_is_told_with_its_place(port: Port) -> None:
    for overlay, hint in (
        ({"fairness.policy": "vtcpc"}, "vtc-pc"),
        ({"models.small.fairness.tresh": 1}, "did you mean `threshold`?"),
        ({"tenants.filed.weight": 0}, "greater than or equal to 0.001"),
        ({"tenants.filed.limits.rpm": 5}, "belongs to `config`"),
    ):
        verdict = (await port.admin.post(f"{V1}/policies/fairness:validate", json={"overlay": overlay})).json()
        assert not verdict["valid"]
        assert hint in verdict["faults"][0]["message"]


@on_both
async def test_a_tenant_has_a_weight(port: Port) -> None:
    made = await port.admin.post(f"{V1}/tenants", json={"id": "acme", "weight": 2.5})
    assert made.json()["weight"] == 2.5
    assert port.services.directory.keyring.tenants[TenantId("acme")].weight == 2.5
    assert (await port.admin.get(f"{V1}/tenants/acme")).json()["weight"] == 2.5
    for weight in (0, -1, 1e9, "much"):
        answer = await port.admin.post(f"{V1}/tenants", json={"id": "beta", "weight": weight})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "weight")


async def test_metrics_count_budgets_and_tell_what_preemption_may_waste(port: Port) -> None:
    await port.services.store.ledger.book(batch(port.services.clock.wall()))
    await port.services.spending.refresh()
    text = (await port.admin.get("/metrics")).text
    assert 'forebay_budgets{state="free"} 2.0' in text
    assert 'forebay_waste_budget_tokens{model="small"} 1000.0' in text, "half a burst, to begin with"


@on_both
async def test_budgets_show_what_is_left(port: Port) -> None:
    await port.services.store.ledger.book(batch(port.services.clock.wall()))
    await port.services.spending.refresh()
    budgets = (await port.admin.get(f"{V1}/budgets", params={"tenant": "filed"})).json()["data"]
    assert [(budget["subject"], budget["id"], budget["per"]) for budget in budgets] == [
        ("key", "file:app", "day"),
        ("tenant", "filed", "month"),
    ]
    assert budgets[0]["limit"] == {"tokens": None, "usd": "5"}
    assert budgets[1]["limit"] == {"tokens": 1000, "usd": None}


# Models, workers, and the gateway itself


async def test_models_show_price_names_and_load(port: Port) -> None:
    (model,) = (await port.admin.get(f"{V1}/models")).json()["data"]
    assert model["price"] == {"input_usd": "0.1", "output_usd": "0.4", "cached_input_usd": None}
    assert (model["aliases"], model["workers"]) == (["s"], ["small-0"])
    assert (await port.admin.get(f"{V1}/models/s")).json()["name"] == "small"
    assert (await port.admin.get(f"{V1}/models/a/b")).status_code == 404


async def test_workers_are_listed_as_before(port: Port) -> None:
    (worker,) = (await port.admin.get(f"{V1}/workers")).json()["data"]
    assert (worker["id"], worker["engine"], worker["running"]) == ("small-0", "openai", 0)
    async with client(port.app, OPERATOR) as operator:
        assert (await operator.get(f"{V1}/workers/small-0/logs")).text == ""
        assert (await operator.post(f"{V1}/workers/small-0/stop")).json()["state"] == "stopped"
        assert (await operator.post(f"{V1}/workers/small-0/explode")).status_code == 400


async def test_metrics_are_for_viewers(port: Port) -> None:
    async with client(port.app, VIEWER) as prometheus:
        assert "forebay_" in (await prometheus.get("/metrics")).text


async def test_health_and_version_tell_how_the_parts_are(port: Port) -> None:
    health = (await port.admin.get(f"{V1}/health")).json()
    assert (health["database"], health["keys_are_fresh"], health["workers"]) == ("up", True, 1)
    assert (await port.admin.get(f"{V1}/version")).json()["version"]


async def test_an_unknown_path_or_method_is_told_in_our_envelope(port: Port) -> None:
    assert (await port.admin.get(f"{V1}/nothing")).json()["error"]["code"] == "unknown_url"
    answer = await port.admin.delete(f"{V1}/version")
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET")


# Settings and policies


async def test_the_settings_are_shown_with_who_said_them_and_without_secrets(port: Port) -> None:
    answer = await port.admin.get(f"{V1}/config")
    values = {value["path"]: (value["value"], value["source"]) for value in answer.json()["values"]}
    assert values["tenants.filed.limits.rpm"] == (100, "file")
    assert values["retry.attempts"] == (3, "default")
    assert ADMIN not in answer.text
    assert DATA_KEY not in answer.text


@on_both
async def test_an_overlay_is_checked_applied_shown_and_rolled_back(port: Port) -> None:
    overlay = {"timeouts.queue": 5}
    assert (await port.admin.post(f"{V1}/config:validate", json={"overlay": overlay})).json() == {
        "valid": True,
        "faults": [],
    }
    body = {"overlay": overlay, "note": "less patience"}
    tag = (await port.admin.get(f"{V1}/config")).headers["etag"]
    applied = await port.admin.post(f"{V1}/config/revisions", json=body, headers={"if-match": tag})
    assert (applied.status_code, tag, applied.headers.get("etag")) == (201, '"0"', '"1"'), applied.text
    assert (applied.json()["number"], applied.json()["author"]) == (1, "admin")
    assert port.services.live.settings.timeouts.queue == 5
    (change,) = (await port.admin.get(f"{V1}/config/diff")).json()["changes"]
    assert (change["path"], change["before"], change["after"]) == ("timeouts.queue", 30, 5)
    await port.admin.post(f"{V1}/config/revisions", json={"overlay": {}}, headers={"if-match": '"1"'})
    assert port.services.live.settings.timeouts.queue == 30
    back = await port.admin.post(f"{V1}/config/revisions/1:rollback")
    assert back.json()["revision"]["number"] == 3
    assert port.services.live.settings.timeouts.queue == 5
    listed = (await port.admin.get(f"{V1}/config/revisions", params={"limit": 2})).json()
    assert [revision["number"] for revision in listed["data"]] == [3, 2]
    rest = await port.admin.get(f"{V1}/config/revisions", params={"after": listed["next"]})
    assert [revision["number"] for revision in rest.json()["data"]] == [1]
    assert (await port.admin.post(f"{V1}/config/revisions/99:rollback")).status_code == 404


@pytest.mark.parametrize(
    "overlay", [{"server.port": 1}, {"models.small.workers": []}, {"nothing": 1}, {"timeouts.queue": "soon"}, {"": 1}]
)
async def test_what_only_the_file_may_say_is_refused(port: Port, overlay: dict[str, Any]) -> None:
    answer = await port.admin.post(f"{V1}/config/revisions", json={"overlay": overlay}, headers=REPLACING)
    assert answer.status_code == 400
    assert port.services.overlays.get("config") is None


async def test_values_that_json_cannot_tell_again_are_refused(port: Port) -> None:
    for text in (b'{"overlay": {"timeouts.queue": NaN}}', b'{"overlay": {"timeouts.queue": 1e999}}', b"[" * 100_000):
        headers = {"content-type": "application/json"}
        answer = await port.admin.post(f"{V1}/config/revisions", content=text, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")


async def test_a_server_without_a_file_has_nothing_to_reload(port: Port) -> None:
    answer = await port.admin.post(f"{V1}/config:reload")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "settings_refused")


@on_both
async def test_a_policy_is_tried_and_kept_or_rolled_back(port: Port) -> None:
    path = f"{V1}/policies/fairness"
    overlay = {"overlay": {"retry.attempts": 1}}
    assert (await port.admin.post(f"{path}:diff", json=overlay)).json()["changes"][0]["after"] == 1
    canary = await port.admin.post(f"{path}:canary", json={**overlay, "lasts_s": 60}, headers={"if-match": '"0"'})
    assert (canary.status_code, canary.json()["state"]) == (201, "canary")
    assert port.services.live.settings.retry.attempts == 1
    back = await port.admin.post(f"{path}:rollback")
    assert back.json() == {"revision": None}
    assert port.services.live.settings.retry.attempts == 3
    await port.admin.post(f"{path}:canary", json=overlay, headers=REPLACING)
    assert (await port.admin.post(f"{path}:keep")).json()["state"] == "applied"
    shown = (await port.admin.get(path)).json()
    assert shown["revision"]["state"] == "applied"
    assert {"path": "retry.attempts", "value": 1, "source": "overlay"} in shown["values"]


@pytest.mark.parametrize("where", ["policies/fairness:apply", "policies/fairness:canary", "config/revisions"])
async def test_an_overlay_has_to_name_the_revision_that_it_replaces(port: Port, where: str) -> None:
    overlay = {"overlay": {"timeouts.queue": 5} if where == "config/revisions" else {"retry.attempts": 1}}
    blind = await port.admin.post(f"{V1}/{where}", json=overlay)
    assert (blind.status_code, blind.json()["error"]["code"]) == (428, "precondition_required")
    assert '`If-Match: "0"`' in blind.json()["error"]["message"]

    first = await port.admin.post(f"{V1}/{where}", json=overlay, headers={"if-match": '"0"'})
    assert (first.status_code, first.headers["etag"]) == (201, '"1"')
    late = await port.admin.post(f"{V1}/{where}", json=overlay, headers={"if-match": '"0"'})
    assert (late.status_code, late.json()["error"]["code"]) == (412, "precondition_failed")
    assert "revision 1 is in force" in late.json()["error"]["message"]
    assert (await port.admin.post(f"{V1}/{where}", json=overlay, headers=REPLACING)).status_code == 201


async def test_of_two_operators_at_the_same_moment_one_is_told_of_the_other(port: Port) -> None:
    path, from_the_file = f"{V1}/policies/fairness:apply", {"if-match": '"0"'}
    bodies = [{"overlay": {"retry.attempts": attempts}} for attempts in (1, 2)]
    answers = await asyncio.gather(*(port.admin.post(path, json=body, headers=from_the_file) for body in bodies))
    first, second = sorted(answer.status_code for answer in answers)
    assert first == 201
    assert second in (409, 412)
    assert len((await port.admin.get(f"{V1}/policies/fairness/revisions")).json()["data"]) == 1


@pytest.mark.parametrize("kind", ["cache", "examples", "routing", "kv"])
async def test_a_policy_that_is_not_built_says_so(port: Port, kind: str) -> None:
    for answer in (
        await port.admin.get(f"{V1}/policies/{kind}"),
        await port.admin.post(f"{V1}/policies/{kind}:apply", json={"overlay": {}}),
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "policy_not_available")


async def test_what_needs_the_database_says_that_it_is_away(port: Port) -> None:
    path = port.services.database.path
    assert path is not None
    path.unlink()
    path.mkdir()  # as good as a disk that is gone
    await port.services.database.__aexit__(None, None, None)
    answer = await port.admin.get(f"{V1}/requests")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "database_unavailable")


async def test_after_a_start_without_the_database_what_needs_it_is_a_503_and_nothing_a_500(tmp_path: Path) -> None:
    away = {"url": "postgresql://u:secret@127.0.0.1:9/x", "timeout": 1}
    async with opened(tmp_path, database=away) as (app, _), client(app) as admin:
        document = (await admin.get("/openapi.json")).json()
        answers = {
            f"{method} {path}": await admin.request(method, filled(path), json={})
            for method, path, _ in operations(document)
        }
    assert [where for where, answer in answers.items() if answer.status_code >= 500 and answer.status_code != 503] == []
    refused = {where for where, answer in answers.items() if "database_unavailable" in answer.text}
    assert {f"GET {V1}/requests", f"GET {V1}/usage", f"GET {V1}/audit", f"GET {V1}/tenants/{{tenant_id}}"} <= refused
    assert {f"POST {V1}/tenants/{{tenant_id}}:erase", f"GET {V1}/config/revisions"} <= refused
    assert f"GET {V1}/workers" not in refused
