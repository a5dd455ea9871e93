"""llama.cpp: its own HTTP server, in a child process of ours or found running, with its oddities hidden."""

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from core.chat import Call, Endpoint, Usage
from core.errors import ForebayError, UpstreamBroken, UpstreamError
from core.ids import RequestId, TenantId
from engines.driver import Capabilities, Chunk, Continuation, Exactness, Health, Load, Piece
from engines.drivers.llamacpp_answers import AnswerAssembler
from engines.drivers.llamacpp_beginnings import WORTH, Beginning, Beginnings, num_shared, parts
from engines.drivers.llamacpp_requests import Json, Plan, edit_request
from engines.drivers.llamacpp_server import slot_files
from engines.drivers.llamacpp_slots import Seat, SlotBook
from engines.drivers.pinning import may_be_cut
from engines.drivers.sse import StreamReader, json_of, split
from engines.drivers.wire import Wire
from engines.engine import Command
from engines.spec import WorkerSpec

_SETTLE_TIMEOUT_S = 20.0  # an abort in the middle of a prefill is noticed after the batch it is in
_SETTLE_POLL_S = 0.05
_STREAM_OPTIONS = frozenset({Endpoint.CHAT, Endpoint.COMPLETIONS})
# Where llama.cpp reads ``id_slot`` and ``cache_prompt``, and where the prompt is; elsewhere it drops both.
_PLACED = {Endpoint.CHAT: "messages", Endpoint.COMPLETIONS: "prompt", Endpoint.RESPONSES: "input"}
_NOT_OF_COMPLETIONS = frozenset({"messages", "chat_template_kwargs", "add_generation_prompt", "tools", "tool_choice",
                                 "parallel_tool_calls", "response_format", "logprobs"})  # fmt: skip
_THOUGHTS = ("think", "reasoning", "<|channel|>")  # in a template: the chat endpoint takes such text out of the answer
_PARK_TIMEOUT_S = 10.0
_FILES_PER_SLOT = 5  # one for what a cut request has left, the others for beginnings


