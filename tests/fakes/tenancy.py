"""Tenants, keys and principals for tests."""

from collections.abc import Iterable
from typing import Any

from core.ids import ModelName, TenantId
from core.tenancy import Key, Tenant
from gateway.auth import Principal, digest_of


def tenant(name: str = "acme", **more: Any) -> Tenant:
    return Tenant(id=TenantId(name), **more)


def key(secret: str = "fbk_0123456789abcdefghij", **more: Any) -> Key:
    return Key(**{"id": "k", "name": "k", "tenant": TenantId("acme"), "digest": digest_of(secret.encode()), **more})


def principal(models: Iterable[ModelName] | None = None, *, of: Tenant | None = None, **more: Any) -> Principal:
    """Return a caller whose key may use `models`, by default all of them."""
    allowed = None if models is None else frozenset(models)
    owner = of or tenant()
    return Principal.of(key(models=allowed, tenant=owner.id, **more), owner)
