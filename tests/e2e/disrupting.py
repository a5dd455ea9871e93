"""Many clients at once, and somebody who kills, drains and restarts the workers under them."""

import asyncio
import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import aiohttp
import httpx

from storage.sql.database import FILE_NAME, Database, sqlite_url
from storage.sql.requests import Requests
from tests.e2e.asking import until
from tests.e2e.questions import Nature, Question, questions
from tests.e2e.seams import seam_faults
from tests.e2e.stories import Story, differences, story_of
from tests.fakes.gateway import GatewayProcess

# A tenant that is ahead by ten tokens loses its slots to whoever waits, as often as that comes to pass.
RESTLESS = {"policy": "vtc-pc", "threshold": 20, "credit": 0, "quantum": 1, "penalty": 0, "interval": 0.001} | {
    "waste_share": 1.0,
    "waste_burst": 10**9,
}
CUT = frozenset({"preempted", "migrated", "drained", "lost"})
PATIENCE_S = 120.0
_STEER_S = 60.0
_POLL_S = 0.02


class Reply(NamedTuple):
    """What came of a question. ``pause_s``: the longest time without a byte after the first."""

    question: Question
    story: Story
    latency_s: float
    pause_s: float


async def answers(
    gateway: GatewayProcess, asked: Sequence[Question], keys: Sequence[str], *, at_once: int
) -> list[Reply]:
    """Ask all of them, so many at once, each with the next of the keys, and return what came, in their order."""
    waiting = iter(asked)
    replies: list[Reply] = []
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        timeout=aiohttp.ClientTimeout(total=None, sock_read=PATIENCE_S),
    ) as http:

        async def ask_on() -> None:
            for question in waiting:
                key = keys[question.number % len(keys)]
                replies.append(await _answer(http, gateway.url, key, question))

        await asyncio.gather(*(ask_on() for _ in range(at_once)))
    return sorted(replies, key=lambda reply: reply.question.number)


async def _answer(http: aiohttp.ClientSession, url: str, key: str, question: Question) -> Reply:
    began = last = time.monotonic()
    pause, body, status, broken = 0.0, b"", 0, None
    try:
        async with http.post(
            url + question.path, json=question.body, headers={"authorization": f"Bearer {key}"}
        ) as response:
            status = response.status
            async for piece in response.content.iter_any():
                now = time.monotonic()
                pause = max(pause, now - last) if body else 0.0
                last = now
                body += piece
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        broken = f"the connection broke: {error!r}"
    story = story_of(question, status, body)
    if broken is not None:
        story = story._replace(faults=(broken, *story.faults))
    return Reply(question, story, time.monotonic() - began, pause)


class Disruption:
    """Inside its context, something happens to a worker now and then: what and when follow from the seed alone.

    ``acts`` are drawn from, ``done`` counts them. One comes after the other, so one worker at a time is drained.
    """

    def __init__(
        self, gateway: GatewayProcess, seed: int, acts: Sequence[str], *, pause_s: tuple[float, float]
    ) -> None:
        self._gateway = gateway
        self._draw = random.Random(seed)
        self._acts = acts
        self._pause_s = pause_s
        self._task: asyncio.Task[None] | None = None
        self.done: Counter[str] = Counter()

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._go_on())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._task is not None
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _go_on(self) -> None:
        headers = {"authorization": f"Bearer {self._gateway.admin_key}"}
        async with httpx.AsyncClient(
            base_url=self._gateway.admin_url, trust_env=False, timeout=_STEER_S, headers=headers
        ) as admin:
            for act in self._acts:
                await asyncio.sleep(self._draw.uniform(*self._pause_s))
                await self._act(admin, act)
                self.done[act] += 1

    async def _act(self, admin: httpx.AsyncClient, act: str) -> None:
        ready: list[dict[str, Any]] = []
        while not ready:
            await asyncio.sleep(_POLL_S)
            workers = (await admin.get("/admin/v1/workers")).json()["data"]
            ready = [worker for worker in workers if worker["state"] == "ready"]
        worker = self._draw.choice(ready)
        if act == "kill":
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker["pid"], signal.SIGKILL)
            return
        for verb in ("drain", "start") if act == "drain" else (act,):
            (await admin.post(f"/admin/v1/workers/{worker['id']}/{verb}")).raise_for_status()


async def causes(gateway: GatewayProcess, num_requests: int) -> Counter[str]:
    """Return how the legs of all requests have ended, once the request log has all of these."""
    counted: Counter[str] = Counter()
    async with Database(sqlite_url(gateway.directory / "state" / FILE_NAME)) as database:

        async def are_written() -> bool:
            found = await Requests(database).search(limit=num_requests)
            counted.clear()
            counted.update(leg.cause for record in found for leg in record.legs)
            return len(found) >= num_requests

        await until(are_written, f"{num_requests} requests are in the request log")
    return counted