class LlamaCppDriver:
    """Always streams from the engine, which notices a client that left only while it writes to it.

    Chooses the engine's slots, so that no tenant is served from another's cache; see ``SlotBook``. For that the engine
    has to be ours alone, and to keep nothing of what cannot be placed: ours is started so, an attached one needs
    ``--no-cache-prompt --cache-ram 0``. Caches are used once ``capabilities`` has told how many slots there are.

    What a slot holds of an answer that was cut is used when the answer goes on: in the slot itself if nobody else has
    had it (llama.cpp leaves it as it was when the connection closed), or from one of the ``slot_files`` that the engine
    has. Such a file holds one request's slot and is given to that request alone. In ``more_files`` lie beginnings that
    prompts of one tenant have in common; see ``Beginnings``.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None,
        *,
        served_name: str,
        slot_files: tuple[str, ...] = (),
        more_files: tuple[str, ...] = (),
    ) -> None:
        # llama.cpp closes some connections right after an answer that promised to keep them (measured: one in ten).
        self._wire = Wire(base_url, api_key, reuses_connections=False)
        self._served_name = served_name
        self._context_tokens: int | None = None
        self._book = SlotBook()
        self._num_settling = 0
        self._can_continue = self._can_continue_chats = self._parts_alike = False
        self._free_files = list(slot_files)
        self._files: dict[tuple[TenantId, RequestId], str] = {}  # whose slot each file holds, the oldest first
        self._beginnings = Beginnings(self._wire, more_files)

    async def run(self, call: Call) -> AsyncIterator[Chunk]:
        """Run the call and yield its answer; see ``Driver.run``."""
        edited, plan = edit_request(call.endpoint, {**call.body, "model": self._served_name}, stream=call.stream)
        if call.endpoint not in _PLACED:
            async with self._book.scattered():
                async for chunk in self._answer(call, edited, plan):
                    yield chunk
            return
        prompt = msgspec.json.encode(edited.get(_PLACED[call.endpoint]))
        async with self._seated(call, prompt, edited) as seat:
            async for chunk in self._answer(call, edited, plan):
                if chunk.is_progress:
                    self._book.entered(seat)
                yield chunk

    @asynccontextmanager
    async def _seated(self, call: Call, prompt: bytes, body: Json) -> AsyncIterator[Seat]:
        """Choose a slot for a body that is about to be sent, and hold it; what was saved for the call is put there."""
        book, tenant = self._book, call.context.tenant
        guest = (tenant, call.id)  # a client may choose its ids: another tenant's may be the same
        was_saved = guest in self._files
        self._beginnings.saw(tenant, prompt)
        beginning, num_kept = (None, 0) if was_saved else self._beginnings.like(tenant, prompt)
        brings_cache, num_brought = was_saved or beginning is not None, max(0, num_kept - WORTH)
        seat = await book.seat(tenant, prompt, call.id, brings_cache=brings_cache, num_brought=num_brought)
        has_ended = False
        try:
            await self._spare(seat, tenant, prompt)
            if was_saved:
                seat.is_own = has_cache = await self._restore(guest, seat)
            else:
                has_cache = seat.is_cached and await self._begin(seat, tenant, prompt, beginning, num_kept)
            if not has_cache:
                seat.is_cached = False
                book.entered(seat)
            body["cache_prompt"] = seat.is_cached
            if seat.slot is not None:
                body["id_slot"] = seat.slot
            yield seat
            has_ended = True
        except UpstreamError:
            has_ended = True
            raise
        finally:
            book.leave(seat, has_ended=has_ended)

    async def _spare(self, seat: Seat, tenant: TenantId, prompt: bytes) -> None:
        """Save what is about to be overwritten, whosever it is, if others of its tenant begin so."""
        if seat.held is None or seat.slot is None or seat.is_own:
            return
        owner, held = seat.held
        goes_on = owner == tenant and not parts(prompt, held)
        if not goes_on and self._beginnings.is_worth_keeping(owner, held):
            await self._beginnings.keep(owner, held, seat.slot)

    async def _begin(
        self, seat: Seat, tenant: TenantId, prompt: bytes, beginning: Beginning | None, num_kept: int
    ) -> bool:
        """Let the slot hold as much of the prompt as there is of it. Return whether what lies there is the tenant's."""
        num_held = num_shared(prompt, seat.held[1]) if seat.held is not None and seat.held[0] == tenant else 0
        if beginning is not None and seat.slot is not None and num_kept >= num_held + WORTH:
            return await self._beginnings.put(beginning, seat.slot)
        return seat.held is not None and seat.held[0] == tenant

    def exactness(self, call: Call) -> Exactness:
        """Return ``prefix`` for plain text: the text so far is tokenised anew, which may part it in another way.

        A request with a ``seed`` of its own is pinned unless it is greedy, and so are all chats with a model that
        thinks: the engine itself has taken the thoughts out of the answer.
        """
        able = self._can_continue_chats if call.endpoint is Endpoint.CHAT else self._can_continue
        return "prefix" if able and may_be_cut(call) else "pinned"

    async def park(self, call: Call, num_expected: Callable[[], int]) -> None:
        """Save the slot that the call has left, if there are files and nobody else has come to it; else settle.

        llama.cpp puts the saving of a slot off until it works there no more, so it is not asked before: each question
        waits for a step of the whole batch, and whoever is to have the slot with it.
        """
        guest = (call.context.tenant, call.id)
        if not await self._save(guest):
            # Of legs that were started the engine may not know yet: that no more run than should does not mean that
            # this one runs no more.
            await self._until(lambda load: load.running <= num_expected() and not self._book.is_leaving(*guest))

    async def _save(self, guest: tuple[TenantId, RequestId]) -> bool:
        """Save the slot that a guest has left, and return whether what was saved is the guest's."""
        if not self._free_files and not self._files:
            return False
        is_saved = False
        async with self._book.parked(*guest) as slot:
            if slot is not None:
                file = self._free_files.pop() if self._free_files else self._files.pop(next(iter(self._files)))
                is_saved = await self._has_saved(slot, file) and self._book.holds(slot, *guest)
                if is_saved:
                    self._files[guest] = file
                    self._book.stopped(slot)
                else:
                    self._free_files.append(file)
        return is_saved

    async def _has_saved(self, slot: int, file: str) -> bool:
        path, body = f"/slots/{slot}?action=save", {"filename": file}
        try:
            saved = await self._wire.ask(path, body, timeout_s=_PARK_TIMEOUT_S)
        except ForebayError:
            return False
        return bool(saved.get("n_saved"))

    async def _restore(self, guest: tuple[TenantId, RequestId], seat: Seat) -> bool:
        """Put what was saved for the request into its slot, unless it lies there still; its file is free then."""
        file = self._files.pop(guest, None)
        if file is None:
            return seat.is_own
        try:
            if seat.is_own or not seat.is_cached:
                return seat.is_own
            path, body = f"/slots/{seat.slot}?action=restore", {"filename": file}
            restored = await self._wire.ask(path, body, timeout_s=_PARK_TIMEOUT_S)
            return bool(restored.get("n_restored"))
        except ForebayError:
            return False
        finally:
            self._free_files.append(file)

    async def resume(self, call: Call, past: Continuation) -> AsyncIterator[Piece]:
        """Go on by ``/v1/completions`` with the rendered prompt and the text so far; see ``Resumable.resume``.

        llama.cpp tells no ids in a stream, and counts what it makes where it is asked to: we ask from leg two on.
        The tokens of the first are counted as the engine parts its text now.
        """
        edited, _ = edit_request(call.endpoint, {**call.body, "model": self._served_name}, stream=True)
        prompt, ids = await self._tokens_of(call.endpoint, edited, past)
        num_parted = len(ids) - len(prompt)
        num_past = num_parted if past.num_tokens is None else past.num_tokens
        limit = edited.get("max_tokens")
        if limit is not None and num_past >= limit:
            yield Piece(ending={"finish_reason": "length"}, usage=Usage(len(prompt), num_past))
            return
        body = {key: value for key, value in edited.items() if key not in _NOT_OF_COMPLETIONS}
        body |= {"prompt": ids, "return_progress": True, "timings_per_token": True}
        if limit is not None:
            body["max_tokens"] = limit - num_past
        placed = msgspec.json.encode(edited.get(_PLACED[call.endpoint]))
        reader = StreamReader(Endpoint.COMPLETIONS, strips_usage=False)
        begun: Usage | None = Usage(len(prompt), num_past)
        num_made = 0
        is_greedy = call.body.get("temperature") == 0
        async with self._seated(call, placed, body) as seat:
            encoded = msgspec.json.encode(body)
            async for chunk in self._wire.stream(Endpoint.COMPLETIONS, call, encoded, reader):
                if chunk.is_progress:
                    self._book.entered(seat)
                    for frame in split(chunk.raw):
                        event = json_of(frame)
                        piece = _piece_of(event, num_made)
                        # All but the last token lay there as the cut leg had left it; that one is always computed anew.
                        piece.is_exact = is_greedy and seat.is_own and piece.prefilled == 1
                        num_made += piece.num_tokens
                        piece.usage, begun = begun, None
                        yield piece
        if reader.usage is not None:
            used = reader.usage
            yield Piece(usage=Usage(used.prompt_tokens - num_parted, used.completion_tokens + num_past))

    async def _tokens_of(self, endpoint: Endpoint, edited: Json, past: Continuation) -> tuple[list[int], list[int]]:
        """Return the ids of the prompt, and of prompt and answer so far.

        A piece of the answer is a token's text, as a rule: each by itself becomes that token again, while the joined
        text may part in another way. Where a tokenizer puts spaces before what it is given, the joined text has to do.
        """
        prompt = edited.get("prompt")
        if isinstance(prompt, list):
            return prompt, [
                *prompt,
                *await self._ids(past.texts if self._parts_alike else past.text, add_special=False),
            ]
        if endpoint is Endpoint.CHAT:
            asked = {key: edited[key] for key in ("messages", "chat_template_kwargs") if key in edited}
            prompt = (await self._wire.ask("/apply-template", asked, timeout_s=30)).get("prompt")
        if not isinstance(prompt, str):
            raise UpstreamBroken("the engine did not render the prompt", status=502)
        whole = [prompt, *past.texts] if self._parts_alike else prompt + past.text
        own, joint = await asyncio.gather(self._ids(prompt), self._ids(whole))
        if joint[: len(own)] == own:
            return own, joint
        return own, own + await self._ids(past.text, add_special=False)  # the prompt's end and the text have merged

    async def _ids(self, text: str | Sequence[str], *, add_special: bool = True) -> list[int]:
        sent = {"content": text, "add_special": add_special, "parse_special": True}
        answer = await self._wire.ask("/tokenize", sent, timeout_s=30)
        return msgspec.convert(answer.get("tokens"), list[int])

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
            keeps_frames = plan.whole and self.exactness(call) != "pinned"
            async for chunk in self._assembled(chunks, plan, keeps_frames=keeps_frames):
                yield chunk

    async def _assembled(self, chunks: AsyncIterator[Chunk], plan: Plan, *, keeps_frames: bool) -> AsyncIterator[Chunk]:
        assembler = AnswerAssembler(plan)
        usage = None
        async for chunk in chunks:
            if not chunk.is_progress:
                continue
            usage = chunk.usage
            aside = (chunk.raw,) if keeps_frames else ()
            yield Chunk(assembler.feed(chunk.raw), chunk.num_tokens, usage, aside=aside)
        if plan.whole:
            yield Chunk(assembler.whole(), 0, usage)

    def reports_progress(self, call: Call) -> bool:
        """Of all but embeddings: whole answers are streamed between the engine and us."""
        return call.endpoint is not Endpoint.EMBEDDINGS

    async def settle(self, num_expected: Callable[[], int]) -> None:
        """Return when no more slots are busy than should be, or after twenty seconds."""
        await self._until(lambda load: load.running <= num_expected())

    async def _until(self, has_settled: Callable[[Load], bool]) -> None:
        self._num_settling += 1
        try:
            for _ in range(int(_SETTLE_TIMEOUT_S / _SETTLE_POLL_S)):
                load = await self.load()
                if load is None or has_settled(load):
                    return
                await asyncio.sleep(_SETTLE_POLL_S)
        finally:
            self._num_settling -= 1
            if not self._num_settling:
                self._book.settled()

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
        await self._try_continuing(str(props.get("chat_template") or ""))
        return Capabilities(
            endpoints=tuple(endpoints),
            context_tokens=context,
            token_prompts=token_prompts,
            continuation=self._can_continue,
            slot_save=bool(self._free_files or self._files),
            num_prefixes=self._book.num_slots + self._beginnings.num_files or None,
            metrics=await self._answers("/metrics"),
            models=(self._served_name,),
            version=str(props.get("build_info")) if props.get("build_info") else None,
        )

    async def _try_continuing(self, template: str) -> None:
        try:
            parts = await self._ids(["a", "b"], add_special=False)
            self._parts_alike = (await self.detokenize({"tokens": parts}))["prompt"] == "ab"
            self._can_continue = bool(await self._ids("a"))
            messages = [{"role": "user", "content": "a"}]
            rendered = await self._wire.ask("/apply-template", {"messages": messages}, timeout_s=30)
        except (ForebayError, msgspec.ValidationError):
            return
        self._can_continue_chats = bool(rendered.get("prompt")) and not any(word in template for word in _THOUGHTS)

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
        await self._beginnings.close()
        await self._wire.close()


