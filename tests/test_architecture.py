"""What holds for the project as a whole: packages, layers, pins. Needs no network."""

import ast
import re
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SERVER_PACKAGES = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
NOT_THE_SERVER = {"tests", "benchmarks", "sdk", "docs", "deploy", "build", "dist"}
OURS = {"forebay-server", "forebay"}
# Programs of their own, run as child processes: what they are told comes by their environment.
PROGRAMS = ("engines/drivers/llamacpp_server.py", "engines/guard.py", "engines/fake_server/", "engines/runtime/")

_BLOCK = re.DOTALL | re.MULTILINE
_PIN = re.compile(r"^(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)(?:\[[^\]]*\])?==(?P<version>[^\s;\\]+)", re.MULTILINE)


def top_level_packages() -> set[str]:
    """Return the folders at the root that hold a package of the server."""
    found = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    return {name for name in found if not name.startswith(".")} - NOT_THE_SERVER


def normal(name: str) -> str:
    """Return a distribution's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(text: str) -> dict[str, set[str]]:
    """Return name -> versions of every `name==version`; a name has several where markers choose between them."""
    found: dict[str, set[str]] = {}
    for match in _PIN.finditer(text):
        found.setdefault(normal(match["name"]), set()).add(match["version"])
    return found


def declared(*groups: str) -> list[str]:
    """Return the requirements that pyproject.toml has for the server and these groups."""
    requirements = list(PYPROJECT["project"]["dependencies"])
    for group in groups:
        for entry in PYPROJECT["dependency-groups"][group]:
            requirements += [entry] if isinstance(entry, str) else declared_in(entry["include-group"])
    return requirements


def declared_in(group: str) -> list[str]:
    return [entry for entry in PYPROJECT["dependency-groups"][group] if isinstance(entry, str)]


def server_modules() -> list[Path]:
    return sorted(path for package in SERVER_PACKAGES for path in (ROOT / package).rglob("*.py"))


def test_the_wheel_holds_every_package() -> None:
    assert set(SERVER_PACKAGES) == top_level_packages()


def test_the_layer_contracts_name_every_package() -> None:
    contracts = PYPROJECT["tool"]["importlinter"]
    assert set(contracts["root_packages"]) == top_level_packages()
    (layers,) = (contract["layers"] for contract in contracts["contracts"] if contract["type"] == "layers")
    named = {name.strip() for layer in layers for name in layer.split("|")}
    assert named == top_level_packages()


def test_no_installed_distribution_has_a_package_of_our_names() -> None:
    clashes = {
        name: distributions
        for name, distributions in packages_distributions().items()
        if name in SERVER_PACKAGES and not {normal(one) for one in distributions} <= OURS
    }
    assert clashes == {}


def test_every_requirement_is_pinned_to_one_version() -> None:
    loose = [line for line in declared("build", "dev") if not _PIN.match(line)]
    assert loose == []


def test_the_build_backend_is_the_one_in_the_lock() -> None:
    assert PYPROJECT["build-system"]["requires"] == declared_in("build")


@pytest.mark.parametrize(("lock", "groups"), [("requirements.txt", ["build"]), ("requirements-dev.txt", ["dev"])])
def test_the_lock_fits_pyproject(lock: str, groups: list[str]) -> None:
    locked = pins((ROOT / lock).read_text(encoding="utf-8"))
    wanted = pins("\n".join(declared(*groups)))
    assert {name: locked.get(name) for name in wanted} == wanted, "run `make lock`"


@pytest.mark.parametrize(("lock", "groups"), [("requirements.txt", ["build"]), ("requirements-dev.txt", ["dev"])])
def test_the_lock_holds_nothing_that_nobody_asked_for(lock: str, groups: list[str]) -> None:
    text = (ROOT / lock).read_text(encoding="utf-8")
    roots = {normal(match["name"]) for match in re.finditer(r"^(?P<name>[\w.-]+)==.*?(?=^[\w.-]+==|\Z)", text, _BLOCK)
             if "forebay-server (pyproject.toml" in match[0]}  # fmt: skip
    assert roots <= set(pins("\n".join(declared(*groups)))), "run `make lock`"


@pytest.mark.parametrize("lock", ["requirements.txt", "requirements-dev.txt"])
def test_every_locked_file_has_its_hash_and_comes_from_the_usual_index(lock: str) -> None:
    text = (ROOT / lock).read_text(encoding="utf-8")
    blocks = re.split(r"^(?=[A-Za-z0-9])", text, flags=re.MULTILINE)[1:]
    assert blocks
    assert [block.splitlines()[0] for block in blocks if "--hash=sha256:" not in block] == []
    assert not re.search(r"^\s*--(?!hash)|^-|https?://|file:", text, flags=re.MULTILINE)


def test_tools_for_developers_do_not_change_what_the_server_runs_with() -> None:
    runtime = pins((ROOT / "requirements.txt").read_text(encoding="utf-8"))
    dev = pins((ROOT / "requirements-dev.txt").read_text(encoding="utf-8"))
    assert {name: dev.get(name) for name in runtime} == runtime


def test_only_the_settings_read_the_environment() -> None:
    readers = {path.relative_to(ROOT).as_posix() for path in server_modules() if reads_environment(path)}
    assert {name for name in readers if not name.startswith(PROGRAMS)} == {"gateway/settings/sources.py"}


def reads_environment(path: Path) -> bool:
    """Return whether a module names os.environ, os.getenv or the like."""
    names = {"environ", "environb", "getenv", "getenvb", "putenv"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and node.attr in names and getattr(node.value, "id", None) == "os":
            return True
        if isinstance(node, ast.ImportFrom) and node.module == "os" and names & {alias.name for alias in node.names}:
            return True
    return False


def test_the_example_settings_travel_with_the_package() -> None:
    assert (ROOT / "gateway" / "cli" / "forebay.yaml.in").is_file()
