"""Models by name and alias."""

import pytest

from core.ids import ModelName
from routing.catalog import Catalog, Model

BIG = Model(name=ModelName("big"), aliases=("gpt-4o", "default"))
SMALL = Model(name=ModelName("small"))


@pytest.fixture
def catalog() -> Catalog:
    return Catalog((BIG, SMALL))


@pytest.mark.parametrize("name", ["big", "gpt-4o", "default"])
def test_a_model_is_found_by_its_name_and_by_each_alias(catalog: Catalog, name: str) -> None:
    assert catalog.find(name) is BIG


def test_other_names_find_nothing(catalog: Catalog) -> None:
    assert [catalog.find(name) for name in ("", "BIG", "big ", "gpt")] == [None] * 4


def test_models_and_names_come_in_the_order_of_the_file(catalog: Catalog) -> None:
    assert catalog.models() == (BIG, SMALL)
    assert catalog.names() == ("big", "gpt-4o", "default", "small")
