"""S3: no id of one tenant works for another; it is answered as an id that nobody ever gave out."""

import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.app import data_app
from tests.fakes.admin import client, opened

OWNER = "fbk_0123456789-of-the-owner"
OTHER = "fbk_0123456789-of-the-other"
IDS = {"model_id": "secret"}
"""For each kind of id in the data port's paths: one that the owner may use and the other may not."""


@pytest.fixture
async def app(tmp_path: Path) -> AsyncIterator[Any]:
    workers = [{"engine": "openai", "url": "http://127.0.0.1:9"}]
    keys = [
        {"name": "owner", "tenant": "a", "key": OWNER},
        {"name": "other", "tenant": "b", "key": OTHER, "models": ["open"]},
    ]
    models = {"open": {"workers": workers}, IDS["model_id"]: {"workers": workers}}
    async with opened(tmp_path, keys=keys, models=models, tenants={}) as (_, services):
        yield data_app(services)


async def routes_with_ids(app: Any) -> list[tuple[str, str]]:
    async with client(app, None) as anybody:
        document = (await anybody.get("/openapi.json")).json()
    return [(method.upper(), path) for path, methods in document["paths"].items() for method in methods if "{" in path]


def with_ids(path: str, ids: dict[str, str]) -> str:
    return re.sub(r"\{(\w+)(?::path)?\}", lambda match: ids[match[1]], path)


def told(answer: httpx.Response, name: str) -> tuple[int, str, set[str]]:
    return answer.status_code, answer.text.replace(name, "<id>"), set(answer.headers)


async def test_an_id_of_another_tenant_is_answered_as_one_that_nobody_knows(app: Any) -> None:
    routes = await routes_with_ids(app)
    assert routes, "the document has no route with an id"
    for method, path in routes:
        async with client(app, OWNER) as owner:
            assert (await owner.request(method, with_ids(path, IDS))).status_code == 200, path
        async with client(app, OTHER) as other:
            of_another = await other.request(method, with_ids(path, IDS))
            of_nobody = await other.request(method, with_ids(path, dict.fromkeys(IDS, "nobody")))
        assert of_another.status_code == 404
        assert told(of_another, "secret") == told(of_nobody, "nobody"), path


async def test_a_model_of_another_tenant_is_in_no_list(app: Any) -> None:
    async with client(app, OTHER) as other:
        assert "secret" not in (await other.get("/v1/models")).text
