"""Erasure: what a tenant or one of its end users has asked is forgotten, what has to be paid is not (S4)."""

from fastapi import APIRouter
from pydantic import Field

from gateway.api.admin.document import errors
from gateway.api.admin.guard import Acting, guarded
from gateway.api.admin.shapes import Shape
from gateway.api.admin.tenants import Id
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


def erasure_routes(services: Services) -> APIRouter:
    """Return the route of erasure."""
    router = APIRouter(prefix="/admin/v1/tenants", tags=["tenants"], route_class=guarded(services))

    @router.post("/{tenant_id}:erase", responses=errors())
    async def erase_tenant(tenant_id: Id, act: Acting, body: Erasure = _ALL_OF_IT) -> Erased:
        """Forget what a tenant, or one `end_user` of it, has asked: its records in the request log go, and the ledger
        keeps amounts alone, under no end user's name.

        The tenant may be the settings file's, or gone already; its declaration and keys stay. A request that ends later
        is recorded anew, and another gateway may hold some for half a second: revoke the keys first, or erase twice.
        After an error, do it again.
        """
        await services.books.flush()  # what waits there would come back
        if services.books.is_away:
            raise StorageUnavailable("what has ended lately cannot be booked, and would come back")
        num = await erase(services.database, tenant_id, body.end_user)
        act.detail = {"of": "tenant" if body.end_user is None else "end_user", "records": num}  # whom, is forgotten
        return Erased(records=num)

    return router
