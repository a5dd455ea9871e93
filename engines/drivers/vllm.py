"""vLLM: `vllm serve` on a GPU or a CPU, started by us or found running."""

import asyncio
import hmac
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import msgspec

from core.chat import Call, Endpoint, Usage
from core.errors import ForebayError, UpstreamError, WorkerLost, WorkerUnreachable
from core.ids import TenantId, WorkerId
from engines.driver import Capabilities, Chunk, Continuation, Exactness, Health, Load, Piece
from engines.drivers.keeping import Keeping
from engines.drivers.metrics import gauge, labelled
from engines.drivers.openai import OpenAIDriver
from engines.drivers.pinning import limit_of, may_be_cut
from engines.drivers.seam import Seam
from engines.drivers.sse import StreamReader
from engines.engine import Command
from engines.spec import Launch, WorkerSpec
from engines.weights import problem_with

_SETTLE_TIMEOUT_S = 5.0  # vLLM drops an aborted request within some 80 ms; a step of a big batch may take longer
_SETTLE_POLL_S = 0.05
_UNSAFE_FORMATS = frozenset({"auto", "hf", "pt", "npcache", "mistral"})
_DEAD = "EngineCore encountered an issue"  # vLLM's EngineDeadError
_NOT_OF_COMPLETIONS = frozenset({
    "messages", "max_completion_tokens", "chat_template_kwargs", "add_generation_prompt", "continue_final_message",
    "tools", "tool_choice", "parallel_tool_calls", "response_format", "logprobs",
})  # fmt: skip
_TEMPLATE_KEYS = ("chat_template_kwargs", "add_generation_prompt")
_NO_CHARACTER = "\ufffd"
_MOST_TORN = 3  # of a letter's four bytes
_DEFAULT_LIMIT = 16  # of /v1/completions
_WORTH_ASKING = 32  # tokens still to come: of a shorter answer the usage comes soon enough
_PREFILL_TIMEOUT_S = 120.0


