"""The record of what operators did, and tried to do."""

from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query

from core.records import AuditEntry
from gateway.api.admin.document import errors
from gateway.api.admin.guard import guarded
from gateway.api.admin.pages import After, Limit, Page, page_found, place_of
from gateway.api.admin.requests import Moment, Text
from gateway.api.admin.shapes import ONE_LINE, Shape, shown_time
from gateway.services import Services


class AuditShape(Shape):
    """One act. `actor` is the name of the key (empty: none that is known), `outcome` the HTTP status it had."""

    id: str
    time: datetime
    actor: str
    role: str
    action: str
    target: str
    outcome: int
    detail: dict[str, Any]


def audit_routes(services: Services) -> APIRouter:
    """Return the route of the record."""
    router = APIRouter(prefix="/admin/v1/audit", tags=["audit"], route_class=guarded(services))

    @router.get("", responses=errors())
    async def list_audit(
        *,
        actor: Text = None,
        action: Text = None,
        target: Annotated[str | None, Query(max_length=256, pattern=ONE_LINE)] = None,
        since: Moment = None,
        until: Moment = None,
        limit: Limit = 50,
        after: After = None,
    ) -> Page[AuditShape]:
        """Search the record of changes, also refused ones, newest first."""
        rows = await services.store.audit.search(
            actor=actor,
            action=action,
            target=target,
            since=since.timestamp() if since else None,
            until=until.timestamp() if until else None,
            after=place_of(after, tuple[float, str]),
            limit=limit + 1,
        )
        return page_found(rows, limit, lambda entry: (entry.time, entry.id), _shown)

    return router


def _shown(entry: AuditEntry) -> AuditShape:
    return AuditShape(
        id=entry.id,
        time=shown_time(entry.time),
        actor=entry.actor,
        role=entry.role,
        action=entry.action,
        target=entry.target,
        outcome=entry.outcome,
        detail=entry.detail,
    )
