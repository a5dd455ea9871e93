"""The ways in which an application can be carried out, from a loop in a script to a workflow of ours."""

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from benchmarks.dataflow.clients import Placing, Target
from benchmarks.dataflow.delay import away
from benchmarks.dataflow.engines import Running, Stand, model_of, worker_of
from benchmarks.loopback.processes import Failed
from tests.fakes.gateway import GatewayProcess

Client = Literal["sequential", "good", "langgraph", "forebay"]
Tuning = Literal["throughput", "latency"]
MODEL = "m"
_READY_S = 60.0
_PATIENCE_S = 1800  # nobody is to be turned away for having waited: waits are what is measured


@dataclass(frozen=True)
class Arm:
    """One way. ``settings``: sections of the gateway's settings that differ from those that it comes with; ``tuning``:
    which slots the engine is given; ``has_labels``: requests tell the gateway of their session, program and run."""

    name: str
    note: str
    client: Client
    uses_gateway: bool = False
    placing: Placing = "round_robin"
    tuning: Tuning = "throughput"
    has_labels: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)


MECHANISMS = (
    ("workflows", "objectives"),
    ("fairness", "run_order"),
    ("fairness", "focus"),
    ("fairness", "affinity"),
    ("fairness", "waves"),
    ("workflows", "eager_prefill"),
)
"""What can be switched of how workflows are scheduled, in the order in which the ladder adds it."""


def _ours(number: int, note: str) -> Arm:
    """Return the arm of the ladder that has the first ``number - 1`` mechanisms."""
    settings: dict[str, dict[str, bool]] = {}
    for index, (section, name) in enumerate(MECHANISMS):
        settings.setdefault(section, {})[name] = index < number - 1
    return Arm(f"g{number}", note, "forebay", uses_gateway=True, settings=settings)


OURS, GOOD = "forebay", "good"
ARMS: Mapping[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("sequential", "one call after the other, directly to the engine", "sequential"),
        Arm(GOOD, "all calls as soon as they can be, directly to the engine; engines in turn", "good"),
        Arm("good-affinity", "the same; a session's calls go to one engine", "good", placing="affinity"),
        Arm("good-latency", "the same as `good`; the engine has few slots", "good", tuning="latency"),
        Arm("good-gateway", "the same as `good`, through Forebay, which knows nothing of it", "good", True),
        Arm("good-labels", "the same, and requests tell session, program and run", "good", True, has_labels=True),
        Arm("langgraph", "LangGraph and langchain-openai, directly to the engine; engines in turn", "langgraph"),
        Arm("langgraph-affinity", "the same; a session's calls go to one engine", "langgraph", placing="affinity"),
        _ours(1, "Forebay's workflows without any mechanism of their scheduling: the graph at the server alone"),
        _ours(2, "and the scheduler is told what the graph says (`objectives`)"),
        _ours(3, "and runs end one after another (`run_order`)"),
        _ours(4, "and not beside each other where an engine gains little by that (`focus`)"),
        _ours(5, "and prompts go where their beginning lies in a cache (`affinity`)"),
        _ours(6, "and one leg computes what others begin with (`waves`)"),
        Arm(OURS, "Forebay's workflows as they come: all that, and `eager_prefill`", "forebay", True),
    )
}


@contextlib.asynccontextmanager
async def opened(arm: Arm, stand: Stand, engines: Sequence[Running], rtt_ms: float) -> AsyncIterator[Target]:
    """Start what stands before the engines, and yield where the client sends its requests.

    The network lies between the client and what it talks to; gateway and engines stand together.
    """
    if not arm.uses_gateway:
        async with away(rtt_ms, [engine.port for engine in engines]) as ports:
            urls = tuple(f"http://127.0.0.1:{port}" for port in ports)
            yield Target(urls, model_of(stand.kind), engines[0].key)
        return
    key = f"fbk_{secrets.token_urlsafe(32)}"
    gateway = GatewayProcess(
        {MODEL: {"workers": [worker_of(stand, engine) for engine in engines]}},
        keys=[{"name": "apps", "tenant": "apps", "key": key}],
        timeouts=dict.fromkeys(("queue", "first_token", "idle", "total"), _PATIENCE_S),
        log={"level": "warning"},
        **arm.settings,
    )
    async with gateway, away(rtt_ms, [gateway.port]) as ports:
        await _all_ready(gateway)
        chat = {"forebay": {"class": "interactive"}}
        yield Target((f"http://127.0.0.1:{ports[0]}",), MODEL, key, chat)


async def _all_ready(gateway: GatewayProcess) -> None:
    """Wait until every worker is ready: the gateway is when one of them is. Raises `Failed`."""
    states: list[str] = []
    for _ in range(int(_READY_S / 0.1)):
        workers = (await gateway.admin("GET", "/admin/v1/workers"))["data"]
        states = [worker["state"] for worker in workers]
        if all(state == "ready" for state in states):
            return
        await asyncio.sleep(0.1)
    raise Failed(f"the gateway's workers are {', '.join(states)} after {_READY_S:g} s")
