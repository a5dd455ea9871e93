"""S16: nothing runs because it was installed, and only what the lock names is. Needs no network."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.images import DOCKERFILES, ROOT, instructions, services

PROJECTS = (ROOT / "pyproject.toml", ROOT / "sdk" / "pyproject.toml")
LOCKS = (ROOT / "requirements.txt", ROOT / "requirements-dev.txt")
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
_DIGEST = re.compile(r"@sha256:[0-9a-f]{64}$")
_INSTALL = re.compile(r"(?:\$\(PIP\)|pip[\"' ,]+install)(?P<options>.*)")


def project(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text("utf-8"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", PROJECTS, ids=name_of)
def test_our_packages_run_no_code_of_their_own_when_they_are_built_or_installed(path: Path) -> None:
    said = project(path)
    assert said["build-system"]["build-backend"] == "hatchling.build"
    assert "backend-path" not in said["build-system"], "the backend is the locked one"
    assert re.fullmatch(r"\[\"hatchling==[\d.]+\"\]", json.dumps(said["build-system"]["requires"]))
    hatch = said.get("tool", {}).get("hatch", {})
    assert set(hatch) <= {"build"}
    assert not _keys_of(hatch) & {"hooks", "dependencies", "force-include", "artifacts", "sources"}
    assert not said["project"].get("dynamic"), "nothing is computed while it is built"
    folder = path.parent
    assert [
        name for name in ("setup.py", "setup.cfg", "hatch_build.py", "MANIFEST.in") if (folder / name).exists()
    ] == []
    assert [name_of(found) for found in folder.glob("*.pth")] == []


def _keys_of(tree: Any) -> set[str]:
    if not isinstance(tree, dict):
        return set()
    return set(tree).union(*(_keys_of(value) for value in tree.values()))


def test_our_packages_bring_no_programs_but_the_one_command() -> None:
    scripts = {name_of(path): project(path)["project"].get("scripts", {}) for path in PROJECTS}
    assert scripts == {"pyproject.toml": {"forebay": "gateway.cli:main"}, "sdk/pyproject.toml": {}}
    for path in PROJECTS:
        assert not set(project(path)["project"]) & {"entry-points", "gui-scripts"}


def test_every_installation_checks_hashes_or_installs_what_is_here_alone() -> None:
    """The lock itself is made by a tool of one version in an environment of its own: that is not an installation."""
    recipes = [line for line in MAKEFILE.splitlines() if line.startswith("\t") and ".venv-lock" not in line]
    found = [match["options"] for line in recipes if (match := _INSTALL.search(line))]
    assert len(found) == 4
    for options in found:
        is_locked = "--require-hashes -r requirements" in options
        is_ours = "--no-deps --no-build-isolation -e ." in options
        assert is_locked is not is_ours, options


@pytest.mark.parametrize("path", LOCKS, ids=name_of)
def test_every_distribution_of_the_lock_has_one_version_and_hashes(path: Path) -> None:
    blocks = re.split(r"^(?=[A-Za-z0-9])", path.read_text("utf-8"), flags=re.MULTILINE)[1:]
    assert len(blocks) > 20
    for block in blocks:
        assert re.match(r"[A-Za-z0-9._-]+(?:\[[^\]]+\])?==[^\s;*]+( ;[^\n]*)? \\\n", block), block.splitlines()[0]
        assert re.search(r"--hash=sha256:[0-9a-f]{64}\b", block)


def test_every_image_is_named_by_its_digest_and_the_doubt_about_digests_is_told() -> None:
    foreign = [service["image"] for service in services().values() if "build" not in service]
    bases = [rest.partition("=")[2] for path in DOCKERFILES for word, rest in instructions(path) if word == "ARG"]
    assert foreign
    assert bases
    assert [image for image in (*foreign, *bases) if not _DIGEST.search(image)] == []
    told = " ".join((ROOT / "docs" / "operate" / "deploy.md").read_text("utf-8").split())
    assert "not from the registry itself; compare it with" in told


def test_no_container_is_root_or_writes_to_its_root() -> None:
    assert [
        name for name, service in services().items() if service.get("user", "0").split(":")[0] in {"0", "root"}
    ] == []
    assert [name for name, service in services().items() if service.get("read_only") is not True] == []
    for path in DOCKERFILES:
        users = [rest for word, rest in instructions(path) if word == "USER"]
        assert users
        assert users[-1].split(":")[0] not in {"0", "root"}


@pytest.mark.parametrize("path", DOCKERFILES, ids=name_of)
def test_an_image_fetches_nothing_but_wheels_of_the_lock_and_packages_of_its_base(path: Path) -> None:
    for word, rest in instructions(path):
        if word == "ADD":
            raise AssertionError(f"{path.name}: ADD fetches and unpacks; COPY does not")
        if word == "RUN":
            assert not re.search(r"\b(curl|wget|git|npm)\b|https?://", rest), rest
            if "pip" in rest and "install" in rest:
                words = json.loads(rest)
                assert "--require-hashes" in words or words[-3:] == ["--no-deps", "--no-build-isolation", "."]


def test_make_check_holds_all_this() -> None:
    check = MAKEFILE.partition("\ncheck: ")[2].partition("\n\n")[0]
    assert "tests/test_architecture.py" in check
    assert "tests/security/test_s16_supply_chain.py" in check
    assert "check-compose" in check
