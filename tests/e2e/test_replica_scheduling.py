"""Three gateways share four engines as one scheduler would: bounds, turns, and whatever dies among them."""

import asyncio
import contextlib
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from typing import Any, NamedTuple

import httpx
import pytest
import pytest_asyncio

from tests.e2e.asking import Answer, ask, event_of, until
from tests.e2e.loading import CHAT, chat
from tests.fakes.engine import FakeEngine
from tests.fakes.gateway import GatewayProcess
from tests.fakes.redis import RedisServer

pytestmark = pytest.mark.asyncio(loop_scope="module")

SLOTS, TOKENS, ITL_MS = 2, 16, 25
ANSWER_S = TOKENS * ITL_MS / 1000
TAKE_OVER_S = 3.0
MARGIN_S = 1.0  # for a machine that is busy with other things
KEYS = {"heavy": "fbk_one-and-the-same-for-all-heavy-tenants", "light": "fbk_one-and-the-same-for-all-light-tenants"}


class Cluster(NamedTuple):
    """Gateways, the Redis they share, and the engines they share: the last one is another model's."""

    gateways: list[GatewayProcess]
    redis: RedisServer
    engines: list[FakeEngine]

    async def role(self, gateway: GatewayProcess, model: str) -> str:
        async with httpx.AsyncClient(trust_env=False, timeout=5.0) as http:
            role: str = (await http.get(gateway.url + "/health")).json()["scheduling"]["models"].get(model, "")
            return role

    async def roles(self, model: str = "fake") -> list[str]:
        return [await self.role(gateway, model) for gateway in self.gateways]

    async def holder(self, model: str = "fake") -> GatewayProcess:
        """Wait until one gateway leads and the others follow, and return that one."""
        wanted = ["following"] * (len(self.gateways) - 1) + ["leading"]
        found: list[str] = []

        async def is_so() -> bool:
            found[:] = await self.roles(model)
            return sorted(found) == wanted

        await until(is_so, "one gateway leads and the others follow")
        return self.gateways[found.index("leading")]

    async def served(self) -> Counter[str]:
        """Return how often each prompt came to an engine; each remembers its last 64."""
        seen: Counter[str] = Counter()
        for engine in self.engines:
            for request in (await engine.stats())["requests"]:
                if isinstance(request["body"], dict) and "messages" in request["body"]:
                    seen[request["body"]["messages"][0]["content"]] += 1
        return seen

    async def most_at_once(self) -> int:
        counts: list[int] = [(await engine.stats())["max_in_flight"] for engine in self.engines]
        return max(counts)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def whole() -> AsyncIterator[Cluster]:
    async with AsyncExitStack() as stack:
        redis = stack.enter_context(RedisServer())
        plain: dict[str, Any] = {"model": "fake", "tokens": TOKENS, "itl_ms": ITL_MS}
        kinds = [*[plain] * 4, {"model": "able", "slots": SLOTS, "tokens": 200, "itl_ms": 10}]
        *engines, able = await asyncio.gather(*(stack.enter_async_context(FakeEngine(**kind)) for kind in kinds))
        workers = [{"engine": "openai", "url": engine.url + "/v1", "max_inflight": SLOTS} for engine in engines]
        models = {
            "fake": {"workers": workers},
            "able": {"workers": [{"engine": "vllm", "url": able.url + "/v1", "max_inflight": SLOTS}]},
        }
        sections: dict[str, Any] = {
            "keys": [{"name": name, "tenant": name, "key": key} for name, key in KEYS.items()],
            "redis": {"url": redis.url, "replicas": 3, "scheduling": "shared"},
            "fairness": {"threshold": 50, "quantum": 8, "waste_share": 1.0},
        }
        gateways = [GatewayProcess(models, **sections) for _ in range(3)]
        for gateway in gateways:
            stack.push_async_callback(gateway.aclose)
            gateway.launch()
        await asyncio.gather(*(gateway.until_ready() for gateway in gateways))
        yield Cluster(gateways, redis, [*engines, able])


