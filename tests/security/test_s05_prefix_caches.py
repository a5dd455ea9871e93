"""S5: an engine's prefix cache serves the tenant that filled it, and tells nobody else what was asked."""

import asyncio
import random
import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
import pytest_asyncio
from aiohttp import web

from core.chat import Call, Endpoint, Usage
from core.ids import TenantId
from engines.drivers.llamacpp import LlamaCppDriver, LlamaCppEngine
from engines.drivers.openai import OpenAIDriver
from engines.drivers.vllm import VllmDriver, salt_of
from tests.fakes.drivers import call
from tests.security.llamacpp import KEY, LlamaServer, worker_spec

WORDS = ("river", "stone", "apple", "cloud", "green", "house", "tiger", "paper", "north", "seven")
_PREAMBLE = 40  # tokens that every prompt of an endpoint has in common: the template's own words, no tenant's
_seeds = iter(range(10_000))


def secret(num_words: int = 60) -> str:
    """Return a text that no test has sent before."""
    words = random.Random(next(_seeds))
    return " ".join(words.choice(WORDS) for _ in range(num_words))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def llama() -> AsyncIterator[LlamaCppDriver]:
    """The driver of a real llama.cpp with four slots."""
    with LlamaServer() as server:
        assert await asyncio.to_thread(server.is_ready)
        driver = LlamaCppEngine().driver(worker_spec(), f"http://127.0.0.1:{server.port}", KEY)
        await driver.capabilities()
        yield driver
        await driver.close()


def asking(tenant: str, text: str, endpoint: Endpoint = Endpoint.CHAT, **more: Any) -> Call:
    """Return a call of the tenant with this prompt."""
    body: dict[str, Any] = {"model": "m", "temperature": 0, **more}
    match endpoint:
        case Endpoint.CHAT:
            body |= {"messages": [{"role": "user", "content": text}], "max_tokens": 2}
        case Endpoint.MESSAGES:
            body |= {"messages": [{"role": "user", "content": text}], "max_tokens": 2}
        case Endpoint.COMPLETIONS:
            body |= {"prompt": text, "max_tokens": 2}
        case Endpoint.RESPONSES:
            body |= {"input": text, "max_output_tokens": 2}
        case Endpoint.EMBEDDINGS:
            body |= {"input": text}
    return call(tenant=tenant, endpoint=endpoint, stream=False, body=body)


async def ask(driver: LlamaCppDriver, asked: Call) -> Usage:
    usage = None
    async for chunk in driver.run(asked):
        usage = chunk.usage or usage
    assert usage is not None
    return usage


async def num_cached(driver: LlamaCppDriver, *given: Any, **more: Any) -> int:
    return (await ask(driver, asking(*given, **more))).cached_tokens


@pytest.mark.parametrize("endpoint", [Endpoint.CHAT, Endpoint.COMPLETIONS, Endpoint.RESPONSES])
@pytest.mark.asyncio(loop_scope="module")
async def test_the_second_tenant_that_sends_a_prompt_finds_nothing_of_it_cached(
    llama: LlamaCppDriver, endpoint: Endpoint
) -> None:
    text = secret()
    assert await num_cached(llama, "one", text, endpoint) <= _PREAMBLE
    assert await num_cached(llama, "one", text, endpoint) > _PREAMBLE
    assert await num_cached(llama, "two", text, endpoint) <= _PREAMBLE
    assert await num_cached(llama, "two", text, endpoint) > _PREAMBLE
    assert await num_cached(llama, "one", text, endpoint) > _PREAMBLE  # and the first has lost nothing by it


@pytest.mark.asyncio(loop_scope="module")
async def test_a_prompt_that_has_lost_its_slot_is_nowhere_else(llama: LlamaCppDriver) -> None:
    text = secret()
    await ask(llama, asking("one", text))
    for number in range(4):
        await ask(llama, asking(f"passer-by-{number}", "hello"))
    for tenant in ("two", "one"):
        assert await num_cached(llama, tenant, text) <= _PREAMBLE


@pytest.mark.asyncio(loop_scope="module")
async def test_what_prompts_of_a_tenant_begin_with_is_kept_for_that_tenant_alone(llama: LlamaCppDriver) -> None:
    system, *ends = secret(), secret(4), secret(4), secret(4), secret(4)
    for end in ends[:2]:
        await ask(llama, asking("one", f"{system} {end}"))
    for number in range(4):
        await ask(llama, asking(f"passer-by-{number}", "hello"))
    assert await num_cached(llama, "two", f"{system} {ends[2]}") <= _PREAMBLE
    assert await num_cached(llama, "one", f"{system} {ends[3]}") > _PREAMBLE


@pytest.mark.asyncio(loop_scope="module")
async def test_one_prompt_that_others_begin_like_is_in_as_many_slots_as_run_them(llama: LlamaCppDriver) -> None:
    system = secret()
    await ask(llama, asking("one", f"{system} {secret(4)}"))
    cached = await asyncio.gather(*(num_cached(llama, "one", f"{system} {secret(4)}") for _ in range(4)))
    assert min(cached) > _PREAMBLE


