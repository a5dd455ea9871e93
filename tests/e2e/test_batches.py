"""OpenAI's Files and Batch API, with OpenAI's own client, through a real gateway to the fake engine: rows that refer to
each other, rows that fail, cancelling, and a gateway that is killed in the middle."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
import pytest_asyncio
from openai.types import Batch

from tests.e2e.asking import ask
from tests.fakes.engine import FakeEngine
from tests.fakes.gateway import GatewayProcess, attached
from tests.fakes.postgres import Postgres

OTHER_KEY = "fbk_of-another-tenant-altogether"
KEYS = [{"name": "other", "tenant": "other", "key": OTHER_KEY}]
CHAT: Literal["/v1/chat/completions"] = "/v1/chat/completions"
ENDED = {"completed", "failed", "expired", "cancelled"}


def row(custom_id: str, content: str = "Say one.", **more: Any) -> dict[str, Any]:
    body = {"model": "fake", "messages": [{"role": "user", "content": content}], "max_tokens": 6, **more}
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body}


class Client:
    """A tenant of a gateway, by OpenAI's own client."""

    def __init__(self, gateway: GatewayProcess, key: str | None = None) -> None:
        self.openai = openai.AsyncOpenAI(base_url=gateway.url + "/v1", api_key=key or gateway.key, max_retries=0)

    async def submit(self, *rows: Any, endpoint: Any = CHAT, **more: Any) -> Batch:
        """Upload rows, and make a batch of them."""
        lines = [one if isinstance(one, bytes) else json.dumps(one).encode() for one in rows]
        file = await self.openai.files.create(file=("rows.jsonl", b"\n".join(lines)), purpose="batch")
        return await self.openai.batches.create(
            input_file_id=file.id, endpoint=endpoint, completion_window="24h", **more
        )

    async def until(self, batch: str, *states: str) -> Batch:
        """Wait until a batch is in one of these states."""
        for _ in range(1500):
            seen = await self.openai.batches.retrieve(batch)
            if seen.status in states:
                return seen
            assert seen.status not in ENDED, seen
            await asyncio.sleep(0.02)
        raise AssertionError(f"{seen.status} is none of {states}")

    async def lines(self, file: str | None) -> dict[str, Any]:
        """Return the lines of a file by their `custom_id`."""
        assert file is not None
        content = await self.openai.files.content(file)
        found = [json.loads(line) for line in content.text.splitlines()]
        assert len({line["custom_id"] for line in found}) == len(found)
        return {line["custom_id"]: line for line in found}


def text_of(line: Any) -> str:
    text: str = line["response"]["body"]["choices"][0]["message"]["content"]
    return text


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def front(engine: FakeEngine) -> AsyncIterator[GatewayProcess]:
    models = {"fake": attached(engine.url)}
    async with GatewayProcess(models, keys=KEYS) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def client(front: GatewayProcess) -> AsyncIterator[Client]:
    made = Client(front)
    yield made
    await made.openai.close()


async def test_rows_that_refer_to_rows_are_one_batch(client: Client, front: GatewayProcess) -> None:
    batch = await client.submit(
        row("last", "{{first.output_text}} and {{request-2.output_text | truncate(4)}}"),
        row("first"),
        row("request-2", "After {{first.output_text}}, not {{name}}"),
        metadata={"of": "a test"},
    )
    assert (batch.status, batch.metadata, batch.endpoint) == ("validating", {"of": "a test"}, CHAT)
    assert batch.expires_at == batch.created_at + 86_400
    done = await client.until(batch.id, "completed")
    counts = done.request_counts
    assert counts is not None
    assert (counts.total, counts.completed, counts.failed) == (3, 3, 0)
    assert done.error_file_id is None
    assert None not in (done.in_progress_at, done.finalizing_at, done.completed_at)
    lines = await client.lines(done.output_file_id)
    first, second = text_of(lines["first"]), text_of(lines["request-2"])
    prompts = {"request-2": f"After {first}, not {{{{name}}}}", "last": f"{first} and {second[:4]}"}
    for name, prompt in prompts.items():
        plain = await client.openai.chat.completions.create(
            model="fake", messages=[{"role": "user", "content": prompt}], max_tokens=6
        )
        assert text_of(lines[name]) == plain.choices[0].message.content, "as a client would have got it"
        assert plain.usage is not None
        assert lines[name]["response"]["body"]["usage"]["total_tokens"] == plain.usage.total_tokens
    assert (lines["first"]["response"]["status_code"], lines["first"]["error"]) == (200, None)
    assert done.model_extra is not None
    run = await ask(front, f"/v1/workflows/{done.model_extra['workflow']}", b"", method="GET")
    assert (run.status, run.json["state"]) == (200, "done")


