"""The examples run as they are, against a gateway with the real executor and a model that is a function."""

import importlib.util
import io
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import forebay
import pytest

from tests.unit.sdk.running import RunningGateway

EXAMPLES = Path(__file__).parents[3] / "sdk" / "examples"


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return what runs an example against a gateway, with arguments and stdin."""

    async def run(name: str, gateway: RunningGateway, *arguments: str, stdin: str = "") -> None:
        example = loaded(name)
        monkeypatch.setattr(example, "AsyncClient", partial(forebay.AsyncClient, transport=gateway.transport))
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        await example.main(["--url", "http://gw:1", "--key", "k", "--model", "small", *arguments])

    return run


def loaded(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def said(body: Any) -> str:
    return str(body["messages"][-1]["content"])


async def test_chain(ran: Any, capsys: pytest.CaptureFixture[str]) -> None:
    gateway = RunningGateway(lambda body: said(body).replace("\n", " "))

    await ran("chain", gateway, "--size", "2", stdin="aabbcc")

    summary = "Existing summary: Existing summary: Summarize in one sentence: aa More context: bb Refined summary:"
    assert capsys.readouterr().out == f"{summary} More context: cc Refined summary:\n"
    assert gateway.asked == ["POST workflows", "GET variables/run_1.refine_2"]
    assert gateway.submitted[0]["calls"][0]["request"]["model"] == "small"


async def test_map_reduce(ran: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def engine(body: Any) -> Any:
        if said(body).startswith("Combine"):
            return {"summary": said(body).partition("\n")[2].replace("\n", ","), "risks": ["none"]}
        return said(body)[-2:]

    await ran("map_reduce", RunningGateway(engine), "--size", "2", stdin="aabbcc")

    assert capsys.readouterr().out == "aa,bb,cc\n- none\n"


async def test_multi_agent(ran: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Both files fail to compile at first; revised they are approved, and documented."""

    def engine(body: Any) -> Any:
        text = said(body)
        answers = {
            "Name the Python files": {"files": ["a.py", "b.py"]},
            "Write the file": "```python\nx =\n```",
            "Revise": "```python\nx = 1\n```" if '"failed":true' in text else "not compiled before",
            "Write a short README": "Two files.",
        }
        usual = {"approved": "x = 1" in text, "comments": ""}
        return next((answer for begin, answer in answers.items() if text.startswith(begin)), usual)

    gateway = RunningGateway(engine)

    await ran("multi_agent", gateway, "count words")

    assert capsys.readouterr().out == "Two files.\n"
    assert len(gateway.submitted) == 1
    assert gateway.asked.count("PUT variables/run_1.loop#0/map[1]/compiles") == 1


async def test_streaming(ran: Any, capsys: pytest.CaptureFixture[str]) -> None:
    await ran("streaming", RunningGateway(lambda body: said(body)[:5]), "why?")

    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "make_plan + 'Mak'"
    assert "answer = 'Answe'" in lines
    assert lines[-1] == "used {'tokens': 7}"
