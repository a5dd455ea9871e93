"""The clock and the wires: arrivals, steps, outages and wake-ups in order of time; events out, effects back.

Everything that has to do with time is a heap of moments. Between two of them nothing changes, so virtual hours take
seconds. Ties go in order of creation: the same input gives the same run.
"""

import heapq
import math
from array import array
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Protocol

import msgspec

from core.ids import LegId, ModelName, RequestId, TenantId, WorkerId
from routing.fairness.policy import Fairness
from routing.scheduler import (
    Abort,
    Effect,
    Event,
    FirstToken,
    LegEnded,
    Limits,
    Reject,
    Scheduler,
    Start,
    Submit,
    Tick,
    Tokens,
    Worker,
    WorkerView,
)
from routing.simulator.engine import Engine, Job, ModelledWorker, blocks_of
from routing.simulator.service import Service
from routing.simulator.trace import Arrival, Trace

MODEL = ModelName("model")
_LEAST_TICK_S = 0.001
_FOREVER = 1e9


class Decider(Protocol):
    """What decides: the scheduler, or something to compare it with."""

    def on(self, event: Event) -> Sequence[Effect]:
        """Take an event, return what is to be done."""

    def next_wakeup(self) -> float | None:
        """Return when a ``Tick`` is wanted at the latest."""


def scheduler(fairness: Fairness) -> Scheduler:
    """Return production's scheduler in its first state, with queues that take every trace."""
    return Scheduler(Limits(queue=10**7, queue_per_tenant=10**7), fairness={MODEL: fairness})


