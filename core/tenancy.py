"""Who may use what, how much of it, and what it costs."""

from typing import Literal

import msgspec

from core.chat import Class, Endpoint, Usage
from core.ids import ModelName, TenantId

Role = Literal["viewer", "operator", "policy", "admin"]
"""What a key may do on the admin port: look; also steer workers; also change policies and settings; everything."""

Unit = Literal["tokens", "usd"]
Period = Literal["day", "week", "month", "total"]
"""Budgets start anew at midnight UTC, on Mondays, on the first of the month, or never."""

PICO_PER_USD = 10**12


class Rate(msgspec.Struct, frozen=True, omit_defaults=True):
    """Limits: requests and tokens in any 60 seconds, answers open at a time. None: no limit."""

    rpm: int | None = None
    tpm: int | None = None
    parallel: int | None = None


class Budget(msgspec.Struct, frozen=True):
    """What may be used up in one period. ``amount``: tokens, or picodollars."""

    amount: int
    unit: Unit
    period: Period


class Ceilings(msgspec.Struct, frozen=True, omit_defaults=True):
    """The largest request that is taken. ``prompt_tokens`` bounds the estimated prompts in flight at a time;
    ``grammars``: whether free grammars are taken, whose cost to an engine nobody can tell beforehand."""

    body: int = 32 * 2**20
    depth: int = 64
    prompt_tokens: int = 16_000_000
    choices: int = 16
    top_logprobs: int = 20
    schema: int = 64 * 2**10
    pattern: int = 512
    grammars: bool = False


class Price(msgspec.Struct, frozen=True):
    """What one token costs, in picodollars: 1 USD per million tokens is 1,000,000 of them."""

    input: int = 0
    output: int = 0
    cached_input: int | None = None

    def cost(self, usage: Usage) -> int:
        """Return the price of what was used; the cached part of the prompt has a price of its own, if one is set."""
        cached = min(usage.cached_tokens, usage.prompt_tokens)
        cached_price = self.input if self.cached_input is None else self.cached_input
        prompt = (usage.prompt_tokens - cached) * self.input + cached * cached_price
        return prompt + usage.completion_tokens * self.output


class Tenant(msgspec.Struct, frozen=True):
    """A customer of this gateway. ``models`` and ``endpoints`` None: all. ``end_user``: limits of each end user that
    the tenant names in its requests; ``end_user_budgets``: likewise. ``weight``: its share of an engine, beside those
    of the others that want it."""

    id: TenantId
    is_suspended: bool = False
    models: frozenset[ModelName] | None = None
    endpoints: frozenset[Endpoint] | None = None
    rate: Rate = Rate()
    budgets: tuple[Budget, ...] = ()
    end_user: Rate = Rate()
    end_user_budgets: tuple[Budget, ...] = ()
    ceilings: Ceilings = Ceilings()
    max_class: Class = "interactive"
    weight: float = 1.0

    @property
    def tells_end_users_apart(self) -> bool:
        """Whether each end user has limits of their own."""
        return bool(self.end_user_budgets) or self.end_user != Rate()


class Key(msgspec.Struct, frozen=True):
    """A secret that stands for a tenant, or, with a ``role``, for an operator. ``digest``: its SHA-256; ``prefix``:
    what is shown of it. Times are Unix seconds."""

    id: str
    name: str
    tenant: TenantId
    digest: bytes
    prefix: str = ""
    role: Role | None = None
    models: frozenset[ModelName] | None = None
    endpoints: frozenset[Endpoint] | None = None
    rate: Rate = Rate()
    budgets: tuple[Budget, ...] = ()
    max_class: Class = "interactive"
    expires_at: float | None = None
    revoked_at: float | None = None
    created_at: float = 0.0


class Stored(msgspec.Struct, frozen=True):
    """Tenants and keys of one source, all of them. ``version`` is another one after every change."""

    version: int
    tenants: tuple[Tenant, ...]
    keys: tuple[Key, ...]
