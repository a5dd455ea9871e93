"""Money goes over the wire exactly."""

from decimal import Decimal

from hypothesis import given
from hypothesis import strategies as st

from core.tenancy import Budget, Key
from gateway.api.admin.shapes import BudgetShape, budgets_in, shown_budgets, shown_key, shown_usd
from tests.fakes.tenancy import key

LARGEST = 10**18


@given(st.integers(1, LARGEST))
def test_an_amount_of_money_comes_back_as_it_went(picodollars: int) -> None:
    budget = (Budget(picodollars, "usd", "day"),)
    (shown,) = shown_budgets(budget)
    assert budgets_in([BudgetShape.model_validate_json(shown.model_dump_json())]) == budget


@given(st.integers(-LARGEST, LARGEST))
def test_money_is_plain_decimal_text(picodollars: int) -> None:
    text = shown_usd(picodollars)
    assert Decimal(text) * 10**12 == picodollars
    assert "E" not in text


def test_a_key_is_shown_without_what_it_is_checked_by() -> None:
    shown: Key = key("fbk_0123456789abcdefghij", expires_at=10.0)
    assert shown.digest.hex() not in shown_key(shown, 0.0).model_dump_json()
    assert [shown_key(shown, now).state for now in (9.0, 10.0)] == ["active", "expired"]
