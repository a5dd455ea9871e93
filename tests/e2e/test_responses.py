"""Background responses as the official `openai` package asks for them, through a real gateway to the fake engine:
created, read along, cancelled, referred to, and gone on with after the gateway was killed."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio
from openai.types.responses import Response, ResponseStreamEvent, ResponseTextConfigParam

from tests.fakes.engine import FakeEngine
from tests.fakes.gateway import GatewayProcess, attached

OTHER_KEY = "fbk_of-another-tenant-altogether"
CHAT_KEY = "fbk_for-chats-and-for-nothing-else"
KEYS: list[dict[str, Any]] = [
    {"name": "other", "tenant": "other", "key": OTHER_KEY},
    {"name": "chats", "tenant": "test", "key": CHAT_KEY, "endpoints": ["/v1/chat/completions"]},
]
SLOWLY = "Take your time."
UNKNOWN = "resp_" + "0" * 32
BEGINNING = ["created", "queued", "in_progress", "output_item.added", "content_part.added"]
END = ["output_text.done", "content_part.done", "output_item.done", "completed"]
SCHEMA: dict[str, object] = {
    "type": "object",
    "required": ["town"],
    "properties": {"town": {"type": "string", "const": "Rome {{x}}"}},
}
AS_JSON: ResponseTextConfigParam = {"format": {"type": "json_schema", "name": "plan", "schema": SCHEMA}}


def client_of(gateway: GatewayProcess, key: str | None = None) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=gateway.url + "/v1", api_key=key or gateway.key, max_retries=0, timeout=30)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def front(engine: FakeEngine) -> AsyncIterator[GatewayProcess]:
    async with GatewayProcess({"fake": attached(engine.url)}, keys=KEYS) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def client(front: GatewayProcess) -> AsyncIterator[openai.AsyncOpenAI]:
    async with client_of(front) as made:
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def slow(engine: FakeEngine) -> AsyncIterator[FakeEngine]:
    """The fake engine, which takes its time for who asks it to."""
    await engine.faults(trickle_ms=40, contains=SLOWLY)
    yield engine
    await engine.faults()


async def ask(client: openai.AsyncOpenAI, said: str, **more: Any) -> Response:
    """Ask for a response in the background."""
    told: Response = await client.responses.create(model="fake", input=said, background=True, **more)
    assert (told.status, told.background, told.output) == ("queued", True, [])
    return told


async def end(client: openai.AsyncOpenAI, response: str) -> Response:
    """Wait for a response's end."""
    for _ in range(600):
        told = await client.responses.retrieve(response)
        if told.status not in {"queued", "in_progress"}:
            return told
        await asyncio.sleep(0.02)
    raise AssertionError(f"{response} has not ended: {told}")


async def chat(client: openai.AsyncOpenAI, *messages: tuple[str, str], **more: Any) -> str:
    """Return what a plain chat is answered."""
    said: Any = [{"role": role, "content": text} for role, text in messages]
    answer = await client.chat.completions.create(model="fake", messages=said, **more)
    return answer.choices[0].message.content or ""


def kinds(events: list[ResponseStreamEvent]) -> list[str]:
    return [event.type.removeprefix("response.") for event in events if event.type != "response.output_text.delta"]


def said(events: list[ResponseStreamEvent]) -> str:
    return "".join(event.delta for event in events if event.type == "response.output_text.delta")


async def refusal(asked: Any) -> openai.APIStatusError:
    with pytest.raises(openai.APIStatusError) as caught:
        await asked
    return caught.value


# --- one response


async def test_a_response_is_what_a_chat_of_the_same_is_answered(client: openai.AsyncOpenAI) -> None:
    asked = await ask(client, "Say one.", instructions="Be {{short}}.", metadata={"a": "b"}, temperature=0.5)
    told = await end(client, asked.id)
    assert told.output_text == await chat(client, ("system", "Be {{short}}."), ("user", "Say one."), temperature=0.5)
    assert (told.status, told.metadata, told.instructions) == ("completed", {"a": "b"}, "Be {{short}}.")
    assert (told.temperature, told.model, told.error) == (0.5, "fake", None)
    assert told.usage is not None
    assert told.usage.output_tokens == 32
    assert told.usage.total_tokens == told.usage.input_tokens + 32
    assert str(told.output[0].id).startswith("msg_")


