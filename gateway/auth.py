"""Keys: who calls, and which models they may use. All hashes are in memory; nothing is asked of anybody."""

import hashlib
import hmac
import os
import secrets
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import msgspec

from core.errors import InvalidKey, ModelNotAllowed
from core.ids import ModelName, TenantId
from gateway.settings import KeySettings
from routing.catalog import Catalog

PREFIX = "fbk_"

_NO_KEY = "no API key was sent: put it into the header 'Authorization: Bearer <key>'"
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
    """A caller. ``models`` None means all of them."""

    key_name: str
    tenant: TenantId
    digest: bytes
    models: frozenset[ModelName] | None

    def may_use(self, model: ModelName) -> bool:
        """Whether the key's allow-list covers the model."""
        return self.models is None or model in self.models

    def check(self, model: ModelName) -> None:
        """Raise ``ModelNotAllowed`` unless the key may use the model."""
        if not self.may_use(model):
            raise ModelNotAllowed(f"this key may not use the model {str(model)!r}", param="model")


class Keys:
    """All keys, by their hash. Immutable."""

    def __init__(self, principals: Iterable[Principal]) -> None:
        self._by_digest = {principal.digest: principal for principal in principals}

    @classmethod
    def from_settings(cls, keys: Iterable[KeySettings], catalog: Catalog) -> "Keys":
        """Return the keys that the settings declare; aliases in allow-lists stand for their models."""
        return cls(_principal(key, catalog) for key in keys)

    def identify(self, headers: Mapping[bytes, bytes]) -> Principal:
        """Return who sent these headers (``Authorization: Bearer``, ``x-api-key`` or ``api-key``), or raise
        ``InvalidKey``."""
        secret = headers.get(b"authorization")
        if secret is not None and secret[:7].lower() == b"bearer ":
            secret = secret[7:].strip()
        else:
            secret = headers.get(b"x-api-key") or headers.get(b"api-key")
        if not secret:
            raise InvalidKey(_NO_KEY)
        digest = hashlib.sha256(secret).digest()
        principal = self._by_digest.get(digest)
        if principal is None or not hmac.compare_digest(principal.digest, digest):
            raise InvalidKey(_UNKNOWN_KEY)
        return principal


def _principal(key: KeySettings, catalog: Catalog) -> Principal:
    digest = (
        bytes.fromhex(key.sha256) if key.sha256 else digest_of(key.key.get_secret_value().encode()) if key.key else b""
    )
    models: frozenset[ModelName] | None = None
    if "*" not in key.models:
        models = frozenset(model.name for name in key.models if (model := catalog.find(name)) is not None)
    return Principal(key_name=key.name, tenant=TenantId(key.tenant), digest=digest, models=models)
