"""llama.cpp: its own HTTP server, in a child process of ours or found running, with its oddities hidden."""

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec

from core.chat import Call, Endpoint
from core.errors import ForebayError, UpstreamError
from engines.driver import Capabilities, Chunk, Health, Load
from engines.drivers.llamacpp_answers import AnswerAssembler
from engines.drivers.llamacpp_requests import Json, Plan, edit_request
from engines.drivers.llamacpp_slots import SlotBook
from engines.drivers.sse import StreamReader
from engines.drivers.wire import Wire
from engines.engine import Command
from engines.spec import WorkerSpec

_SETTLE_TIMEOUT_S = 20.0  # an abort in the middle of a prefill is noticed after the batch it is in
_SETTLE_POLL_S = 0.05
_STREAM_OPTIONS = frozenset({Endpoint.CHAT, Endpoint.COMPLETIONS})
# Where llama.cpp reads ``id_slot`` and ``cache_prompt``, and where the prompt is; elsewhere it drops both.
_PLACED = {Endpoint.CHAT: "messages", Endpoint.COMPLETIONS: "prompt", Endpoint.RESPONSES: "input"}


class LlamaCppDriver:
    """Always streams from the engine, which notices a client that left only while it writes to it.

    Chooses the engine's slots, so that no tenant is served from another's cache; see ``SlotBook``. For that the engine
    has to be ours alone, and to keep nothing of what cannot be placed: ours is started so, an attached one needs
    ``--no-cache-prompt --cache-ram 0``. Caches are used once ``capabilities`` has told how many slots there are.
    """

    def __init__(self, base_url: str, api_key: str | None, *, served_name: str) -> None:
        # llama.cpp closes some connections right after an answer that promised to keep them (measured: one in ten).
        self._wire = Wire(base_url, api_key, reuses_connections=False)
        self._served_name = served_name
        self._context_tokens: int | None = None
        self._book = SlotBook()

    async def run(self, call: Call) -> AsyncIterator[Chunk]:
        """Run the call and yield its answer; see ``Driver.run``."""
        edited, plan = edit_request(call.endpoint, {**call.body, "model": self._served_name}, stream=call.stream)
        if call.endpoint not in _PLACED:
            async with self._book.scattered():
                async for chunk in self._answer(call, edited, plan):
                    yield chunk
            return
        book = self._book
        seat = await book.seat(call.context.tenant, msgspec.json.encode(edited.get(_PLACED[call.endpoint])))
        edited["cache_prompt"] = seat.is_cached
        if seat.slot is not None:
            edited["id_slot"] = seat.slot
        has_ended = False
        try:
            async for chunk in self._answer(call, edited, plan):
                if chunk.is_progress:
                    book.entered(seat)
                yield chunk
            has_ended = True
        except UpstreamError:
            has_ended = True
            raise
        finally:
            book.leave(seat, has_ended=has_ended)

    async def _answer(self, call: Call, edited: Json, plan: Plan) -> AsyncIterator[Chunk]:
        body = msgspec.json.encode(edited)
        if not plan.streams:
            yield await self._wire.whole(call.endpoint, call, body)
            return
        # Where the answer is assembled, its usage is part of it; a stream loses the usage that only we asked for.
        strips_usage = call.stream and not call.wants_usage and call.endpoint in _STREAM_OPTIONS
        reader = StreamReader(call.endpoint, strips_usage=strips_usage)
        chunks = self._wire.stream(call.endpoint, call, body, reader)
        if plan.passthrough:
            async for chunk in chunks:
                yield chunk
        else:
            async for chunk in self._assembled(chunks, plan):
                yield chunk

    async def _assembled(self, chunks: AsyncIterator[Chunk], plan: Plan) -> AsyncIterator[Chunk]:
        assembler = AnswerAssembler(plan)
        usage = None
        async for chunk in chunks:
            if not chunk.is_progress:
                continue
            usage = chunk.usage
            yield Chunk(assembler.feed(chunk.raw), chunk.num_tokens, usage)
        if plan.whole:
            yield Chunk(assembler.whole(), 0, usage)

    def reports_progress(self, call: Call) -> bool:
        """Of all but embeddings: whole answers are streamed between the engine and us."""
        return call.endpoint is not Endpoint.EMBEDDINGS

    async def settle(self, num_expected: Callable[[], int]) -> None:
        """Return when no more slots are busy than should be, or after twenty seconds."""
        for _ in range(int(_SETTLE_TIMEOUT_S / _SETTLE_POLL_S)):
            load = await self.load()
            if load is None or load.running <= num_expected():
                return
            await asyncio.sleep(_SETTLE_POLL_S)

    async def tokenize(self, body: dict[str, object]) -> dict[str, object]:
        """Ask ``/tokenize``, rendering messages by ``/apply-template`` first."""
        prompt = body.get("prompt")
        if prompt is None:
            rendered = await self._wire.ask("/apply-template", {"messages": body.get("messages")}, timeout_s=30)
            prompt = rendered.get("prompt", "")
        add_special = body.get("add_special_tokens", "messages" not in body)
        sent = {"content": prompt, "add_special": add_special, "parse_special": True}
        answer = await self._wire.ask("/tokenize", sent, timeout_s=30)
        tokens = answer.get("tokens", [])
        return {"tokens": tokens, "count": len(tokens), "max_model_len": await self._context()}

    async def detokenize(self, body: dict[str, object]) -> dict[str, object]:
        """Ask ``/detokenize``."""
        answer = await self._wire.ask("/detokenize", {"tokens": body.get("tokens")}, timeout_s=30)
        return {"prompt": answer.get("content", "")}

    async def count_tokens(self, body: dict[str, object]) -> dict[str, object]:
        """Ask ``/v1/messages/count_tokens``."""
        answer = await self._wire.ask("/v1/messages/count_tokens", body, timeout_s=30)
        return {"input_tokens": answer.get("input_tokens", 0)}

    async def health(self) -> Health:
        """Ask ``/health``; llama.cpp answers 503 while it loads."""
        answer = await self._wire.probe("/health")
        if isinstance(answer, str):
            return answer
        if answer == 503:
            return "loading"
        return "ok" if answer == 200 else "unhealthy"

    async def load(self) -> Load | None:
        """Count busy slots."""
        try:
            slots = await self._wire.ask("/slots")
        except ForebayError:
            return None
        busy = [slot.get("id", -1) for slot in slots if slot.get("is_processing")]
        self._book.observe(busy)
        return Load(running=len(busy))

    async def capabilities(self) -> Capabilities:
        """Read the context of a slot and how many there are, and try embeddings and a prompt of token ids."""
        context = await self._context()
        props = await self._props()
        endpoints = [Endpoint.CHAT, Endpoint.COMPLETIONS, Endpoint.RESPONSES, Endpoint.MESSAGES]
        if await self._works("/v1/embeddings", {"input": "a"}):
            endpoints.append(Endpoint.EMBEDDINGS)
        token_prompts = await self._works("/v1/completions", {"prompt": [1, 2], "max_tokens": 1})
        num_slots = props.get("total_slots")
        if isinstance(num_slots, int) and num_slots != self._book.num_slots:
            self._book = SlotBook(num_slots)
        return Capabilities(
            endpoints=tuple(endpoints),
            context_tokens=context,
            token_prompts=token_prompts,
            continuation=True,
            metrics=await self._answers("/metrics"),
            models=(self._served_name,),
            version=str(props.get("build_info")) if props.get("build_info") else None,
        )

    async def _context(self) -> int | None:
        if self._context_tokens is None:
            settings = (await self._props()).get("default_generation_settings", {})
            self._context_tokens = settings.get("n_ctx") if isinstance(settings, dict) else None
        return self._context_tokens

    async def _props(self) -> dict[str, Any]:
        try:
            return dict(await self._wire.ask("/props"))
        except ForebayError:
            return {}

    async def _works(self, path: str, body: dict[str, Any]) -> bool:
        try:
            await self._wire.ask(path, {**body, "model": self._served_name}, timeout_s=30)
        except ForebayError:
            return False
        return True

    async def _answers(self, path: str) -> bool:
        try:
            status, _ = await self._wire.fetch(path)
        except ForebayError:
            return False
        return status == 200

    async def close(self) -> None:
        """Close every connection."""
        await self._wire.close()


class LlamaCppEngine:
    """How the embedded llama.cpp is started: from its wheel, in a process of its own, because native code can abort."""

    def command(self, spec: WorkerSpec, port: int, key: str) -> Command:
        """Return argv and environment for one worker of ours."""
        launch = spec.launch
        assert launch is not None
        argv = [
            launch.program or sys.executable, "-m", "engines.drivers.llamacpp_server",
            "--model", launch.source,
            "--port", str(port),
            "--slots", str(launch.slots),
            "--context", str(launch.context),
            "--threads", str(launch.threads or 1),
            "--alias", spec.served_name or spec.model,
            "--embeddings",
        ]  # fmt: skip
        return Command(argv=(*argv, *launch.args), env={"FOREBAY_WORKER_KEY": key})

    def driver(self, spec: WorkerSpec, base_url: str, key: str | None) -> LlamaCppDriver:
        """Return the driver of a worker at this URL."""
        return LlamaCppDriver(base_url, key, served_name=spec.served_name or spec.model)
