"""S13: what was asked and answered goes to the client and the engine alone, and secrets go nowhere."""

import asyncio
import json
import os
import re
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from engines.models import fetch
from gateway.cli.common import models_dir
from tests.e2e.asking import Answer, ask, connected, kinds
from tests.fakes.collector import Collector
from tests.fakes.engine import FakeEngine
from tests.fakes.gateway import GatewayProcess, attached, launched_llamacpp
from tests.fakes.postgres import Postgres

pytestmark = pytest.mark.asyncio(loop_scope="module")

CONTENT = "canarycontent7f3a"
PROVIDER_KEY = "sk-canary-provider-key-91c2"
CHAT = "/v1/chat/completions"
DATABASE_PASSWORD = "canary-database-password-5b1d"
DEBUG = {"level": "debug"}
IMPATIENT = {"queue": 1, "total": 30}
_HOLDS_SECRETS = frozenset({"forebay.yaml", "admin.key"})


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[FakeEngine]:
    async with FakeEngine(model="fake", tokens=12, max_model_len=4096) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def collector() -> AsyncIterator[Collector]:
    async with Collector() as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def front(engine: FakeEngine, collector: Collector) -> AsyncIterator[GatewayProcess]:
    """A gateway that logs and traces all it can, in front of a provider with a key and of a real llama.cpp."""
    models = {
        "fake": attached(engine.url, key=PROVIDER_KEY),
        "gone": attached("http://127.0.0.1:9", key=PROVIDER_KEY),
        "real": launched_llamacpp(fetch("smollm2", models_dir(os.environ))),
    }
    tracing = {"endpoint": collector.url}
    async with GatewayProcess(models, log=DEBUG, timeouts=IMPATIENT, tracing=tracing) as gateway:
        yield gateway