class VllmDriver(OpenAIDriver):
    """vLLM's OpenAI server: its wire is OpenAI's, and it tells its health, its load and its context."""

    def __init__(self, base_url: str, api_key: str | None, *, served_name: str | None = None) -> None:
        super().__init__(base_url, api_key, served_name=served_name)
        self._salt_key = (api_key or "").encode()
        self._is_dead = False
        self._can_continue = False
        self._context_tokens: int | None = None
        self._keeping = Keeping()

    def run(self, call: Call, most: int | None = None) -> AsyncIterator[Chunk]:
        """Run the call; see ``Driver.run``. Raises ``WorkerUnreachable`` at once while the engine process is dead.

        vLLM's server outlives its engine process by half a second or more and answers 500 to everything: a request
        that comes in that time must not lose its attempts there.
        """
        if self._is_dead:
            raise WorkerUnreachable("the engine process of this worker has died")
        return super().run(call, most)

    def _body(self, call: Call) -> dict[str, Any]:
        body = super()._body(call) | {"cache_salt": salt_of(call.context.tenant, self._salt_key)}
        if self._takes_ids(call):
            body["return_token_ids"] = True
        return body

    def _takes_ids(self, call: Call) -> bool:
        return call.stream and self.exactness(call) != "pinned"

    def exactness(self, call: Call) -> Exactness:
        """Return ``prefix`` for plain text: batches of other sizes may round a near tie the other way.

        A request with a ``seed`` of its own is pinned unless it is greedy: vLLM starts its random numbers anew.
        """
        return "prefix" if self._can_continue and may_be_cut(call) else "pinned"

    def quantum(self, call: Call) -> int | None:
        """Return None: vLLM notices at once that it is left, and its ids say how far it was."""

    async def resume(self, call: Call, past: Continuation, most: int | None = None) -> AsyncIterator[Piece]:
        """Go on by ``/v1/completions`` with the prompt's and the answer's token ids; see ``Resumable.resume``.

        The ids are those of the earlier legs: they are what the engine made, also where no text follows from them
        (special tokens, bytes that are no characters). Where they are unknown, or end in the beginning of a letter, the
        text is tokenised anew: of a prompt that ends so vLLM tells all the text again, with the letter. With stop
        strings vLLM holds text back that its ids say already: it is delivered by this leg.
        """
        if self._is_dead:
            raise WorkerUnreachable("the engine process of this worker has died")
        prompt_ids = past.prompt_ids if past.prompt_ids is not None else await self._ids_of_prompt(call)
        stops = _stops_of(call)
        held = await self._held_back(past, stops) if stops else ""
        num_torn = 0 if stops else await self._num_torn(past)
        by_ids = past.ids is not None and held is not None and num_torn == 0
        ids = past.ids if by_ids and past.ids is not None else await self._ids_of_text(call, past.text)
        num_past = len(ids) if past.num_tokens is None else past.num_tokens - (num_torn or 0)
        seam = Seam(held or "", stops)
        limit = self._limit(call, len(prompt_ids), len(ids) - num_past)
        if limit is not None and num_past >= limit:
            ended = {"finish_reason": "length", "stop_reason": None}
            yield Piece(seam.close(), ending=ended, usage=Usage(len(prompt_ids), num_past))
            return
        body = {key: value for key, value in self._body(call).items() if key not in _NOT_OF_COMPLETIONS}
        body |= {"prompt": prompt_ids + ids, "stream": True, "stream_options": {"include_usage": True}}
        body["return_token_ids"] = True
        if limit is not None:
            body["max_tokens"] = limit - num_past
        if isinstance(least := body.get("min_tokens"), int):
            body["min_tokens"] = max(0, least - num_past)
        reader = StreamReader(Endpoint.COMPLETIONS, strips_usage=False)
        told = await self._prefill(body) if limit is None or limit - num_past > _WORTH_ASKING else None
        if told is not None:
            yield told
        begun: Usage | None = Usage(len(prompt_ids), num_past)
        async with aclosing(self._events(call, Endpoint.COMPLETIONS, body, reader)) as events:
            async for event in events:
                if (piece := _piece_of(event, by_ids=by_ids)) is None:
                    continue
                piece.usage, begun = begun, None
                has_stopped = _joined(piece, seam)
                yield piece
                if has_stopped:
                    return
        if reader.usage is not None:
            used = reader.usage
            whole = Usage(used.prompt_tokens - len(ids), used.completion_tokens + num_past)
            prefilled = used.prompt_tokens - used.cached_tokens
            if told is None or told.prefilled is None:
                self._keeping.learn(used.prompt_tokens, prefilled)
            yield Piece(usage=whole, prefilled=prefilled)

    async def _prefill(self, body: dict[str, Any]) -> Piece | None:
        """Say how much of the prompt was not cached, or how much that may be where it was asked for others of late.

        A stream tells it with the usage, at its end: thousands of tokens too late for who has to choose the next leg to
        cut. So the engine is asked to compute the prompt, and the one token that this makes is thrown away; the stream
        makes it again, from a prompt that is cached now. Each time costs a step of the whole batch; see ``Keeping``.
        """
        if not self._keeping.asks_now():
            return Piece(expected=self._keeping.expected)
        left_out = ("stream", "stream_options", "min_tokens", "return_token_ids")
        asked = {key: value for key, value in body.items() if key not in left_out} | {"max_tokens": 1}
        try:
            used = (await self._wire.ask("/v1/completions", asked, timeout_s=_PREFILL_TIMEOUT_S))["usage"]
            prefilled = int(used["prompt_tokens"] - used["prompt_tokens_details"]["cached_tokens"])
        except (ForebayError, KeyError, TypeError):
            return None  # the stream will say what is wrong
        self._keeping.learn(len(body["prompt"]), prefilled)
        return Piece(prefilled=prefilled)

    async def park(self, call: Call, num_expected: Callable[[], int]) -> None:
        """Do nothing: vLLM lets go at its next step, queues who comes before that, and keeps the blocks of its cache
        until it needs their room. To wait until it says so would leave the slot empty for a poll and a step."""

    async def _ids_of_prompt(self, call: Call) -> list[int]:
        asked: dict[str, object] = {"add_special_tokens": True, "prompt": call.body.get("prompt")}
        if call.endpoint is Endpoint.CHAT:
            template = {key: call.body[key] for key in _TEMPLATE_KEYS if call.body.get(key) is not None}
            asked = {"messages": call.body.get("messages"), **template}
        elif isinstance(prompt := call.body.get("prompt"), list):
            return prompt
        return await self._tokens(call, asked)

    async def _ids_of_text(self, call: Call, text: str) -> list[int]:
        text = text.rstrip(_NO_CHARACTER)  # it would be taken for the beginning of a letter
        return await self._tokens(call, {"prompt": text, "add_special_tokens": False}) if text else []

    async def _tokens(self, call: Call, asked: dict[str, object]) -> list[int]:
        answer = await self.tokenize({"model": call.model, **asked})
        return msgspec.convert(answer.get("tokens"), list[int])

    async def _held_back(self, past: Continuation, stops: Sequence[str]) -> str | None:
        """Return the text that the ids of the past say and that was not delivered; None if they say another.

        Tokenizers differ in the space before a text that stands alone. What is told of special tokens and of bytes that
        are no characters differs from what was streamed: such an answer goes on by its text. No more is held back than
        may be the beginning of a stop string; what is more is a special token.
        """
        if not past.ids:
            return None if past.text else ""
        told = (await self.detokenize({"tokens": past.ids})).get("prompt")
        told, text = str(told).lstrip(" "), past.text.lstrip(" ")
        held = told[len(text) :]
        is_held = told.startswith(text) and len(held) < max(map(len, stops)) and not held.endswith(_NO_CHARACTER)
        return held if is_held else None

    async def _num_torn(self, past: Continuation) -> int | None:
        """Return how many of the last ids begin a letter that the text has not; None if they say another text.

        A letter's ids have no text until it is whole, so only those that came several at once are asked about. What is
        told of special tokens differs from what was streamed.
        """
        if not past.ids or not past.num_at_once:
            return 0
        at_once, text = past.ids[-past.num_at_once :], past.texts[-1]
        for num_torn in range(min(len(at_once), _MOST_TORN + 1)):
            told = (await self.detokenize({"tokens": at_once[: len(at_once) - num_torn]})).get("prompt")
            if str(told).lstrip(" ") == text.lstrip(" "):
                return num_torn
        return None

    def _limit(self, call: Call, num_prompt: int, num_more: int) -> int | None:
        """Return how many tokens the answer may have in all. ``num_more``: how many more its text is when it is parted
        anew than it was made of; they take room of the context."""
        limit = limit_of(call)
        if limit is None and call.endpoint is Endpoint.COMPLETIONS:
            limit = _DEFAULT_LIMIT
        if self._context_tokens is None:
            return limit
        room = self._context_tokens - num_prompt - num_more
        return room if limit is None else min(limit, room)

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
        text = await self._metrics()
        if text is None:
            return None
        return Load(
            running=int(gauge(text, "vllm:num_requests_running") or 0),
            waiting=int(gauge(text, "vllm:num_requests_waiting") or 0),
            kv_used=gauge(text, "vllm:kv_cache_usage_perc"),
        )

    async def _metrics(self) -> str | None:
        try:
            status, body = await self._wire.fetch("/metrics")
        except ForebayError:
            return None
        return body.decode("utf-8", "replace") if status == 200 else None

    async def capabilities(self) -> Capabilities:
        """Read the routes and the context, then try token ids both ways, and whether text becomes ids."""
        known = await self._listed()
        self._context_tokens = known.context_tokens
        model = self._served_name or (known.models[0] if known.models else "")
        probe = await self._probe("/v1/completions", {"model": model, "prompt": [1, 2, 3], "return_token_ids": True})
        has_ids = bool(probe and probe["choices"][0].get("token_ids"))
        self._can_continue = has_ids and await self._has_tokenizer(model)
        metrics = await self._metrics()
        memory = labelled(metrics or "", "vllm:cache_config_info", "num_gpu_blocks", "block_size")
        return Capabilities(
            endpoints=await self._endpoints(),
            context_tokens=known.context_tokens,
            kv_tokens=int(memory) if memory is not None else None,
            token_ids=has_ids,
            token_prompts=probe is not None,
            continuation=self._can_continue,
            cache_salt=True,
            metrics=metrics is not None,
            models=known.models,
            version=await self._version(),
        )

    async def _probe(self, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        try:
            answer = await self._wire.ask(path, {**body, "max_tokens": 1, "temperature": 0}, timeout_s=60)
        except ForebayError:
            return None
        return dict(answer)

    async def _has_tokenizer(self, model: str) -> bool:
        try:
            answer = await self.tokenize({"model": model, "prompt": "1, 2,", "add_special_tokens": False})
            return bool(msgspec.convert(answer.get("tokens"), list[int]))
        except (ForebayError, msgspec.ValidationError):
            return False

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


def _joined(piece: Piece, seam: Seam) -> bool:
    """Have the piece say what can be delivered with it; return whether a stop string has ended the answer."""
    piece.text, stop = seam.add(piece.text)
    if stop is not None:
        piece.ending = {"finish_reason": "stop", "stop_reason": stop}
    elif piece.ending is not None:
        piece.text += seam.close()
    return stop is not None


def _stops_of(call: Call) -> list[str]:
    stop = call.body.get("stop")
    return [stop] if isinstance(stop, str) else [one for one in stop or () if isinstance(one, str)]


def _piece_of(event: Any, *, by_ids: bool) -> Piece | None:
    """Return what an event of ``/v1/completions`` adds to the answer; None for those that add nothing."""
    choices = event.get("choices") if isinstance(event, dict) else None
    if not choices:
        return None
    choice = choices[0]
    ending = None
    if choice.get("finish_reason"):
        ending = {key: choice[key] for key in ("finish_reason", "stop_reason") if key in choice}
    ids = choice.get("token_ids") or []
    return Piece(choice.get("text") or "", len(ids), ids if by_ids else None, ending)


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
