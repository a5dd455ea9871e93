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
SECRET = "secret"
NOBODYS_RUN = "run_" + "0" * 32
A_RESPONSE = {
    "app": "responses",
    "calls": [{"kind": "llm", "id": "output", "request": {"model": "open", "messages": []}}],
    "variables": {"request": {"value": {"model": "open"}}},
    "outputs": ["output"],
}  # the run that a background response is


@pytest.fixture
async def app(tmp_path: Path) -> AsyncIterator[Any]:
    workers = [{"engine": "openai", "url": "http://127.0.0.1:9"}]
    keys = [
        {"name": "owner", "tenant": "a", "key": OWNER},
        {"name": "other", "tenant": "b", "key": OTHER, "models": ["open"]},
    ]
    models = {"open": {"workers": workers}, SECRET: {"workers": workers}}
    async with opened(tmp_path, keys=keys, models=models, tenants={}) as (_, services):
        yield data_app(services)


async def routes_with_ids(app: Any) -> list[tuple[str, str]]:
    async with client(app, None) as anybody:
        document = (await anybody.get("/openapi.json")).json()
    return [(method.upper(), path) for path, methods in document["paths"].items() for method in methods if "{" in path]


def with_ids(path: str, ids: dict[str, str]) -> str:
    return re.sub(r"\{(\w+)(?::path)?\}", lambda match: ids[match[1]], path)


async def ids_of_the_owner(app: Any) -> dict[str, str]:
    """Return for each kind of id in the data port's paths one that the owner may use and the other may not, all new."""
    workflow = {"calls": [{"kind": "transform", "id": "a", "value": "x"}]}
    form = {"data": {"purpose": "batch"}, "files": {"file": b"{}"}}
    async with client(app, OWNER) as owner:
        run = (await owner.post("/v1/workflows", json=workflow)).json()["id"]
        assert (await owner.get(f"/v1/variables/{run}.a?wait=10")).json()["value"] == "x"
        file = (await owner.post("/v1/files", **form)).json()["id"]  # type: ignore[arg-type]
        new = {"input_file_id": file, "endpoint": "/v1/embeddings", "completion_window": "24h"}
        batch = (await owner.post("/v1/batches", json=new)).json()["id"]
        background = (await owner.post("/v1/workflows", json=A_RESPONSE)).json()["id"]
    response = background.replace("run_", "resp_")
    return {
        "model_id": SECRET, "run": run, "variable": f"{run}.a", "file": file, "batch": batch, "response": response,
    }  # fmt: skip


def told(answer: httpx.Response, ids: dict[str, str]) -> tuple[int, str, set[str]]:
    text = answer.text
    for name in (ids["model_id"], ids["run"], ids["file"], ids["batch"], ids["response"]):
        text = text.replace(name, "<id>")
    return answer.status_code, text, set(answer.headers)


async def test_an_id_of_another_tenant_is_answered_as_one_that_nobody_knows(app: Any) -> None:
    routes = await routes_with_ids(app)
    kinds = {"model_id", "run", "variable", "file", "batch", "response"}
    assert {name for _, path in routes for name in re.findall(r"\{(\w+)", path)} == kinds
    nobodys = {"model_id": "nobody", "run": NOBODYS_RUN, "variable": f"{NOBODYS_RUN}.a"}
    nobodys |= {"file": "file-" + "0" * 32, "batch": "batch_" + "0" * 32, "response": "resp_" + "0" * 32}
    for method, path in routes:
        ids = await ids_of_the_owner(app)
        body: dict[str, str] | None = {} if method in {"POST", "PUT"} else None
        async with client(app, OTHER) as other:
            of_another = await other.request(method, with_ids(path, ids), json=body)
            of_nobody = await other.request(method, with_ids(path, nobodys), json=body)
        assert of_another.status_code == 404, path
        assert told(of_another, ids) == told(of_nobody, nobodys), path
        async with client(app, OWNER) as owner:
            assert (await owner.request(method, with_ids(path, ids), json=body)).status_code in {200, 202, 409}, path


async def test_a_model_of_another_tenant_is_in_no_list(app: Any) -> None:
    async with client(app, OTHER) as other:
        assert "secret" not in (await other.get("/v1/models")).text
