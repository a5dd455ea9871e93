"""Gateways for end-to-end tests. An async test that uses one runs in its module's event loop, in which they were made;
an async fixture of such a test has to be declared with `loop_scope="module"`."""

import hashlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Generator, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
import pytest_asyncio

from engines.models import fetch
from gateway.cli.common import cache_dir, models_dir
from tests.fakes.engine import FakeEngine
from tests.fakes.gateway import GatewayProcess, attached, launched_llamacpp

LIMITED_KEY = "fbk_limited-to-the-model-fake-alone"
_HERE = Path(__file__).resolve().parent


class Target(NamedTuple):
    """What a client needs to know: an address, a key and a model."""

    gateway: GatewayProcess
    model: str
    is_real: bool

    @property
    def url(self) -> str:
        """The gateway's address without `/v1`."""
        return self.gateway.url

    @property
    def v1(self) -> str:
        """The address that OpenAI clients are given."""
        return self.gateway.url + "/v1"

    @property
    def key(self) -> str:
        """A key for all models."""
        return self.gateway.key


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[FakeEngine]:
    """A fake engine that serves the model `fake`."""
    async with FakeEngine(model="fake", max_model_len=4096) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(engine: FakeEngine) -> AsyncIterator[GatewayProcess]:
    """A gateway in front of `engine`: models `fake` and `org/hidden`; `LIMITED_KEY` may use only `fake`."""
    limited = {"name": "limited", "tenant": "limited", "key": LIMITED_KEY, "models": ["fake"]}
    models = {"fake": attached(engine.url), "org/hidden": attached(engine.url, served_name="fake")}
    async with GatewayProcess(models, keys=[limited]) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def real_gateway() -> AsyncIterator[GatewayProcess]:
    """A gateway in front of a real llama.cpp that it launches, with the model `smollm2`."""
    async with GatewayProcess({"smollm2": launched_llamacpp(smollm2())}) as running:
        yield running


@pytest.fixture(scope="module", params=["fake", "real"])
def target(request: pytest.FixtureRequest) -> Target:
    """The fake engine and the real llama.cpp, each behind a gateway."""
    if request.param == "real":
        return Target(request.getfixturevalue("real_gateway"), "smollm2", is_real=True)
    return Target(request.getfixturevalue("gateway"), "fake", is_real=False)


@pytest.fixture(scope="module")
def fake(gateway: GatewayProcess) -> Target:
    """The fake engine alone, for what no small model does reliably."""
    return Target(gateway, "fake", is_real=False)


def smollm2() -> Path:
    """Return the path of the small model; fetches it on the first use."""
    return fetch("smollm2", models_dir(os.environ))


@pytest.fixture(scope="session")
def llama_index_python() -> Path:
    """A Python that can import LlamaIndex: this one, or that of an environment made on the first use (270 MB)."""
    if find_spec("llama_index") is not None:
        return Path(sys.executable)
    lock = _HERE / "llama_index.txt"
    name = f"llama-index-{hashlib.sha256(lock.read_bytes()).hexdigest()[:12]}-py{sys.version_info.minor}"
    cache = cache_dir(os.environ) / "clients"
    python = cache / name / "bin" / "python"
    done = cache / name / "complete"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(cache / name)], check=True)
        install = [str(python), "-m", "pip", "install", "-q", "--no-deps", "--require-hashes", "-r", str(lock)]
        subprocess.run(install, check=True)
        done.touch()
    return python


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the async tests that use a fixture of this file in their module's event loop."""
    shared = {"engine", "gateway", "real_gateway", "target", "fake"}
    for item in items:
        is_ours = item.path.is_relative_to(_HERE) and not shared.isdisjoint(getattr(item, "fixturenames", ()))
        if is_ours and pytest_asyncio.is_async_test(item):
            item.add_marker(pytest.mark.asyncio(loop_scope="module"), append=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failed test shows the logs of the gateways it used."""
    report = yield
    if report.failed:
        report.sections += [("gateway log", gateway.log) for gateway in _gateways_of(item)]
    return report


def _gateways_of(item: pytest.Item) -> Iterator[GatewayProcess]:
    for value in getattr(item, "funcargs", {}).values():
        if isinstance(value, GatewayProcess):
            yield value
        elif isinstance(value, Target):
            yield value.gateway
