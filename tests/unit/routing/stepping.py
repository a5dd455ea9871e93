"""An engine for the scheduler to drive, one step at a time: every leg that has its prompt gives one token a step."""

from collections import Counter, defaultdict
from itertools import combinations

import msgspec

from routing.fairness.policy import Fairness
from routing.scheduler import Abort, Effect, Start
from tests.fakes.workers import view
from tests.unit.routing.world import World


class Job(msgspec.Struct, frozen=True):
    """A request: when it comes (in steps), whose it is, its prompt and its answer."""

    at: int
    tenant: str
    prompt: int
    answer: int
    program: str = ""
    rank: int = 0
    cancelled_at: int | None = None


class Run:
    """The world after all jobs have run. ``kept``: which share of a context the engine still holds, in percent."""

    STEP_S = 0.05

    def __init__(self, jobs: list[Job], fairness: Fairness, *, slots: int, kept: int = 90) -> None:
        self.world = World(view(slots=slots), fairness=fairness)
        self.world.checks_always = False  # once a step will do
        self.jobs = {f"r{index}": job for index, job in enumerate(jobs)}
        self.given: Counter[str] = Counter()
        self.service: Counter[str] = Counter()
        self.first_at: dict[str, int] = {}
        self.max_gap = 0.0
        self.order: list[str] = []
        self._kept = kept
        self._fairness = fairness
        self._low: dict[tuple[str, str], float] = {}
        self._high: dict[tuple[str, str], float] = {}
        self._new: list[Start] = []
        self.step = 0
        while len(self.world.ended) < len(jobs):
            self._advance()
            assert self.step < 100_000

    def _advance(self) -> None:
        for name, job in self.jobs.items():
            if job.at == self.step:
                self._take(
                    self.world.submit(
                        name,
                        job.tenant,
                        tokens=job.prompt + 2 * job.answer,  # what it says it may need is more than it does
                        prompt=job.prompt,
                        timeout=1e9,
                        pinned=False,
                        program=job.program,
                        rank=job.rank,
                    )
                )
            if job.cancelled_at == self.step:
                self._take(self.world.cancel(name))
        self._take(self.world.let_go())
        for leg, start in list(self.world.running.items()):
            if leg in self.world.running:
                self._run(start)
        self.world.now += self.STEP_S
        self.step += 1
        self._take(self.world.advance(0.0))
        self._measure()
        self.world.check()

    def _run(self, start: Start) -> None:
        name, leg = start.request, start.leg
        job = self.jobs[name]
        if not self.world.ran[leg]:
            context = job.prompt + self.given[name]
            self.world.first_token(leg, prefilled=context * (100 - self._kept) // 100 if self.given[name] else context)
            self.first_at.setdefault(name, self.step)
        self.given[name] += 1
        self.service[job.tenant] += self._price(1)
        self._take(self.world.tokens(leg, 1))
        if self.given[name] >= job.answer and leg in self.world.running:
            self._take(self.world.end(leg, "done"))

    def _price(self, tokens: int) -> int:
        return int(tokens * self._fairness.output_price)

    def _take(self, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Start):
                self.order.append(effect.request)
                if not self.given[effect.request] and effect.leg.endswith("/0"):
                    job = self.jobs[effect.request]
                    self.service[job.tenant] += int(job.prompt * self._fairness.prompt_price)
            if isinstance(effect, Abort):
                self.order.append(f"-{effect.leg}")

    def _measure(self) -> None:
        """Follow how far apart the service of two tenants drifts while both have a queue."""
        models = self.world.scheduler._books.models.values()
        accounts = [account for model in models for account in model.line.accounts.values()]
        queued = {account.tenant for account in accounts if account.is_backlogged}
        for pair in combinations(sorted({job.tenant for job in self.jobs.values()}), 2):
            if not queued.issuperset(pair):
                self._low.pop(pair, None)
                self._high.pop(pair, None)
                continue
            apart = self.service[pair[0]] - self.service[pair[1]]
            self._low[pair] = min(self._low.get(pair, apart), apart)
            self._high[pair] = max(self._high.get(pair, apart), apart)
            self.max_gap = max(self.max_gap, self._high[pair] - self._low[pair])


def waits(run: Run) -> dict[str, list[int]]:
    """Return the steps to the first token, by tenant."""
    found: dict[str, list[int]] = defaultdict(list)
    for name, at in run.first_at.items():
        found[run.jobs[name].tenant].append(at - run.jobs[name].at)
    return found
