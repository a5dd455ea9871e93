"""Budgets: what is set, used, left, and when it begins anew."""

from collections.abc import Iterator
from datetime import datetime
from typing import Annotated, Literal, NamedTuple

from fastapi import APIRouter, Query

from core.tenancy import Budget, Period, Unit
from gateway.api.admin.document import errors
from gateway.api.admin.guard import guarded
from gateway.api.admin.pages import After, Limit, Page, page_of
from gateway.api.admin.shapes import TENANT_ID, Shape, Spend, shown_moment, shown_usd
from gateway.services import Services


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


class _Set(NamedTuple):
    subject: Literal["tenant", "key"]
    id: str
    tenant: str
    position: int
    budget: Budget


def budget_routes(services: Services) -> APIRouter:
    """Return the routes of budgets."""
    router = APIRouter(prefix="/admin/v1/budgets", tags=["budgets"], route_class=guarded(services))

    @router.get("", responses=errors())
    async def list_budgets(
        tenant: Annotated[str | None, Query(pattern=TENANT_ID)] = None, limit: Limit = 50, after: After = None
    ) -> Page[BudgetState]:
        """List the budgets of tenants and keys, of one tenant or of all, with what is used of each."""
        found = [entry for entry in _all(services) if tenant is None or entry.tenant == tenant]
        page, following = page_of(found, lambda entry: f"{entry.subject}/{entry.id}/{entry.position:03}", after, limit)
        return Page(data=[_shown(entry, services) for entry in page], next=following)

    return router


def _all(services: Services) -> Iterator[_Set]:
    keyring = services.directory.keyring
    for tenant in keyring.tenants.values():
        for index, budget in enumerate(tenant.budgets):
            yield _Set("tenant", tenant.id, tenant.id, index, budget)
    for key in keyring.keys.values():
        for index, budget in enumerate(key.budgets):
            yield _Set("key", key.id, key.tenant, index, budget)


def _shown(entry: _Set, services: Services) -> BudgetState:
    budget = entry.budget
    meter = services.spending.spent.meter((entry.subject, entry.id), budget, 0, services.clock.wall())
    return BudgetState(
        subject=entry.subject,
        id=entry.id,
        tenant=entry.tenant,
        per=budget.period,
        limit=_amount(budget.amount, budget.unit),
        used=_amount(meter.seed, budget.unit),
        left=_amount(max(0, budget.amount - meter.seed), budget.unit),
        ends_at=shown_moment(meter.ends_at),
    )


def _amount(amount: int, unit: Unit) -> Amount:
    return Amount(tokens=amount) if unit == "tokens" else Amount(usd=shown_usd(amount))
