"""The admin port against its own document: whatever is asked, no server error and nothing that it does not tell of."""

import asyncio
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from gateway.api.admin.access import ACCESS
from tests.fakes.gateway import GatewayProcess, attached

CHECKS: list[Any] = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
EXAMPLES = 500 if os.environ.get("HYPOTHESIS_PROFILE") == "long" else 20
V1 = "/admin/v1"


class Port(NamedTuple):
    """The running port as the tests ask it; ``known`` are path parameters of things that are there."""

    schema: Any
    headers: dict[str, str]
    known: dict[str, str]


@pytest.fixture(scope="module")
def port() -> Iterator[Port]:
    gateway = GatewayProcess({"fake": attached("http://127.0.0.1:9")}, tenants={"filed": {"limits": {"rpm": 5}}})
    try:
        gateway.launch()
        headers = {"authorization": f"Bearer {gateway.admin_key}"}
        with httpx.Client(base_url=gateway.admin_url, headers=headers, trust_env=False, timeout=10) as admin:
            until_alive(admin)
            document = admin.get("/openapi.json").json()
            for tenant in ("acme", "leaving"):
                admin.post(f"{V1}/tenants", json={"id": tenant}).raise_for_status()
            made = admin.post(f"{V1}/keys", json={"name": "ci", "tenant": "acme"}).raise_for_status().json()
            overlay, alone = {"overlay": {"timeouts.queue": 9}}, {"if-match": '"0"'}
            admin.post(f"{V1}/config/revisions", json=overlay, headers=alone).raise_for_status()
        schema = schemathesis.openapi.from_dict(document)
        schema.config.update(base_url=gateway.admin_url)
        known = {
            "tenant_id": "acme",
            "key_id": made["key"]["id"],
            "worker_id": "fake-0",
            "model": "fake",
            "kind": "fairness",
            "number": "1",
        }
        yield Port(schema, headers, known)
    finally:
        asyncio.run(gateway.aclose())


def until_alive(admin: httpx.Client) -> None:
    for _ in range(600):
        with suppress(httpx.TransportError):
            admin.get("/livez").raise_for_status()
            return
        time.sleep(0.05)
    raise AssertionError("the gateway does not answer")


def cases(operation: Any, known: dict[str, str]) -> st.SearchStrategy[Any]:
    """Return requests that fit the document, requests that do not, and requests for things that are there."""
    strategies = [operation.as_strategy()]
    if operation.body or any(operation.iter_parameters()):
        strategies.append(operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE))
    names = [parameter.name for parameter in operation.path_parameters]
    if names:
        ids = {name: known[name] for name in names if name in known}
        strategies.append(operation.as_strategy(path_parameters=ids))
    return st.one_of(strategies)


@pytest.mark.parametrize("operation_id", sorted(ACCESS))
def test_whatever_is_asked_is_answered_as_the_document_says(port: Port, operation_id: str) -> None:
    operation = port.schema.find_operation_by_id(operation_id)

    known = {**port.known, "tenant_id": "leaving"} if operation_id == "delete_tenant" else port.known

    @seed(20261122)
    @settings(max_examples=EXAMPLES, deadline=None, phases=[Phase.generate], suppress_health_check=[*HealthCheck])
    @given(case=cases(operation, known), tag=st.sampled_from(['"1"', '"2"', "*", None]))
    def ask(case: Any, tag: str | None) -> None:
        headers = port.headers if tag is None else {**port.headers, "if-match": tag}
        case.call_and_validate(headers=headers, checks=CHECKS)

    ask()