def chat(model: str, **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": f"Say {CONTENT}."}], "max_tokens": 6, **more}


async def answers_of_all_kinds(
    front: GatewayProcess, engine: FakeEngine, models: Sequence[str] = ("fake", "real")
) -> list[Answer]:
    """Ask in every way, well and badly, and return the answers that are errors."""
    schema = {"type": "object", "properties": {CONTENT: {"type": "string"}}, "description": CONTENT}
    format_ = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    circular = {"$ref": f"#/$defs/{CONTENT}", "$defs": {CONTENT: {"$ref": f"#/$defs/{CONTENT}"}}}
    answers = [
        await ask(front, kind.path, {"model": model, "max_tokens": 6, **kind.body})
        for model in models
        for kind in kinds(f"Say {CONTENT}.")
    ]
    bad: list[Any] = [
        json.dumps(chat("fake")).encode()[:-3],
        chat("fake", n=0),
        chat("fake", forebay={"session": 5}),
        chat("gone"),
        chat("real", response_format={"type": "json_schema", "json_schema": {"schema": {"$ref": f"#/{CONTENT}"}}}),
        chat("real", response_format={"type": "json_schema", "json_schema": {"schema": circular}}),
        chat("real", messages=[{"role": "user", "content": f"{CONTENT} " * 4000}]),
        chat("real", messages=[{"role": CONTENT, "content": [{"type": "nothing", "nothing": CONTENT}]}]),
        chat("real", chat_template_kwargs={"x": CONTENT}, response_format=format_, stop=[CONTENT]),
        chat("fake", messages=[{"role": "user", "content": [{"image_url": {"url": f"http://x/{CONTENT}"}}]}]),
    ]
    answers += [await ask(front, CHAT, body) for body in bad]
    for fault in ({"refuse_status": 400}, {"refuse_status": 500}):
        await engine.faults(**fault)
        answers.append(await ask(front, CHAT, chat("fake")))
        await engine.faults()
    answers.append(await ask(front, CHAT, chat("fake"), key=f"fbk_{CONTENT}_wrong_key"))
    for model in models:
        async with connected(front) as client:  # leaves in the middle
            client.ask(CHAT, chat(model, stream=True, max_tokens=200))
            await client.head()
    return [answer for answer in answers if answer.status >= 400]


async def admin_answers(front: GatewayProcess) -> dict[str, str]:
    """Return everything that the admin port shows, of everything that has an id."""
    headers = {"authorization": f"Bearer {front.admin_key}"}
    async with httpx.AsyncClient(base_url=front.admin_url, headers=headers, trust_env=False, timeout=10) as http:

        async def ids(path: str, name: str = "id") -> list[str]:
            return [entry[name] for entry in (await http.get(path, params={"limit": 200})).json().get("data", ())]

        of = {
            "{worker_id}": await ids("/admin/v1/workers"),
            "{tenant_id}": await ids("/admin/v1/tenants"),
            "{key_id}": await ids("/admin/v1/keys"),
            "{request_id}": await ids("/admin/v1/requests"),
            "{model}": await ids("/admin/v1/models", "name"),
            "{kind}": ["fairness"],
        }
        document = (await http.get("/openapi.json")).json()
        paths = {"/metrics", "/openapi.json"}
        for path, verbs in document["paths"].items():
            if "get" in verbs and not path.endswith("/events"):
                named = re.findall(r"{\w+}", path)
                assert set(named) <= set(of), path
                paths |= {path.replace(named[0], one) for one in of[named[0]]} if named else {path}
        answers = await asyncio.gather(*map(http.get, sorted(paths)))  # those that wait for a database do so together
        return {path: answer.text for path, answer in zip(sorted(paths), answers, strict=True)}


def files_of(directory: Path) -> dict[str, bytes]:
    """Return every file that the gateway and its workers have written."""
    found = (path for path in directory.rglob("*") if path.is_file() and path.name not in _HOLDS_SECRETS)
    return {str(path.relative_to(directory)): path.read_bytes() for path in found}


async def test_no_output_holds_content_or_secrets(
    front: GatewayProcess, engine: FakeEngine, collector: Collector
) -> None:
    worker_keys = {process.environ().get("FOREBAY_WORKER_KEY", "") for process in front.descendants()} - {""}
    assert worker_keys

    errors = await answers_of_all_kinds(front, engine)
    shown = await admin_answers(front)
    front.terminate()
    await front.wait()

    assert len(errors) >= 8
    assert len(shown) > 50
    assert {"/admin/v1/workers/real-0/logs", "/admin/v1/keys/file:test", "/admin/v1/tenants/test"} <= set(shown)
    assert len(collector.spans) > 20
    outputs = {
        "traces": collector.raw,
        **{f"error {index}": answer.body + str(answer.headers).encode() for index, answer in enumerate(errors)},
        **{path: text.encode() for path, text in shown.items()},
        **files_of(front.directory),
    }
    assert any(name.endswith(".log") and "real" in name for name in outputs), "the worker's log is among them"
    assert outputs["gateway.log"]
    for canary in (PROVIDER_KEY, front.key, front.admin_key, *worker_keys):
        assert [name for name, text in outputs.items() if canary.encode() in text] == []
    # An engine's refusal may quote to its client what that client sent.
    kept = {name: text for name, text in outputs.items() if not name.startswith("error ")}
    assert [name for name, text in kept.items() if CONTENT.encode() in text] == []


async def test_no_output_holds_the_password_of_the_database_and_it_holds_no_content(
    engine: FakeEngine, postgres: Postgres
) -> None:
    url = postgres.new_database().replace(":secret@", f":{DATABASE_PASSWORD}@")
    database = {"url": url, "timeout": 20}
    models = {"fake": attached(engine.url, key=PROVIDER_KEY), "gone": attached("http://127.0.0.1:9")}
    async with GatewayProcess(models, log=DEBUG, timeouts=IMPATIENT, database=database) as gateway:
        errors = await answers_of_all_kinds(gateway, engine, ["fake"])
        shown = await admin_answers(gateway)
        gateway.terminate()
        await gateway.wait()
        stored = await said_by(postgres.programs / "pg_dump", "--column-inserts", url)
        assert b"INSERT INTO public.requests" in stored

        away = url.replace(f":{postgres.port}/", ":9/")
        gateway.settings["database"] = {"url": away, "timeout": 1}
        gateway.launch()
        await gateway.until_ready()
        assert (await ask(gateway, CHAT, chat("fake"))).status == 200
        shown_away = await admin_answers(gateway)
        assert "database_unavailable" in shown_away["/admin/v1/requests"]
        gateway.terminate()
        await gateway.wait()
        assert "database_away" in gateway.log
        told = await said_by(sys.executable, "-m", "gateway", "config", "show", "-c", gateway.settings_path)
        assert b"database" in told

        outputs = {
            **{f"error {index}": answer.body + str(answer.headers).encode() for index, answer in enumerate(errors)},
            **{path: text.encode() for path, text in shown.items()},
            **{f"away {path}": text.encode() for path, text in shown_away.items()},
            **files_of(gateway.directory),
            "config show": told,
            "database": stored,
        }
    for canary in (DATABASE_PASSWORD, PROVIDER_KEY, gateway.key, gateway.admin_key):
        assert [name for name, text in outputs.items() if canary.encode() in text] == []
    kept = {name: text for name, text in outputs.items() if not name.startswith("error ")}
    kept["database bytes"] = binary_of(stored)
    assert b"/v1/chat/completions" in kept["database bytes"]
    assert [name for name, text in kept.items() if CONTENT.encode() in text] == []


async def said_by(*command: str | Path) -> bytes:
    """Run a command, which has to succeed, and return what it writes."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=asyncio.subprocess.STDOUT)
    output, _ = await process.communicate()
    assert process.returncode == 0, output
    return output


def binary_of(dump: bytes) -> bytes:
    """Return what a dump writes of binary columns in hex."""
    return b"\n".join(bytes.fromhex(found.decode()) for found in re.findall(rb"'\\\\?x([0-9a-f]*)'", dump))
