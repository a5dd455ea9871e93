"""Periods by the calendar, and budgets that start from the ledger."""

import datetime

import pytest

from core.ids import TenantId
from core.records import Sum
from core.tenancy import Budget, Period
from routing.budgets import PERIODS, Spent, day_of, ends_at, first_day


def day(text: str) -> int:
    return datetime.date.fromisoformat(text).toordinal() - datetime.date(1970, 1, 1).toordinal()


def moment(text: str) -> float:
    return datetime.datetime.fromisoformat(text).replace(tzinfo=datetime.UTC).timestamp()


def test_days_begin_at_midnight_utc() -> None:
    assert day_of(moment("2026-02-28T23:59:59.999")) == day("2026-02-28")
    assert day_of(moment("2026-03-01T00:00:00")) == day("2026-03-01")


@pytest.mark.parametrize(
    ("period", "today", "first", "next_first"),
    [
        ("day", "2026-02-28", "2026-02-28", "2026-03-01"),
        ("week", "2026-03-01", "2026-02-23", "2026-03-02"),  # a Sunday
        ("week", "2026-03-02", "2026-03-02", "2026-03-09"),
        ("week", "2026-01-01", "2025-12-29", "2026-01-05"),
        ("month", "2026-02-28", "2026-02-01", "2026-03-01"),
        ("month", "2028-02-29", "2028-02-01", "2028-03-01"),
        ("month", "2026-12-31", "2026-12-01", "2027-01-01"),
    ],
)
def test_a_period_ends_where_the_next_begins(period: Period, today: str, first: str, next_first: str) -> None:
    assert first_day(period, day(today)) == day(first)
    assert ends_at(period, day(today)) == moment(next_first)


def test_every_day_lies_in_its_period() -> None:
    for number in range(0, 20_000, 7):
        for period in PERIODS:
            assert first_day(period, number) <= number
            assert first_day(period, first_day(period, number)) == first_day(period, number)
            assert period == "total" or number < day_of(ends_at(period, number))


def test_a_total_never_ends() -> None:
    assert (first_day("total", day("2026-02-28")), ends_at("total", day("2026-02-28"))) == (0, 0.0)


TODAY = day("2026-02-28")
NOW = moment("2026-02-28T12:00:00")


def spent() -> Spent:
    return Spent(
        TODAY,
        {
            "day": [Sum(TenantId("acme"), "k1", "ann", 10, 100), Sum(TenantId("acme"), "k2", "", 20, 200)],
            "month": [Sum(TenantId("acme"), "k1", "ann", 1000, 7)],
        },
    )


@pytest.mark.parametrize(
    ("subject", "budget", "seed"),
    [
        (("tenant", "acme"), Budget(50, "tokens", "day"), 30),
        (("tenant", "acme"), Budget(50, "usd", "day"), 300),
        (("key", "k1"), Budget(50, "tokens", "day"), 10),
        (("key", "k1"), Budget(50, "tokens", "month"), 1000),
        (("end_user", "acme", "ann"), Budget(50, "usd", "day"), 100),
        (("end_user", "acme", ""), Budget(50, "usd", "day"), 0),
        (("tenant", "other"), Budget(50, "tokens", "day"), 0),
        (("key", "k1"), Budget(50, "tokens", "total"), 0),
    ],
)
def test_a_budget_starts_from_what_its_subject_used(subject: tuple[str, ...], budget: Budget, seed: int) -> None:
    meter = spent().meter(subject, budget, NOW)

    assert (meter.kind, meter.limit, meter.seed) == ("period", 50, seed)
    assert meter.ends_at == ends_at(budget.period, TODAY)


def test_what_was_used_yesterday_is_not_used_today_and_is_used_this_week() -> None:
    known = Spent(
        TODAY, {"day": [Sum(TenantId("acme"), "k", "", 9, 9)], "week": [Sum(TenantId("acme"), "k", "", 9, 9)]}
    )
    tomorrow = moment("2026-03-01T00:00:01")

    assert known.meter(("key", "k"), Budget(50, "tokens", "day"), tomorrow).seed == 0
    assert known.meter(("key", "k"), Budget(50, "tokens", "week"), tomorrow).seed == 9


def test_each_subject_unit_and_period_has_a_count_of_its_own() -> None:
    keys = {
        Spent().meter(subject, Budget(1, unit, period), now).key
        for subject in (("tenant", "a"), ("key", "a"), ("end_user", "a", "b"), ("end_user", "a", "b/tokens/day/1"))
        for unit in ("tokens", "usd")
        for period in PERIODS
        for now in (NOW, NOW + 40 * 86_400)
    }

    assert len(keys) == 4 * 2 * (3 * 2 + 1)
