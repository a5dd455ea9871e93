"""Keys: who calls, and what they may use. All hashes are in memory; nothing is asked of anybody."""

import hashlib
import hmac
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import msgspec

from core.chat import CLASSES, Class, Endpoint
from core.errors import EndpointNotAllowed, InvalidKey, KeysUnavailable, ModelNotAllowed, TenantSuspended
from core.ids import ModelName, TenantId
from core.tenancy import Budget, Key, Role, Tenant

PREFIX = "fbk_"

Item = TypeVar("Item")

_NO_KEY = "no API key was sent: put it into the header 'Authorization: Bearer <key>'"
_REVOKED = "this API key has been revoked; ask whoever gave it to you for a new one"
_EXPIRED = "this API key has expired; ask whoever gave it to you for a new one"
_UNKNOWN_KEY = "this API key is not known here; `forebay keys show-local` prints the one of a local gateway"


def new_key() -> str:
    """Return a fresh key of 256 random bits."""
    return PREFIX + secrets.token_urlsafe(32)


def digest_of(key: bytes) -> bytes:
    """Return what is kept of a key: its SHA-256."""
    return hashlib.sha256(key).digest()


def new_admin_key() -> str:
    """Return a fresh key for the admin port: 256 random bits."""
    return "fba_" + secrets.token_urlsafe(32)


class EmptyKeyFile(Exception):
    """A file that should hold a key holds none."""


def keep_key(path: Path, make: Callable[[], str]) -> str:
    """Return the key in the file; the first caller makes it, readable by its owner alone.

    Two processes that start at once get the same key, and nobody ever sees half of one. Raises ``OSError`` and
    ``EmptyKeyFile``.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not path.exists():
        _write_once(path, make())
    if path.stat().st_mode & 0o077:
        path.chmod(0o600)
    key = path.read_text(encoding="utf-8").strip()
    if not key:
        raise EmptyKeyFile(f"{path} is empty; delete it and start again.")
    return key


def _write_once(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileExistsError):  # another process was first: its key stands
            os.link(draft, path)
    finally:
        draft.unlink()


class Principal(msgspec.Struct, frozen=True):
    """A caller of the data port: a key and its tenant, what both allow. ``models`` and ``endpoints`` None: all."""

    key: Key
    tenant_spec: Tenant
    tenant: TenantId
    models: frozenset[ModelName] | None
    endpoints: frozenset[Endpoint] | None
    max_class: Class

    @classmethod
    def of(cls, key: Key, tenant: Tenant) -> "Principal":
        """Return what the key may do: never more than its tenant."""
        return cls(
            key=key,
            tenant_spec=tenant,
            tenant=tenant.id,
            models=_both(key.models, tenant.models),
            endpoints=_both(key.endpoints, tenant.endpoints),
            max_class=max(key.max_class, tenant.max_class, key=CLASSES.index),
        )

    def may_use(self, model: ModelName) -> bool:
        """Whether the key's allow-list covers the model."""
        return self.models is None or model in self.models

    def check(self, model: ModelName) -> None:
        """Raise ``ModelNotAllowed`` unless the key may use the model."""
        if not self.may_use(model):
            raise ModelNotAllowed(f"this key may not use the model {str(model)!r}", param="model")

    def check_endpoint(self, endpoint: Endpoint) -> None:
        """Raise ``EndpointNotAllowed`` unless the key may use the route."""
        if self.endpoints is not None and endpoint not in self.endpoints:
            raise EndpointNotAllowed(f"this key may not use {endpoint.value}")


class Operator(msgspec.Struct, frozen=True):
    """A caller of the admin port."""

    name: str
    role: Role


class OwnedBudget(NamedTuple):
    """A budget, and whose it is: a tenant's or a key's (``subject``, ``id``); ``position``: which one of theirs."""

    subject: Literal["tenant", "key"]
    id: str
    tenant: TenantId
    position: int
    budget: Budget


_ROLES = ("viewer", "operator", "policy", "admin")


def covers(role: Role, needed: Role) -> bool:
    """Whether a role may do what another may."""
    return _ROLES.index(role) >= _ROLES.index(needed)


