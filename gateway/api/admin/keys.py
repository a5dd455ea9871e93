"""Keys: made, shown, changed, rotated and revoked. A secret is shown once, when it is made."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import msgspec
from fastapi import APIRouter, Path, Query, Response
from pydantic import AwareDatetime, Field

from core.clock import Clock
from core.errors import Conflict, InvalidRequest, PreconditionFailed, UnknownId
from core.ids import TenantId
from core.tenancy import Key
from gateway.api.admin.document import errors, tagged
from gateway.api.admin.etags import IfMatch, etag_of, version_in
from gateway.api.admin.guard import Acting, guarded
from gateway.api.admin.pages import After, Limit, Page, page_of
from gateway.api.admin.shapes import (
    ONE_LINE,
    TENANT_ID,
    KeyChange,
    KeyShape,
    KeyWithSecret,
    NewKey,
    Shape,
    budgets_in,
    rate_in,
    shown_key,
)
from gateway.api.admin.terms import models_in
from gateway.auth import digest_of, new_admin_key, new_key
from gateway.services import Services
from gateway.tenants import endpoints_of
from storage.sql import database
from storage.sql.tenants import Row

_SHOWN_OF_A_SECRET = 8
_MAX_OVERLAP_S = 30 * 86_400

Id = Annotated[str, Path(min_length=1, max_length=210, pattern=ONE_LINE)]


class Rotation(Shape):
    """For how many seconds the old secret holds beside the new one."""

    overlap_s: float = Field(default=86_400, ge=0, le=_MAX_OVERLAP_S)


_A_DAY = Rotation()


def key_routes(services: Services) -> APIRouter:
    """Return the routes of keys."""
    router = APIRouter(prefix="/admin/v1/keys", tags=["keys"], route_class=guarded(services))

    @router.get("", responses=errors())
    async def list_keys(
        tenant: Annotated[str | None, Query(pattern=TENANT_ID)] = None, limit: Limit = 50, after: After = None
    ) -> Page[KeyShape]:
        """List the keys, by id, of one tenant or of all; from memory, at most half a second old."""
        known = [key for key in services.directory.keyring.keys.values() if tenant is None or key.tenant == tenant]
        page, following = page_of(known, lambda key: key.id, after, limit)
        return Page(data=[shown_key(key, services.clock.wall()) for key in page], next=following)

    @router.post("", status_code=201, responses=tagged(201) | errors())
    async def create_key(body: NewKey, response: Response, act: Acting) -> KeyWithSecret:
        """Make a key, for a tenant that there is or, with a role, for an operator. Its secret is shown this once."""
        act.target = body.tenant
        if body.role is None and TenantId(body.tenant) not in services.directory.keyring.tenants:
            raise InvalidRequest(
                f"there is no tenant {body.tenant!r}; make it first with POST /admin/v1/tenants",
                param="tenant",
                code="unknown_tenant",
            )
        key, secret = _with_secret(_terms(body, services), services.clock.wall())
        act.target, act.detail = key.id, {"tenant": body.tenant, "role": body.role or ""}
        row = await services.store.tenants.add_key(key)
        return await _made(row, secret, response, services)

    @router.get("/{key_id}", responses=tagged(200) | errors(404))
    async def show_key(key_id: Id, response: Response) -> KeyShape:
        """Show one key, without its secret. Its `ETag` is what a change has to name."""
        if (declared := _of_file(key_id, services)) is not None:
            return shown_key(declared, services.clock.wall())
        return _shown(await _stored(key_id, services), response, services)

    @router.patch("/{key_id}", responses=tagged(200) | errors(404, 409, 412, 428))
    async def change_key(key_id: Id, body: KeyChange, response: Response, if_match: IfMatch = None) -> KeyShape:
        """Change a key's terms; what is not given stays as it is. Needs `If-Match`."""
        old = await _changeable(key_id, services)
        version = version_in(if_match)
        with _answered(key_id):
            row = await services.store.tenants.change_key(_changed(old.value, body, services), expected=version)
        await services.directory.refresh()
        return _shown(row, response, services)

    @router.post("/{key_id}:rotate", status_code=201, responses=tagged(201) | errors(404, 409, 412))
    async def rotate_key(
        key_id: Id,
        response: Response,
        act: Acting,
        body: Rotation = _A_DAY,
        if_match: IfMatch = None,
    ) -> KeyWithSecret:
        """Make a key with the same terms and a new secret; the old one holds for `overlap_s` more seconds."""
        old = await _changeable(key_id, services)
        now = services.clock.wall()
        key, secret = _with_secret(old.value, now)
        act.detail = {"new_key": key.id, "overlap_s": body.overlap_s}
        expected = None if if_match is None else version_in(if_match)
        with _answered(key_id):
            row = await services.store.tenants.rotate_key(
                key_id, key, overlap_s=body.overlap_s, now=now, expected=expected
            )
        return await _made(row, secret, response, services)

    @router.post("/{key_id}:revoke", responses=tagged(200) | errors(404, 409))
    async def revoke_key(key_id: Id, response: Response) -> KeyShape:
        """Refuse a key from now on, everywhere within a second. One that is revoked already stays as it is."""
        _refuse_declared(key_id, services)
        with _answered(key_id):
            row = await services.store.tenants.revoke_key(key_id, services.clock.wall())
        await services.directory.refresh()
        return _shown(row, response, services)

    return router


