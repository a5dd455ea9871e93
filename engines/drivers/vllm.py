"""vLLM: `vllm serve` on a GPU or a CPU, started by us or found running."""

import asyncio
import hmac
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from core.chat import Call, Endpoint
from core.errors import ForebayError, UpstreamError, WorkerLost, WorkerUnreachable
from core.ids import TenantId, WorkerId
from engines.driver import Capabilities, Chunk, Health, Load
from engines.drivers.metrics import gauge
from engines.drivers.openai import OpenAIDriver
from engines.engine import Command
from engines.spec import Launch, WorkerSpec
from engines.weights import problem_with

_SETTLE_TIMEOUT_S = 5.0  # vLLM drops an aborted request within some 80 ms; a step of a big batch may take longer
_SETTLE_POLL_S = 0.05
_UNSAFE_FORMATS = frozenset({"auto", "hf", "pt", "npcache", "mistral"})
_DEAD = "EngineCore encountered an issue"  # vLLM's EngineDeadError


class VllmDriver(OpenAIDriver):
    """vLLM's OpenAI server: its wire is OpenAI's, and it tells its health, its load and its context."""

    def __init__(self, base_url: str, api_key: str | None, *, served_name: str | None = None) -> None:
        super().__init__(base_url, api_key, served_name=served_name)
        self._salt_key = (api_key or "").encode()
        self._is_dead = False

    def run(self, call: Call) -> AsyncIterator[Chunk]:
        """Run the call; see ``Driver.run``. Raises ``WorkerUnreachable`` at once while the engine process is dead.

        vLLM's server outlives its engine process by half a second or more and answers 500 to everything: a request
        that comes in that time must not lose its attempts there.
        """
        if self._is_dead:
            raise WorkerUnreachable("the engine process of this worker has died")
        return super().run(call)

    def _body(self, call: Call) -> dict[str, Any]:
        return super()._body(call) | {"cache_salt": salt_of(call.context.tenant, self._salt_key)}

    def _meaning_of(self, error: UpstreamError, call: Call) -> ForebayError:
        if _DEAD in error.message:
            self._is_dead = True
            return WorkerLost("the engine process of this worker has died")
        return super()._meaning_of(error, call)

    async def settle(self, num_expected: Callable[[], int]) -> None:
        """Return when vLLM itself runs no more than it should, or after five seconds."""
        for _ in range(int(_SETTLE_TIMEOUT_S / _SETTLE_POLL_S)):
            load = await self.load()
            if load is None or load.running <= num_expected():
                return
            await asyncio.sleep(_SETTLE_POLL_S)

    async def health(self) -> Health:
        """Ask ``/health``; vLLM answers 503 once its engine process is dead."""
        answer = await self._wire.probe("/health")
        if isinstance(answer, str):
            return answer
        if answer == 200:
            self._is_dead = False
        return "ok" if answer == 200 else "unhealthy"

    async def load(self) -> Load | None:
        """Read ``/metrics``."""
        try:
            status, body = await self._wire.fetch("/metrics")
        except ForebayError:
            return None
        if status != 200:
            return None
        text = body.decode("utf-8", "replace")
        return Load(
            running=int(gauge(text, "vllm:num_requests_running") or 0),
            waiting=int(gauge(text, "vllm:num_requests_waiting") or 0),
            kv_used=gauge(text, "vllm:kv_cache_usage_perc"),
        )

    async def capabilities(self) -> Capabilities:
        """Read the routes and the context, then try token ids both ways and a continued message."""
        known = await super().capabilities()
        model = self._served_name or (known.models[0] if known.models else "")
        probe = await self._probe("/v1/completions", {"model": model, "prompt": [1, 2, 3], "return_token_ids": True})
        continued = await self._probe(
            "/v1/chat/completions",
            {
                "model": model,
                "messages": [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "1, 2,"}],
                "continue_final_message": True,
                "add_generation_prompt": False,
            },
        )
        return Capabilities(
            endpoints=await self._endpoints(),
            context_tokens=known.context_tokens,
            token_ids=bool(probe and probe["choices"][0].get("token_ids")),
            token_prompts=probe is not None,
            continuation=continued is not None,
            cache_salt=True,
            metrics=await self.load() is not None,
            models=known.models,
            version=await self._version(),
        )

    async def _probe(self, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        try:
            answer = await self._wire.ask(path, {**body, "max_tokens": 1, "temperature": 0}, timeout_s=60)
        except ForebayError:
            return None
        return dict(answer)

    async def _endpoints(self) -> tuple[str, ...]:
        try:
            document = await self._wire.ask("/openapi.json", timeout_s=10)
        except ForebayError:
            return ()
        paths = document.get("paths", {})
        return tuple(path for path in Endpoint if path in paths)

    async def _version(self) -> str | None:
        try:
            return str((await self._wire.ask("/version")).get("version"))
        except ForebayError:
            return None


def salt_of(tenant: TenantId, key: bytes) -> str:
    """Return what keeps a tenant's prefix cache apart from all others' (S5), and serves the tenant again and again.

    ``key`` is the engine's own: gateways that share an engine share its key and so a tenant's cache, and who does not
    know the key cannot compute another's salt.
    """
    return hmac.digest(key, b"forebay-cache-salt:" + tenant.encode(), "sha256").hex()


class VllmEngine:
    """How ``vllm serve`` is started. The key travels by environment, so that no process list shows it."""

    def command(self, spec: WorkerSpec, port: int, key: str) -> Command:
        """Return argv and environment; raise ``ValueError`` for a model that could run code of its own (S11)."""
        launch = spec.launch
        assert launch is not None
        _check(spec.id, launch)
        argv = [
            launch.program or _program(), "serve", launch.source,
            "--host", "127.0.0.1", "--port", str(port),
            "--served-model-name", spec.served_name or spec.model,
            "--max-num-seqs", str(max(launch.slots, spec.max_inflight)),
            "--enable-prompt-tokens-details",
        ]  # fmt: skip
        if launch.context:
            argv += ["--max-model-len", str(launch.context)]
        if launch.tp > 1:
            argv += ["--tensor-parallel-size", str(launch.tp)]
        if launch.revision is not None:
            argv += ["--revision", launch.revision, "--tokenizer-revision", launch.revision]
        if not launch.source.endswith(".gguf") and not _given(launch.args, "load-format"):
            argv += ["--load-format", "safetensors"]  # by itself vLLM falls back to pickled weights
        if launch.trust_remote_code:
            argv.append("--trust-remote-code")
        env = {"VLLM_API_KEY": key, "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        return Command(argv=(*argv, *launch.args), env=env)

    def driver(self, spec: WorkerSpec, base_url: str, key: str | None) -> VllmDriver:
        """Return the driver of a worker at this URL."""
        return VllmDriver(base_url, key, served_name=spec.served_name or spec.model)


def _check(worker: WorkerId, launch: Launch) -> None:
    if problem := problem_with(launch.source):
        raise ValueError(f"worker {worker!r}: {problem}")
    if not launch.trust_remote_code and _given(launch.args, "trust-remote-code"):
        raise ValueError(
            f"worker {worker!r}: --trust-remote-code runs the Python that comes with the model; "
            "if that is meant, set launch.trust_remote_code: true in place of the argument"
        )
    if unsafe := _UNSAFE_FORMATS & set(_given(launch.args, "load-format")):
        raise ValueError(f"worker {worker!r}: --load-format {min(unsafe)} may load pickled weights; use safetensors")
    if launch.sha256 is not None and not Path(launch.source).is_file():
        raise ValueError(f"worker {worker!r}: launch.sha256 is the digest of one file; for a hub id, set revision")


def _given(args: tuple[str, ...], name: str) -> list[str]:
    """Return what follows each mention of an option, however it is written: vLLM takes ``_`` for ``-``, and stems."""
    values: list[str] = []
    for index, arg in enumerate(args):
        option, has_value, value = arg.partition("=")
        stem = option.removeprefix("--").replace("_", "-").lower()
        if option.startswith("--") and len(stem) > 3 and name.startswith(stem):
            values.append(value if has_value else next(iter(args[index + 1 : index + 2]), ""))
    return values


def _program() -> str:
    """Return the `vllm` beside this Python if there is one, else whatever PATH has."""
    beside = Path(sys.executable).with_name("vllm")
    return str(beside) if beside.exists() else "vllm"
