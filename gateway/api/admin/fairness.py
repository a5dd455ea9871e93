"""Fairness as it is at this moment: who has had how much of a model, who waits, and what preemption may still cost."""

from typing import Annotated

from fastapi import APIRouter, Path

from core.errors import UnknownId
from core.ids import ModelName
from gateway.api.admin.document import errors
from gateway.api.admin.guard import guarded
from gateway.api.admin.pages import After, Limit, Page, page_of
from gateway.api.admin.shapes import Shape
from gateway.services import Services
from routing.fairness.policy import Policy
from routing.scheduler.views import FairnessView, TenantView


class TenantShare(Shape):
    """What a tenant has had of a model. Tokens are weighted (one of a prompt counts 1, one of an answer 2, unless the
    settings say otherwise); `counter`: divided by the `weight`, what tenants are compared by, the lowest is served
    next; `credit`: by how much it may begin behind the others if it comes back now."""

    tenant: str
    weight: float
    queued: int
    running: int
    attained: float
    counter: float
    credit: float


class FairnessShape(Shape):
    """One model's sharing. `waste_left`: tokens that preemption may still have computed again, below 0 if it had more
    than it should; `wasted_tokens`: those that were, `lost_tokens`: likewise after failures; `reserved`: slots that are
    kept for requests on their way. `holder`: the gateway that decides, if several do so together, and `age_s`: how long
    ago it told this one, which knows no more than 256 of its tenants. Numbers count from when that gateway began to
    decide, but for what tenants have had."""

    model: str
    policy: Policy
    queued: int
    tenants: int
    reserved: int
    preemptions: int
    migrations: int
    drained: int
    recovered: int
    useful_tokens: int
    wasted_tokens: int
    lost_tokens: int
    waste_left: float
    holder: str | None
    age_s: float


class FairnessOfModel(FairnessShape):
    """The same with the tenants it is shared by: `shares` has those that wait, then those that had most."""

    shares: list[TenantShare]


def fairness_routes(services: Services) -> APIRouter:
    """Return the routes of fairness."""
    router = APIRouter(prefix="/admin/v1/fairness", tags=["fairness"], route_class=guarded(services))

    @router.get("", responses=errors())
    async def list_fairness(limit: Limit = 50, after: After = None) -> Page[FairnessShape]:
        """List how each model is shared, by name."""
        page, following = page_of(services.live.catalog.models(), lambda model: model.name, after, limit)
        return Page(data=[_shown(services.scheduler.fairness_view(model.name)) for model in page], next=following)

    @router.get("/{model:path}", responses=errors(404))
    async def show_fairness(model: Annotated[str, Path(max_length=160)], limit: Limit = 50) -> FairnessOfModel:
        """Show how one model is shared, with at most `limit` of its tenants; names may hold slashes."""
        found = services.live.catalog.find(model)
        if found is None:
            raise UnknownId(f"there is no model {model[:128]!r}; GET /admin/v1/models lists them", code="unknown_model")
        view = services.scheduler.fairness_view(ModelName(found.name))
        first = sorted(view.tenants, key=lambda tenant: (-tenant.queued, -tenant.attained, tenant.tenant))[:limit]
        return FairnessOfModel(**dict(_shown(view)), shares=[_share(tenant) for tenant in first])

    return router


def _shown(view: FairnessView) -> FairnessShape:
    return FairnessShape(
        model=view.model,
        policy=view.policy,
        queued=view.queued,
        tenants=len(view.tenants),
        reserved=view.reserved,
        preemptions=view.preemptions,
        migrations=view.migrations,
        drained=view.drained,
        recovered=view.recovered,
        useful_tokens=view.useful_tokens,
        wasted_tokens=view.wasted_tokens,
        lost_tokens=view.lost_tokens,
        waste_left=view.waste_left,
        holder=view.holder or None,
        age_s=view.age,
    )


def _share(tenant: TenantView) -> TenantShare:
    return TenantShare(
        tenant=tenant.tenant,
        weight=tenant.weight,
        queued=tenant.queued,
        running=tenant.running,
        attained=tenant.attained,
        counter=tenant.counter,
        credit=tenant.credit,
    )
