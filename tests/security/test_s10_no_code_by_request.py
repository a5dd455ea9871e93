"""S10: what a worker runs stands in the settings file, and no shell reads it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from core.ids import ModelName, WorkerId
from engines.drivers.openai import OpenAIEngine
from engines.engine import command_of
from engines.spec import Launch, WorkerSpec
from gateway.settings import Settings, SettingsError
from gateway.settings.paths import resolved

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("core", "routing", "storage", "engines", "gateway")
_SHELLS = frozenset({"system", "popen", "create_subprocess_shell", "getoutput", "getstatusoutput"})
_EVALUATORS = frozenset({"eval", "exec", "compile"})


def calls() -> Iterator[tuple[str, ast.Call]]:
    """Yield every call in our packages with its place."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.Call):
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", node


def test_nothing_is_run_by_a_shell_or_evaluated() -> None:
    places = list(calls())
    assert len(places) > 1000, "the scan finds the packages"
    for place, node in places:
        for keyword in node.keywords:
            assert keyword.arg != "shell", f"{place} may start a shell"
        match node.func:
            case ast.Attribute(attr=name) if name in _SHELLS:
                raise AssertionError(f"{place} starts a shell")
            case ast.Name(id=name) if name in _EVALUATORS:
                raise AssertionError(f"{place} runs text as code")


@pytest.mark.parametrize("hostile", ["; touch /tmp/x", "$(touch x)", "`touch x`", "a b --port 1", "{port}", "\n--host"])
def test_a_name_with_a_shells_words_in_it_stays_one_argument(hostile: str) -> None:
    launch = Launch(source="model", command=("engine", "--name={name}", "--port", "{port}"))
    spec = WorkerSpec(id=WorkerId("m-0"), model=ModelName(hostile), engine="openai", launch=launch)
    command = command_of(spec, OpenAIEngine(), 1234, "key")
    assert len(command.argv) == 4
    assert command.argv[0] == "engine"
    assert command.argv[2:] == ("--port", "1234")


def test_what_a_worker_runs_cannot_be_changed_once_it_is_declared() -> None:
    launch = Launch(source="model", command=("engine",))
    for field in ("command", "program", "args", "source", "trust_remote_code"):
        with pytest.raises(AttributeError, match="immutable"):
            setattr(launch, field, ("sh", "-c", "true"))
    assert msgspec.json.encode(launch)


@pytest.mark.parametrize("place", ["models", "models.m", "models.m.workers"])
def test_no_overlay_of_the_settings_reaches_what_is_run(place: str) -> None:
    """Overlays change only what is marked for it; a list of workers is one value, and has no mark, nor has its way."""
    worker = {"engine": "openai", "launch": {"source": "x", "command": ["engine"]}}
    settings = Settings.model_validate({"version": 1, "models": {"m": {"workers": [worker]}}})
    assert not resolved(place, settings).is_overridable
    with pytest.raises(SettingsError, match="as a whole"):
        resolved("models.m.workers.0.launch.command", settings)