@pytest_asyncio.fixture(loop_scope="module")
async def cluster(whole: Cluster) -> Cluster:
    """The same cluster for every test, less what the last one killed, and nothing counted.

    A gateway takes seconds to start: so tests that kill one come last, and what they leave is enough for the next.
    """
    whole.gateways[:] = [gateway for gateway in whole.gateways if gateway.returncode is None]
    await whole.holder()
    for engine in whole.engines:
        await engine.until(in_flight=0)
        await engine.reset()
    return Cluster(list(whole.gateways), whole.redis, whole.engines)


class Asked(NamedTuple):
    """One request: its prompt, how it was answered (None: the gateway has died), and after how many seconds."""

    prompt: str
    answer: Answer | None
    seconds: float


async def send(
    gateway: GatewayProcess,
    prompt: str,
    tenant: str = "heavy",
    *,
    model: str = "fake",
    stream: bool = False,
    length: int = TOKENS,
) -> Asked:
    began = time.monotonic()
    body = chat(model=model, messages=[{"role": "user", "content": prompt}], max_tokens=length, stream=stream)
    answer: Answer | None = None
    with contextlib.suppress(OSError, EOFError, ValueError):  # the last: cut between two chunks
        answer = await ask(gateway, CHAT, body, key=KEYS[tenant])
    return Asked(prompt, answer, time.monotonic() - began)