async def test_a_row_that_fails_fails_only_what_refers_to_it(client: Client) -> None:
    batch = await client.submit(
        row("ok"), row("broken-1", model="nothing"), row("after", "{{broken-1.output_text}}"), row("too", "x")
    )
    done = await client.until(batch.id, "completed")
    assert done.request_counts is not None
    assert (done.request_counts.completed, done.request_counts.failed) == (2, 2)
    assert (await client.lines(done.output_file_id)).keys() == {"ok", "too"}
    errors = await client.lines(done.error_file_id)
    assert {name: line["error"]["code"] for name, line in errors.items()} == {
        "broken-1": "model_not_found",
        "after": "upstream_failed",
    }
    assert errors["after"]["error"]["message"].startswith("the row 'broken-1' has failed (model_not_found)")
    assert errors["after"]["response"] is None


async def test_a_file_that_cannot_run_fails_before_anything_runs(client: Client, engine: FakeEngine) -> None:
    await engine.reset()
    batch = await client.submit(row("a", "{{b.output_text}}"), row("b", "{{a.output_text}}"), row("c"))
    failed = await client.until(batch.id, "failed")
    assert failed.errors is not None
    assert failed.errors.data is not None
    ((error,), counts) = failed.errors.data, failed.request_counts
    assert (error.code, error.line in {1, 2}, error.param) == ("circular_reference", True, "body")
    assert "circle" in (error.message or "")
    assert counts is not None
    assert (counts.total, failed.output_file_id) == (0, None)
    assert failed.failed_at is not None
    wrong = await client.until((await client.submit(b"{", row("a"), row("a"))).id, "failed")
    assert wrong.errors is not None
    assert [(one.code, one.line) for one in wrong.errors.data or ()] == [("invalid_json_line", 1)]
    assert (await engine.stats())["finished"] == 0


async def test_completions_and_embeddings_are_batches_too(client: Client) -> None:
    body = {"model": "fake", "prompt": "Say one.", "max_tokens": 6}
    completion = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
    after = {**completion, "custom_id": "b", "body": {**body, "prompt": "{{a.output_text}}"}}
    batch = await client.submit(completion, after, endpoint="/v1/completions")
    lines = await client.lines((await client.until(batch.id, "completed")).output_file_id)
    first = lines["a"]["response"]["body"]["choices"][0]["text"]
    plain = await client.openai.completions.create(model="fake", prompt=first, max_tokens=6)
    assert lines["b"]["response"]["body"]["choices"][0]["text"] == plain.choices[0].text
    body = {"model": "fake", "input": ["x", "y"]}
    embedding = {"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": body}
    batch = await client.submit(embedding, endpoint="/v1/embeddings")
    line = (await client.lines((await client.until(batch.id, "completed")).output_file_id))["a"]
    vectors = await client.openai.embeddings.create(model="fake", input=["x", "y"], encoding_format="float")
    told = line["response"]["body"]
    assert [one["embedding"] for one in told["data"]] == [one.embedding for one in vectors.data]
    assert told["usage"]["prompt_tokens"] == vectors.usage.prompt_tokens