def _terms(body: NewKey, services: Services) -> Key:
    """Return the key that is asked for, less its id and secret."""
    return Key(
        id="",
        name=body.name,
        tenant=TenantId(body.tenant),
        digest=b"",
        role=body.role,
        models=models_in(body.models, services.live.catalog),
        endpoints=endpoints_of(body.endpoints),
        rate=rate_in(body.limits),
        budgets=budgets_in(body.budgets),
        max_class=body.max_class,
        expires_at=_future(body.expires_at, services.clock),
    )


def _with_secret(terms: Key, now: float) -> tuple[Key, str]:
    """Return the key with a new id and digest, and the secret they were made from."""
    secret = new_key() if terms.role is None else new_admin_key()
    key = msgspec.structs.replace(
        terms,
        id=f"key_{secrets.token_hex(8)}",
        digest=digest_of(secret.encode()),
        prefix=secret[:_SHOWN_OF_A_SECRET],
        created_at=now,
        revoked_at=None,
    )
    return key, secret


def _changed(old: Key, change: KeyChange, services: Services) -> Key:
    given = change.model_fields_set
    changes: dict[str, object] = {}
    if "name" in given:
        changes["name"] = change.name
    if "models" in given:
        changes["models"] = models_in(change.models, services.live.catalog)
    if "endpoints" in given:
        changes["endpoints"] = endpoints_of(change.endpoints)
    if "limits" in given:
        changes["rate"] = rate_in(change.limits)
    if "budgets" in given:
        changes["budgets"] = budgets_in(change.budgets)
    if "max_class" in given:
        changes["max_class"] = change.max_class
    if "expires_at" in given:
        changes["expires_at"] = _future(change.expires_at, services.clock)
    return msgspec.structs.replace(old, **changes)


def _future(moment: AwareDatetime | None, clock: Clock) -> float | None:
    if moment is None:
        return None
    if moment.timestamp() <= clock.wall():
        raise InvalidRequest("`expires_at` has passed; to end a key now, revoke it", param="expires_at")
    return moment.timestamp()


async def _stored(key_id: str, services: Services) -> Row[Key]:
    row = await services.store.tenants.key(key_id)
    if row is None:
        raise _unknown(key_id)
    return row


async def _changeable(key_id: str, services: Services) -> Row[Key]:
    """Return a key that may be changed here."""
    _refuse_declared(key_id, services)
    row = await _stored(key_id, services)
    if row.value.revoked_at is not None:
        raise Conflict(f"the key {key_id!r} is revoked, and stays so; make a new one", code="key_revoked")
    return row


def _refuse_declared(key_id: str, services: Services) -> None:
    if _of_file(key_id, services) is not None:
        raise Conflict(f"the key {key_id!r} is declared in the settings file; change it there", code="of_file")


def _of_file(key_id: str, services: Services) -> Key | None:
    if not key_id.startswith("file:"):
        return None
    return next((key for key in services.directory.keyring.keys.values() if key.id == key_id), None)


async def _made(row: Row[Key], secret: str, response: Response, services: Services) -> KeyWithSecret:
    await services.directory.refresh()
    response.headers["cache-control"] = "no-store"
    return KeyWithSecret(key=_shown(row, response, services), secret=secret)


def _shown(row: Row[Key], response: Response, services: Services) -> KeyShape:
    response.headers["etag"] = etag_of(row.version)
    return shown_key(row.value, services.clock.wall())


@contextmanager
def _answered(key_id: str) -> Iterator[None]:
    """Turn what the database says of a change into what its caller is told."""
    try:
        yield
    except database.Conflict as error:
        raise _outdated(key_id) from error
    except database.Missing as error:
        raise _unknown(key_id) from error


def _unknown(key_id: str) -> UnknownId:
    return UnknownId(f"there is no key {key_id[:128]!r}; GET /admin/v1/keys lists them", code="unknown_key")


def _outdated(key_id: str) -> PreconditionFailed:
    return PreconditionFailed(f"the key {key_id!r} has been changed since; read it again", param="If-Match")
