"""Limits and budgets of a call: taken before it runs, settled to what it used after."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
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
from routing.limits import WINDOW_S, Claim, Granted, Kind, Limiter, Meter, Refused, reset_after

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


_REQUESTS, _TOKENS, _MONEY = range(3)  # what a call may use, in this order, and what it has used
_AMOUNT_OF: dict[Measure, int] = {
    "requests": _REQUESTS,
    "parallel": _REQUESTS,
    "tokens": _TOKENS,
    "token budget": _TOKENS,
    "money budget": _MONEY,
}


_LINES: dict[Measure, bytes] = {
    measure: b"x-ratelimit-limit-%b: %%d\r\nx-ratelimit-remaining-%b: %%d\r\nx-ratelimit-reset-%b: %%b\r\n"
    % (measure.encode(), measure.encode(), measure.encode())
    for measure in ("requests", "tokens")
}


class _Terms:
    """What some calls come under: gauges with their meters, and what of a call each measures.

    ``shown``: of requests and of tokens, where their windows are, and headers with gaps for limit, rest and reset.
    """

    __slots__ = ("amounts", "gauges", "has_money", "meters", "shown")

    def __init__(self, gauges: tuple[_Gauge, ...], meters: tuple[Meter, ...]) -> None:
        self.gauges = gauges
        self.meters = meters
        self.amounts = tuple(_AMOUNT_OF[gauge.measure] for gauge in gauges)
        self.has_money = _MONEY in self.amounts
        places = {
            measure: [index for index, gauge in enumerate(gauges) if gauge.measure == measure] for measure in _LINES
        }
        self.shown = [(own, _LINES[measure]) for measure, own in places.items() if own]

    def claim(self, requests: int, tokens: int, money: int) -> tuple[int, ...]:
        """Return how much of each meter that is."""
        values = (requests, tokens, money)
        return tuple([values[which] for which in self.amounts])


class _Known:
    """The terms of a principal's calls: the same for each until its key, the ledger's figures or the day change."""

    __slots__ = ("day", "gauges", "principal", "spent", "terms")

    def __init__(self, principal: Principal) -> None:
        owner, key = principal.tenant_spec, principal.key
        self.principal = principal
        self.gauges = (
            *_gauges(("tenant", owner.id), owner.rate, owner.budgets),
            *_gauges(("key", key.id), key.rate, key.budgets),
        )
        self.spent: Spent | None = None
        self.day = 0
        self.terms = _Terms((), ())

    def terms_of(self, spent: Spent, now: float) -> _Terms:
        """Return the terms as they are now."""
        day = day_of(now)
        if self.gauges and (self.spent is not spent or self.day != day):
            self.spent, self.day = spent, day
            self.terms = _Terms(self.gauges, _meters(self.gauges, spent, now))
        return self.terms


class Admitted(msgspec.Struct, frozen=True):
    """A call's reservation. ``headers`` tell the client what is left, ready for the wire."""

    terms: _Terms
    claim: Claim
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
        terms = self._terms(principal, call, now)
        if not terms.gauges:
            return None
        cost = self._highest_cost(call) if terms.has_money else 0
        claim = Claim(terms.meters, terms.claim(1, call.tokens_estimate, cost))
        verdict = await self._limiter.reserve(claim, now)
        if isinstance(verdict, Refused):
            raise _refusal(terms.gauges[verdict.meter], claim, verdict)
        return Admitted(terms, claim, verdict, _headers(terms, verdict, now))

    def settle(self, admitted: Admitted, usage: Usage | None, cost: int) -> None:
        """Put what the call really used in the place of what it took. Never waits."""
        tokens = usage.prompt_tokens + usage.completion_tokens if usage is not None else 0
        self._limiter.settle(admitted.claim, admitted.terms.claim(1, tokens, cost), admitted.granted)

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

    def _terms(self, principal: Principal, call: Call, now: float) -> _Terms:
        tenant, spent = principal.tenant_spec, self._spent()
        known = self._known.get(principal.key.id)
        if known is None or known.principal is not principal:
            known = self._known[principal.key.id] = _Known(principal)
        terms, user = known.terms_of(spent, now), call.context.end_user
        if not user or not tenant.tells_end_users_apart:
            return terms
        own = _gauges(("end_user", tenant.id, user), tenant.end_user, tenant.end_user_budgets)
        return _Terms(terms.gauges + own, terms.meters + _meters(own, spent, now))


def _meters(gauges: Sequence[_Gauge], spent: Spent, now: float) -> tuple[Meter, ...]:
    return tuple(
        Meter(gauge.key, gauge.kind, gauge.limit)
        if gauge.budget is None
        else spent.meter(gauge.subject, gauge.budget, now)
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


def _refusal(gauge: _Gauge, claim: Claim, refused: Refused) -> RateLimited:
    meter, amount, retry_after = claim.meters[refused.meter], claim.amounts[refused.meter], refused.retry_after
    whose = f"{gauge.subject[0].replace('_', ' ')} {gauge.subject[-1]!r}"
    if gauge.budget is not None:
        what = f"{meter.limit:,} tokens" if gauge.budget.unit == "tokens" else f"{meter.limit / PICO_PER_USD:,.2f} USD"
        return BudgetExceeded(
            f"the budget of {whose}, {what} {_PERIOD_WORDS[gauge.budget.period]}, has no room for this request"
        )
    if amount > meter.limit:
        error = RateLimited(
            f"this request may use {amount:,} {gauge.measure}, and {whose} may use {meter.limit:,} in a minute: "
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


def _headers(terms: _Terms, granted: Granted, now: float) -> bytes:
    """Return ``x-ratelimit-*`` of the tightest limit on requests and on tokens."""
    lines = b""
    remaining = granted.remaining
    for places, line in terms.shown:
        least = min(places, key=remaining.__getitem__)
        meter = terms.meters[least]
        lines += line % (meter.limit, remaining[least], _reset(reset_after(meter, now, granted.at[least])))
    return lines


@lru_cache(maxsize=WINDOW_S + 2)
def _reset(seconds: float) -> bytes:
    return reset_text(seconds).encode()
