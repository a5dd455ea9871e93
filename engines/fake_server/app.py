"""The engine's routes: each turns a body into a job, waits for a slot and sends the job."""

import asyncio
import base64
import os
import time
import uuid
from array import array
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from engines.fake_server import asks, wire
from engines.fake_server.answers import Forced, Job, Limits, chat_forced, write_answer
from engines.fake_server.asks import BadRequestError, Prompt
from engines.fake_server.faults import NO_FAULTS, FaultBox, Faults, parse_faults
from engines.fake_server.sender import (
    Pace,
    StreamSender,
    before_headers,
    error_response,
    json_response,
    refusal,
    send_whole,
)
from engines.fake_server.settings import Settings
from engines.fake_server.text import Author, InvalidTokenError, decode, embed, encode
from engines.fake_server.traffic import PrefixCache, Served, Traffic

_BODY_LIMIT = 256 * 2**20
_MAX_CHOICES = 128
_Body = TypeVar("_Body")
_Answering = Callable[[web.Request, bytes, Faults, Served], Awaitable[web.StreamResponse]]


def _parse(raw: bytes, shape: type[_Body]) -> _Body:
    try:
        return msgspec.json.decode(raw, type=shape)
    except msgspec.DecodeError as error:
        raise BadRequestError(str(error)) from error


