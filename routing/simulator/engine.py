"""A modelled worker: continuous batching with chunked prefill, a prefix cache and a KV limit, step by step.

A step takes ``base + per_sequence * batch + per_kv_token * KV + per_prefill_token * prefill`` seconds (``fit.py`` finds
the four from measurements). All that runs gains a token a step; a prompt is computed ``chunk`` tokens a step, oldest
first, and its first token comes with its last chunk. What exceeds the slots or the KV memory waits in the engine, first
come first served; where running requests outgrow the memory the youngest starts again, as vLLM has it.
"""

from collections import deque
from collections.abc import Callable
from typing import Literal

import msgspec

from core.ids import LegId
from routing.simulator.prefixes import Block, PrefixCache


class StepTime(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Seconds of a step. The defaults are close to a 7B model on an A10G (VTC's testbed, arXiv 2401.00588)."""

    base: float = 0.030
    per_sequence: float = 0.0007
    per_kv_token: float = 0.0
    per_prefill_token: float = 0.00021

    def seconds(self, batch: float, kv: float, prefill: float) -> float:
        """Return how long a step takes with so many sequences, tokens in memory and prompt tokens to compute."""
        return self.base + self.per_sequence * batch + self.per_kv_token * kv + self.per_prefill_token * prefill


class Engine(msgspec.Struct, frozen=True):
    """What a worker can do. Without ``keeps_prefixes`` nothing is reused: a resumed request is computed anew."""

    step: StepTime = StepTime()
    slots: int = 24
    kv_tokens: int = 100_000
    chunk: int = 512
    keeps_prefixes: bool = True


class Job:
    """One leg in the engine. ``context``: tokens to compute before the next one can be given."""

    __slots__ = (
        "blocks", "context", "held", "id", "is_cut", "left", "num_given", "num_prefilled", "planned", "private",
        "remaining", "request",
    )  # fmt: skip

    def __init__(
        self, leg: LegId, request: int, context: int, remaining: int, blocks: Callable[[int], list[Block]]
    ) -> None:
        self.id = leg
        self.request = request
        self.context = context
        self.remaining = remaining
        self.blocks = blocks  # of the first so many tokens
        self.held: list[Block] = []
        self.private = 0  # tokens in memory that are in no block of the cache
        self.left = context
        self.planned = 0
        self.num_given = 0
        self.num_prefilled = 0
        self.is_cut = False

    @property
    def num_computed(self) -> int:
        """Tokens of prompt and answer that are in memory."""
        return self.context - self.left


Outcome = tuple[Job, int, Literal["", "done", "aborted"]]
"""What a step did for a leg: tokens given, and how it ended if it did."""


class ModelledWorker:
    """Runs jobs step by step; whoever holds it keeps the time. What is given or cut in a step counts from the next."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.cache = PrefixCache()
        self.num_restarts = 0
        self._running: list[Job] = []
        self._waiting: deque[Job] = deque()
        self._private = 0
        self._steps = 0  # that run now

    @property
    def num_kv_tokens(self) -> int:
        """Tokens in memory: of what runs, and of what is kept for later."""
        return self.cache.num_tokens + self._private

    def give(self, job: Job) -> None:
        """Take a job; it runs from the next step on if there is room."""
        self._waiting.append(job)

    def cut(self, leg: LegId) -> bool:
        """End a leg: at once if no step has it (True), else with the step that runs, which then reports it."""
        for job in self._waiting:
            if job.id == leg:
                self._waiting.remove(job)
                return True
        for job in self._running:
            if job.id == leg:
                if self._steps:
                    job.is_cut = True
                    return False
                self._running.remove(job)
                self._let_go(job)
                return True
        return False

    def begin_step(self, stride: int) -> float | None:
        """Plan the next step, or as many as ``stride`` equal ones if nothing is to be computed but next tokens.

        Return its seconds; None if there is nothing to do.
        """
        self._admit()
        if not self._running:
            return None
        prefilling = sum(job.left for job in self._running if job.left)
        self._make_room(min(self.engine.chunk, prefilling) + len(self._running))
        if prefilling:
            return self._plan_chunk()
        batch = len(self._running)
        self._steps = min(stride, *(job.remaining for job in self._running))
        extra = batch * (self._steps - 1) / 2  # what the memory grows by on the way, on average
        return self._steps * self.engine.step.seconds(batch, self.num_kv_tokens + extra, 0)

    def end_step(self) -> list[Outcome]:
        """Return what the step has brought, job by job, the oldest first."""
        jobs, steps = self._running, self._steps
        self._running, self._steps = [], 0
        outcomes: list[Outcome] = []
        for job in jobs:
            if job.planned:
                self._prefill(job)
            num = 0
            if job.is_cut:
                self._let_go(job)
                outcomes.append((job, 0, "aborted"))
                continue
            if not job.left:
                num = min(steps, job.remaining)
                job.remaining -= num
                job.num_given += num
                job.context += num
                job.private += num
                self._private += num
                if not job.remaining:
                    self._let_go(job)
                    outcomes.append((job, num, "done"))
                    continue
            self._running.append(job)
            outcomes.append((job, num, ""))
        return outcomes

    def lose_all(self) -> list[Job]:
        """The process is gone, and its memory with it: return the jobs that were here."""
        lost = [*self._running, *self._waiting]
        self._running.clear()
        self._waiting.clear()
        self.cache.clear()
        self._private = self._steps = 0
        return lost

    def _plan_chunk(self) -> float:
        budget, batch = self.engine.chunk, 0
        for job in self._running:
            job.planned = min(job.left, budget)
            budget -= job.planned
            batch += job.left == job.planned
        self._steps = 1
        return self.engine.step.seconds(batch, self.num_kv_tokens, self.engine.chunk - budget)

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self.engine.slots:
            job = self._waiting[0]
            num_blocks = num_tokens = 0
            blocks = job.blocks(job.context) if self.engine.keeps_prefixes else []
            if blocks:
                num_blocks, num_tokens = self.cache.hold_prefix(blocks)
            held = blocks[:num_blocks]
            wanted = job.context - num_tokens + 1
            if self._running and self.num_kv_tokens - self.cache.num_idle + wanted > self.engine.kv_tokens:
                self.cache.release(held)
                return
            if held and _is_part(held[-1]):  # it goes on growing, and serves nobody else
                self.cache.take(held[-1])
                job.private += held[-1][1]
                self._private += held.pop()[1]
            job.held = held
            job.left = max(1, job.context - num_tokens)  # the last token is always computed: it gives the next one
            self._waiting.popleft()
            self._running.append(job)

    def _make_room(self, wanted: int) -> None:
        missing = self.num_kv_tokens + wanted - self.engine.kv_tokens
        if missing > 0:
            missing -= self.cache.evict(missing)
        while missing > 0 and len(self._running) > 1:
            youngest = self._running.pop()
            before = self.num_kv_tokens
            self._let_go(youngest)
            youngest.left, youngest.planned = youngest.context, 0
            self._waiting.appendleft(youngest)
            self.num_restarts += 1
            self.cache.evict(missing)
            missing -= before - self.num_kv_tokens

    def _prefill(self, job: Job) -> None:
        done, job.planned = job.planned, 0
        job.left -= done
        job.num_prefilled += done
        job.private += done
        self._private += done
        if not job.left:
            self._keep(job, whole_blocks_only=True)

    def _keep(self, job: Job, *, whole_blocks_only: bool) -> None:
        """Put what the job has computed into the cache, for others and for its own return."""
        if not self.engine.keeps_prefixes:
            return
        blocks = job.blocks(job.num_computed)
        if whole_blocks_only and blocks and _is_part(blocks[-1]):
            blocks.pop()
        more = blocks[len(job.held) :]
        self.cache.add(more)
        job.held += more
        num = min(job.private, sum(size for _, size in more))
        job.private -= num
        self._private -= num

    def _let_go(self, job: Job) -> None:
        self._keep(job, whole_blocks_only=False)
        self._private -= job.private
        job.private = 0
        self.cache.release(job.held)
        job.held = []


def _is_part(block: Block) -> bool:
    return len(block[0]) == 3


def blocks_of(shared: tuple[int, ...], owner: int, block_tokens: int) -> Callable[[int], list[Block]]:
    """Return what names the blocks of the first so many tokens of a request: ``shared`` ones first, then its own.

    The last block may be part of one: it serves only the request itself, resumed where it was cut.
    """

    def blocks(num_tokens: int) -> list[Block]:
        whole, rest = divmod(num_tokens, block_tokens)
        num_shared = min(whole, len(shared))
        found: list[Block] = [((name,), block_tokens) for name in shared[:num_shared]]
        found += [((owner, index), block_tokens) for index in range(num_shared, whole)]
        if rest := rest // 16 * 16:
            found.append(((owner, whole, rest), rest))
        return found

    return blocks
