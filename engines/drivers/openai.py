"""Any OpenAI-compatible endpoint: a provider, a router, an engine we have no closer driver for."""

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import msgspec

from core.chat import Call, Endpoint
from core.errors import ForebayError, UnsupportedParameter, UpstreamError, WorkerLost
from engines.driver import Capabilities, Chunk, Continuation, Exactness, Health, Load, Piece
from engines.drivers.continuing import Rest, Way, continued, proven_way
from engines.drivers.parts import limit_to, part_for, without_our_end
from engines.drivers.pinning import limit_of, may_be_cut
from engines.drivers.sse import StreamReader, json_of, split
from engines.drivers.wire import Wire
from engines.engine import Command
from engines.spec import WorkerSpec

_STREAM_OPTIONS = frozenset({Endpoint.CHAT, Endpoint.COMPLETIONS})
_QUANTUM = 256  # tokens of a leg while others wait
_PROBE_TIMEOUT_S = 10.0
# A limit on how short an answer is, and text that an engine holds back, belong to an engine's answer as a whole.
_NOT_IN_PARTS = ("stop", "min_tokens")
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
    """Passes calls on as they are. Health is a list of models, for lack of anything else that all of them have.

    Goes on with an answer by its text where ``capabilities`` has seen the endpoint do so; ``probes_continuation`` is
    whether it tries. Legs that end by themselves are counted by the endpoint. Of one that was left in the middle each
    piece counts as a token: limits and usage are as exact as that.
    """

    def __init__(
        self, base_url: str, api_key: str | None, *, served_name: str | None = None, probes_continuation: bool = True
    ) -> None:
        self._wire = Wire(base_url, api_key)
        self._served_name = served_name
        self._probes_continuation = probes_continuation
        self._ways: dict[Endpoint, Way] = {}

    async def run(self, call: Call, most: int | None = None) -> AsyncIterator[Chunk]:
        """Run the call and yield its answer; see ``Driver.run`` and ``Bounded.run``."""
        sent = self._body(call)
        if most is not None and (most := part_for(call, most)) is not None:
            limit_to(sent, call, most)
        body = msgspec.json.encode(sent)
        try:
            if not call.stream:
                yield await self._wire.whole(call.endpoint, call, body)
                return
            strips_usage = not call.wants_usage and call.endpoint in _STREAM_OPTIONS
            takes_ids = "return_token_ids" in sent and not call.body.get("return_token_ids")
            reader = StreamReader(call.endpoint, strips_usage=strips_usage, takes_ids=takes_ids)
            chunks = self._wire.stream(call.endpoint, call, body, reader)
            async for chunk in chunks if most is None else without_our_end(chunks, reader, most):
                yield chunk
        except UpstreamError as error:
            meant = self._meaning_of(error, call)
            if meant is error:
                raise
            raise meant from error

    def exactness(self, call: Call) -> Exactness:
        """Return ``prefix`` for plain text in a stream, if the endpoint goes on with text and the limit is known.

        Pinned where the template is told more than the messages, which may have it think, and for a prompt of ids.
        """
        body = call.body
        if call.endpoint not in self._ways or not call.stream or body.get("chat_template_kwargs") is not None:
            return "pinned"
        if call.endpoint is Endpoint.COMPLETIONS and not (isinstance(body.get("prompt"), str) and limit_of(call)):
            return "pinned"
        return "prefix" if may_be_cut(call) else "pinned"

    def quantum(self, call: Call) -> int | None:
        """Return how long the legs of an answer are while others wait; see ``Bounded``."""
        if any(call.body.get(key) for key in _NOT_IN_PARTS) or self.exactness(call) == "pinned":
            return None
        return part_for(call, _QUANTUM)

    async def resume(self, call: Call, past: Continuation, most: int | None = None) -> AsyncIterator[Piece]:
        """Go on by the text of the answer; see ``Resumable.resume`` and ``Bounded.resume``."""
        num_past = past.num_pieces if past.num_tokens is None else past.num_tokens
        limit = limit_of(call)
        if limit is not None and num_past >= limit:
            yield Piece(ending={"finish_reason": "length"}, usage=past.usage)
            return
        most = part_for(call, most, num_past) if most is not None else None
        sent = self._body(call) | {"stream_options": {"include_usage": True}}
        body, tail = continued(call.endpoint, sent, past.text, self._ways.get(call.endpoint, Way()))
        if most is not None:
            limit_to(body, call, most)
        elif limit is not None:
            limit_to(body, call, limit - num_past)
        if isinstance(least := body.get("min_tokens"), int):
            body["min_tokens"] = max(0, least - num_past)
        reader = StreamReader(call.endpoint, strips_usage=False)
        rest = Rest(call.endpoint, past, num_past, tail)
        async with aclosing(self._events(call, call.endpoint, body, reader)) as events:
            async for event in events:
                yield rest.add(event)
        yield rest.close(reader.usage, most)

    async def _events(
        self, call: Call, endpoint: Endpoint, body: dict[str, Any], reader: StreamReader
    ) -> AsyncGenerator[Any]:
        """Post a body of our own for the call and yield the events of the answer, parsed. Raises like ``run``.

        Posts it twice if the connection breaks before anything has come: some servers close one that they have promised
        to keep, and a leg follows at once on the leg before.
        """
        encoded = msgspec.json.encode(body)
        has_begun = False
        try:
            for is_last in (False, True):
                try:
                    async for chunk in self._wire.stream(endpoint, call, encoded, reader):
                        has_begun = True
                        for frame in split(chunk.raw) if chunk.is_progress else ():
                            yield json_of(frame)
                    return
                except WorkerLost:
                    if has_begun or is_last:
                        raise
        except UpstreamError as error:
            meant = self._meaning_of(error, call)
            if meant is error:
                raise
            raise meant from error

    async def park(self, call: Call, num_expected: Callable[[], int]) -> None:
        """Do nothing: what an endpoint keeps of an answer is its own business."""

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
        """Return the models that the endpoint lists, and whether it goes on with an answer: a few requests tell."""
        known = await self._listed()
        if self._probes_continuation:
            model = self._served_name or (known.models[0] if known.models else None)
            chat = await proven_way(self._fetch, Endpoint.CHAT, model)
            text = await proven_way(self._fetch, Endpoint.COMPLETIONS, model)
            ways = {Endpoint.CHAT: chat, Endpoint.COMPLETIONS: text}
            self._ways = {endpoint: way for endpoint, way in ways.items() if way is not None}
        return msgspec.structs.replace(known, continuation=bool(self._ways))

    async def _fetch(self, path: str, body: dict[str, Any]) -> tuple[int, bytes]:
        try:
            return await self._wire.fetch(path, body, timeout_s=_PROBE_TIMEOUT_S)
        except WorkerLost:  # see ``_events``
            return await self._wire.fetch(path, body, timeout_s=_PROBE_TIMEOUT_S)

    async def _listed(self) -> Capabilities:
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
        probes = spec.probe_continuation
        return OpenAIDriver(base_url, key, served_name=spec.served_name, probes_continuation=probes)
