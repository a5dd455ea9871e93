"""The admin clients: what they ask, understand, and raise."""

import asyncio
import time
from collections.abc import Callable
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

import forebay
import httpx
import pytest

from tests.unit.sdk.gateway import ScriptedGateway, error

TENANT = {
    "id": "acme",
    "source": "database",
    "suspended": False,
    "models": ["*"],
    "endpoints": ["*"],
    "limits": {"rpm": 60, "tpm": None, "parallel": None},
    "budgets": [{"tokens": None, "usd": "5.000000000001", "per": "day"}],
    "end_users": {"limits": {"rpm": None, "tpm": None, "parallel": None}, "budgets": []},
    "ceilings": None,
    "max_class": "interactive",
    "weight": 2.0,
    "of_a_newer_gateway": 7,
}
KEY = {
    "id": "key_1",
    "name": "app",
    "tenant": "acme",
    "source": "database",
    "state": "active",
    "prefix": "fbk_1234",
    "role": None,
    "models": ["*"],
    "endpoints": ["*"],
    "limits": {"rpm": None, "tpm": None, "parallel": None},
    "budgets": [],
    "max_class": "interactive",
    "expires_at": None,
    "revoked_at": None,
    "created_at": "2026-11-22T20:00:00Z",
}
WORKER = {
    "id": "w/0",
    "model": "m",
    "engine": "openai",
    "state": "ready",
    "healthy": True,
    "max_inflight": 4,
    "since": 1.0,
    "restarts": 0,
    "running": 0,
    "capabilities": {},
}


def answer(body: Any, status: int = 200, **headers: str) -> httpx.Response:
    return httpx.Response(status, json=body, headers=headers)


def page(*items: Any, following: str | None = None) -> httpx.Response:
    return answer({"data": list(items), "next": following})


def admin(gateway: ScriptedGateway, **options: Any) -> forebay.Admin:
    return forebay.Admin("http://gw:2", "fba_k", transport=gateway.transport, **options)


def async_admin(gateway: ScriptedGateway, **options: Any) -> forebay.AsyncAdmin:
    return forebay.AsyncAdmin("http://gw:2", "fba_k", transport=gateway.transport, **options)


def test_a_tenant_that_was_read_is_changed_and_names_what_it_was_made_from() -> None:
    gateway = ScriptedGateway(answer(TENANT, etag='"3"'), answer(TENANT, etag='"4"'))

    with admin(gateway) as client:
        tenant = client.tenants.show("acme")
        tenant.limits = forebay.admin.Limits(rpm=120)
        changed = client.tenants.replace(tenant)

    sent = gateway.requests[-1]
    assert (sent.method, sent.url.path, sent.headers["if-match"]) == ("PUT", "/admin/v1/tenants/acme", '"3"')
    assert sent.headers["authorization"] == "Bearer fba_k"
    assert gateway.body() == {
        **{name: value for name, value in TENANT.items() if name not in {"id", "source"}},
        "limits": {"rpm": 120, "tpm": None, "parallel": None},
    }
    assert changed.etag == '"4"'
    assert tenant.budgets[0].usd == Decimal("5.000000000001")


async def test_the_async_client_asks_the_same_as_the_sync_client() -> None:
    gateways = [ScriptedGateway(answer(TENANT, 201)), ScriptedGateway(answer(TENANT, 201))]
    terms: forebay.admin.TenantTerms = {
        "budgets": [forebay.admin.Budget(usd=Decimal("0.5"), per="day")],
        "ceilings": forebay.admin.Ceilings(body=1000),
    }

    with admin(gateways[0]) as client:
        first = client.tenants.create("acme", **terms)
    async with async_admin(gateways[1]) as aclient:
        second = await aclient.tenants.create("acme", **terms)

    assert first == second
    assert gateways[0].requests[0].url == gateways[1].requests[0].url == "http://gw:2/admin/v1/tenants"
    for gateway in gateways:
        budgets = [{"tokens": None, "usd": "0.5", "per": "day"}]
        assert gateway.body() == {"id": "acme", "budgets": budgets, "ceilings": {"body": 1000}}


def test_a_list_is_gone_through_page_by_page_as_it_is_read() -> None:
    gateway = ScriptedGateway(page(KEY, following="abc"), page({**KEY, "id": "key_2"}))

    with admin(gateway) as client:
        keys = client.keys.list(tenant="acme")
        assert gateway.requests == []
        assert next(keys).id == "key_1"
        assert len(gateway.requests) == 1
        assert [key.id for key in keys] == ["key_2"]

    first, second = (dict(request.url.params) for request in gateway.requests)
    assert first == {"tenant": "acme", "limit": "200"}
    assert second == {"tenant": "acme", "limit": "200", "after": "abc"}


async def test_a_list_is_gone_through_with_async_for() -> None:
    gateway = ScriptedGateway(page(KEY, following="abc"), page({**KEY, "id": "key_2"}))

    async with async_admin(gateway) as client:
        assert [key.id async for key in client.keys.list()] == ["key_1", "key_2"]


def test_the_sharing_of_models_is_read_in_a_list_and_one_by_one() -> None:
    told = {"model": "org/m", "policy": "vtc-pc", "preemptions": 3, "waste_left": -1.5, "of_a_newer_gateway": 1}
    shares = [{"tenant": "acme", "weight": 2.0, "queued": 4, "attained": 10.5}]
    gateway = ScriptedGateway(page(told), answer({**told, "shares": shares}))

    with admin(gateway) as client:
        (listed,) = client.fairness.list()
        one = client.fairness.show("org/m", limit=5)

    assert (listed.preemptions, listed.waste_left, listed.shares) == (3, -1.5, [])
    assert (one.shares[0].tenant, one.shares[0].attained) == ("acme", 10.5)
    assert gateway.requests[1].url.raw_path == b"/admin/v1/fairness/org/m?limit=5"


