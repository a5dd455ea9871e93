"""Who calls is known from the key alone."""

import stat
from pathlib import Path

import pytest

from core.chat import Endpoint
from core.errors import EndpointNotAllowed, InvalidKey, KeysUnavailable, ModelNotAllowed, TenantSuspended
from core.ids import ModelName
from gateway.auth import PREFIX, EmptyKeyFile, Keyring, covers, digest_of, keep_key, new_key
from gateway.settings import Settings
from gateway.tenants import declared_keys, declared_tenants
from routing.catalog import Catalog, Model
from tests.fakes.tenancy import key, principal, tenant

SECRET = "fbk_0123456789abcdefghij"
CATALOG = Catalog((Model(name=ModelName("big"), aliases=("gpt-4o",)), Model(name=ModelName("small"))))


NOW = 1_000_000.0
MODELS = {name: {"workers": [{"engine": "openai", "url": "http://x"}]} for name in ("big", "small")}


def keys(**more: object) -> Keyring:
    declared = {"name": "laptop", "tenant": "acme", "key": SECRET, **more}
    models = {**MODELS, "big": {**MODELS["big"], "aliases": ["gpt-4o"]}}
    settings = Settings.model_validate({"models": models, "keys": [declared]})
    return Keyring(declared_tenants(settings, CATALOG), declared_keys(settings, CATALOG))


@pytest.mark.parametrize(
    "headers",
    [
        {b"authorization": b"Bearer " + SECRET.encode()},
        {b"authorization": b"bearer  " + SECRET.encode() + b" "},
        {b"authorization": b"BEARER " + SECRET.encode()},
        {b"x-api-key": SECRET.encode()},
        {b"api-key": SECRET.encode()},
        {b"authorization": b"Basic xyz", b"x-api-key": SECRET.encode()},
    ],
)
def test_a_key_is_found_where_clients_put_it(headers: dict[bytes, bytes]) -> None:
    caller = keys().identify(headers, NOW)

    assert (caller.key.name, caller.tenant, caller.models) == ("laptop", "acme", None)


@pytest.mark.parametrize(
    "headers",
    [{}, {b"authorization": b""}, {b"authorization": b"Bearer "}, {b"authorization": b"Basic x"}, {b"x-api-key": b""}],
)
def test_no_key_is_told_apart_from_a_wrong_one(headers: dict[bytes, bytes]) -> None:
    with pytest.raises(InvalidKey, match="no API key was sent"):
        keys().identify(headers, NOW)


@pytest.mark.parametrize(
    "secret", [b"x", SECRET.encode() + b"x", SECRET.encode()[:-1], b"\xff\x00", SECRET.upper().encode()]
)
def test_a_wrong_key_is_refused(secret: bytes) -> None:
    with pytest.raises(InvalidKey, match="not known here"):
        keys().identify({b"authorization": b"Bearer " + secret}, NOW)


def test_a_bearer_key_is_not_replaced_by_another_header() -> None:
    with pytest.raises(InvalidKey):
        keys().identify({b"authorization": b"Bearer wrong", b"x-api-key": SECRET.encode()}, NOW)


def test_a_key_may_be_declared_by_its_hash() -> None:
    by_hash = keys(key=None, sha256=digest_of(SECRET.encode()).hex())

    assert by_hash.identify({b"api-key": SECRET.encode()}, NOW).tenant == "acme"


def test_the_hash_is_no_key() -> None:
    with pytest.raises(InvalidKey):
        keys().identify({b"api-key": digest_of(SECRET.encode())}, NOW)


def test_an_allow_list_takes_aliases() -> None:
    caller = keys(models=("gpt-4o",)).identify({b"api-key": SECRET.encode()}, NOW)

    assert caller.models == frozenset({ModelName("big")})
    assert caller.may_use(ModelName("big"))
    with pytest.raises(ModelNotAllowed):
        caller.check(ModelName("small"))


def test_an_empty_allow_list_allows_nothing() -> None:
    assert not principal([]).may_use(ModelName("big"))


def test_nobody_is_known_where_no_key_was_declared() -> None:
    with pytest.raises(InvalidKey):
        Keyring([], []).identify({b"api-key": b"anything"}, NOW)


def test_a_key_may_do_no_more_than_its_tenant() -> None:
    big, small = ModelName("big"), ModelName("small")
    owner = tenant(models=frozenset({big}), endpoints=frozenset({Endpoint.CHAT}), max_class="standard")

    caller = principal([big, small], of=owner, max_class="interactive")

    assert (caller.models, caller.max_class) == (frozenset({big}), "standard")
    caller.check_endpoint(Endpoint.CHAT)
    with pytest.raises(EndpointNotAllowed, match="/v1/embeddings"):
        caller.check_endpoint(Endpoint.EMBEDDINGS)


@pytest.mark.parametrize(
    ("more", "code"), [({"expires_at": NOW}, "key_expired"), ({"revoked_at": NOW - 1}, "key_revoked")]
)
def test_a_key_that_holds_no_longer_is_told_why(more: dict[str, float], code: str) -> None:
    ring = Keyring([tenant()], [key(SECRET, **more)])

    with pytest.raises(InvalidKey) as refused:
        ring.identify({b"api-key": SECRET.encode()}, NOW)
    assert refused.value.specific_code == code


def test_a_key_holds_until_the_moment_it_expires() -> None:
    ring = Keyring([tenant()], [key(SECRET, expires_at=NOW + 1)])

    assert ring.identify({b"api-key": SECRET.encode()}, NOW).tenant == "acme"


def test_a_suspended_tenants_keys_are_refused() -> None:
    ring = Keyring([tenant(is_suspended=True)], [key(SECRET)])

    with pytest.raises(TenantSuspended):
        ring.identify({b"api-key": SECRET.encode()}, NOW)


def test_a_key_that_only_the_database_may_know_is_unavailable_rather_than_wrong() -> None:
    with pytest.raises(KeysUnavailable):
        Keyring([], [], is_complete=False).identify({b"api-key": SECRET.encode()}, NOW)


def test_an_operators_key_opens_the_admin_port_and_nothing_else() -> None:
    ring = Keyring([tenant()], [key(SECRET, role="operator"), key("fbk_another_key_of_length")])
    headers = {b"authorization": b"Bearer " + SECRET.encode()}

    assert ring.operator(headers, NOW).role == "operator"
    with pytest.raises(InvalidKey):
        ring.identify(headers, NOW)
    with pytest.raises(InvalidKey):
        ring.operator({b"api-key": b"fbk_another_key_of_length"}, NOW)


def test_a_role_covers_those_below_it() -> None:
    assert covers("admin", "policy")
    assert covers("operator", "operator")
    assert not covers("viewer", "operator")


def test_new_keys_are_long_and_never_the_same() -> None:
    made = {new_key() for _ in range(100)}

    assert len(made) == 100
    assert all(key.startswith(PREFIX) and len(key) > 40 for key in made)


def test_a_kept_key_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "key"

    first, second = keep_key(path, new_key), keep_key(path, new_key)

    assert first == second
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_kept_key_that_others_could_read_is_closed_to_them(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("fbk_old\n")
    path.chmod(0o644)

    assert keep_key(path, new_key) == "fbk_old"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_an_empty_key_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "key").touch()

    with pytest.raises(EmptyKeyFile):
        keep_key(tmp_path / "key", new_key)
