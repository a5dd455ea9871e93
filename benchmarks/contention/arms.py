"""The ways in which tenants may share llama.cpp's slots: the engine's own, what operators use today, and ours."""

import contextlib
import secrets
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, field

import psutil

from benchmarks.contention.llamacpp import MODEL, llamacpp, pin, weights
from benchmarks.contention.replay import Target
from tests.fakes.gateway import GatewayProcess, launched_llamacpp

SLOTS, CONTEXT = 4, 1024
_PATIENCE_S = 1800  # nobody is to be turned away for having waited: waits are what is measured
_SERVER = "engines.drivers.llamacpp_server"


@dataclass(frozen=True)
class Arm:
    """One way. Without a policy, requests go straight to the engine. ``limits`` hold for every tenant alike."""

    name: str
    note: str
    policy: str = ""
    limits: Mapping[str, int] = field(default_factory=dict)


ARMS = (
    Arm("engine", "llama.cpp alone, started with the same flags: first come, first served"),
    Arm("fcfs", "Forebay, policy fcfs", "fcfs"),
    Arm("cap", "Forebay, policy fcfs, and each tenant has at most half of the slots", "fcfs", {"parallel": SLOTS // 2}),
    Arm("tpm", "Forebay, policy fcfs, and each tenant has 2,400 tokens a minute, half of all", "fcfs", {"tpm": 2400}),
    Arm("drr", "Forebay, policy drr", "drr"),
    Arm("vtc", "Forebay, policy vtc", "vtc"),
    Arm("vtc-pc", "Forebay, policy vtc-pc as it comes", "vtc-pc"),
)  # fmt: skip


@contextlib.asynccontextmanager
async def opened(arm: Arm, tenants: Iterable[str], core: int) -> AsyncIterator[Target]:
    """Start gateway and engine afresh, the engine on ``core`` alone, and yield where to send the tenants' requests."""
    if not arm.policy:
        async with llamacpp(slots=SLOTS, context=CONTEXT) as engine:
            pin([engine.pid], core)
            yield Target(engine.url, MODEL, dict.fromkeys(tenants, engine.key))
        return
    keys = {tenant: f"fbk_{secrets.token_urlsafe(32)}" for tenant in tenants}
    model = launched_llamacpp(weights(), slots=SLOTS, context=CONTEXT) | {"fairness": {"policy": arm.policy}}
    gateway = GatewayProcess(
        {MODEL: model},
        keys=[{"name": tenant, "tenant": tenant, "key": key} for tenant, key in keys.items()],
        defaults={"limits": dict(arm.limits)},
        timeouts=dict.fromkeys(("queue", "first_token", "idle", "total"), _PATIENCE_S),
    )
    async with gateway:
        engines = [process for process in gateway.descendants() if _SERVER in _argv(process)]
        pin([process.pid for process in engines], core)
        yield Target(gateway.url, MODEL, keys)


def _argv(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return []
