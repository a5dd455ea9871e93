"""Production's scheduler over an engine that is as simple as can be, and counts what each tenant was given."""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

from core.ids import LegId, ModelName, RequestId, TenantId, WorkerId
from routing.fairness.policy import Fairness
from routing.scheduler import (
    Abort,
    Cancel,
    Effect,
    Event,
    FirstToken,
    LegEnded,
    Limits,
    Scheduler,
    Start,
    Submit,
    Tick,
    Tokens,
    Worker,
    WorkerView,
)

MODEL = ModelName("m")
STEP_S = 0.03
FAIRNESS = Fairness(threshold=200, credit=400, quantum=8, penalty=10, waste_burst=500)


@dataclass
class Job:
    """A request as the engine knows it. ``delivered`` counts over all its legs."""

    tenant: TenantId
    prompt: int
    length: int
    delivered: int = 0
    has_begun: bool = False


class Town:
    """``slots`` places on one engine; in a step each that is taken gives a token. ``given``: weighted tokens by tenant,
    as the engine counts them: each prompt once, each token that came out, whoever still wanted it."""

    def __init__(self, slots: int = 4, fairness: Fairness = FAIRNESS) -> None:
        self.slots = slots
        self.fairness = fairness
        self.now = 0.0
        self.jobs: dict[RequestId, Job] = {}
        self.running: dict[LegId, RequestId] = {}
        self.given: Counter[TenantId] = Counter()
        self.preempted = 0
        self._fresh: set[LegId] = set()
        self._leaving: dict[LegId, bool] = {}
        self._longest_prompt = self._longest_answer = 0
        self.scheduler = Scheduler(Limits(queue=10**6, queue_per_tenant=10**6), {MODEL: fairness})
        view = WorkerView(
            WorkerId("w"), MODEL, is_ready=True, is_healthy=True, may_return=True, max_inflight=slots, kv_tokens=10**9
        )
        self._feed(Worker(view, self.now))

    def submit(
        self,
        tenant: str,
        *,
        length: int = 40,
        prompt: int = 10,
        told: int | None = None,
        estimate: int | None = None,
        program: str = "",
        rank: int = 1,
        weight: float = 1.0,
        is_pinned: bool = False,
        **hints: Any,
    ) -> RequestId:
        """Ask for an answer of ``length`` tokens. ``told``: the prompt as the gateway guesses it from its bytes;
        ``estimate``: the longest answer that the request allows; ``hints``: what else it says of itself."""
        request = RequestId(f"r{len(self.jobs)}")
        self.jobs[request] = Job(TenantId(tenant), prompt, length)
        self._longest_prompt = max(self._longest_prompt, prompt)
        self._longest_answer = max(self._longest_answer, length)
        told = prompt if told is None else told
        self._feed(
            Submit(
                request=request,
                tenant=TenantId(tenant),
                models=(MODEL,),
                tokens_estimate=told + (length if estimate is None else estimate),
                queue_timeout=math.inf,
                now=self.now,
                rank=rank,
                prompt_tokens=told,
                weight=weight,
                program=program,
                is_pinned=is_pinned,
                **hints,
            )
        )
        return request

    def cancel(self, request: RequestId) -> None:
        """Leave without waiting for the end."""
        self._feed(Cancel(request, self.now))

    def waiting(self, tenant: str) -> int:
        """Return how many requests of the tenant wait."""
        view = self.scheduler.fairness_view(MODEL)
        return sum(one.queued for one in view.tenants if one.tenant == tenant)

    def charged(self, tenant: str) -> float:
        """Return what the scheduler has charged the tenant, in weighted tokens."""
        return sum(one.attained for one in self.scheduler.fairness_view(MODEL).tenants if one.tenant == tenant)

    def step(self) -> None:
        """Let time pass: what was cut ends, every leg gives a token, and those that are whole end."""
        self.now += STEP_S
        leaving, self._leaving = self._leaving, {}
        for leg, can_resume in leaving.items():
            if self.running.pop(leg, None) is not None:
                self._feed(LegEnded(leg, "aborted", self.now, can_resume=can_resume))
        for leg, request in tuple(self.running.items()):
            if leg in self.running:
                self._produce(leg, self.jobs[request])
        self._feed(Tick(self.now))

    def _produce(self, leg: LegId, job: Job) -> None:
        if leg in self._fresh:
            self._fresh.remove(leg)
            if not job.has_begun:
                job.has_begun = True
                self.given[job.tenant] += round(job.prompt * self.fairness.prompt_price)
            self._feed(FirstToken(leg, self.now, prefilled=job.prompt + job.delivered))
        job.delivered += 1
        self.given[job.tenant] += round(self.fairness.output_price)
        self._feed(Tokens(leg, 1, self.now))
        if job.delivered >= job.length and leg in self.running:
            del self.running[leg]
            self._feed(LegEnded(leg, "done", self.now))

    def _feed(self, event: Event) -> None:
        for effect in self.scheduler.on(event):
            self._take(effect)

    def _take(self, effect: Effect) -> None:
        match effect:
            case Start():
                self.running[effect.leg] = effect.request
                self._fresh.add(effect.leg)
                assert len(self.running) <= self.slots
            case Abort():
                self._leaving[effect.leg] = effect.why != "cancelled"
                self.preempted += effect.why == "preempted"
            case _:
                raise AssertionError(effect)

    @property
    def bound(self) -> float:
        """How much more than another that always waits a tenant may be given in any interval: ``routing/DESIGN.md``'s
        bound, VTC's own where the budget for waste is used up, and the credit with which it may have begun."""
        fairness, slots = self.fairness, self.slots
        delay = 1 / STEP_S * fairness.interval * math.ceil(slots / 2) + 2
        cost = fairness.prompt_price * (self._longest_prompt + self._longest_answer)
        preemptive = fairness.threshold + 2 * cost + slots * fairness.output_price * (fairness.quantum + delay)
        plain = 2 * max(
            fairness.prompt_price * self._longest_prompt, fairness.output_price * slots * self._longest_answer
        )
        return max(preemptive, plain) + fairness.credit
