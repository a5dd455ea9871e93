"""One tenant has every slot and another comes; a worker is drained under an answer: what both sides see of it."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.asking import event_of, logged
from tests.fakes.engine import FakeEngine
from tests.fakes.gateway import GatewayProcess

MESSAGES = [{"role": "user", "content": "Hello."}]
HOG, LIGHT = "fbk_the-tenant-that-has-it-all", "fbk_the-tenant-that-comes-late"
KEYS = [{"name": "hog", "tenant": "hog", "key": HOG}, {"name": "light", "tenant": "light", "key": LIGHT}]
LENGTH = 200


class Told(NamedTuple):
    """A streamed answer to its end. ``pieces``: its text as it came."""

    id: str
    worker: str
    pieces: list[str]
    first_s: float
    finishes: list[str]


async def stream(gateway: GatewayProcess, key: str, length: int, began: asyncio.Event | None = None) -> Told:
    """Ask for an answer of so many tokens, and read it."""
    body = {"model": "fake", "messages": MESSAGES, "stream": True, "max_tokens": length, "ignore_eos": True}
    asked_at = time.monotonic()
    first_s = 0.0
    pieces: list[str] = []
    finishes: list[str] = []
    async with (
        httpx.AsyncClient(trust_env=False, timeout=60, headers={"authorization": f"Bearer {key}"}) as http,
        http.stream("POST", gateway.url + "/v1/chat/completions", json=body) as answer,
    ):
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            event = event_of(line.encode())
            if event is None or not event["choices"]:
                continue
            first_s = first_s or time.monotonic() - asked_at
            if began is not None:
                began.set()
            choice = event["choices"][0]
            pieces += [choice["delta"]["content"]] if choice["delta"].get("content") else []
            finishes += [choice["finish_reason"]] if choice["finish_reason"] else []
    return Told(answer.headers["x-request-id"], answer.headers["x-forebay-worker"], pieces, first_s, finishes)


@asynccontextmanager
async def served(*, engines: int, slots: int) -> AsyncIterator[GatewayProcess]:
    """A gateway in front of engines that take 10 ms for a token, attached as vLLM is."""
    async with asyncio.TaskGroup() as tasks:
        made = [FakeEngine(slots=slots, itl_ms=10, ttft_ms=5, tokens=LENGTH) for _ in range(engines)]
        for engine in made:
            tasks.create_task(engine.__aenter__())
    try:
        workers: list[dict[str, Any]] = [
            {"engine": "vllm", "url": engine.url + "/v1", "max_inflight": slots} for engine in made
        ]
        fairness = {"threshold": 50, "quantum": 8, "waste_share": 1.0}
        async with GatewayProcess({"fake": {"workers": workers}}, keys=KEYS, fairness=fairness) as gateway:
            yield gateway
    finally:
        for engine in made:
            await engine.__aexit__(None, None, None)


async def test_a_tenant_that_comes_late_is_served_at_once_and_nothing_of_the_others_is_lost() -> None:
    async with served(engines=1, slots=2) as gateway:
        undisturbed = await stream(gateway, HOG, LENGTH)
        async with asyncio.TaskGroup() as tasks:
            begun = [asyncio.Event() for _ in range(2)]
            hogs = [tasks.create_task(stream(gateway, HOG, LENGTH, began)) for began in begun]
            await asyncio.gather(*(began.wait() for began in begun))
            await asyncio.sleep(0.5)
            light = await stream(gateway, LIGHT, 5)
            told = await gateway.admin("GET", "/admin/v1/fairness/fake")
        assert light.first_s < 1.0, "the others had more than a second to go"
        for hog in hogs:
            assert hog.result().pieces == undisturbed.pieces
            assert hog.result().finishes == ["length"]

        assert told["preemptions"] >= 1
        assert {share["tenant"] for share in told["shares"]} == {"hog", "light"}
        assert told["useful_tokens"] > LENGTH

        cut = [decision for hog in hogs if (decision := await decision_of(gateway, hog.result().id))["resumes"]]
        assert len(cut) == 1
        assert "gave its slot to a tenant that was further behind its share" in cut[0]["summary"]
        assert [step["kind"] for step in cut[0]["steps"]] == ["preempted", "resumed"]
        assert f"for {light.id} of tenant light" in cut[0]["steps"][0]["text"]
        assert [leg["cause"] for leg in cut[0]["legs"]] == ["preempted", "done"]
        assert cut[0]["retries"] == 0
        counted = await metrics(gateway)
        assert counted["forebay_cuts_total", "preempted"] == counted["forebay_resumes_total", "preempted"] == 1
        assert counted["forebay_recomputed_tokens_total", "preempted"] == cut[0]["recomputed"]
        assert ("forebay_retries_total", "preempted") not in counted


async def test_a_worker_that_is_drained_hands_its_answers_on() -> None:
    async with served(engines=2, slots=4) as gateway:
        undisturbed = await stream(gateway, HOG, LENGTH)
        began = asyncio.Event()
        running = asyncio.create_task(stream(gateway, HOG, LENGTH, began))
        await began.wait()
        await asyncio.sleep(0.2)
        busy = [worker for worker in (await gateway.admin("GET", "/admin/v1/workers"))["data"] if worker["running"]]
        asked_at = time.monotonic()
        drained = await gateway.admin("POST", f"/admin/v1/workers/{busy[0]['id']}/drain")
        assert drained["state"] == "stopped"
        assert time.monotonic() - asked_at < 1.2, "the answer had longer to go"
        assert not running.done()

        told = await running
        assert told.worker == busy[0]["id"]
        assert (told.pieces, told.finishes) == (undisturbed.pieces, ["length"])
        decision = await decision_of(gateway, told.id)
        assert [leg["cause"] for leg in decision["legs"]] == ["drained", "done"]
        assert decision["steps"][0]["text"].endswith(f"{told.worker} is draining")
        assert (await gateway.admin("GET", "/admin/v1/fairness/fake"))["drained"] == 1


async def metrics(gateway: GatewayProcess) -> dict[tuple[str, str], float]:
    """Return the counters that tell causes, by name and cause."""
    headers = {"authorization": f"Bearer {gateway.admin_key}"}
    async with httpx.AsyncClient(trust_env=False, headers=headers) as http:
        text = (await http.get(gateway.admin_url + "/metrics")).text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {(one.name, one.labels["cause"]): one.value for one in samples if "cause" in one.labels}


async def decision_of(gateway: GatewayProcess, request: str) -> dict[str, Any]:
    """Return how a request was served, once it is in the log."""

    await logged(gateway, request)
    decision: dict[str, Any] = await gateway.admin("GET", f"/admin/v1/decisions/{request}")
    return decision