class Keyring:
    """All keys of one moment, by their hash. Immutable.

    ``is_complete``: the database has told all it knows. Without that a key that is not here may yet be good.
    """

    def __init__(self, tenants: Iterable[Tenant], keys: Iterable[Key], *, is_complete: bool = True) -> None:
        by_id = {tenant.id: tenant for tenant in tenants}
        self.tenants: Mapping[TenantId, Tenant] = by_id
        self.keys: Mapping[bytes, Key] = {key.digest: key for key in keys}
        self.is_complete = is_complete
        self._principals = {
            key.digest: Principal.of(key, by_id.get(key.tenant) or Tenant(id=key.tenant))
            for key in self.keys.values()
            if key.role is None
        }
        self._operators = {
            key.digest: Operator(key.name, key.role) for key in self.keys.values() if key.role is not None
        }

    @property
    def has_budgets(self) -> bool:
        """Whether anybody has a budget."""
        return any(tenant.budgets or tenant.end_user_budgets for tenant in self.tenants.values()) or any(
            key.budgets for key in self.keys.values()
        )

    def budgets(self) -> Iterator[OwnedBudget]:
        """Yield the budgets of all tenants and keys."""
        for tenant in self.tenants.values():
            for position, budget in enumerate(tenant.budgets):
                yield OwnedBudget("tenant", tenant.id, tenant.id, position, budget)
        for key in self.keys.values():
            for position, budget in enumerate(key.budgets):
                yield OwnedBudget("key", key.id, key.tenant, position, budget)

    def identify(self, headers: Mapping[bytes, bytes], now: float) -> Principal:
        """Return who sent these headers (``Authorization: Bearer``, ``x-api-key`` or ``api-key``).

        ``now`` is Unix time. Raises ``InvalidKey``, ``TenantSuspended``, or ``KeysUnavailable``.
        """
        digest = _digest_in(headers)
        principal = self._principals.get(digest)
        if principal is None or not hmac.compare_digest(principal.key.digest, digest):
            raise self._unknown()
        _check_validity(principal.key, now)
        if principal.tenant_spec.is_suspended:
            raise TenantSuspended(f"the tenant {str(principal.tenant)!r} is suspended; ask whoever runs this gateway")
        return principal

    def principal(self, key: str, now: float) -> Principal:
        """Return who a key's id belongs to. Raises like ``identify``."""
        found = next((one for one in self._principals.values() if one.key.id == key), None)
        if found is None:
            raise self._unknown()
        _check_validity(found.key, now)
        if found.tenant_spec.is_suspended:
            raise TenantSuspended(f"the tenant {str(found.tenant)!r} is suspended; ask whoever runs this gateway")
        return found

    def operator(self, headers: Mapping[bytes, bytes], now: float) -> Operator:
        """Return which operator sent these headers; raises like ``identify``."""
        digest = _digest_in(headers)
        operator = self._operators.get(digest)
        if operator is None or not hmac.compare_digest(self.keys[digest].digest, digest):
            raise self._unknown()
        _check_validity(self.keys[digest], now)
        return operator

    def _unknown(self) -> InvalidKey | KeysUnavailable:
        if self.is_complete:
            return InvalidKey(_UNKNOWN_KEY)
        return KeysUnavailable("the database of keys cannot be reached, and this one is not known yet", retry_after=2.0)


def _digest_in(headers: Mapping[bytes, bytes]) -> bytes:
    secret = headers.get(b"authorization")
    if secret is not None and secret[:7].lower() == b"bearer ":
        secret = secret[7:].strip()
    else:
        secret = headers.get(b"x-api-key") or headers.get(b"api-key")
    if not secret:
        raise InvalidKey(_NO_KEY)
    return hashlib.sha256(secret).digest()


def _check_validity(key: Key, now: float) -> None:
    if key.revoked_at is not None and key.revoked_at <= now:
        raise InvalidKey(_REVOKED, code="key_revoked")
    if key.expires_at is not None and key.expires_at <= now:
        raise InvalidKey(_EXPIRED, code="key_expired")


def _both(one: frozenset[Item] | None, other: frozenset[Item] | None) -> frozenset[Item] | None:
    if one is None or other is None:
        return other if one is None else one
    return one & other
