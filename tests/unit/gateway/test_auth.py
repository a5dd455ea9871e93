"""Who calls is known from the key alone."""

import stat
from pathlib import Path

import pytest

from core.errors import InvalidKey, ModelNotAllowed
from core.ids import ModelName, TenantId
from gateway.auth import PREFIX, EmptyKeyFile, Keys, Principal, digest_of, keep_key, new_key
from gateway.settings import KeySettings
from routing.catalog import Catalog, Model

SECRET = "fbk_0123456789abcdefghij"
CATALOG = Catalog((Model(name=ModelName("big"), aliases=("gpt-4o",)), Model(name=ModelName("small"))))


def keys(**more: object) -> Keys:
    settings = {"name": "laptop", "tenant": "acme", "key": SECRET, **more}
    return Keys.from_settings([KeySettings.model_validate(settings)], CATALOG)


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
    principal = keys().identify(headers)

    assert (principal.key_name, principal.tenant, principal.models) == ("laptop", "acme", None)


@pytest.mark.parametrize(
    "headers",
    [{}, {b"authorization": b""}, {b"authorization": b"Bearer "}, {b"authorization": b"Basic x"}, {b"x-api-key": b""}],
)
def test_no_key_is_told_apart_from_a_wrong_one(headers: dict[bytes, bytes]) -> None:
    with pytest.raises(InvalidKey, match="no API key was sent"):
        keys().identify(headers)


@pytest.mark.parametrize(
    "secret", [b"x", SECRET.encode() + b"x", SECRET.encode()[:-1], b"\xff\x00", SECRET.upper().encode()]
)
def test_a_wrong_key_is_refused(secret: bytes) -> None:
    with pytest.raises(InvalidKey, match="not known here"):
        keys().identify({b"authorization": b"Bearer " + secret})


def test_a_bearer_key_is_not_replaced_by_another_header() -> None:
    with pytest.raises(InvalidKey):
        keys().identify({b"authorization": b"Bearer wrong", b"x-api-key": SECRET.encode()})


def test_a_key_may_be_declared_by_its_hash() -> None:
    by_hash = keys(key=None, sha256=digest_of(SECRET.encode()).hex())

    assert by_hash.identify({b"api-key": SECRET.encode()}).tenant == "acme"


def test_the_hash_is_no_key() -> None:
    with pytest.raises(InvalidKey):
        keys().identify({b"api-key": digest_of(SECRET.encode())})


def test_an_allow_list_takes_aliases_and_leaves_out_what_does_not_exist() -> None:
    principal = keys(models=("gpt-4o", "nobody")).identify({b"api-key": SECRET.encode()})

    assert principal.models == frozenset({ModelName("big")})
    assert principal.may_use(ModelName("big"))
    with pytest.raises(ModelNotAllowed):
        principal.check(ModelName("small"))


def test_an_empty_allow_list_allows_nothing() -> None:
    principal = Principal(key_name="k", tenant=TenantId("t"), digest=b"", models=frozenset())

    assert not principal.may_use(ModelName("big"))


def test_nobody_is_known_where_no_key_was_declared() -> None:
    with pytest.raises(InvalidKey):
        Keys([]).identify({b"api-key": b"anything"})


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