def test_questions_carry_days_times_and_dimensions() -> None:
    gateway = ScriptedGateway(page())

    with admin(gateway) as client:
        list(client.usage.list(by=["day", "model"], since=date(2026, 11, 1), model="m"))
        list(client.requests.list(since=datetime(2026, 11, 1, 12, tzinfo=UTC), min_status=500))

    assert str(gateway.requests[0].url.query, "ascii") == "by=day&by=model&since=2026-11-01&model=m&limit=200"
    assert gateway.requests[1].url.params["since"] == "2026-11-01T12:00:00Z"
    assert "until" not in gateway.requests[1].url.params


def test_a_secret_is_not_printed_with_its_key() -> None:
    with admin(ScriptedGateway(answer({"key": KEY, "secret": "fbk_1234_and_more"}, 201, etag='"1"'))) as client:
        made = client.keys.create("app", tenant="acme", expires_at=datetime(2027, 1, 1, tzinfo=UTC))

    assert made.secret == "fbk_1234_and_more"
    assert "and_more" not in repr(made)
    assert made.key.etag == '"1"'


def test_names_are_quoted_in_paths_and_a_models_slash_is_kept() -> None:
    gateway = ScriptedGateway(answer(WORKER))

    with admin(gateway) as client:
        client.workers.drain("w/0")
        with pytest.raises(forebay.MalformedAnswer):
            client.models.show("org/name one")

    paths = [request.url.raw_path for request in gateway.requests]
    assert paths == [b"/admin/v1/workers/w%2F0/drain", b"/admin/v1/models/org/name%20one"]


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (401, forebay.AuthenticationError),
        (403, forebay.PermissionDenied),
        (404, forebay.NotFound),
        (409, forebay.Conflict),
        (412, forebay.PreconditionFailed),
        (428, forebay.PreconditionFailed),
        (503, forebay.Unavailable),
    ],
)
async def test_an_error_has_its_class_in_both_clients(status: int, kind: type[forebay.APIStatusError]) -> None:
    with admin(ScriptedGateway(error(status, "its_code")), max_retries=0) as client, pytest.raises(kind) as caught:
        client.tenants.show("acme")
    async with async_admin(ScriptedGateway(error(status, "its_code")), max_retries=0) as aclient:
        with pytest.raises(kind):
            await aclient.tenants.show("acme")

    assert (caught.value.code, caught.value.request_id) == ("its_code", "req_9")


def _asleep(told: list[float]) -> Callable[[float], Any]:
    async def asleep(seconds: float) -> None:
        told.append(seconds)

    return asleep


async def test_what_looks_is_tried_again_and_what_changes_is_sent_once(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    monkeypatch.setattr(asyncio, "sleep", _asleep(waits))

    with admin(ScriptedGateway(error(503), answer(TENANT))) as client:
        assert client.tenants.show("acme").id == "acme"
    async with async_admin(ScriptedGateway(httpx.ConnectError("no"), answer(TENANT))) as aclient:
        assert (await aclient.tenants.show("acme")).id == "acme"
    assert len(waits) == 2

    gateway = ScriptedGateway(error(503), answer(KEY))
    with admin(gateway) as client, pytest.raises(forebay.Unavailable):
        client.keys.revoke("key_1")
    with admin(ScriptedGateway(httpx.ConnectError("no"))) as client, pytest.raises(forebay.ConnectionFailed):
        client.keys.revoke("key_1")
    assert len(gateway.requests) == 1


def test_the_key_falls_back_to_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOREBAY_ADMIN_KEY", "fba_env")
    gateway = ScriptedGateway(answer(TENANT))

    with forebay.Admin("http://gw:2", transport=gateway.transport) as client:
        client.tenants.show("acme")

    assert gateway.requests[0].headers["authorization"] == "Bearer fba_env"


def test_methods_have_their_help() -> None:
    with admin(ScriptedGateway(answer(TENANT))) as client:
        assert (client.keys.rotate.__doc__ or "").startswith("Make a key of the same terms")


def test_an_overlay_names_the_revision_that_it_replaces() -> None:
    revision = {
        "resource": "fairness",
        "number": 8,
        "state": "applied",
        "overlay": {},
        "author": "ann",
        "created_at": "2026-11-22T20:00:00Z",
        "note": "",
        "expires_at": None,
    }
    gateway = ScriptedGateway(*(answer(revision, 201) for _ in range(3)), error(412, "precondition_failed"))

    with admin(gateway) as client:
        made = client.policies.apply("fairness", {"retry.attempts": 1}, expect=None)
        client.policies.canary("fairness", {"retry.attempts": 2}, expect=made.number, lasts_s=60)
        client.config.apply({"timeouts.queue": 5}, expect="any")
        with pytest.raises(forebay.PreconditionFailed):
            client.config.apply({"timeouts.queue": 5}, expect=7)

    assert [request.headers["if-match"] for request in gateway.requests] == ['"0"', '"8"', "*", '"7"']


def test_an_end_user_is_erased_by_name() -> None:
    gateway = ScriptedGateway(answer({"records": 3}))

    with admin(gateway) as client:
        erased = client.tenants.erase("acme", end_user="ann")

    assert (erased.records, gateway.body()) == (3, {"end_user": "ann"})
    assert gateway.requests[0].url.path == "/admin/v1/tenants/acme:erase"
