"""Limits and budgets of a call: what it may use is taken, what it used is kept."""

from typing import Any

import pytest

from core.chat import Call, CallContext, Endpoint, Timeouts, Usage
from core.errors import BudgetExceeded, RateLimited
from core.ids import ModelName, RequestId, TenantId
from core.records import Sum
from core.tenancy import PICO_PER_USD, Budget, Price, Rate
from gateway.admission import Admission, Admitted
from gateway.errors import headers_of, reset_text, status_of
from gateway.spending import Spending
from routing.budgets import Spent, day_of
from routing.limits import LocalLimiter
from tests.fakes.clock import ManualClock
from tests.fakes.tenancy import principal, tenant

BIG, SMALL = ModelName("big"), ModelName("small")
PRICES = {BIG: Price(input=10, output=100), SMALL: Price(input=1, output=1)}


def call(**more: Any) -> Call:
    fields = {"id": RequestId("req_1"), "endpoint": Endpoint.CHAT, "model": BIG, "body": {}, "stream": False,
              "context": CallContext(tenant=TenantId("acme")), "wants_usage": False, "timeouts": Timeouts(),
              "prompt_tokens_estimate": 10, "max_tokens": 90}  # fmt: skip
    return Call(**{**fields, **more})


def admission(spent: Spent | None = None) -> tuple[Admission, ManualClock]:
    clock = ManualClock()
    return Admission(LocalLimiter(), clock, lambda: spent or Spent(), lambda: PRICES), clock


async def admitted(home: Admission, **limits: Any) -> Admitted:
    taken = await home.admit(principal(of=tenant(**limits)), call())
    assert taken is not None
    return taken


async def test_a_caller_without_limits_is_asked_nothing() -> None:
    home, _ = admission()

    assert await home.admit(principal(), call()) is None


async def test_requests_beyond_the_limit_are_refused_until_there_is_room() -> None:
    home, clock = admission()
    caller = principal(of=tenant(rate=Rate(rpm=2)))
    for _ in range(2):
        await home.admit(caller, call())

    with pytest.raises(RateLimited, match="tenant 'acme' may use 2 requests in a minute") as refused:
        await home.admit(caller, call())
    headers = dict(headers_of(refused.value))
    assert (status_of(refused.value), headers[b"x-should-retry"]) == (429, b"true")
    assert headers[b"x-ratelimit-limit-requests"] == b"2"
    assert refused.value.retry_after is not None

    clock.advance(refused.value.retry_after)
    assert await home.admit(caller, call()) is not None


async def test_tokens_are_taken_as_estimated_and_settled_to_what_was_used() -> None:
    home, _ = admission()
    caller = principal(of=tenant(rate=Rate(tpm=150)))
    first = await home.admit(caller, call())
    assert first is not None
    with pytest.raises(RateLimited, match="tokens"):
        await home.admit(caller, call())

    home.settle(first, Usage(prompt_tokens=10, completion_tokens=5), 0)

    second = await home.admit(caller, call())
    assert second is not None
    assert b"x-ratelimit-remaining-tokens: 35\r\n" in second.headers


async def test_a_request_that_can_never_fit_is_told_what_to_lower() -> None:
    home, _ = admission()

    with pytest.raises(RateLimited, match="lower `max_tokens`") as refused:
        await admitted(home, rate=Rate(tpm=99))
    assert dict(headers_of(refused.value))[b"x-should-retry"] == b"false"


async def test_answers_open_at_a_time_are_bounded_and_given_back() -> None:
    home, _ = admission()
    caller = principal(of=tenant(rate=Rate(parallel=1)))
    first = await home.admit(caller, call())
    assert first is not None
    with pytest.raises(RateLimited, match="1 answers open"):
        await home.admit(caller, call())

    home.settle(first, None, 0)

    assert await home.admit(caller, call()) is not None


async def test_a_key_has_limits_of_its_own_inside_its_tenants() -> None:
    home, _ = admission()
    owner = tenant(rate=Rate(rpm=10))
    strict, free = principal(of=owner, id="strict", rate=Rate(rpm=1)), principal(of=owner, id="free")
    await home.admit(strict, call())

    with pytest.raises(RateLimited, match="key 'strict'"):
        await home.admit(strict, call())
    last = await home.admit(free, call())
    assert last is not None
    assert b"x-ratelimit-remaining-requests: 8\r\n" in last.headers  # the refused one took nothing


async def test_each_end_user_has_limits_of_its_own() -> None:
    home, _ = admission()
    caller = principal(of=tenant(end_user=Rate(rpm=1)))
    ann, bob = (call(context=CallContext(tenant=TenantId("acme"), end_user=name)) for name in ("ann", "bob"))
    await home.admit(caller, ann)

    assert await home.admit(caller, bob) is not None
    assert await home.admit(caller, call()) is None
    with pytest.raises(RateLimited, match="end user 'ann'"):
        await home.admit(caller, ann)


async def test_a_money_budget_takes_the_highest_cost_of_the_models_that_may_answer() -> None:
    home, _ = admission()
    budget = Budget(amount=9_100, unit="usd", period="day")
    caller = principal(of=tenant(budgets=(budget,)))
    dear = call(model=SMALL, fallbacks=(BIG,))  # at most 10 × 10 + 90 × 100 picodollars
    taken = await home.admit(caller, dear)
    assert taken is not None
    with pytest.raises(BudgetExceeded) as refused:
        await home.admit(caller, dear)
    assert dict(headers_of(refused.value))[b"x-should-retry"] == b"false"

    home.settle(taken, Usage(10, 90), PRICES[SMALL].cost(Usage(10, 90)))

    with pytest.raises(BudgetExceeded):
        await home.admit(caller, dear)
    assert await home.admit(caller, call(model=SMALL)) is not None


async def test_a_budget_starts_from_what_the_ledger_knows_and_anew_when_its_period_ends() -> None:
    clock = ManualClock()
    today = day_of(clock.wall())
    spent = Spent(today, {"day": [Sum(TenantId("acme"), "k", "", tokens=950, cost=0)]})
    home = Admission(LocalLimiter(), clock, lambda: spent, lambda: PRICES)
    caller = principal(of=tenant(budgets=(Budget(amount=1000, unit="tokens", period="day"),)))

    with pytest.raises(BudgetExceeded, match="today"):
        await home.admit(caller, call())
    clock.advance(86_400)
    assert await home.admit(caller, call()) is not None


async def test_the_ledger_is_read_only_where_somebody_has_a_budget() -> None:
    asked: list[tuple[int, int]] = []

    async def sums(first: int, last: int) -> list[Sum]:
        asked.append((first, last))
        return [Sum(TenantId("acme"), "k", "", tokens=7, cost=PICO_PER_USD)]

    clock, wanted = ManualClock(), False
    home = Spending(sums, clock, lambda: wanted)
    await home.refresh()
    assert asked == []

    wanted = True
    await home.refresh()
    await home.refresh()
    assert len(asked) == 6  # four periods' past once, today twice
    await home.reread()
    clock.advance(Spending.PAST_EVERY_S)
    await home.refresh()
    assert len(asked) == 16
    meter = home.spent.meter(("tenant", "acme"), Budget(10, "tokens", "day"), clock.wall())
    assert meter.seed == 14


def test_resets_are_written_as_openai_does() -> None:
    assert [reset_text(seconds) for seconds in (0.2, 1, 59.6, 360)] == ["0s", "1s", "1m0s", "6m0s"]
