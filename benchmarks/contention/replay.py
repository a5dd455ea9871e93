"""Send a trace as OpenAI clients would, and note when every piece of every answer came."""

import asyncio
import time
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import aiohttp
import msgspec

from benchmarks.contention.trace import Ask

CHAT = "/v1/chat/completions"
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 8.0  # as OpenAI's clients wait where a refusal does not say for how long


@dataclass(frozen=True)
class Target:
    """Where to send it, and as whom: the bearer key of each tenant, and what its requests say besides."""

    url: str
    model: str
    keys: Mapping[str, str]
    more: Mapping[str, Mapping[str, object]] = field(default_factory=dict)


@dataclass
class Answer:
    """What came of one request; times are seconds from the trace's start. ``times``: of each piece of text."""

    ask: Ask
    asked: float
    times: "array[float]" = field(default_factory=lambda: array("d"))
    first: float | None = None
    end: float | None = None
    text: str = ""
    tokens: int = 0
    prompt_tokens: int = 0
    legs: int = 1
    recomputed: int = 0
    tries: int = 0
    problem: str = ""

    @property
    def is_whole(self) -> bool:
        """Whether all that was wanted came, in one stream that ended well."""
        return self.end is not None and not self.problem and self.tokens == self.ask.tokens

    @property
    def tokens_per_piece(self) -> float:
        """A piece is a token, but for characters of several tokens; usage knows."""
        return self.tokens / len(self.times) if self.tokens and self.times else 1.0


class _Delta(msgspec.Struct):
    content: str | None = None
    role: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta = msgspec.field(default_factory=_Delta)


class _Extra(msgspec.Struct):
    legs: int = 1
    recomputed_tokens: int = 0


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    forebay: _Extra | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = msgspec.field(default_factory=list)
    usage: _Usage | None = None
    error: dict[str, object] | None = None


def _is_piece(delta: _Delta) -> bool:
    """Whether it stands for tokens: the frame that only says whose turn it is does not; text may be empty."""
    return delta.content is not None and (delta.role is None or bool(delta.content))


_decoder = msgspec.json.Decoder(_Event)


async def play(asks: Sequence[Ask], target: Target, *, until: float | None = None) -> list[Answer]:
    """Send every request at its time and return the answers, in the order of ``asks``.

    With ``until``, what has not ended by then is cut off, and its answer is what had come. A refusal (429, 503) is
    tried again as OpenAI's clients do: after ``Retry-After``, or after longer and longer waits; its time counts.
    """
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as http:
        start = time.monotonic()
        answers = [Answer(ask, ask.at) for ask in asks]
        tasks = [asyncio.create_task(_one(http, target, answer, start)) for answer in answers]
        _, late = await asyncio.wait(tasks, timeout=until)
        for task in late:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
    for wrong in ended:
        if isinstance(wrong, Exception):
            raise wrong
    return answers


async def _one(http: aiohttp.ClientSession, target: Target, answer: Answer, start: float) -> None:
    ask = answer.ask
    await asyncio.sleep(start + ask.at - time.monotonic())
    body = {
        "model": target.model,
        "messages": [{"role": "user", "content": ask.prompt}],
        "max_tokens": ask.tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **target.more.get(ask.tenant, {}),
    }
    key = target.keys.get(ask.tenant)
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
    payload = msgspec.json.encode(body)
    wait = FIRST_WAIT_S
    answer.asked = time.monotonic() - start
    try:
        while True:
            answer.tries += 1
            async with http.post(target.url + CHAT, data=payload, headers=headers) as response:
                if response.status == 200:
                    await _read(response, answer, start)
                    return
                if response.status not in (429, 503):
                    answer.problem = f"{response.status} {(await response.text())[:300]}"
                    return
                told = response.headers.get("retry-after")
            await asyncio.sleep(float(told) if told else wait)
            wait = min(2 * wait, LONGEST_WAIT_S)
    except aiohttp.ClientError as error:
        answer.problem = repr(error)


async def _read(response: aiohttp.ClientResponse, answer: Answer, start: float) -> None:
    pieces: list[str] = []
    try:
        async for line in response.content:
            if not line.startswith(b"data: "):
                continue
            now = time.monotonic() - start
            if line.startswith(b"data: [DONE]"):
                answer.end = now
                continue
            event = _decoder.decode(line[6:])
            if event.error is not None:
                answer.problem = str(event.error)[:300]
            if answer.first is None:
                answer.first = now
            if event.choices and _is_piece(event.choices[0].delta):
                answer.times.append(now)
                pieces.append(event.choices[0].delta.content or "")
            if event.usage is not None:
                answer.tokens, answer.prompt_tokens = event.usage.completion_tokens, event.usage.prompt_tokens
                if event.usage.forebay is not None:
                    answer.legs = event.usage.forebay.legs
                    answer.recomputed = event.usage.forebay.recomputed_tokens
    finally:
        answer.text = "".join(pieces)
    if answer.end is None and not answer.problem:
        answer.problem = "the stream ended without [DONE]"
