"""One gateway that launches one real vLLM, for all tests of the session: a start takes half a minute, or several on a
busy machine. `vllm` gives it to a test up and ready, whatever the test before has done to it."""

import asyncio
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.fakes.gateway import GatewayProcess

START_TIMEOUT_S = 900.0
SLOTS = 8
CONTEXT = 2048
_HERE = Path(__file__).resolve().parent
_LOG_TAIL = 8_000
STRANGERS_KEY = "fbk_the-key-of-another-tenant"


class Vllm:
    """A real vLLM behind a real gateway that owns it; the model is called `smol`."""

    def __init__(self, gateway: GatewayProcess) -> None:
        self.gateway = gateway

    @property
    def url(self) -> str:
        """The gateway's address without `/v1`."""
        return self.gateway.url

    @property
    def key(self) -> str:
        return self.gateway.key

    def worker(self) -> dict[str, Any]:
        """Return what the admin API says of the worker."""
        with self._admin() as admin:
            (worker,) = admin.get("/admin/v1/workers").raise_for_status().json()["data"]
        assert isinstance(worker, dict)
        return worker

    def tell(self, verb: str) -> None:
        """Start, stop, drain or restart the worker, and wait for the answer."""
        with self._admin() as admin:
            admin.post(f"/admin/v1/workers/smol-0/{verb}").raise_for_status()

    def until_ready(self) -> None:
        """Have the worker up, and the gateway too; waits as long as a start may take."""
        if self.gateway.returncode is not None:
            self.gateway.launch()
            asyncio.run(self.gateway.until_ready())
        if not self.worker()["is_wanted"]:
            self.tell("start")
        deadline = time.monotonic() + START_TIMEOUT_S
        while (worker := self.worker())["state"] != "ready":
            assert time.monotonic() < deadline, f"not ready after {START_TIMEOUT_S} s: {worker}\n{self.log}"
            time.sleep(0.5)

    def processes(self) -> list[psutil.Process]:
        """Return vLLM's processes: the server and all below it."""
        server = psutil.Process(self.worker()["pid"])
        return [server, *server.children(recursive=True)]

    def direct(self) -> httpx.AsyncClient:
        """Return a client of vLLM itself, with the key that the gateway gave it."""
        worker = self.worker()
        key = psutil.Process(worker["pid"]).environ()["VLLM_API_KEY"]
        return _client(worker["url"], key)

    def client(self) -> httpx.AsyncClient:
        """Return a client of the gateway."""
        return _client(self.url, self.key)

    def stranger(self) -> httpx.AsyncClient:
        """Return a client of the gateway that is another tenant's."""
        return _client(self.url, STRANGERS_KEY)

    @property
    def log(self) -> str:
        """The end of what vLLM printed."""
        path = self.gateway.directory / "state" / "logs" / "smol-0.log"
        return path.read_text("utf-8", "replace")[-_LOG_TAIL:] if path.exists() else ""

    def _admin(self) -> httpx.Client:
        headers = {"authorization": f"Bearer {self.gateway.admin_key}"}
        return httpx.Client(base_url=self.gateway.admin_url, headers=headers, timeout=120.0, trust_env=False)


def _client(url: str, key: str) -> httpx.AsyncClient:
    headers = {"authorization": f"Bearer {key}"}
    return httpx.AsyncClient(base_url=url, headers=headers, timeout=START_TIMEOUT_S * 1.5, trust_env=False)


def _prepared() -> dict[str, str]:
    """Return the paths of vLLM and the model, made ready if they are not."""
    prepare = [sys.executable, str(_HERE / "prepare.py")]
    lines = subprocess.run(prepare, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    return dict(line.split("=", 1) for line in lines)


@pytest.fixture(scope="session")
def launched() -> Iterator[Vllm]:
    """The session's vLLM, started once."""
    paths = _prepared()
    launch = {
        "program": paths["vllm"],
        "source": paths["model"],
        "context": CONTEXT,
        "slots": SLOTS,
        "args": [
            *("--enforce-eager", "--block-size", "32", "--dtype", "bfloat16"),
            *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
        ],
        "env": {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        },
    }
    lifecycle = {"start_timeout": START_TIMEOUT_S, "drain_timeout": 300, "probe_interval": 0.5}
    gateway = GatewayProcess(
        {"smol": {"workers": [{"engine": "vllm", "launch": launch, "lifecycle": lifecycle}]}},
        keys=[{"name": "stranger", "tenant": "stranger", "key": STRANGERS_KEY}],
        timeouts={"queue": START_TIMEOUT_S, "first_token": 600, "idle": 300, "total": 2 * START_TIMEOUT_S},
        start_timeout_s=START_TIMEOUT_S,
        stop_timeout_s=60.0,
    )
    vllm = Vllm(gateway)
    try:
        gateway.launch()
        try:
            asyncio.run(gateway.until_ready())
        except Exception as error:
            error.add_note(f"vLLM log:\n{vllm.log}")
            raise
        yield vllm
    finally:
        asyncio.run(gateway.aclose())


@pytest.fixture
def vllm(launched: Vllm) -> Vllm:
    """The session's vLLM, ready."""
    launched.until_ready()
    return launched


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failed test shows the logs of the gateway and of vLLM."""
    report = yield
    vllm = getattr(item, "funcargs", {}).get("vllm")
    if report.failed and isinstance(vllm, Vllm):
        report.sections += [("gateway log", vllm.gateway.log), ("vLLM log", vllm.log)]
    return report
