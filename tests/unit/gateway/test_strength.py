"""Weak keys of operators are refused when the server starts."""

import pytest

from gateway.auth import new_admin_key, new_key
from gateway.settings import SettingsError, parse
from gateway.strength import weakness_of

MODELS = {"m": {"workers": [{"engine": "openai", "url": "http://127.0.0.1:9"}]}}


@pytest.mark.parametrize("secret", ["", "admin", "sk-1234", "a" * 40, "changemechangemechangeme", "0123456" * 5])
def test_what_is_short_or_of_little_variety_is_weak(secret: str) -> None:
    assert weakness_of(secret) is not None
    with pytest.raises(SettingsError, match="admin_key"):
        parse({"models": MODELS, "admin_key": secret or "x"}, {}, origin="forebay.yaml")
    operator = {"name": "bob", "tenant": "ops", "key": secret or "x", "role": "admin"}
    with pytest.raises(SettingsError, match="forebay keys new"):
        parse({"models": MODELS, "keys": [operator]}, {}, origin="forebay.yaml")


def test_keys_that_we_make_are_not() -> None:
    assert all(weakness_of(make()) is None for make in (new_key, new_admin_key) for _ in range(200))
