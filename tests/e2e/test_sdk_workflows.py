"""The SDK's examples as they are, over real HTTP through a real gateway, with the fake engine and a real llama.cpp."""

import importlib.util
import io
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.e2e.conftest import Target

_EXAMPLES = Path(__file__).parents[2] / "sdk" / "examples"


def loaded(name: str) -> ModuleType:
    """Return an example's module, executed anew."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", _EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


async def run(target: Target, name: str, *arguments: str) -> None:
    """Run an example against a gateway."""
    await loaded(name).main(["--url", target.url, "--key", target.key, "--model", target.model, *arguments])


@pytest.fixture
def book(monkeypatch: pytest.MonkeyPatch) -> str:
    text = "The river rose for three days, and the people below the dam did not sleep. " * 4
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    return text


async def test_a_chain(target: Target, book: str, capsys: pytest.CaptureFixture[str]) -> None:
    await run(target, "chain", "--size", str(len(book) // 3))
    assert capsys.readouterr().out.strip()


async def test_two_variables_are_watched(target: Target, capsys: pytest.CaptureFixture[str]) -> None:
    await run(target, "streaming", "Why is the sky blue?")
    told = capsys.readouterr().out
    assert "make_plan = " in told
    assert "answer = " in told
    assert "used " in told


async def test_a_map_and_a_typed_report(target: Target, book: str, capsys: pytest.CaptureFixture[str]) -> None:
    await run(target, "map_reduce", "--size", str(len(book) // 5))
    assert capsys.readouterr().out.strip()


async def test_agents_with_a_loop_a_race_a_branch_and_a_tool_of_this_process(
    target: Target, capsys: pytest.CaptureFixture[str]
) -> None:
    await run(target, "multi_agent", "a command that counts words")
    assert capsys.readouterr().out.strip()