async def test_what_is_done_when_a_batch_is_cancelled_is_kept(client: Client, engine: FakeEngine) -> None:
    await engine.faults(trickle_ms=100, contains="Say much.")
    batch = await client.submit(row("a"), row("slow", "Say much.", max_tokens=200), row("c", "{{slow.output_text}}"))
    for _ in range(500):
        seen = await client.openai.batches.retrieve(batch.id)
        if seen.request_counts is not None and seen.request_counts.completed == 1:
            break
        await asyncio.sleep(0.02)
    assert seen.status == "in_progress"
    cancelling = await client.openai.batches.cancel(batch.id)
    assert cancelling.status == "cancelling"
    done = await client.until(batch.id, "cancelled")
    assert done.cancelling_at is not None
    assert done.cancelled_at is not None
    assert (await client.lines(done.output_file_id)).keys() == {"a"}
    errors = await client.lines(done.error_file_id)
    assert {line["error"]["code"] for line in errors.values()} == {"batch_cancelled"}
    assert errors.keys() == {"slow", "c"}
    assert (await client.openai.batches.cancel(batch.id)).status == "cancelled", "twice is once"
    await engine.until(running=0)
    await engine.faults()


async def test_a_batch_that_has_ended_cannot_be_cancelled(client: Client) -> None:
    batch = await client.submit(row("a"))
    await client.until(batch.id, "completed")
    with pytest.raises(openai.ConflictError, match="is completed"):
        await client.openai.batches.cancel(batch.id)


async def test_files_are_listed_shown_read_and_deleted(client: Client) -> None:
    made = [await client.openai.files.create(file=(f"{n}.jsonl", b"x" * n), purpose="batch") for n in range(3)]
    assert [(one.bytes, one.filename, one.purpose, one.status) for one in made] == [
        (n, f"{n}.jsonl", "batch", "processed") for n in range(3)
    ]
    page = await client.openai.files.list(purpose="batch", limit=2)
    assert [one.id for one in page.data] == [made[2].id, made[1].id]
    assert page.has_more
    following = await client.openai.files.list(purpose="batch", limit=2, after=page.data[-1].id)
    assert following.data[0].id == made[0].id
    assert (await client.openai.files.retrieve(made[1].id)) == made[1]
    assert (await client.openai.files.content(made[2].id)).content == b"xx"
    assert (await client.openai.files.content(made[0].id)).content == b""
    assert (await client.openai.files.delete(made[2].id)).deleted
    with pytest.raises(openai.NotFoundError):
        await client.openai.files.retrieve(made[2].id)


async def test_batches_are_listed_newest_first(client: Client) -> None:
    made = [(await client.submit(row("a"))).id for _ in range(3)]
    page = await client.openai.batches.list(limit=2)
    assert [one.id for one in page.data] == [made[2], made[1]]
    assert [one.id for one in (await client.openai.batches.list(limit=1, after=made[1])).data] == [made[0]]
    for one in made:
        await client.until(one, "completed")


async def test_a_batch_whose_file_is_deleted_goes_on(client: Client) -> None:
    batch = await client.submit(row("a"))
    await client.until(batch.id, "in_progress", "finalizing", "completed")
    await client.openai.files.delete(batch.input_file_id)
    await client.until(batch.id, "completed")


async def test_a_batch_that_is_submitted_again_under_its_key_is_the_same_one(client: Client) -> None:
    first = await client.submit(row("a"), extra_headers={"idempotency-key": "once"})
    again: dict[str, Any] = {"input_file_id": first.input_file_id, "endpoint": CHAT, "completion_window": "24h"}
    headers = {"idempotency-key": "once"}

    assert (await client.openai.batches.create(**again, extra_headers=headers)).id == first.id
    ended = await client.until(first.id, "completed")
    assert (await client.openai.batches.create(**again, extra_headers=headers)).status == ended.status
    assert (await client.openai.batches.create(**again)).id != first.id
    with pytest.raises(openai.ConflictError, match="used for another batch"):
        await client.openai.batches.create(**again, metadata={"team": "red"}, extra_headers=headers)


