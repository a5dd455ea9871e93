"""What an operator sees of a running gateway: metrics, traces, logs and the live terminal."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest_asyncio
from prometheus_client.parser import text_string_to_metric_families

from tests.fakes.collector import Collector
from tests.fakes.engine import FakeEngine
from tests.fakes.gateway import GatewayProcess, attached

_ROOT = Path(__file__).resolve().parents[2]
CANARY = "the-canary-of-this-prompt"
PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
PRICED = {"price": {"input": 1.0, "output": 2.0}}


@pytest_asyncio.fixture(loop_scope="module")
async def pair(engine: FakeEngine) -> AsyncIterator[tuple[GatewayProcess, GatewayProcess, Collector]]:
    """Two gateways in front of one engine, and the collector that they trace to."""
    models = {"fake": {**attached(engine.url), **PRICED}}
    async with AsyncExitStack() as stack:
        collector = await stack.enter_async_context(Collector())
        more: dict[str, Any] = {"tracing": {"endpoint": collector.url}, "log": {"format": "json", "level": "debug"}}
        one, other = GatewayProcess(models, **more), GatewayProcess(models, **more)
        await stack.enter_async_context(one)
        await stack.enter_async_context(other)
        yield one, other, collector


async def chat(gateway: GatewayProcess, *, headers: dict[str, str] | None = None, **more: Any) -> httpx.Response:
    body = {"model": "fake", "messages": [{"role": "user", "content": CANARY}], "max_tokens": 4, **more}
    async with httpx.AsyncClient(trust_env=False) as http:
        return await http.post(
            gateway.url + "/v1/chat/completions",
            json=body,
            headers={"authorization": f"Bearer {gateway.key}", **(headers or {})},
        )


async def series(gateway: GatewayProcess) -> dict[str, float]:
    """Return the sum of each metric's series."""
    async with httpx.AsyncClient(trust_env=False) as http:
        answer = await http.get(
            gateway.admin_url + "/metrics", headers={"authorization": f"Bearer {gateway.admin_key}"}
        )
    assert answer.status_code == 200
    sums: dict[str, float] = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
    return sums


async def look(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a verb of the CLI to its end on a terminal of 80 columns."""
    env = {**os.environ, "COLUMNS": "80"}
    return await asyncio.to_thread(
        lambda: subprocess.run(command, cwd=_ROOT, env=env, capture_output=True, text=True, timeout=60, check=False)
    )


async def test_what_is_seen_of_requests(
    pair: tuple[GatewayProcess, GatewayProcess, Collector], engine: FakeEngine, tmp_path: Path
) -> None:
    one, other, collector = pair

    # Counters of two gateways add up, and neither knows of the other's.
    assert {(await chat(one)).status_code for _ in range(3)} == {200}
    traced = await chat(other, headers={"traceparent": PARENT, "x-request-id": "seen-1"}, stream=True)
    assert traced.status_code == 200
    assert (await chat(other, model=CANARY)).status_code == 404
    mine, theirs = await series(one), await series(other)
    assert (mine["forebay_requests_total"], theirs["forebay_requests_total"]) == (3, 2)
    assert mine["forebay_spend_usd_total"] > 0
    assert mine["forebay_database_up"] == 1
    assert mine["forebay_inflight_requests"] == 0
    assert mine["process_resident_memory_bytes"] > 10**6
    assert "forebay_redis_up" not in mine

    # The client's span is the parent of ours, and that of ours for its leg; the engine is told of the leg's.
    spans = await collector.trace(PARENT[3:35])
    root = next(span for span in spans if span.kind == "server")
    leg = next(span for span in spans if span.kind == "client")
    assert (root.name, root.parent_id, leg.parent_id) == ("chat fake", PARENT[36:52], root.id)
    assert root.attributes["forebay.request.id"] == "seen-1"
    assert root.attributes["gen_ai.usage.output_tokens"] > 0
    told = [request["headers"].get("traceparent") for request in (await engine.stats())["requests"]]
    assert f"00-{root.trace_id}-{leg.id}-01" in told
    assert CANARY.encode() not in collector.raw

    # The log is JSON to the last line, and holds neither content nor keys.
    for gateway in (one, other):
        assert CANARY not in gateway.log
        assert gateway.key not in gateway.log
        assert gateway.admin_key not in gateway.log
        for line in gateway.log.splitlines():
            if not line.startswith("Forebay is ready"):
                assert json.loads(line)["event"]

    # The terminal, as people and as scripts read it.
    key_file = tmp_path / "admin.key"
    key_file.write_text(one.admin_key)
    top = [
        sys.executable,
        "-m",
        "gateway",
        "top",
        "--admin-url",
        one.admin_url,
        "--admin-key-file",
        str(key_file),
        "--once",
        "--interval",
        "0.2",
    ]
    shown, as_json = await asyncio.gather(look(top), look([*top, "--json"]))
    assert shown.returncode == 0, shown.stderr
    assert "database up" in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 80
    view = json.loads(as_json.stdout)
    assert [worker["id"] for worker in view["workers"]] == ["fake-0"]
    assert view["models"][0]["ttft_p50_s"] > 0


async def test_metrics_need_a_key(gateway: GatewayProcess) -> None:
    async with httpx.AsyncClient(trust_env=False) as http:
        assert (await http.get(gateway.admin_url + "/metrics")).status_code == 401


async def test_a_collector_that_is_away_costs_a_line_and_no_request(engine: FakeEngine) -> None:
    more: dict[str, Any] = {"tracing": {"endpoint": "http://127.0.0.1:9"}, "log": {"format": "json"}}
    async with GatewayProcess({"fake": attached(engine.url)}, **more) as gateway:
        for _ in range(3):
            assert (await chat(gateway)).status_code == 200
            await asyncio.sleep(1.2)
        gateway.terminate()
        assert await gateway.wait() == 0
        assert gateway.log.count("trace_collector_away") == 1
