"""Erasure: what a tenant or one of its end users has asked is forgotten, what has to be paid is not (S4)."""

import asyncio

from fastapi import APIRouter
from pydantic import Field

from core.ids import TenantId
from gateway.api.admin.document import errors
from gateway.api.admin.guard import Acting, guarded
from gateway.api.admin.shapes import Shape
from gateway.api.admin.tenants import Id
from gateway.books import Books
from gateway.services import Services
from storage.sql.database import StorageUnavailable
from storage.sql.erasure import erase


class Erasure(Shape):
    """Whom to forget: one end user of the tenant, as its requests named it; null: all of the tenant."""

    end_user: str | None = Field(default=None, min_length=1, max_length=256)


class Erased(Shape):
    """How many records of the request log are gone."""

    records: int


_ALL_OF_IT = Erasure()
_OTHERS_BOOK_WITHIN_S = 2 * Books.FLUSH_INTERVAL_S


def erasure_routes(services: Services) -> APIRouter:
    """Return the route of erasure."""
    router = APIRouter(prefix="/admin/v1/tenants", tags=["tenants"], route_class=guarded(services))

    @router.post("/{tenant_id}:erase", responses=errors())
    async def erase_tenant(tenant_id: Id, act: Acting, body: Erasure = _ALL_OF_IT) -> Erased:
        """Forget what a tenant, or one `end_user` of it, has asked: its records in the request log go, and the ledger
        keeps amounts alone, under no end user's name.

        What limits and budgets have counted under an end user's name goes too, and begins anew if it asks again. The
        tenant may be the settings file's, or gone already; its declaration and keys stay. A request that ends later is
        recorded anew: revoke the keys first. One gateway is asked for all that share its database and Redis; where the
        database is PostgreSQL they are given a second to book what they hold. After an error, do it again.
        """
        if not services.database.is_sqlite:
            await asyncio.sleep(_OTHERS_BOOK_WITHIN_S)
        await services.runs.forget(TenantId(tenant_id), body.end_user)
        await services.books.flush()  # what waits there would come back
        if services.books.is_away:
            raise StorageUnavailable("what has ended lately cannot be booked, and would come back")
        num = await erase(services.database, tenant_id, body.end_user)
        await services.spending.reread()
        await services.admission.forget(tenant_id, body.end_user)
        act.detail = {"of": "tenant" if body.end_user is None else "end_user", "records": num}  # whom, is forgotten
        return Erased(records=num)

    return router
