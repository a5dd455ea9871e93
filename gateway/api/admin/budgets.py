"""Budgets: what is set, used, left, and when it begins anew."""

from datetime import datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Query

from core.tenancy import Period, Unit
from gateway.api.admin.document import errors
from gateway.api.admin.guard import guarded
from gateway.api.admin.pages import After, Limit, Page, page_of
from gateway.api.admin.shapes import TENANT_ID, Shape, Spend, shown_moment, shown_usd
from gateway.auth import OwnedBudget
from gateway.services import Services
from routing.budgets import day_of, ends_at


class Amount(Shape):
    """Tokens or US dollars, whichever the budget is in; the other is null."""

    tokens: int | None = None
    usd: Spend | None = None


class BudgetState(Shape):
    """A budget of a tenant or a key.

    `used` is what the ledger knew within the last second; answers under way are not in it. `left` is never below 0.
    `ends_at` null: it never begins anew.
    """

    subject: Literal["tenant", "key"]
    id: str
    tenant: str
    per: Period
    limit: Amount
    used: Amount
    left: Amount
    ends_at: datetime | None


def budget_routes(services: Services) -> APIRouter:
    """Return the routes of budgets."""
    router = APIRouter(prefix="/admin/v1/budgets", tags=["budgets"], route_class=guarded(services))

    @router.get("", responses=errors())
    async def list_budgets(
        tenant: Annotated[str | None, Query(pattern=TENANT_ID)] = None, limit: Limit = 50, after: After = None
    ) -> Page[BudgetState]:
        """List the budgets of tenants and keys, of one tenant or of all, with what is used of each."""
        found = [entry for entry in services.directory.keyring.budgets() if tenant is None or entry.tenant == tenant]
        page, following = page_of(found, lambda entry: f"{entry.subject}/{entry.id}/{entry.position:03}", after, limit)
        return Page(data=[_shown(entry, services) for entry in page], next=following)

    return router


def _shown(entry: OwnedBudget, services: Services) -> BudgetState:
    budget, now = entry.budget, services.clock.wall()
    used = services.spending.spent.used((entry.subject, entry.id), budget, now)
    return BudgetState(
        subject=entry.subject,
        id=entry.id,
        tenant=entry.tenant,
        per=budget.period,
        limit=_amount(budget.amount, budget.unit),
        used=_amount(used, budget.unit),
        left=_amount(max(0, budget.amount - used), budget.unit),
        ends_at=shown_moment(ends_at(budget.period, day_of(now))),
    )


def _amount(amount: int, unit: Unit) -> Amount:
    return Amount(tokens=amount) if unit == "tokens" else Amount(usd=shown_usd(amount))