@pytest.mark.parametrize("more", [{"n": 2}, {"cache_prompt": True, "id_slot": 0}, {"cache_prompt": True, "id_slot": 3}])
@pytest.mark.asyncio(loop_scope="module")
async def test_several_choices_and_a_clients_own_slot_change_nothing(llama: LlamaCppDriver, more: Any) -> None:
    text = secret()
    await ask(llama, asking("one", text, **more))
    cached = [await num_cached(llama, tenant, text, **more) for tenant in ("two", "three", "four", "five")]
    assert max(cached) <= _PREAMBLE
    assert await num_cached(llama, "five", text, **more) > _PREAMBLE


@pytest.mark.parametrize("endpoint", [Endpoint.MESSAGES, Endpoint.EMBEDDINGS])
@pytest.mark.asyncio(loop_scope="module")
async def test_what_cannot_be_placed_is_neither_served_from_a_cache_nor_left_in_one(
    llama: LlamaCppDriver, endpoint: Endpoint
) -> None:
    text = secret()
    for tenant in ("one", "two", "three", "four"):
        await ask(llama, asking(tenant, "hello"))
    for _ in range(2):
        assert await num_cached(llama, "one", text, endpoint) == 0
    placed = Endpoint.CHAT if endpoint is Endpoint.MESSAGES else Endpoint.COMPLETIONS
    for tenant in ("two", "three", "four", "five"):
        assert await num_cached(llama, tenant, text, placed) <= _PREAMBLE


@pytest.mark.asyncio(loop_scope="module")
async def test_by_the_clock_a_strangers_prompt_is_like_a_new_one_and_ones_own_is_not(llama: LlamaCppDriver) -> None:
    text = secret(100)

    async def seconds(tenant: str, prompt: str) -> float:
        started = time.perf_counter()
        await ask(llama, asking(tenant, prompt))
        return time.perf_counter() - started

    await seconds("one", text)
    fresh, strangers, own = await seconds("two", secret(100)), await seconds("three", text), await seconds("one", text)
    assert own < strangers / 2
    assert own < fresh / 2


@pytest.mark.asyncio(loop_scope="module")
async def test_tenants_that_press_at_once_find_only_their_own(llama: LlamaCppDriver) -> None:
    """Eight at a time on four slots: more than a scheduler would let in."""
    shared = secret()
    cached = await asyncio.gather(*(num_cached(llama, f"tenant-{number}", shared) for number in range(8)))
    assert max(cached) <= _PREAMBLE


# --- by salt


@pytest_asyncio.fixture
async def heard() -> AsyncIterator[tuple[str, list[dict[str, Any]]]]:
    """An engine that notes what it is asked."""
    bodies: list[dict[str, Any]] = []

    async def answer(request: web.Request) -> web.Response:
        bodies.append(msgspec.json.decode(await request.read()))
        return web.json_response({"choices": []})

    app = web.Application()
    app.router.add_post("/{path:.*}", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}", bodies
    await runner.cleanup()


INTERNAL: dict[str, Any] = {
    "id_slot": 1, "slot_id": 1, "cache_prompt": True, "cache_salt": "mine", "kv_transfer_params": {"do_remote": True},
    "vllm_xargs": {"kv_transfer_params": {}}, "lora": [{"id": 0, "scale": 1}], "lora_path": "/etc", "request_id": "x",
    "custom_logit_processor": "80049", "bootstrap_host": "10.0.0.1", "data_parallel_rank": 1,
}  # fmt: skip


@pytest.mark.parametrize("endpoint", list(Endpoint))
async def test_every_request_to_vllm_has_its_tenants_salt_whatever_the_client_says(
    heard: tuple[str, list[dict[str, Any]]], endpoint: Endpoint
) -> None:
    url, bodies = heard
    driver = VllmDriver(url, KEY, served_name="m")
    for tenant in ("one", "two", "one"):
        async for _ in driver.run(asking(tenant, "hello", endpoint, **INTERNAL)):
            pass
    await driver.close()

    salts = [body.pop("cache_salt") for body in bodies]
    assert salts[0] == salts[2] != salts[1]
    assert "one" not in salts[0]
    assert not any(set(body) & set(INTERNAL) for body in bodies)


async def test_fields_that_steer_an_engine_reach_no_foreign_one(heard: tuple[str, list[dict[str, Any]]]) -> None:
    url, bodies = heard
    driver = OpenAIDriver(url, KEY)
    async for _ in driver.run(asking("one", "hello", seed=7, **INTERNAL)):
        pass
    await driver.close()
    assert not set(bodies[0]) & set(INTERNAL)
    assert bodies[0]["seed"] == 7


def test_the_salt_of_a_tenant_cannot_be_computed_without_the_engines_key() -> None:
    one = TenantId("one")
    assert salt_of(one, b"a") == salt_of(one, b"a")
    assert len({salt_of(one, b"a"), salt_of(one, b"b"), salt_of(TenantId("two"), b"a")}) == 3
    assert len(salt_of(one, b"a")) <= 128  # all that vLLM takes
