"""Limits and budgets of a call: taken before it runs, settled to what it used after."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import msgspec

from core.chat import Call, Usage
from core.clock import Clock
from core.errors import BudgetExceeded, RateLimited
from core.ids import ModelName
from core.tenancy import PICO_PER_USD, Budget, Price, Rate
from gateway.auth import Principal
from gateway.errors import reset_text
from routing.budgets import Spent, Subject, day_of
from routing.limits import Granted, Kind, Limiter, Meter, Refused, reset_after

Measure = Literal["requests", "tokens", "parallel", "token budget", "money budget"]
_NO_PRICE = Price()


class _Gauge(NamedTuple):
    """A limit that a principal's calls come under, before it is known what one needs."""

    subject: Subject
    measure: Measure
    kind: Kind
    key: str
    limit: int
    budget: Budget | None = None


class _Known:
    """What a principal's calls come under: the same for each until its key, the ledger's figures or the day change.

    ``stencils``: the meters of the gauges, with no amount yet.
    """

    __slots__ = ("day", "gauges", "principal", "spent", "stencils")

    def __init__(self, principal: Principal, gauges: tuple[_Gauge, ...]) -> None:
        self.principal = principal
        self.gauges = gauges
        self.spent: Spent | None = None
        self.day = 0
        self.stencils: tuple[Meter, ...] = ()

    def meters(self, spent: Spent, now: float) -> tuple[Meter, ...]:
        """Return the stencils as they are now."""
        day = day_of(now)
        if self.spent is not spent or self.day != day:
            self.spent, self.day = spent, day
            self.stencils = _stencils(self.gauges, spent, now)
        return self.stencils


class Admitted(msgspec.Struct, frozen=True):
    """A call's reservation. ``headers`` tell the client what is left, ready for the wire."""

    gauges: tuple[_Gauge, ...]
    meters: tuple[Meter, ...]
    granted: Granted
    headers: bytes


class Admission:
    """Asks the limiter for room. ``spent`` returns what the ledger knew last; ``prices`` are by model."""

    def __init__(
        self,
        limiter: Limiter,
        clock: Clock,
        spent: Callable[[], Spent],
        prices: Callable[[], Mapping[ModelName, Price]],
    ) -> None:
        self._limiter = limiter
        self._clock = clock
        self._spent = spent
        self._prices = prices
        self._known: dict[str, _Known] = {}

    async def admit(self, principal: Principal, call: Call) -> Admitted | None:
        """Take what the call may use of every limit it comes under; None if it comes under none.

        Raises ``RateLimited`` or ``BudgetExceeded``, having taken nothing, or ``LimitsUnavailable``.
        """
        now = self._clock.wall()
        gauges, stencils = self._under(principal, call, now)
        if not gauges:
            return None
        cost = self._highest_cost(call) if any(gauge.measure == "money budget" for gauge in gauges) else 0
        amounts = {
            "requests": 1,
            "parallel": 1,
            "tokens": call.tokens_estimate,
            "token budget": call.tokens_estimate,
            "money budget": cost,
        }
        meters = tuple(
            [
                Meter(one.key, one.kind, one.limit, amounts[gauge.measure], one.seed, one.ends_at)
                for gauge, one in zip(gauges, stencils, strict=True)
            ]
        )
        verdict = await self._limiter.reserve(meters, now)
        if isinstance(verdict, Refused):
            raise _refusal(gauges[verdict.meter], meters[verdict.meter], verdict.retry_after)
        return Admitted(gauges, meters, verdict, _headers(gauges, meters, verdict, now))

    def settle(self, admitted: Admitted, usage: Usage | None, cost: int) -> None:
        """Put what the call really used in the place of what it took. Never waits."""
        tokens = usage.prompt_tokens + usage.completion_tokens if usage is not None else 0
        used = {"requests": 1, "parallel": 0, "tokens": tokens, "token budget": tokens, "money budget": cost}
        self._limiter.settle(admitted.meters, [used[gauge.measure] for gauge in admitted.gauges], admitted.granted)

    async def forget(self, tenant: str, end_user: str | None) -> None:
        """Forget the counts of one end user of a tenant, or of all of them; see ``Limiter``."""
        await self._limiter.forget(tenant, end_user)

    def price(self, model: ModelName) -> Price:
        """Return what the model's tokens cost."""
        return self._prices().get(model, _NO_PRICE)

    def _highest_cost(self, call: Call) -> int:
        """Return what the call costs at most: any of its models may answer, and as long as it allows."""
        most = Usage(prompt_tokens=call.prompt_tokens_estimate, completion_tokens=call.max_tokens)
        return max(self.price(model).cost(most) for model in (call.model, *call.fallbacks))

    def _under(self, principal: Principal, call: Call, now: float) -> tuple[tuple[_Gauge, ...], tuple[Meter, ...]]:
        """Return what the call comes under, and the meter of each with no amount yet."""
        tenant, spent = principal.tenant_spec, self._spent()
        known = self._known.get(principal.key.id)
        if known is None or known.principal is not principal:
            gauges = (
                *_gauges(("tenant", tenant.id), tenant.rate, tenant.budgets),
                *_gauges(("key", principal.key.id), principal.key.rate, principal.key.budgets),
            )
            known = self._known[principal.key.id] = _Known(principal, gauges)
        stencils = known.meters(spent, now) if known.gauges else ()
        user = call.context.end_user
        if not user or not tenant.tells_end_users_apart:
            return known.gauges, stencils
        own = _gauges(("end_user", tenant.id, user), tenant.end_user, tenant.end_user_budgets)
        return known.gauges + own, stencils + _stencils(own, spent, now)


