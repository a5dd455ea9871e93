import json
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway.settings import Settings, load
from tests.deploy.images import (
    DEPLOY,
    DOCKERFILES,
    ROOT,
    SETTINGS,
    command,
    compose,
    final_stage,
    health_command,
    instructions,
    services,
)

_SERVICES = sorted(services())
_BY_DIGEST = re.compile(r"^[\w./-]+:[\w.-]+@sha256:[0-9a-f]{64}$")
_OURS = ("gateway", "gateway-gpu")


def seconds(duration: str) -> int:
    match = re.fullmatch(r"(?:(\d+)m)?(?:(\d+)s)?", duration)
    assert match is not None
    return 60 * int(match[1] or 0) + int(match[2] or 0)


def settings_of(name: str, folder: Path) -> Settings:
    """Return a settings file of deploy/, with secrets that are made for the occasion."""
    subprocess.run([DEPLOY / "make-secrets", folder / "secrets"], check=True, stdout=subprocess.DEVNULL)
    text = (DEPLOY / name).read_text("utf-8").replace("/run/secrets", str(folder / "secrets"))
    (folder / name).write_text(text, "utf-8")
    return load(folder / name, {})


@pytest.mark.parametrize("name", _SERVICES)
def test_a_service_is_unprivileged_and_cannot_write_to_its_root(name: str) -> None:
    service = services()[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "cap_add" not in service
    assert "privileged" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert int(service["user"].split(":")[0]) > 0
    assert service["restart"] == "unless-stopped"


@pytest.mark.parametrize("name", _SERVICES)
def test_a_service_is_reached_from_this_machine_alone(name: str) -> None:
    assert all(port.startswith("127.0.0.1:") for port in services()[name].get("ports", ()))


@pytest.mark.parametrize("name", _SERVICES)
def test_a_service_has_a_health_check(name: str) -> None:
    if name in _OURS:
        dockerfile = ROOT / services()[name]["build"]["dockerfile"]
        assert "/health/readiness" in health_command(dockerfile)[-1]
    else:
        assert services()[name]["healthcheck"]["test"][0] in {"CMD", "CMD-SHELL"}


@pytest.mark.parametrize("name", [name for name in _SERVICES if name not in _OURS])
def test_an_image_is_pinned_by_its_digest(name: str) -> None:
    assert _BY_DIGEST.match(services()[name]["image"])


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_a_base_image_is_pinned_by_its_digest(path: Path) -> None:
    found = instructions(path)
    bases = [rest.partition("=")[2] for word, rest in found if word == "ARG"]
    assert bases
    assert all(_BY_DIGEST.match(base) for base in bases)
    assert all(rest.startswith("${") for word, rest in found if word == "FROM")


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_installs_only_wheels_of_the_lock(path: Path) -> None:
    installs = [json.loads(rest) for word, rest in instructions(path) if word == "RUN" and rest.startswith("[")]
    locked, ours = [words for words in installs if "install" in words]
    assert {"--require-hashes", "--only-binary=:all:"} <= set(locked)
    assert {"--no-deps", "--no-build-isolation"} <= set(ours)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_runs_as_nobody_in_particular_and_stops_when_told(path: Path) -> None:
    stage = final_stage(path)
    assert stage["USER"] == "10001:0"
    assert stage["STOPSIGNAL"] == "SIGTERM"
    assert command(path)[1:] == ["serve", "-c", "/etc/forebay/forebay.yaml"]


def test_a_secret_is_a_file_and_never_a_variable() -> None:
    tree = compose()
    assert all(list(secret) == ["file"] for secret in tree["secrets"].values())
    for service in tree["services"].values():
        assert set(service.get("secrets", ())) <= set(tree["secrets"])
        for name, value in service.get("environment", {}).items():
            if any(word in name for word in ("PASSWORD", "KEY", "TOKEN", "SECRET")):
                assert value.startswith("/run/secrets/")
                assert value.rpartition("/")[2] in service["secrets"]


def test_secrets_are_made_once_and_kept(tmp_path: Path) -> None:
    folder = tmp_path / "secrets"
    subprocess.run([DEPLOY / "make-secrets", folder], check=True)
    first = {path.name: path.read_text() for path in folder.iterdir()}
    subprocess.run([DEPLOY / "make-secrets", folder], check=True)
    assert {path.name: path.read_text() for path in folder.iterdir()} == first
    assert set(first) == set(compose()["secrets"])
    assert all(len(value.strip()) >= 43 for value in first.values())
    assert len(set(first.values())) == len(first)
    assert folder.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("name", SETTINGS)
def test_the_settings_are_right_and_every_secret_in_them_is_mounted(name: str, tmp_path: Path) -> None:
    settings = settings_of(name, tmp_path)
    assert settings.admin_key is not None
    service = services()["gateway-gpu" if "gpu" in name else "gateway"]
    assert set(re.findall(r"/run/secrets/(\w+)", (DEPLOY / name).read_text("utf-8"))) <= set(service["secrets"])


@pytest.mark.parametrize("name", SETTINGS)
def test_a_stop_has_time_to_drain_and_to_end_the_engine(name: str, tmp_path: Path) -> None:
    settings = settings_of(name, tmp_path)
    lifecycle = settings.models[next(iter(settings.models))].workers[0].lifecycle
    needed = settings.server.drain_timeout + lifecycle.stop_timeout
    for service in _OURS:
        assert seconds(services()[service]["stop_grace_period"]) > needed


def test_the_settings_files_differ_only_where_they_have_to() -> None:
    base, postgres, gpu = (yaml.safe_load((DEPLOY / name).read_text("utf-8")) for name in SETTINGS)
    assert {key: value for key, value in postgres.items() if key != "database"} == base
    assert {**gpu, "models": base["models"]} == base


def test_without_a_profile_there_is_the_gateway_and_redis() -> None:
    assert {name for name, service in services().items() if "profiles" not in service} == {"gateway", "redis"}
    profiles = {profile for service in services().values() for profile in service.get("profiles", ())}
    assert profiles == {"postgres", "gpu", "observability"}


@pytest.mark.parametrize("name", ["redis", "postgres"])
def test_what_has_no_password_for_others_is_on_a_network_of_its_own(name: str) -> None:
    assert services()[name]["networks"] == ["state"]
    assert compose()["networks"]["state"]["internal"] is True
    assert "ports" not in services()[name]


def test_a_build_sees_every_package_and_nothing_secret() -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line.startswith("!")]
    build = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["hatch"]["build"]
    assert set(build["targets"]["wheel"]["packages"]) <= set(allowed)
    assert not [name for name in allowed if "secret" in name or name in {"deploy", ".", ".git"}]
    for path in DOCKERFILES:
        copied = [rest.split()[0] for word, rest in instructions(path) if word == "COPY" and "--from" not in rest]
        assert all(name == "." or name in allowed for name in copied)


def mounted_files() -> list[tuple[str, str]]:
    found: list[Any] = [(name, v) for name, service in services().items() for v in service.get("volumes", ())]
    return [(name, volume.split(":")[0]) for name, volume in found if volume.startswith("./")]


@pytest.mark.parametrize(("name", "source"), mounted_files())
def test_what_is_mounted_from_the_repository_is_there(name: str, source: str) -> None:
    assert (ROOT / source).exists(), f"{name} mounts {source}"


def test_the_scraper_uses_the_key_that_may_only_look() -> None:
    text = (DEPLOY / "prometheus" / "prometheus.yml").read_text("utf-8")
    assert set(re.findall(r"/run/secrets/(\w+)", text)) == {"metrics_key"}
    assert "gateway:8412" in text