def _piece_of(event: Any, num_made: int) -> Piece:
    """Return what an event of ``/v1/completions`` adds to an answer that had ``num_made`` tokens of this leg before; an
    empty piece is a sign of life."""
    if not isinstance(event, dict):
        return Piece()
    progress = event.get("prompt_progress") or {}
    prefilled = progress["total"] - progress["cache"] if progress else None
    choices: list[Json] = event.get("choices") or [{}]
    choice = choices[0]
    text = choice.get("text") or ""
    ending = {"finish_reason": choice["finish_reason"]} if choice.get("finish_reason") else None
    num = (event.get("timings") or {}).get("predicted_n", num_made + bool(text)) if text else num_made
    return Piece(text, max(0, num - num_made), ending=ending, prefilled=prefilled)


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
            "--slot-files", str(num_slot_files(launch.slots)),
            "--embeddings",
        ]  # fmt: skip
        return Command(argv=(*argv, *launch.args), env={"FOREBAY_WORKER_KEY": key})

    def driver(self, spec: WorkerSpec, base_url: str, key: str | None) -> LlamaCppDriver:
        """Return the driver of a worker at this URL."""
        is_ours = spec.launch is not None and not spec.launch.command
        files = slot_files(
            num_slot_files(spec.launch.slots) if is_ours and spec.launch is not None else spec.slot_files
        )
        num_left = -(-len(files) // _FILES_PER_SLOT)
        name = spec.served_name or spec.model
        return LlamaCppDriver(base_url, key, served_name=name, slot_files=files[:num_left], more_files=files[num_left:])


def num_slot_files(slots: int) -> int:
    """Return how many slots our own server can save for an engine with so many slots."""
    return _FILES_PER_SLOT * slots
