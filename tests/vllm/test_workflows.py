"""The SDK's examples as they are, over real HTTP, with a real vLLM (CPU build, SmolLM2) behind the gateway."""

import io
import sys

import pytest

from tests.e2e.test_sdk_workflows import loaded
from tests.vllm.conftest import START_TIMEOUT_S, Vllm

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(START_TIMEOUT_S)]

BOOK = "The river rose for three days, and the people below the dam did not sleep. " * 4


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("chain", ["--size", "100"]),
        ("streaming", ["Why is the sky blue?"]),
        ("map_reduce", ["--size", "60"]),
        ("multi_agent", ["a command that counts words"]),
    ],
)
async def test_an_example_of_the_sdk_comes_to_its_end(
    vllm: Vllm, name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(BOOK))
    main = loaded(name).main
    await main(["--url", vllm.url, "--key", vllm.gateway.key, "--model", "smol", *arguments])
    assert capsys.readouterr().out.strip()