async def test_what_is_asked_wrongly_is_told(client: Client, front: GatewayProcess) -> None:
    file = await client.openai.files.create(file=("rows.jsonl", b"{}"), purpose="batch")
    good = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h"}
    for wrong, status, word in (
        ({"endpoint": "/v1/responses"}, 400, "`endpoint`"),
        ({"completion_window": "1h"}, 400, "24h"),
        ({"input_file_id": "file-nobodys"}, 404, "file-nobodys"),
        ({"metadata": {"a": 1}}, 400, "metadata"),
        ({"something": 1}, 400, "something"),
    ):
        answer = await ask(front, "/v1/batches", {**good, **wrong})
        assert (answer.status, word in answer.json["error"]["message"]) == (status, True), answer.json
    with pytest.raises(openai.BadRequestError, match="purpose"):
        await client.openai.files.create(file=("x", b"{}"), purpose="fine-tune")
    with pytest.raises(openai.BadRequestError, match="expires_after"):
        await client.openai.files.create(
            file=("x", b"{}"), purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
        )
    assert (await ask(front, "/v1/files", b"{}")).status == 400


async def test_no_id_of_one_tenant_means_anything_to_another(client: Client, front: GatewayProcess) -> None:
    batch = await client.submit(row("a"))
    done = await client.until(batch.id, "completed")
    assert done.output_file_id is not None
    stranger = Client(front, OTHER_KEY).openai
    for file in (batch.input_file_id, done.output_file_id):
        for asking in (
            stranger.files.retrieve(file),
            stranger.files.content(file),
            stranger.files.delete(file),
            stranger.batches.create(input_file_id=file, endpoint=CHAT, completion_window="24h"),
        ):
            with pytest.raises(openai.NotFoundError):
                await asking
    for of_batch in (stranger.batches.retrieve(batch.id), stranger.batches.cancel(batch.id)):
        with pytest.raises(openai.NotFoundError):
            await of_batch
    assert (await stranger.batches.list()).data == []
    assert (await stranger.files.list()).data == []
    await stranger.close()


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with Postgres() as running:
        yield running


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
async def test_a_killed_gateway_goes_on_with_its_batches_and_answers_no_row_twice(
    engine: FakeEngine, tmp_path: Path, request: pytest.FixtureRequest, kind: str
) -> None:
    url = request.getfixturevalue("postgres").new_database() if kind == "postgresql" else None
    database = {"url": url} if url is not None else {}
    models = {"fake": attached(engine.url)}
    rows = [row(f"row-{number}", f"Say {number}.") for number in range(12)]
    rows += [row("next", "{{row-3.output_text}}"), row("last", "{{next.output_text}} {{row-11.output_text}}")]
    await engine.reset()
    await engine.faults(trickle_ms=20)
    slow = {"max_tenant_streams": 2}
    async with GatewayProcess(models, directory=tmp_path, database=database, server=slow) as gateway:
        client = Client(gateway)
        batch = await client.submit(*rows)
        for _ in range(1000):
            seen = await client.openai.batches.retrieve(batch.id)
            assert seen.request_counts is not None
            if (num_done := seen.request_counts.completed) >= 4:
                break
            await asyncio.sleep(0.02)
        assert seen.status == "in_progress"
        young = await client.submit(row("a"))
        gateway.kill()
        await gateway.wait()
        await client.openai.close()
    before = await engine.until(running=0)
    await engine.faults()
    async with GatewayProcess(models, directory=tmp_path, database=database) as again:
        client = Client(again)
        done = await client.until(batch.id, "completed")
        assert done.request_counts is not None
        assert (done.request_counts.total, done.request_counts.completed) == (14, 14)
        assert len(await client.lines(done.output_file_id)) == 14
        assert len(await client.lines((await client.until(young.id, "completed")).output_file_id)) == 1
        after = await engine.until(running=0)
        made = after["finished"] + after["aborted"] - before["finished"] - before["aborted"]
        assert made <= 15 - num_done, "no row that was done is made again"
        await client.openai.close()