class Engine:
    """One fake engine: its routes, and the state that they share."""

    def __init__(self, settings: Settings, child_pid: int | None) -> None:
        self._settings = settings
        self._child_pid = child_pid
        self._author = Author(settings.salt, settings.glyphs)
        self._box = FaultBox(settings.faults)
        self._traffic = Traffic(settings.slots)
        self._prefixes = PrefixCache()
        self._chat = wire.ChatWire()
        self._completions = wire.CompletionWire()
        self._responses = wire.ResponsesWire()
        self._messages = wire.AnthropicWire()
        self._started_at = time.time()
        self._ready_at = time.monotonic() + settings.start_delay_s

    def application(self) -> web.Application:
        """Return the web application."""
        app = web.Application(client_max_size=_BODY_LIMIT)
        served: list[tuple[str, wire.Wire, _Answering]] = [
            ("/v1/chat/completions", self._chat, self._answer_chat),
            ("/v1/completions", self._completions, self._answer_completions),
            ("/v1/responses", self._responses, self._answer_responses),
            ("/v1/messages", self._messages, self._answer_messages),
            ("/v1/messages/count_tokens", self._messages, self._count_tokens),
            ("/v1/embeddings", self._completions, self._embeddings),
            ("/tokenize", self._completions, self._tokenize),
            ("/detokenize", self._completions, self._detokenize),
        ]
        for path, shape, answer in served:
            app.router.add_post(path, self._serving(shape, answer))
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/fake/stats", self._stats)
        app.router.add_post("/fake/faults", self._put_faults)
        app.router.add_post("/fake/reset", self._reset)
        app.router.add_route("*", "/{path:.*}", self._not_found)
        return app

    # What every served route goes through.

    def _serving(self, shape: wire.Wire, answer: _Answering) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def handler(request: web.Request) -> web.StreamResponse:
            served = self._traffic.begin(request)
            try:
                response = await self._guarded(request, shape, answer, served)
            except (asyncio.CancelledError, ConnectionError):
                self._traffic.abort(served)
                raise
            except BaseException:
                self._traffic.finish(served)
                raise
            self._traffic.finish(served)
            return response

        return handler

    async def _guarded(
        self, request: web.Request, shape: wire.Wire, answer: _Answering, served: Served
    ) -> web.StreamResponse:
        served.body = raw = await request.read()
        try:
            self._admit(request)
            faults = self._box.take(raw)
            if faults is not NO_FAULTS:
                refused = refusal(faults, shape) or await before_headers(request, faults)
                if refused is not None:
                    return refused
            return await answer(request, raw, faults, served)
        except BadRequestError as error:
            return error_response(shape, error)
        except InvalidTokenError as error:
            return error_response(shape, BadRequestError(str(error), param="prompt"))

    def _admit(self, request: web.Request) -> None:
        if self._is_starting():
            raise BadRequestError("Loading model", status=503, code="unavailable")
        key = self._settings.api_key
        if key is None or request.headers.get("Authorization") == f"Bearer {key}":
            return
        if request.headers.get("x-api-key") != key:
            raise BadRequestError("Incorrect API key provided", status=401, code="invalid_api_key")

    def _is_starting(self) -> bool:
        return time.monotonic() < self._ready_at

    def _model(self, asked: str | None) -> str:
        models = self._settings.models
        if asked is not None and asked not in models:
            message = f"The model `{asked}` does not exist."
            raise BadRequestError(message, status=404, code="model_not_found", param="model")
        return asked or models[0]

    # Generation.

    async def _answer_chat(
        self, request: web.Request, raw: bytes, faults: Faults, served: Served
    ) -> web.StreamResponse:
        body = _parse(raw, asks.ChatBody)
        prompt = asks.render(
            body.messages,
            tools=body.tools,
            continues=bool(body.continue_final_message),
            generates=body.add_generation_prompt is not False,
        )
        most = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        forced = chat_forced(self._author, body, prompt)
        top = (body.top_logprobs or 0) if body.logprobs else None
        job = self._common_job(body, [prompt], most, faults, forced=forced, top=top)
        return await self._send(
            request, self._chat, job, streams=bool(body.stream), faults=faults, served=served, salt=body.cache_salt
        )

    async def _answer_completions(
        self, request: web.Request, raw: bytes, faults: Faults, served: Served
    ) -> web.StreamResponse:
        body = _parse(raw, asks.CompletionBody)
        prompts = asks.plain_prompts(body.prompt)
        if body.echo:
            prompts = [Prompt(prompt.ids, prompt.head or decode(prompt.ids)) for prompt in prompts]
        job = self._common_job(body, prompts, body.max_tokens, faults, top=body.logprobs, echo=bool(body.echo))
        return await self._send(
            request,
            self._completions,
            job,
            streams=bool(body.stream),
            faults=faults,
            served=served,
            salt=body.cache_salt,
        )

    async def _answer_responses(
        self, request: web.Request, raw: bytes, faults: Faults, served: Served
    ) -> web.StreamResponse:
        body = _parse(raw, asks.ResponsesBody)
        prompt = asks.render(asks.responses_messages(body))
        job = self._text_job(body.model, prompt, self._limits(body.max_output_tokens))
        return await self._send(request, self._responses, job, streams=bool(body.stream), faults=faults, served=served)

    async def _answer_messages(
        self, request: web.Request, raw: bytes, faults: Faults, served: Served
    ) -> web.StreamResponse:
        body = _parse(raw, asks.MessagesBody)
        prompt = asks.render(asks.anthropic_messages(body))
        job = self._text_job(body.model, prompt, self._limits(body.max_tokens, body.stop_sequences))
        return await self._send(request, self._messages, job, streams=bool(body.stream), faults=faults, served=served)

    def _limits(self, most: int | None, stop: str | list[str] | None = None, ignore_eos: bool | None = False) -> Limits:
        if most is not None and most < 1:
            raise BadRequestError(f"max_tokens must be at least 1, got {most}.", param="max_tokens")
        stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
        return Limits(self._settings.tokens, most, tuple(filter(None, stops)), bool(ignore_eos))

    def _text_job(self, model: str | None, prompt: Prompt, limits: Limits) -> Job:
        model = self._model(model)
        self._check_length([prompt], limits.max_tokens)
        answer = write_answer(self._author, prompt, limits, None, 0)
        return Job(uuid.uuid4().hex, int(time.time()), model, [prompt], [answer])

    def _common_job(
        self,
        body: asks.Common,
        prompts: list[Prompt],
        most: int | None,
        faults: Faults,
        *,
        forced: Forced | None = None,
        top: int | None = None,
        echo: bool = False,
    ) -> Job:
        model = self._model(body.model)
        count = 1 if body.n is None else body.n
        if not 1 <= count <= _MAX_CHOICES:
            raise BadRequestError(f"n must be from 1 to {_MAX_CHOICES}", param="n")
        if self._settings.begins_anew:
            prompts = [self._unanswered(prompt) for prompt in prompts]
        limits = self._limits(most, body.stop, body.ignore_eos)
        self._check_length(prompts, most)
        answers = [
            write_answer(self._author, prompt, limits, forced, voice) for prompt in prompts for voice in range(count)
        ]
        kind = "chatcmpl-" if isinstance(body, asks.ChatBody) else "cmpl-"
        return Job(
            id=kind + uuid.uuid4().hex,
            created=int(time.time()),
            model=model,
            prompts=prompts,
            choices=answers,
            include_usage=bool(body.stream_options and body.stream_options.include_usage),
            usage_with_choices=faults.usage_with_choices,
            return_token_ids=bool(body.return_token_ids),
            top_logprobs=top,
            echo=echo,
        )

    def _unanswered(self, prompt: Prompt) -> Prompt:
        """Return the prompt without the beginning of an answer that stands at its end."""
        num = self._author.already_written(prompt.ids)
        return Prompt(prompt.ids[: len(prompt.ids) - num], prompt.head)

    def _check_length(self, prompts: list[Prompt], most: int | None) -> None:
        limit = self._settings.max_model_len
        longest = max(len(prompt.ids) for prompt in prompts)
        if longest + (most or 1) > limit:
            message = (
                f"This model's maximum context length is {limit} tokens. However, you requested {longest} tokens in "
                f"the prompt and {most or 1} in the completion. Please reduce the length of either."
            )
            raise BadRequestError(message, code="context_length_exceeded", param="messages")

    async def _send(
        self,
        request: web.Request,
        shape: wire.Wire,
        job: Job,
        *,
        streams: bool,
        faults: Faults,
        served: Served,
        salt: str | None = None,
    ) -> web.StreamResponse:
        settings = self._settings
        cached = sum(self._prefixes.admit(prompt.ids, salt or "") for prompt in job.prompts)
        self._traffic.prompt_tokens += job.prompt_tokens
        job = replace(job, cached_tokens=cached)
        prefill = settings.prefill_s_per_token * (job.prompt_tokens - cached)
        pace = Pace(settings.ttft_s + prefill, settings.itl_s)
        if streams:
            return await StreamSender(request, shape, faults, served).send(job, pace, self._traffic)
        async with self._traffic.slot():
            response = await send_whole(request, shape, job, pace, faults)
            self._traffic.generated_tokens += job.completion_tokens
            return response

    # Routes which answer at once.

    async def _embeddings(self, request: web.Request, raw: bytes, faults: Faults, served: Served) -> web.StreamResponse:
        body = _parse(raw, asks.EmbeddingsBody)
        model = self._model(body.model)
        prompts = asks.plain_prompts(body.input)
        self._check_length(prompts, None)
        dims = body.dimensions or self._settings.dims
        vectors = [embed(prompt.head or decode(prompt.ids), dims) for prompt in prompts]
        if body.encoding_format == "base64":
            shown: list[Any] = [base64.b64encode(array("f", vector).tobytes()).decode() for vector in vectors]
        else:
            shown = vectors
        count = sum(len(prompt.ids) for prompt in prompts)
        async with self._traffic.slot():
            await asyncio.sleep(self._settings.ttft_s)
        return _json_of(
            {
                "object": "list",
                "model": model,
                "data": [{"object": "embedding", "index": at, "embedding": one} for at, one in enumerate(shown)],
                "usage": {"prompt_tokens": count, "total_tokens": count},
            }
        )

    async def _count_tokens(
        self, request: web.Request, raw: bytes, faults: Faults, served: Served
    ) -> web.StreamResponse:
        body = _parse(raw, asks.MessagesBody)
        self._model(body.model)
        return _json_of({"input_tokens": len(asks.render(asks.anthropic_messages(body)).ids)})

    async def _tokenize(self, request: web.Request, raw: bytes, faults: Faults, served: Served) -> web.StreamResponse:
        body = _parse(raw, asks.TokenizeBody)
        self._model(body.model)
        if body.messages is None:
            ids = encode(body.prompt or "")
        else:
            prompt = asks.render(
                body.messages,
                tools=body.tools,
                continues=body.continue_final_message,
                generates=body.add_generation_prompt,
            )
            ids = prompt.ids
        return _json_of({"tokens": ids, "count": len(ids), "max_model_len": self._settings.max_model_len})

    async def _detokenize(self, request: web.Request, raw: bytes, faults: Faults, served: Served) -> web.StreamResponse:
        body = _parse(raw, asks.DetokenizeBody)
        self._model(body.model)
        return _json_of({"prompt": decode(body.tokens)})

    async def _models(self, request: web.Request) -> web.Response:
        try:
            self._admit(request)
        except BadRequestError as error:
            return error_response(self._chat, error)
        shared = {"object": "model", "created": int(self._started_at), "owned_by": "fake"}
        length = self._settings.max_model_len
        rows = [{"id": name, **shared, "max_model_len": length} for name in self._settings.models]
        return _json_of({"object": "list", "data": rows})

    async def _health(self, request: web.Request) -> web.Response:
        if self._is_starting():
            return web.Response(status=503)
        return web.Response(status=500 if self._box.current.unhealthy else 200)

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(text=self._traffic.metrics(self._settings.models[0]))

    async def _stats(self, request: web.Request) -> web.Response:
        processes = {"pid": os.getpid(), "child_pid": self._child_pid}
        return _json_of({**processes, **self._traffic.report()})

    async def _put_faults(self, request: web.Request) -> web.Response:
        try:
            fields = msgspec.json.decode(await request.read(), type=dict[str, Any])
            self._box.put(parse_faults(fields))
        except msgspec.DecodeError as error:
            return error_response(self._chat, BadRequestError(str(error)))
        return _json_of(self._box.current)

    async def _reset(self, request: web.Request) -> web.Response:
        self._box.put(NO_FAULTS)
        self._traffic.reset()
        self._prefixes.clear()
        return _json_of({})

    async def _not_found(self, request: web.Request) -> web.Response:
        return error_response(self._chat, BadRequestError("Not Found", status=404))


def _json_of(value: Any) -> web.Response:
    return json_response(msgspec.json.encode(value))