class Outage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A worker (by its place in the fleet) dies at ``at`` and is back, empty, ``lasts`` seconds later."""

    worker: int
    at: float
    lasts: float


class Fleet(msgspec.Struct, frozen=True):
    """The workers, each with its engine, and what befalls them."""

    engines: tuple[Engine, ...]
    outages: tuple[Outage, ...] = ()

    @property
    def slots(self) -> int:
        """Requests that run at once in all of it."""
        return sum(engine.slots for engine in self.engines)


class Terms(msgspec.Struct, frozen=True):
    """How requests are made of a trace, and how closely the run is looked at.

    ``longest_answer`` is what a request states as its longest, if it is not longer than that (what it will really be is
    nobody's to know);
    ``stride``: engine steps taken at once where only next tokens are computed (1 is exact; more is faster, and
    decisions come that much later); ``look``: seconds between looks at the service gap.
    """

    weights: Mapping[TenantId, float] = {}
    longest_answer: int = 512
    queue_timeout: float = 1e6
    stride: int = 1
    look: float = 0.05


class Served(msgspec.Struct):
    """What became of one request; times in seconds from the trace's beginning. ``gaps``: between its tokens."""

    arrival: Arrival
    first_at: float | None = None
    ended_at: float | None = None
    num_tokens: int = 0
    num_legs: int = 0
    num_preempted: int = 0
    num_migrated: int = 0
    num_recomputed: int = 0
    end: Literal["", "done", "rejected"] = ""
    gaps: "array[float]" = msgspec.field(default_factory=lambda: array("f"))
    last_at: float = 0.0
    num_known: int = 0  # tokens of prompt and answer that some leg has computed
    is_waiting: bool = False
    leg: LegId | None = None

    @property
    def ttft(self) -> float | None:
        """Seconds from arrival to the first token; None if there was none."""
        return None if self.first_at is None else self.first_at - self.arrival.at


class Run(msgspec.Struct, frozen=True):
    """A run's result. ``num_prefilled`` counts prompt work of all legs, ``num_recomputed`` that which was done before.
    ``num_restarts``: requests that engines restarted for lack of memory."""

    served: tuple[Served, ...]
    service: Service
    makespan: float
    num_prefilled: int
    num_recomputed: int
    num_restarts: int
    num_aborts: Mapping[str, int]


class Stuck(Exception):
    """Requests wait, and nothing is left that could start them: a fault of what decides."""


class Simulation:
    """One run of a trace over a fleet. ``decider`` is fed from a fresh state."""

    def __init__(self, trace: Trace, fleet: Fleet, decider: Decider, terms: Terms) -> None:
        self._trace = trace
        self._fleet = fleet
        self._decider = decider
        self._terms = terms
        self._served = [Served(arrival=arrival) for arrival in trace.arrivals]
        self._workers = [ModelledWorker(engine) for engine in fleet.engines]
        self._is_stepping = [False] * len(self._workers)
        self._incarnations = [0] * len(self._workers)
        self._is_up = [True] * len(self._workers)
        self._heap: list[tuple[float, int, Literal["step", "down", "up"], int, int]] = []
        self._order = 0
        self._now = 0.0
        self._soon: deque[Event] = deque()
        self._idle: dict[int, None] = {}  # workers that may have to begin a step
        self._service = Service(terms.weights, terms.look)
        self._worker_of: dict[LegId, int] = {}
        self._jobs: dict[LegId, Job] = {}
        self._num_done = 0
        self._num_prefilled = 0
        self._num_aborts: dict[str, int] = {}

    def run(self, progress: Callable[[int, float], None] = lambda _done, _now: None) -> Run:
        """Run to the last request's end. ``progress`` hears how many have ended, and the virtual time, now and then,
        and at the end.

        Raises ``Stuck``.
        """
        for index in range(len(self._workers)):
            self._feed(Worker(view=self._view(index), now=0.0))
        for outage in self._fleet.outages:
            self._push(outage.at, "down", outage.worker)
            self._push(outage.at + outage.lasts, "up", outage.worker)
        arrived, total = 0, len(self._served)
        arrivals = self._trace.arrivals
        last_tick, told = -1.0, 0
        while self._num_done < total:
            wakeup = self._decider.next_wakeup()
            tick = math.inf if wakeup is None else max(wakeup, self._now, last_tick + _LEAST_TICK_S)
            arrival = arrivals[arrived].at if arrived < total else math.inf
            moment = self._heap[0][0] if self._heap else math.inf
            now = min(tick, arrival, moment)
            if now > _FOREVER:
                raise Stuck(f"{total - self._num_done} of {total} requests are left at {self._now:.1f} s")
            self._now = now
            self._service.at(now)
            if moment == now:
                _, _, kind, index, incarnation = heapq.heappop(self._heap)
                self._happens(kind, index, incarnation)
            elif arrival == now:
                self._submit(arrived)
                arrived += 1
            else:
                last_tick = now
                self._feed(Tick(now=now))
            self._settle()
            if self._num_done - told > total // 100:
                told = self._num_done
                progress(told, now)
        progress(total, self._now)
        return Run(
            served=tuple(self._served),
            service=self._service,
            makespan=self._now,
            num_prefilled=self._num_prefilled,
            num_recomputed=sum(one.num_recomputed for one in self._served),
            num_restarts=sum(worker.num_restarts for worker in self._workers),
            num_aborts=self._num_aborts,
        )

    def _happens(self, kind: Literal["step", "down", "up"], index: int, incarnation: int) -> None:
        match kind:
            case "step":
                if incarnation == self._incarnations[index]:
                    self._end_step(index)
            case "down":
                self._is_up[index] = self._is_stepping[index] = False
                self._incarnations[index] += 1
                for job in self._workers[index].lose_all():
                    self._leave(job)
                    self._soon.append(LegEnded(leg=job.id, cause="lost", now=self._now, can_resume=True))
                self._feed(Worker(view=self._view(index), now=self._now))
            case "up":
                self._is_up[index] = True
                self._feed(Worker(view=self._view(index), now=self._now))

    def _submit(self, index: int) -> None:
        arrival = self._trace.arrivals[index]
        self._waits(index)
        self._feed(
            Submit(
                request=RequestId(str(index)),
                tenant=arrival.tenant,
                models=(MODEL,),
                tokens_estimate=arrival.prompt + max(self._terms.longest_answer, arrival.output),
                queue_timeout=self._terms.queue_timeout,
                now=self._now,
                prompt_tokens=arrival.prompt,
                weight=self._terms.weights.get(arrival.tenant, 1.0),
                program=arrival.program,
                is_pinned=False,
            )
        )

    def _feed(self, event: Event) -> None:
        for effect in self._decider.on(event):
            match effect:
                case Start():
                    self._start(effect)
                case Abort():
                    self._abort(effect)
                case Reject():
                    self._end(int(effect.request), "rejected")

    def _settle(self) -> None:
        """Feed what follows at the same moment, and let workers begin steps when all of it is known."""
        while self._soon:
            self._feed(self._soon.popleft())
        for index in self._idle:
            self._begin_step(index)
        self._idle.clear()

    def _start(self, start: Start) -> None:
        number, index = int(start.request), int(start.worker[1:])
        served = self._served[number]
        if not served.num_legs:
            self._service.serves(served.arrival.tenant, served.arrival.prompt, 0)
        if served.is_waiting:
            served.is_waiting = False
            self._service.leaves(served.arrival.tenant)
        served.num_legs += 1
        served.leg = start.leg
        job = Job(
            start.leg,
            number,
            served.arrival.prompt + served.num_tokens,
            served.arrival.output - served.num_tokens,
            blocks_of(served.arrival.blocks, number, self._trace.block_tokens),
        )
        self._jobs[start.leg] = job
        self._worker_of[start.leg] = index
        self._workers[index].give(job)
        self._idle[index] = None

    def _abort(self, abort: Abort) -> None:
        job = self._jobs.get(abort.leg)
        if job is None:
            return
        self._num_aborts[abort.why] = self._num_aborts.get(abort.why, 0) + 1
        served = self._served[job.request]
        served.num_preempted += abort.why == "preempted"
        served.num_migrated += abort.why == "migrated"
        if self._workers[self._worker_of[abort.leg]].cut(abort.leg):
            self._aborted(job)

    def _aborted(self, job: Job) -> None:
        self._leave(job)
        self._soon.append(
            LegEnded(leg=job.id, cause="aborted", now=self._now, can_resume=True, prefilled=job.num_prefilled)
        )

    def _leave(self, job: Job) -> None:
        """The leg is over, and the request is not: it waits again."""
        self._account(job)
        self._waits(job.request)

    def _waits(self, number: int) -> None:
        served = self._served[number]
        served.is_waiting = True
        served.leg = None
        self._service.waits(served.arrival.tenant)

    def _account(self, job: Job) -> None:
        served = self._served[job.request]
        del self._jobs[job.id], self._worker_of[job.id]
        computed = job.num_computed
        new = max(0, computed - served.num_known)
        served.num_known = max(served.num_known, computed)
        self._num_prefilled += job.num_prefilled
        served.num_recomputed += max(0, job.num_prefilled - max(0, new - job.num_given))

    def _begin_step(self, index: int) -> None:
        if self._is_stepping[index] or not self._is_up[index]:
            return
        seconds = self._workers[index].begin_step(self._terms.stride)
        if seconds is not None:
            self._is_stepping[index] = True
            self._push(self._now + seconds, "step", index)

    def _end_step(self, index: int) -> None:
        self._is_stepping[index] = False
        self._idle[index] = None
        now = self._now
        outcomes = self._workers[index].end_step()
        for job, num, end in outcomes:  # all is written down before anybody can react to a part of it
            if num:
                self._write_down(job, num)
            if end == "done":
                self._account(job)
            elif end == "aborted":
                self._aborted(job)
        for job, num, end in outcomes:
            if num:
                if job.num_given == num:
                    self._feed(FirstToken(leg=job.id, now=now, prefilled=job.num_prefilled))
                self._feed(Tokens(leg=job.id, num=num, now=now))
            if end == "done":
                self._end(job.request, "done")
                self._feed(LegEnded(leg=job.id, cause="done", now=now, prefilled=job.num_prefilled))

    def _write_down(self, job: Job, num: int) -> None:
        served = self._served[job.request]
        now = self._now
        if served.first_at is None:
            served.first_at = now
        else:
            served.gaps.extend([(now - served.last_at) / num] * num)
        served.last_at = now
        served.num_tokens += num
        self._service.serves(served.arrival.tenant, 0, num)

    def _end(self, number: int, end: Literal["done", "rejected"]) -> None:
        served = self._served[number]
        served.end = end
        served.ended_at = self._now
        self._num_done += 1
        if served.is_waiting:
            served.is_waiting = False
            self._service.leaves(served.arrival.tenant)

    def _push(self, at: float, kind: Literal["step", "down", "up"], index: int) -> None:
        self._order += 1
        heapq.heappush(self._heap, (at, self._order, kind, index, self._incarnations[index]))

    def _view(self, index: int) -> WorkerView:
        return WorkerView(
            id=WorkerId(f"w{index}"),
            model=MODEL,
            is_ready=self._is_up[index],
            is_healthy=self._is_up[index],
            may_return=True,
            max_inflight=self._fleet.engines[index].slots,
            incarnation=self._incarnations[index],
            kv_tokens=self._fleet.engines[index].kv_tokens,
        )