def crowd(gateways: Sequence[GatewayProcess], count: int, name: str) -> list[asyncio.Task[Asked]]:
    """Ask everywhere at once, every other request as a stream."""
    return [
        asyncio.create_task(send(gateways[i % len(gateways)], f"{name} {i}", stream=i // len(gateways) % 2 == 0))
        for i in range(count)
    ]


def assert_good(asked: Sequence[Asked]) -> None:
    for one in asked:
        assert one.answer is not None, one
        assert one.answer.status == 200, one
        if one.answer.headers["content-type"].startswith("text/event-stream"):
            assert not one.answer.errors
            assert one.answer.events[-1] == b"data: [DONE]"


async def test_slots_are_counted_once_and_tenants_take_turns_wherever_they_ask(cluster: Cluster) -> None:
    heavy = crowd(cluster.gateways, 48, "heavy")
    await asyncio.sleep(0.1)
    light = [await send(cluster.gateways[i % 3], f"light {i}", "light") for i in range(6)]
    answered = [await task for task in heavy]
    assert_good(answered + light)
    assert await cluster.most_at_once() == SLOTS
    assert set((await cluster.served()).values()) == {1}
    assert sum((await cluster.served()).values()) == 54
    worst_light = max(one.seconds for one in light)
    assert worst_light < 2 * ANSWER_S + MARGIN_S, "it waits for one answer, not for the crowd"
    assert max(one.seconds for one in answered) > 5 * ANSWER_S

    async def is_told() -> bool:
        told = [await gateway.admin("GET", "/admin/v1/fairness/fake") for gateway in cluster.gateways]
        shares = [{share["tenant"]: share["attained"] for share in one["shares"]} for one in told]
        return len({one["holder"] for one in told}) == 1 and shares == [shares[0]] * 3 and len(shares[0]) == 2

    await until(is_told, "each knows from the one that decides what tenants have had")


async def test_a_stream_of_one_gateway_is_cut_for_a_tenant_of_another_and_goes_on_whole(cluster: Cluster) -> None:
    holder = await cluster.holder("able")
    follower = next(gateway for gateway in cluster.gateways if gateway is not holder)

    async def long(gateway: GatewayProcess) -> Asked:
        return await send(gateway, "the same for all", model="able", length=200, stream=True)

    undisturbed = await long(holder)
    for hogs, lights in ((follower, holder), (holder, follower)):
        asked = [asyncio.create_task(long(hogs)) for _ in range(SLOTS)]
        await asyncio.sleep(0.8)
        light = await send(lights, "short", "light", model="able", length=8)
        assert not any(task.done() for task in asked), "it did not wait for their end"
        heavy = [await task for task in asked]
        assert_good([light, *heavy])
        assert [text_of(one) for one in heavy] == [text_of(undisturbed)] * SLOTS
        assert await cluster.most_at_once() <= SLOTS


async def test_without_redis_each_goes_on_alone_and_returns_when_it_is_back(cluster: Cluster) -> None:
    first = crowd(cluster.gateways, 20, "before")
    await asyncio.sleep(ANSWER_S / 2)
    cluster.redis.kill()

    async def are_alone() -> bool:
        return await cluster.roles() == ["alone"] * 3

    assert await until(are_alone, "each decides alone") < TAKE_OVER_S + MARGIN_S
    during = crowd(cluster.gateways, 20, "during")
    assert_good([await task for task in first])
    cluster.redis.start()
    after = crowd(cluster.gateways, 20, "after")
    await cluster.holder()
    assert_good([await task for task in during + after])
    assert set((await cluster.served()).values()) == {1}
    assert sum((await cluster.served()).values()) == 60
    assert await cluster.most_at_once() <= SLOTS + len(cluster.gateways), "each adds its share at most"
    for engine in cluster.engines:
        await engine.reset()
    assert_good([await task for task in crowd(cluster.gateways, 24, "again")])
    assert await cluster.most_at_once() == SLOTS


async def test_a_paused_holder_is_replaced_and_does_no_harm_when_it_wakes(cluster: Cluster) -> None:
    holder = await cluster.holder()
    others = [gateway for gateway in cluster.gateways if gateway is not holder]
    asked = crowd(others, 24, "others")
    await asyncio.sleep(ANSWER_S / 2)
    os.kill(holder.pid, signal.SIGSTOP)
    try:
        answered = [await task for task in asked]
    finally:
        os.kill(holder.pid, signal.SIGCONT)
    assert_good(answered)
    late = crowd(cluster.gateways, 24, "late")
    assert_good([await task for task in late])
    await cluster.holder()
    assert await cluster.most_at_once() <= SLOTS
    assert set((await cluster.served()).values()) == {1}


async def test_a_killed_holder_is_followed_within_three_seconds_and_nothing_is_lost(cluster: Cluster) -> None:
    holder = await cluster.holder()
    others = [gateway for gateway in cluster.gateways if gateway is not holder]
    asked = crowd(others, 24, "others") + crowd([holder], 6, "holder")
    await asyncio.sleep(ANSWER_S / 2)
    holder.kill()
    killed_at = time.monotonic()
    cluster.gateways.remove(holder)
    new = await send(others[0], "after", "light")
    assert_good([new])
    assert time.monotonic() - killed_at < TAKE_OVER_S + 2 * ANSWER_S + MARGIN_S
    answered = [await task for task in asked]
    assert_good([one for one in answered if one.prompt.startswith("others")])
    assert await cluster.most_at_once() <= SLOTS
    assert set((await cluster.served()).values()) == {1}, "nothing runs twice"


async def test_slots_of_another_killed_gateway_are_given_to_those_that_live(cluster: Cluster) -> None:
    holder = await cluster.holder()
    lost = next(gateway for gateway in cluster.gateways if gateway is not holder)
    dying = crowd([lost], 16, "dying")
    await asyncio.sleep(ANSWER_S / 2)
    lost.kill()
    cluster.gateways.remove(lost)
    began = time.monotonic()
    assert_good([await task for task in crowd(cluster.gateways, 16, "living")])
    assert time.monotonic() - began < TAKE_OVER_S + 4 * ANSWER_S + MARGIN_S
    assert all(task.answer is None for task in [await task for task in dying])
    assert await cluster.most_at_once() <= SLOTS
    for engine in cluster.engines:
        await engine.until(in_flight=0)


def text_of(asked: Asked) -> str:
    """Return what a stream said."""
    assert asked.answer is not None
    choices = [event["choices"] for frame in asked.answer.events if (event := event_of(frame)) is not None]
    return "".join(choice["delta"].get("content") or "" for some in choices for choice in some)