async def test_a_response_that_was_cut_is_incomplete(client: openai.AsyncOpenAI) -> None:
    told = await end(client, (await ask(client, "Say one.", max_output_tokens=6)).id)
    assert told.status == "incomplete"
    assert told.incomplete_details is not None
    assert told.incomplete_details.reason == "max_output_tokens"
    assert told.output_text == await chat(client, ("user", "Say one."), max_tokens=6)


async def test_a_response_has_the_schema_that_it_was_asked_for(client: openai.AsyncOpenAI) -> None:
    told = await end(client, (await ask(client, "Where?", text=AS_JSON)).id)
    assert json.loads(told.output_text) == {"town": "Rome {{x}}"}


async def test_a_response_of_the_engines_own_is_what_it_was(client: openai.AsyncOpenAI) -> None:
    whole = await client.responses.create(model="fake", input="Say {{one}}.", background=False)
    assert (whole.status, bool(whole.output_text)) == ("completed", True)


async def test_the_same_twice_is_one_response(client: openai.AsyncOpenAI) -> None:
    headers = {"idempotency-key": "just one"}
    first = await ask(client, "Say one.", extra_headers=headers)
    assert (await ask(client, "Say one.", extra_headers=headers)).id == first.id
    again = client.responses.create(model="fake", input="Say two.", background=True, extra_headers=headers)
    assert (await refusal(again)).status_code == 409


async def test_a_response_is_a_run_of_its_tenant(client: openai.AsyncOpenAI, front: GatewayProcess) -> None:
    asked = await ask(client, "Say one.")
    headers = {"authorization": f"Bearer {front.key}"}
    async with httpx.AsyncClient(base_url=front.url, headers=headers, trust_env=False) as http:
        run = (await http.get(f"/v1/workflows/{asked.id.replace('resp_', 'run_')}")).json()
    assert (run["app"], set(run["variables"])) == ("responses", {"request", "output"})


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"store": False}, "store"), ({"tools": [{"type": "web_search"}]}, "tools"), ({"model": "nothing"}, "model"),
        ({"max_output_tokens": 0}, "max_output_tokens"), ({"nonsense": 1}, "nonsense"), ({"input": None}, "input"),
        ({"forebay": {"class": "urgent"}}, "forebay.class"), ({"previous_response_id": 5}, "previous_response_id"),
        ({"previous_response_id": UNKNOWN}, "previous_response_id"),
        ({"input": f"{{{{{UNKNOWN}.output_text}}}}"}, "input"),
        ({"input": f"{{{{{UNKNOWN}.output_text | no}}}}"}, "input"),
    ],
)  # fmt: skip
async def test_what_cannot_be_is_refused_before_anything_is_kept(
    client: openai.AsyncOpenAI, more: dict[str, Any], param: str
) -> None:
    body = {"model": "fake", "input": "x", "background": True, **more}
    error = await refusal(client.post("/responses", body=body, cast_to=Response))
    assert error.status_code in {400, 404}
    assert error.param == param
    assert error.type == "invalid_request_error"


async def test_the_other_routes_say_what_is_not_there(client: openai.AsyncOpenAI) -> None:
    for asked in (client.responses.retrieve(UNKNOWN), client.responses.cancel(UNKNOWN)):
        error = await refusal(asked)
        assert (error.status_code, error.code) == (404, "not_found")
        assert UNKNOWN in error.message
    assert (await refusal(client.responses.delete(UNKNOWN))).status_code == 405


async def test_a_key_for_other_routes_may_not_use_these(front: GatewayProcess) -> None:
    async with client_of(front, CHAT_KEY) as limited:
        for asked in (
            limited.responses.create(model="fake", input="x", background=True), limited.responses.retrieve(UNKNOWN),
        ):  # fmt: skip
            assert (await refusal(asked)).status_code == 403


# --- reading along


async def test_a_response_is_read_along_and_gone_on_with_at_any_character(
    client: openai.AsyncOpenAI, slow: FakeEngine
) -> None:
    stream = await client.responses.create(model="fake", input=SLOWLY, background=True, stream=True)
    before: list[ResponseStreamEvent] = []
    async for event in stream:
        before.append(event)
        if len(said(before)) > 20:
            break
    await stream.close()
    first = before[0]
    assert first.type == "response.created"
    number = first.response.id
    rest = [
        event
        async for event in await client.responses.retrieve(
            number, stream=True, starting_after=before[-1].sequence_number
        )
    ]
    assert kinds(before) == BEGINNING
    assert kinds(rest) == END
    assert sum(event.type == "response.output_text.delta" for event in rest) > 3, "piece by piece"
    whole = await client.responses.retrieve(number)
    assert said(before) + said(rest) == whole.output_text
    last = rest[-1]
    assert last.type == "response.completed"
    assert last.response.output_text == whole.output_text
    assert last.response.usage == whole.usage
    numbers = [event.sequence_number for event in before + rest]
    assert numbers == sorted(set(numbers))
    again = [event async for event in await client.responses.retrieve(number, stream=True)]
    assert kinds(again) == BEGINNING + END
    assert said(again) == whole.output_text


