"""Which names the admin port answers to."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.api.admin.hosts import host_name


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("localhost", "localhost"),
        ("localhost:8412", "localhost"),
        ("127.0.0.1:8412", "127.0.0.1"),
        ("[::1]:8412", "::1"),
        ("[::1]", "::1"),
        ("::1", ""),
        ("", ""),
        (":8412", ""),
        ("evil.example:localhost", ""),
        ("[::1].evil.example", ""),
        ("[::1", ""),
    ],
)
def test_the_name_is_what_stands_before_the_port(header: str, name: str) -> None:
    assert host_name(header) == name


@given(st.text(min_size=1, max_size=40))
def test_no_name_that_only_begins_like_loopback_is_taken_for_it(rest: str) -> None:
    is_port = rest[0] == ":" and (rest == ":" or (rest[1:].isascii() and rest[1:].isdigit()))
    assert (host_name(f"[::1]{rest}") == "::1") is is_port
    assert (host_name(f"localhost{rest}") == "localhost") is is_port
