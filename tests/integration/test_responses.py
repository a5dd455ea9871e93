"""Background responses over real runs and a real SQLite file, with no engine: calls wait until they are given up."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from core.errors import UnknownId
from gateway.auth import Principal
from gateway.responses.asked import Conversation
from gateway.responses.background import Background
from gateway.responses.question import read_question
from gateway.responses.service import Responses
from gateway.services import Services
from storage.sql.erasure import erase
from tests.fakes.admin import DATA_KEY, opened


@pytest.fixture
async def services(tmp_path: Path) -> AsyncIterator[Services]:
    async with opened(tmp_path) as (_, running):
        yield running


def responses_of(services: Services) -> Responses:
    return Responses(services.runs, lambda: services.runs.alive)


def principal_of(services: Services) -> Principal:
    headers = {b"authorization": f"Bearer {DATA_KEY}".encode()}
    return services.directory.keyring.identify(headers, services.clock.wall())


async def ask(
    services: Services, responses: Responses, text: str, end_user: str | None = None, **more: Any
) -> Background:
    question = read_question({"model": "small", "input": text, **more}, {}, Conversation())
    return await responses.submit(principal_of(services), question, end_user=end_user, idempotency=None)


async def end(services: Services, responses: Responses, background: Background) -> dict[str, Any]:
    """Return a response after its last event."""
    frames = [frame async for frame in responses.follow(principal_of(services), background, -1)]
    last: dict[str, Any] = json.loads(frames[-1].split(b"\ndata: ")[1])
    return last["response"]  # type: ignore[no-any-return]


async def test_links_are_made_again_for_runs_that_are_gone_on_with(services: Services) -> None:
    lost = responses_of(services)
    first = await ask(services, lost, "one")
    second = await ask(services, lost, f"{{{{{first.id}.output_text}}}}", stream=True)
    await lost.__aexit__(None, None, None)
    async with responses_of(services) as again:
        assert (await again.find(principal_of(services), second.id)).status == "queued"
        await again.cancel(principal_of(services), first.id)
        told = await end(services, again, second)
    assert (told["status"], told["error"]["code"]) == ("failed", "upstream_failed")
    assert first.id in told["error"]["message"]
    assert "cancelled" in told["error"]["message"]


async def test_a_waiting_response_that_is_cancelled_fails_who_waits_for_it(services: Services) -> None:
    async with responses_of(services) as responses:
        first = await ask(services, responses, "one")
        second = await ask(services, responses, f"{{{{{first.id}.output_text}}}}")
        third = await ask(services, responses, f"{{{{{second.id}.output_text}}}}")
        await responses.cancel(principal_of(services), second.id)
        told = await end(services, responses, third)
        assert (told["status"], told["error"]["code"]) == ("failed", "upstream_failed")
        with pytest.raises(UnknownId, match="there is no response"):
            await ask(services, responses, "{{resp_1.output_text}}")


async def test_a_response_that_is_erased_fails_who_waits_for_it(services: Services) -> None:
    tenant = principal_of(services).tenant
    async with responses_of(services) as responses:
        first = await ask(services, responses, "one", end_user="u")
        second = await ask(services, responses, f"{{{{{first.id}.output_text}}}}")
        await services.runs.forget(tenant, "u")
        await erase(services.database, tenant, "u")
        told = await end(services, responses, second)
    assert "there is no such response any more" in told["error"]["message"]


async def test_a_run_that_is_no_response_is_unknown(services: Services) -> None:
    async with responses_of(services) as responses:
        found = await ask(services, responses, "one")
        workflow = found.history.workflow
        changed = type(workflow)(calls=workflow.calls, app="mine")
        run = await services.runs.submit(principal_of(services), changed)
        with pytest.raises(UnknownId):
            await responses.find(principal_of(services), run.id.replace("run_", "resp_"))