async def test_one_that_was_not_asked_for_as_a_stream_is_told_whole(
    client: openai.AsyncOpenAI, slow: FakeEngine
) -> None:
    asked = await ask(client, SLOWLY)
    events = [event async for event in await client.responses.retrieve(asked.id, stream=True)]
    assert kinds(events) == BEGINNING + END
    assert said(events) == (await client.responses.retrieve(asked.id)).output_text


async def test_the_packages_own_reader_puts_the_events_together(client: openai.AsyncOpenAI, slow: FakeEngine) -> None:
    async with client.responses.stream(model="fake", input=SLOWLY, background=True) as stream:
        whole = await stream.get_final_response()
    assert whole.output_text == (await client.responses.retrieve(whole.id)).output_text
    async with client.responses.stream(response_id=whole.id) as stream:
        assert (await stream.get_final_response()).output_text == whole.output_text


async def test_clients_may_leave_the_prefix_out(front: GatewayProcess) -> None:
    async with openai.AsyncOpenAI(base_url=front.url, api_key=front.key, max_retries=0) as client:
        assert (await end(client, (await ask(client, "Say one.")).id)).output_text


async def test_a_cancelled_response_leaves_no_call_at_the_engine(client: openai.AsyncOpenAI, slow: FakeEngine) -> None:
    stream = await client.responses.create(model="fake", input=SLOWLY, background=True, stream=True)
    first = await anext(aiter(stream))
    assert first.type == "response.created"
    await slow.until(running=1)
    assert (await client.responses.retrieve(first.response.id)).status == "in_progress"
    for _ in range(2):
        told = await client.responses.cancel(first.response.id)
        assert (told.status, told.output, told.error) == ("cancelled", [], None)
    await slow.until(running=0)
    events = [event async for event in stream]
    last = events[-1]
    assert last.type == "response.failed"
    assert last.response.status == "cancelled"


async def test_a_response_that_has_ended_is_not_cancelled_any_more(client: openai.AsyncOpenAI) -> None:
    whole = await end(client, (await ask(client, "Say one.")).id)
    assert await client.responses.cancel(whole.id) == whole
    assert await client.responses.retrieve(whole.id) == whole


# --- references


async def test_a_response_starts_when_all_are_there_that_it_refers_to(
    client: openai.AsyncOpenAI, slow: FakeEngine
) -> None:
    plan = await ask(client, f"{SLOWLY} Where?", text=AS_JSON)
    other = await ask(client, SLOWLY)
    trip = await ask(
        client,
        f"Go to {{{{{plan.id}.output_text | json('$.town')}}}}",
        instructions=f"Know {{{{ {other.id}.output_text }}}}.",
    )
    assert (await client.responses.retrieve(trip.id)).status == "queued"
    told = await end(client, trip.id)
    known = (await client.responses.retrieve(other.id)).output_text
    wanted = await chat(client, ("system", f"Know {known}."), ("user", "Go to Rome {{x}}"))
    assert told.output_text == wanted
    late = await end(client, (await ask(client, f"{{{{{trip.id}.output_text}}}}!")).id)
    assert late.output_text == await chat(client, ("user", f"{wanted}!"))


async def test_a_response_fails_with_one_that_it_refers_to(client: openai.AsyncOpenAI, slow: FakeEngine) -> None:
    first = await ask(client, SLOWLY)
    second = await ask(client, f"{{{{{first.id}.output_text}}}}")
    third = await ask(client, f"{{{{{second.id}.output_text}}}}")
    await client.responses.cancel(first.id)
    for response, cause in ((second, first), (third, second)):
        told = await end(client, response.id)
        assert told.status == "failed"
        error = told.to_dict()["error"]
        assert isinstance(error, dict)
        assert error["code"] == "upstream_failed"
        assert cause.id in error["message"]


async def test_a_transform_that_cannot_be_fails_the_response_alone(client: openai.AsyncOpenAI) -> None:
    first = await ask(client, "Say one.")
    told = await end(client, (await ask(client, f"{{{{{first.id}.output_text | json('$.a')}}}}")).id)
    assert told.error is not None
    assert (told.status, str(told.error.code)) == ("failed", "transform")
    assert (await end(client, first.id)).status == "completed"


