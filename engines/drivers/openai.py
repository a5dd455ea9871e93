"""Any OpenAI-compatible endpoint: a provider, a router, an engine we have no closer driver for."""

from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec

from core.chat import Call, Endpoint
from core.errors import ForebayError, UnsupportedParameter, UpstreamError
from engines.driver import Capabilities, Chunk, Health, Load
from engines.drivers.sse import StreamReader
from engines.drivers.wire import Wire
from engines.engine import Command
from engines.spec import WorkerSpec

_STREAM_OPTIONS = frozenset({Endpoint.CHAT, Endpoint.COMPLETIONS})
_NO_ROUTE = frozenset({"Not Found", "Method Not Allowed"})  # Starlette's words; a model that is unknown has others


# They steer the engine itself, whose slots, cache and adapters belong to whoever runs it (S12): slots and cache of
# llama.cpp, salt and KV transfer of vLLM (which ``vllm_xargs`` can carry too), peers, adapter paths and pickled code
# of SGLang. Taken out in silence, as everything else that an engine does not know.
_NEVER_SENT = frozenset({
    "id_slot", "slot_id", "cache_prompt", "n_cache_reuse", "cache_salt", "kv_transfer_params", "ec_transfer_params",
    "lora", "lora_path", "lora_request", "extra_key", "vllm_xargs", "custom_logit_processor",
    "bootstrap_host", "bootstrap_port", "bootstrap_room", "data_parallel_rank", "request_id",
})  # fmt: skip


def engine_body(call: Call, served_name: str | None) -> dict[str, Any]:
    """Return the body for the engine: its own name of the model, nothing internal, the usage asked for in streams."""
    body = {key: value for key, value in call.body.items() if key not in _NEVER_SENT}
    body["model"] = served_name or call.model
    if call.stream and not call.wants_usage and call.endpoint in _STREAM_OPTIONS:
        options = body.get("stream_options")
        body["stream_options"] = {**(options if isinstance(options, dict) else {}), "include_usage": True}
    return body


class OpenAIDriver:
    """Passes calls on as they are. Health is a list of models, for lack of anything else that all of them have."""

    def __init__(self, base_url: str, api_key: str | None, *, served_name: str | None = None) -> None:
        self._wire = Wire(base_url, api_key)
        self._served_name = served_name

    async def run(self, call: Call) -> AsyncIterator[Chunk]:
        """Run the call and yield its answer; see ``Driver.run``."""
        sent = self._body(call)
        body = msgspec.json.encode(sent)
        try:
            if not call.stream:
                yield await self._wire.whole(call.endpoint, call, body)
                return
            strips_usage = not call.wants_usage and call.endpoint in _STREAM_OPTIONS
            takes_ids = "return_token_ids" in sent and not call.body.get("return_token_ids")
            reader = StreamReader(call.endpoint, strips_usage=strips_usage, takes_ids=takes_ids)
            async for chunk in self._wire.stream(call.endpoint, call, body, reader):
                yield chunk
        except UpstreamError as error:
            meant = self._meaning_of(error, call)
            if meant is error:
                raise
            raise meant from error

    def _body(self, call: Call) -> dict[str, Any]:
        return engine_body(call, self._served_name)

    def _meaning_of(self, error: UpstreamError, call: Call) -> ForebayError:
        """Return what an error is to a caller: often the engine's own, as it came."""
        if error.status in {404, 405} and error.message in _NO_ROUTE:
            return UnsupportedParameter(f"the engine behind this model does not serve {call.endpoint}")
        return error

    def reports_progress(self, call: Call) -> bool:
        """Only of streams: a whole answer comes in one piece at its end."""
        return call.stream

    async def settle(self, num_expected: Callable[[], int]) -> None:
        """Return at once: a foreign endpoint cannot be asked whether it has stopped."""

    async def tokenize(self, body: dict[str, object]) -> dict[str, object]:
        """Ask the endpoint's own ``/tokenize``; many have none."""
        return await self._forward("/tokenize", body)

    async def detokenize(self, body: dict[str, object]) -> dict[str, object]:
        """Ask the endpoint's own ``/detokenize``; many have none."""
        return await self._forward("/detokenize", body)

    async def count_tokens(self, body: dict[str, object]) -> dict[str, object]:
        """Ask the endpoint's own ``/v1/messages/count_tokens``."""
        return await self._forward("/v1/messages/count_tokens", body)

    async def _forward(self, path: str, body: dict[str, object]) -> dict[str, object]:
        try:
            answer = await self._wire.ask(path, {**body, "model": self._served_name or body.get("model")}, timeout_s=30)
        except UpstreamError as error:
            if error.status in {404, 405}:
                raise UnsupportedParameter(f"the engine behind this model does not serve {path}") from error
            raise
        return dict(answer)

    async def health(self) -> Health:
        """Return ``ok`` if the endpoint answers at all: a provider may hide its list of models."""
        answer = await self._wire.probe("/v1/models")
        if isinstance(answer, str):
            return answer
        return "ok" if answer < 500 else "unhealthy"

    async def load(self) -> Load | None:
        """Return None: a foreign endpoint does not tell."""
        return None

    async def capabilities(self) -> Capabilities:
        """Return the models that the endpoint lists; nothing else is proven."""
        try:
            listed = await self._wire.ask("/v1/models")
        except ForebayError:
            return Capabilities()
        models = listed.get("data", []) if isinstance(listed, dict) else []
        entries = [entry for entry in models if isinstance(entry, dict)]
        context = next((entry["max_model_len"] for entry in entries if entry.get("max_model_len")), None)
        return Capabilities(models=tuple(str(entry.get("id")) for entry in entries), context_tokens=context)

    async def close(self) -> None:
        """Close every connection."""
        await self._wire.close()


class OpenAIEngine:
    """An engine that we do not know how to start: attached by URL, or started by the operator's own command."""

    def command(self, spec: WorkerSpec, port: int, key: str) -> Command:
        """Raise ``ValueError``: there is no program that every compatible engine shares."""
        raise ValueError(f"worker {spec.id!r}: engine 'openai' has no program of its own; give launch.command or a url")

    def driver(self, spec: WorkerSpec, base_url: str, key: str | None) -> OpenAIDriver:
        """Return the driver of a worker at this URL."""
        return OpenAIDriver(base_url, key, served_name=spec.served_name)
