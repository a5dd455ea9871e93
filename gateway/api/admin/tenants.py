"""Tenants: those of the settings file are shown, those of the database are made, replaced and deleted here."""

from typing import Annotated

from fastapi import APIRouter, Path, Response

from core.errors import Conflict, PreconditionFailed, UnknownId
from core.ids import TenantId
from core.tenancy import Tenant
from gateway.api.admin.document import errors, tagged
from gateway.api.admin.etags import IfMatch, etag_of, version_in
from gateway.api.admin.guard import Acting, guarded
from gateway.api.admin.pages import After, Limit, Page, page_of
from gateway.api.admin.shapes import (
    TENANT_ID,
    NewTenant,
    Source,
    TenantShape,
    TenantTerms,
    budgets_in,
    ceilings_in,
    rate_in,
    shown_tenant,
)
from gateway.api.admin.terms import models_in
from gateway.services import Services
from gateway.tenants import ceilings_of, endpoints_of, rate_of
from storage.sql import database

Id = Annotated[str, Path(pattern=TENANT_ID)]


def tenant_routes(services: Services) -> APIRouter:
    """Return the routes of tenants."""
    router = APIRouter(prefix="/admin/v1/tenants", tags=["tenants"], route_class=guarded(services))

    @router.get("", responses=errors())
    async def list_tenants(limit: Limit = 50, after: After = None) -> Page[TenantShape]:
        """List the tenants, by id; from memory, at most half a second old."""
        known = list(services.directory.keyring.tenants.values())
        page, following = page_of(known, lambda tenant: tenant.id, after, limit)
        return Page(data=[shown_tenant(tenant, source_of(tenant.id, services)) for tenant in page], next=following)

    @router.post("", status_code=201, responses=tagged(201) | errors(409))
    async def create_tenant(body: NewTenant, response: Response, act: Acting) -> TenantShape:
        """Make a tenant. Answers 409 if there is one with this id."""
        act.target = body.id
        if body.id in services.directory.keyring.tenants:
            raise Conflict(f"there is a tenant {body.id!r} already; choose another id, or replace it with PUT")
        return await _put(_tenant(TenantId(body.id), body, services), 0, response, services)

    @router.get("/{tenant_id}", responses=tagged(200) | errors(404))
    async def show_tenant(tenant_id: Id, response: Response) -> TenantShape:
        """Show one tenant. Its `ETag` is what a change has to name."""
        if source_of(tenant_id, services) == "file":
            return shown_tenant(services.directory.keyring.tenants[TenantId(tenant_id)], "file")
        row = await services.store.tenants.tenant(tenant_id)
        if row is None:
            raise _unknown(tenant_id)
        response.headers["etag"] = etag_of(row.version)
        return shown_tenant(row.value, "database")

    @router.put("/{tenant_id}", responses=tagged(200) | errors(404, 409, 412, 428))
    async def replace_tenant(
        tenant_id: Id, body: TenantTerms, response: Response, if_match: IfMatch = None
    ) -> TenantShape:
        """Replace what a tenant may use; what is not given is as for a new one. Needs `If-Match`."""
        await _check_changeable(tenant_id, services)
        return await _put(_tenant(TenantId(tenant_id), body, services), version_in(if_match), response, services)

    @router.delete("/{tenant_id}", status_code=204, responses=errors(404, 409, 412, 428))
    async def delete_tenant(tenant_id: Id, if_match: IfMatch = None) -> None:
        """Delete a tenant and its keys: they are refused within a second, everywhere. Needs `If-Match`."""
        await _check_changeable(tenant_id, services)
        version = version_in(if_match)
        try:
            await services.store.tenants.delete_tenant(tenant_id, expected=version)
        except database.Missing as error:
            raise _unknown(tenant_id) from error
        except database.Conflict as error:
            raise _outdated(tenant_id) from error
        await services.directory.refresh()

    return router


def source_of(tenant_id: str, services: Services) -> Source:
    """Return who declares a tenant."""
    settings = services.live.settings
    is_of_file = tenant_id in settings.tenants or any(
        key.tenant == tenant_id for key in settings.keys if key.role is None
    )
    return "file" if is_of_file else "database"


def _tenant(tenant_id: TenantId, terms: TenantTerms, services: Services) -> Tenant:
    defaults, catalog = services.live.settings.defaults, services.live.catalog
    return Tenant(
        id=tenant_id,
        is_suspended=terms.suspended,
        models=models_in(terms.models, catalog),
        endpoints=endpoints_of(terms.endpoints),
        rate=rate_of(defaults.limits) if terms.limits is None else rate_in(terms.limits),
        budgets=budgets_in(terms.budgets),
        end_user=rate_in(terms.end_users.limits),
        end_user_budgets=budgets_in(terms.end_users.budgets),
        ceilings=ceilings_of(defaults.ceilings) if terms.ceilings is None else ceilings_in(terms.ceilings),
        max_class=terms.max_class,
        weight=terms.weight,
    )


async def _check_changeable(tenant_id: str, services: Services) -> None:
    """Raise unless the tenant is there and may be changed here."""
    if source_of(tenant_id, services) == "file":
        raise Conflict(f"the tenant {tenant_id!r} is declared in the settings file; change it there", code="of_file")
    if await services.store.tenants.tenant(tenant_id) is None:
        raise _unknown(tenant_id)


async def _put(tenant: Tenant, expected: int, response: Response, services: Services) -> TenantShape:
    try:
        row = await services.store.tenants.put_tenant(tenant, expected=expected)
    except database.Conflict as error:
        if expected == 0:
            raise Conflict(f"there is a tenant {str(tenant.id)!r} already") from error
        raise _outdated(tenant.id) from error
    await services.directory.refresh()
    response.headers["etag"] = etag_of(row.version)
    return shown_tenant(row.value, "database")


def _unknown(tenant_id: str) -> UnknownId:
    return UnknownId(f"there is no tenant {tenant_id!r}; GET /admin/v1/tenants lists them", code="unknown_tenant")


def _outdated(tenant_id: str) -> PreconditionFailed:
    return PreconditionFailed(f"the tenant {tenant_id!r} has been changed since; read it again", param="If-Match")