async def test_a_waiting_response_is_cancelled_at_once(client: openai.AsyncOpenAI, slow: FakeEngine) -> None:
    first = await ask(client, SLOWLY)
    second = await ask(client, f"{{{{{first.id}.output_text}}}}")
    assert (await client.responses.cancel(second.id)).status == "cancelled"
    assert (await end(client, first.id)).status == "completed"
    assert (await client.responses.retrieve(second.id)).status == "cancelled"


async def test_a_reference_needs_the_background(client: openai.AsyncOpenAI) -> None:
    error = await refusal(client.responses.create(model="fake", input=f"{{{{{UNKNOWN}.output_text}}}}"))
    assert (error.status_code, error.param) == (400, "background")


async def test_a_conversation_goes_on_in_the_background(client: openai.AsyncOpenAI) -> None:
    first = await ask(client, "One?", instructions="I")
    second = await ask(client, "Two?", previous_response_id=first.id, instructions="J")
    third = await end(client, (await ask(client, "Three?", previous_response_id=second.id)).id)
    answers = [(await client.responses.retrieve(one.id)).output_text for one in (first, second)]
    before = [("user", "One?"), ("assistant", answers[0]), ("user", "Two?")]
    assert answers[1] == await chat(client, ("system", "J"), *before)
    assert third.output_text == await chat(client, *before, ("assistant", answers[1]), ("user", "Three?"))
    assert third.previous_response_id == second.id


async def test_no_id_of_one_tenant_means_anything_to_another(client: openai.AsyncOpenAI, front: GatewayProcess) -> None:
    mine = await end(client, (await ask(client, "Say one.")).id)
    async with client_of(front, OTHER_KEY) as other:
        for one in (mine.id, UNKNOWN):
            errors = [
                await refusal(other.responses.retrieve(one)),
                await refusal(other.responses.retrieve(one, stream=True)),
                await refusal(other.responses.cancel(one)),
                await refusal(ask(other, f"{{{{{one}.output_text}}}}")),
                await refusal(ask(other, "x", previous_response_id=one)),
            ]
            for error in errors:
                assert error.status_code == 404
                assert error.body == {
                    "message": f"there is no response '{one}'", "type": "invalid_request_error", "code": "not_found",
                    "param": error.param,
                }  # fmt: skip


async def test_a_real_engine_answers_in_the_background(real_gateway: GatewayProcess) -> None:
    async with client_of(real_gateway) as client:
        few: dict[str, Any] = {"model": "smollm2", "max_output_tokens": 8, "temperature": 0, "background": True}
        first = await client.responses.create(input="Name a river.", text=AS_JSON, **(few | {"max_output_tokens": 48}))
        hole = f"Describe {{{{{first.id}.output_text | json('$.town')}}}}."
        events = [event async for event in await client.responses.create(input=hole, stream=True, **few)]
        assert (await client.responses.retrieve(first.id)).status == "completed"
    last = events[-1]
    assert last.type == "response.incomplete"
    assert last.response.output_text == said(events)
    assert last.response.usage is not None
    assert last.response.usage.output_tokens == 8


# --- after a crash


async def test_a_killed_gateway_goes_on_with_responses_that_wait_for_others(engine: FakeEngine, tmp_path: Path) -> None:
    models = {"fake": attached(engine.url)}
    await engine.faults(trickle_ms=60, contains=SLOWLY)
    async with GatewayProcess(models, directory=tmp_path) as gateway, client_of(gateway) as client:
        done = await end(client, (await ask(client, "Say one.")).id)
        first = await ask(client, SLOWLY)
        hole = f"{{{{{first.id}.output_text}}}} {{{{{done.id}.output_text}}}}"
        stream = await client.responses.create(model="fake", input=hole, background=True, stream=True)
        created = await anext(aiter(stream))
        assert created.type == "response.created"
        await engine.until(running=1)
        gateway.kill()
        await gateway.wait()
    async with GatewayProcess(models, directory=tmp_path) as again, client_of(again) as client:
        rest = [
            event
            async for event in await client.responses.retrieve(
                created.response.id, stream=True, starting_after=created.sequence_number
            )
        ]
        text = (await client.responses.retrieve(first.id)).output_text
        wanted = await chat(client, ("user", f"{text} {done.output_text}"))
    await engine.faults()
    assert said(rest) == wanted
    assert kinds(rest) == BEGINNING[1:] + END