def _stencils(gauges: Sequence[_Gauge], spent: Spent, now: float) -> tuple[Meter, ...]:
    return tuple(
        Meter(gauge.key, gauge.kind, gauge.limit, 0)
        if gauge.budget is None
        else spent.meter(gauge.subject, gauge.budget, 0, now)
        for gauge in gauges
    )


def _gauges(subject: Subject, rate: Rate, budgets: Sequence[Budget]) -> tuple[_Gauge, ...]:
    name = "/".join(subject)
    gauges: list[_Gauge] = []
    if rate.parallel is not None:
        gauges.append(_Gauge(subject, "parallel", "parallel", f"parallel/{name}", rate.parallel))
    if rate.rpm is not None:
        gauges.append(_Gauge(subject, "requests", "window", f"requests/{name}", rate.rpm))
    if rate.tpm is not None:
        gauges.append(_Gauge(subject, "tokens", "window", f"tokens/{name}", rate.tpm))
    for budget in budgets:
        measure: Measure = "token budget" if budget.unit == "tokens" else "money budget"
        gauges.append(_Gauge(subject, measure, "period", "", budget.amount, budget))
    return tuple(gauges)


_PERIOD_WORDS = {"day": "today", "week": "this week", "month": "this month", "total": "in all"}


def _refusal(gauge: _Gauge, meter: Meter, retry_after: float | None) -> RateLimited:
    whose = f"{gauge.subject[0].replace('_', ' ')} {gauge.subject[-1]!r}"
    if gauge.budget is not None:
        what = f"{meter.limit:,} tokens" if gauge.budget.unit == "tokens" else f"{meter.limit / PICO_PER_USD:,.2f} USD"
        return BudgetExceeded(
            f"the budget of {whose}, {what} {_PERIOD_WORDS[gauge.budget.period]}, has no room for this request"
        )
    if meter.amount > meter.limit:
        error = RateLimited(
            f"this request may use {meter.amount:,} {gauge.measure}, and {whose} may use {meter.limit:,} in a minute: "
            "lower `max_tokens` or shorten the prompt",
            code="request_exceeds_limit",
        )
    elif gauge.measure == "parallel":
        error = RateLimited(
            f"{whose} has {meter.limit:,} answers open, which is all it may at a time", retry_after=retry_after
        )
    else:
        error = RateLimited(
            f"{whose} may use {meter.limit:,} {gauge.measure} in a minute; there will be room in {retry_after:g} s",
            retry_after=retry_after,
        )
    error.measure, error.limit = gauge.measure, meter.limit
    return error


def _headers(gauges: Sequence[_Gauge], meters: Sequence[Meter], granted: Granted, now: float) -> bytes:
    """Return ``x-ratelimit-*`` of the tightest limit on requests and on tokens."""
    lines = b""
    for measure in ("requests", "tokens"):
        indices = [index for index, gauge in enumerate(gauges) if gauge.measure == measure]
        if indices:
            least = min(indices, key=granted.remaining.__getitem__)
            lines += b"x-ratelimit-limit-%b: %d\r\nx-ratelimit-remaining-%b: %d\r\nx-ratelimit-reset-%b: %b\r\n" % (
                measure.encode(), meters[least].limit,
                measure.encode(), granted.remaining[least],
                measure.encode(), reset_text(reset_after(meters[least], now, granted.at[least])).encode(),
            )  # fmt: skip
    return lines
