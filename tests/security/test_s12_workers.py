"""S12: a worker listens on loopback with a key of its own, and nothing of it but its answers can be had through us."""

from collections.abc import AsyncIterator

import httpx
import psutil
import pytest
import pytest_asyncio

from tests.fakes.gateway import GatewayProcess, launched_llamacpp
from tests.security.llamacpp import worker_spec

# What engines serve beside the API: slots, KV, adapters, sleep, weights, metrics, debugging.
ENGINE_PATHS = (
    "/slots", "/slots/0?action=save", "/slots/0?action=erase", "/slots/0?action=restore", "/props", "/metrics",
    "/lora-adapters", "/apply-template", "/infill", "/completion", "/embedding", "/v1/completion",
    "/rerank", "/api/show", "/api/tags", "/api/chat", "/cors-proxy", "/models/load", "/models/unload",
    "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/reset_prefix_cache", "/reset_mm_cache", "/sleep", "/wake_up",
    "/is_sleeping", "/collective_rpc", "/update_weights", "/init_weights_update_group", "/scale_elastic_ep",
    "/server_info", "/get_server_info", "/flush_cache", "/start_profile", "/stop_profile", "/abort_requests",
    "/invocations", "/inference/v1/generate", "/generate", "/load", "/ping", "/debug", "/debug/pprof",
    "/v1/chat/completions/control", "/v1/../slots", "/v1/%2e%2e/slots", "//slots", "/v1/models/../../slots",
)  # fmt: skip


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway() -> AsyncIterator[GatewayProcess]:
    """A gateway with a real llama.cpp that it launches."""
    launch = worker_spec().launch
    assert launch is not None
    async with GatewayProcess({"m": launched_llamacpp(launch.source)}) as running:  # type: ignore[arg-type]
        yield running


def listening(gateway: GatewayProcess) -> list[tuple[str, int]]:
    """Return where the processes below the gateway listen."""
    sockets = [one for process in gateway.descendants() for one in process.net_connections(kind="inet")]
    return [(one.laddr.ip, one.laddr.port) for one in sockets if one.status == psutil.CONN_LISTEN]


@pytest.mark.asyncio(loop_scope="module")
async def test_a_worker_listens_on_loopback_alone_and_refuses_who_has_no_key(gateway: GatewayProcess) -> None:
    places = listening(gateway)
    assert places
    assert {host for host, _ in places} == {"127.0.0.1"}
    async with httpx.AsyncClient(trust_env=False) as http:
        for _, port in places:
            base = f"http://127.0.0.1:{port}"
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Bearer {gateway.key}"}):
                asked = {"prompt": "hi", "max_tokens": 1}
                assert (await http.post(base + "/v1/completions", json=asked, headers=headers)).status_code == 401
                for path in ("/slots", "/props", "/metrics", "/v1/models"):
                    assert (await http.get(base + path, headers=headers)).status_code == 401, path


@pytest.mark.asyncio(loop_scope="module")
async def test_no_path_of_an_engine_but_the_api_is_reachable_through_the_gateway(gateway: GatewayProcess) -> None:
    headers = {"authorization": f"Bearer {gateway.key}"}
    async with httpx.AsyncClient(trust_env=False, base_url=gateway.url, headers=headers) as http:
        for path in ENGINE_PATHS:
            for method in ("GET", "POST"):
                request = http.build_request(method, "/", json={"model": "m"} if method == "POST" else None)
                request.url = request.url.copy_with(raw_path=path.encode())
                response = await http.send(request)
                assert response.status_code in {404, 405}, f"{method} {path}: {response.status_code} {response.text}"


@pytest.mark.asyncio(loop_scope="module")
async def test_the_workers_key_stands_in_no_process_list(gateway: GatewayProcess) -> None:
    keys = set()
    for process in gateway.descendants():
        environment, argv = process.environ(), process.cmdline()
        if key := environment.get("FOREBAY_WORKER_KEY"):
            keys.add(key)
            assert not any(key in word for word in argv)
    assert len(keys) == 1
    assert len(keys.pop()) >= 32
