"""The tenants and keys that the settings declare, as the same values that the database holds."""

import hashlib
from collections.abc import Iterable

from pydantic import SecretStr

from core.chat import Endpoint
from core.ids import ModelName, TenantId
from core.tenancy import PICO_PER_USD, Budget, Ceilings, Key, Price, Rate, Tenant
from gateway.settings import (
    BudgetSettings,
    CeilingSettings,
    KeySettings,
    PriceSettings,
    RateSettings,
    Settings,
    TenantSettings,
)
from routing.catalog import Catalog

ENDPOINTS = {endpoint.name.lower(): endpoint for endpoint in Endpoint}
"""The routes of an allow-list, by the name that settings and the admin API use."""

_PICO_PER_TOKEN = PICO_PER_USD // 1_000_000  # at one dollar per million tokens


def declared_tenants(settings: Settings, catalog: Catalog) -> tuple[Tenant, ...]:
    """Return every tenant that the file declares, or names in a key."""
    named = {key.tenant: TenantSettings() for key in settings.keys if key.role is None}
    return tuple(_tenant(name, spec, settings, catalog) for name, spec in {**named, **settings.tenants}.items())


def declared_keys(settings: Settings, catalog: Catalog) -> tuple[Key, ...]:
    """Return every key that the file declares; aliases in allow-lists stand for their models."""
    return tuple(_key(key, catalog) for key in settings.keys)


def price_of(settings: PriceSettings) -> Price:
    """Return a model's price in picodollars per token."""
    cached = settings.cached_input
    return Price(
        input=round(settings.input * _PICO_PER_TOKEN),
        output=round(settings.output * _PICO_PER_TOKEN),
        cached_input=None if cached is None else round(cached * _PICO_PER_TOKEN),
    )


def rate_of(settings: RateSettings) -> Rate:
    """Return limits as decisions know them."""
    return Rate(rpm=settings.rpm, tpm=settings.tpm, parallel=settings.parallel)


def ceilings_of(settings: CeilingSettings) -> Ceilings:
    """Return the largest request as decisions know it."""
    return Ceilings(
        body=settings.body,
        depth=settings.depth,
        prompt_tokens=settings.prompt_tokens,
        choices=settings.choices,
        top_logprobs=settings.top_logprobs,
        schema=settings.schema_size,
        pattern=settings.pattern,
        grammars=settings.grammars,
    )


def budgets_of(settings: Iterable[BudgetSettings]) -> tuple[Budget, ...]:
    """Return budgets in tokens and picodollars."""
    return tuple(
        Budget(amount=budget.tokens, unit="tokens", period=budget.per)
        if budget.tokens is not None
        else Budget(amount=round((budget.usd or 0) * PICO_PER_USD), unit="usd", period=budget.per)
        for budget in settings
    )


def models_of(names: Iterable[str], catalog: Catalog) -> frozenset[ModelName] | None:
    """Return the models of an allow-list, aliases resolved; None for ``*``. Names that are no models stand for none."""
    wanted = tuple(names)
    if "*" in wanted:
        return None
    return frozenset(model.name for name in wanted if (model := catalog.find(name)) is not None)


def endpoints_of(names: Iterable[str]) -> frozenset[Endpoint] | None:
    """Return the routes of an allow-list; None for ``*``."""
    wanted = tuple(names)
    return None if "*" in wanted else frozenset(ENDPOINTS[name] for name in wanted if name in ENDPOINTS)


def _tenant(name: str, spec: TenantSettings, settings: Settings, catalog: Catalog) -> Tenant:
    return Tenant(
        id=TenantId(name),
        is_suspended=spec.suspended,
        models=models_of(spec.models, catalog),
        endpoints=endpoints_of(spec.endpoints),
        rate=rate_of(spec.limits or settings.defaults.limits),
        budgets=budgets_of(spec.budgets),
        end_user=rate_of(spec.end_users.limits),
        end_user_budgets=budgets_of(spec.end_users.budgets),
        ceilings=ceilings_of(spec.ceilings or settings.defaults.ceilings),
        max_class=spec.max_class,
        weight=spec.weight,
    )


def _key(spec: KeySettings, catalog: Catalog) -> Key:
    digest = bytes.fromhex(spec.sha256) if spec.sha256 else _digest(spec.key)
    return Key(
        id=f"file:{spec.name}",
        name=spec.name,
        tenant=TenantId(spec.tenant),
        digest=digest,
        role=spec.role,
        models=models_of(spec.models, catalog),
        endpoints=endpoints_of(spec.endpoints),
        rate=rate_of(spec.limits),
        budgets=budgets_of(spec.budgets),
        max_class=spec.max_class,
        expires_at=spec.expires_at.timestamp() if spec.expires_at else None,
    )


def _digest(secret: SecretStr | None) -> bytes:
    assert secret is not None  # the settings have checked that there is one of the two
    return hashlib.sha256(secret.get_secret_value().encode()).digest()