class Verdict(NamedTuple):
    """What is to be said of answers: ``broken`` against the rules of the wire, ``unfinished`` without having to be,
    ``different`` from the undisturbed ones among the ``compared``; lines are for people. ``cut``: how many pinned
    streams ended in their one error, as they have to when their worker dies."""

    broken: list[str]
    unfinished: list[str]
    different: list[str]
    compared: int
    cut: int

    @property
    def equal_share(self) -> float:
        return 1 - len(self.different) / max(self.compared, 1)


def verdict(replies: Sequence[Reply], undisturbed: Sequence[Reply] = ()) -> Verdict:
    """Judge answers, beside undisturbed ones to the same questions where there are such."""
    broken, unfinished, different, compared, cut = [], [], [], 0, 0
    others: Sequence[Reply | None] = undisturbed if undisturbed else [None] * len(replies)
    for reply, other in zip(replies, others, strict=True):
        question, story = reply.question, reply.story
        name = f"{question.number} ({question.path}{' stream' if question.streams else ''})"
        broken += [f"{name}: {fault}" for fault in story.faults]
        if story.error is not None:
            if question.is_pinned and question.streams and story.error == "worker_lost":
                cut += 1
            else:
                unfinished.append(f"{name}: {story.error}")
        elif not question.is_free and other is not None and other.story.error is None:
            compared += 1
            different += [f"{name}: {', '.join(found)}"] if (found := differences(story, other.story)) else []
    return Verdict(broken, unfinished, different, compared, cut)


class Trial(NamedTuple):
    """One mixture of questions, asked in peace (``control`` compares a second time with the first) and once under
    ``acts``; ``ended`` counts how the legs of that time ended. ``seams``: where an answer is not what its engines
    said, put together; None where nobody wrote that down, as the control is without one."""

    disturbed: Verdict
    control: Verdict | None
    acts: Counter[str]
    ended: Counter[str]
    replies: Sequence[Reply]
    undisturbed: Sequence[Reply]
    seams: list[str] | None

    @property
    def num_cut(self) -> int:
        """How many legs ended before their answers did."""
        return sum(count for cause, count in self.ended.items() if cause in CUT)

    def summary(self) -> str:
        """In a line or two, for people."""
        seams = "" if self.seams is None else f"{len(self.seams)} not as the engines said it, "
        beside = "" if self.control is None else f" (undisturbed twice: {self.control.equal_share:.1%})"
        return (
            f"{len(self.replies)} requests, {_counted(self.acts)}; legs: {_counted(self.ended)}; "
            f"{len(self.disturbed.broken)} broken, {len(self.disturbed.unfinished)} unfinished, "
            f"{seams}{self.disturbed.cut} pinned streams cut; equal to the undisturbed: "
            f"{self.disturbed.equal_share:.1%} of {self.disturbed.compared}{beside}"
        )


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.most_common()) or "none"


class Plan(NamedTuple):
    """How a trial is run: the workers of the model's ``settings`` are disturbed by ``acts`` with such pauses before
    them (seconds, from and to) while ``at_once`` requests are under way; a gateway that disturbs nobody differs in
    fairness alone. ``record`` is where a ``tests.fakes.recorder`` writes what the engines say, if there is one."""

    nature: Nature
    settings: dict[str, Any]
    keys: Sequence[dict[str, Any]]
    at_once: int
    acts: Sequence[str]
    pause_s: tuple[float, float]
    sections: dict[str, Any]
    seed: int
    record: Path | None


async def trial(plan: Plan, count: int, *, num_quiet: int = 2) -> Trial:
    """Ask so many questions in peace, twice or once or not at all, and under disruption."""
    asked = questions(plan.nature, count, plan.seed)
    secrets = [key["key"] for key in plan.keys]

    def gateway(fairness: dict[str, Any]) -> GatewayProcess:
        models = {plan.nature.model: {**plan.settings, "fairness": fairness}}
        return GatewayProcess(models, keys=plan.keys, **plan.sections)

    undisturbed: Sequence[Reply] = ()
    control = None
    if num_quiet:
        async with gateway({"policy": "fcfs"}) as quiet:
            undisturbed = await answers(quiet, asked, secrets, at_once=plan.at_once)
            if num_quiet > 1:
                control = verdict(await answers(quiet, asked, secrets, at_once=plan.at_once), undisturbed)
    if plan.record is not None:
        plan.record.write_text("")  # a free question was answered otherwise in peace, perhaps in parts
    async with gateway(RESTLESS) as restless:
        async with Disruption(restless, plan.seed, plan.acts, pause_s=plan.pause_s) as disruption:
            replies = await answers(restless, asked, secrets, at_once=plan.at_once)
        ended = await causes(restless, len(asked))
    told = [(reply.question, reply.story) for reply in replies]
    seams = seam_faults(plan.record, told) if plan.record is not None else None
    return Trial(verdict(replies, undisturbed), control, disruption.done, ended, replies, undisturbed, seams)
