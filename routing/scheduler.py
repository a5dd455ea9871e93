"""Who runs where, and when: a synchronous machine. Events go in, effects come out, nothing else happens.

One owner feeds it (``engines/dispatcher.py``; a simulator under a virtual clock does the same), so it has no lock.
Requests wait here and not in the engines: a worker is never given more than ``max_inflight`` of them, and which
worker it will be is decided when one has room, not before. ``DESIGN.md`` beside this file tells the rules.
"""

import heapq
import itertools
from typing import Literal, assert_never

import msgspec

from core.ids import LegId, ModelName, RequestId, TenantId, WorkerId
from routing.breaker import Breaker
from routing.fairness import TenantQueues
from routing.placement import Candidate, choose

Cause = Literal["done", "refused", "busy", "broken", "lost", "unreachable", "timed_out", "hurried", "aborted"]
"""How a leg ended. ``refused``: the request's own fault; ``unreachable``: the worker never saw the request;
``hurried``: it missed a deadline of the caller's own choice, which says nothing of the worker."""

BUSY_PAUSE_S = 0.1
"""How long a request first stays away from a model whose engine is busy and does not say for how long."""

CutFor = Literal["cancelled", "preempted", "migrated", "drained"]
"""Why a leg is ended before its time."""

Why = Literal["queue_full", "queue_timeout", "no_healthy_worker", "failed"]


class WorkerView(msgspec.Struct, frozen=True):
    """What decisions know of a worker. ``may_return``: not ready now, and something is being done about it."""

    id: WorkerId
    model: ModelName
    is_ready: bool
    is_healthy: bool
    may_return: bool
    max_inflight: int
    incarnation: int = 0


class Submit(msgspec.Struct, frozen=True, tag="submit"):
    """A request has come. ``models``: the one asked for, then its fallbacks. ``rank``: its place among its tenant's
    own, the lower the sooner. ``weight``: its tenant's share, beside the others'. ``program``: which of the tenant's
    programs it belongs to. ``is_pinned``: it must not be cut by choice. ``tokens_estimate``: the prompt and the longest
    answer; ``prompt_tokens``: the prompt's part of it."""

    request: RequestId
    tenant: TenantId
    models: tuple[ModelName, ...]
    tokens_estimate: int
    queue_timeout: float
    now: float
    rank: int = 0
    prompt_tokens: int = 0
    weight: float = 1.0
    program: str = ""
    is_pinned: bool = True


class FirstToken(msgspec.Struct, frozen=True, tag="first_token"):
    """The leg's first byte is there: from now on the request is bound to this answer. ``prefilled``: the tokens that
    the engine really processed for the prompt; None if it does not tell, or not yet."""

    leg: LegId
    now: float
    prefilled: int | None = None


class Tokens(msgspec.Struct, frozen=True, tag="tokens"):
    """The engine has delivered ``num`` more output tokens."""

    leg: LegId
    num: int
    now: float


class LegEnded(msgspec.Struct, frozen=True, tag="leg_ended"):
    """The leg is over and its slot is free; ``retry_after`` is the engine's own advice, in seconds.

    ``can_resume``: another leg can go on where this one ended, so that the client notices nothing. ``prefilled``: as in
    ``FirstToken``, where the engine tells it only at the end.
    """

    leg: LegId
    cause: Cause
    now: float
    retry_after: float | None = None
    can_resume: bool = False
    prefilled: int | None = None


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """Nobody wants the answer any more. A running leg's slot counts as taken until its ``LegEnded``."""

    request: RequestId
    now: float


class Worker(msgspec.Struct, frozen=True, tag="worker"):
    """A worker has appeared or changed."""

    view: WorkerView
    now: float


class Tick(msgspec.Struct, frozen=True, tag="tick"):
    """Time has passed."""

    now: float


Event = Submit | FirstToken | Tokens | LegEnded | Cancel | Worker | Tick


class Start(msgspec.Struct, frozen=True, tag="start"):
    """Run a leg of the request on the worker."""

    leg: LegId
    request: RequestId
    worker: WorkerId
    model: ModelName
    attempt: int


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """End the leg at once; its ``LegEnded`` follows when the engine has let go.

    Unless it was ``cancelled``, the request goes on later, by a ``Start`` on this or another worker.
    """

    leg: LegId
    why: CutFor


class Reject(msgspec.Struct, frozen=True, tag="reject"):
    """The request gets no answer. ``failed``: its last leg's own error says why."""

    request: RequestId
    why: Why
    retry_after: float | None = None


Effect = Start | Abort | Reject


class Limits(msgspec.Struct, frozen=True):
    """Bounds of the scheduler: requests that wait per model, and per tenant of it; legs that one request may use."""

    queue: int = 2048
    queue_per_tenant: int = 1024
    attempts: int = 3
    max_retry_after: float = 10.0


class _Request(msgspec.Struct):
    id: RequestId
    tenant: TenantId
    models: tuple[ModelName, ...]
    tokens_estimate: int
    queue_timeout: float
    rank: int
    deadline: float = 0.0
    not_before: float = 0.0
    num_legs: int = 0
    num_attempts: int = 0
    model_index: int = 0
    leg: LegId | None = None
    is_committed: bool = False
    is_cancelled: bool = False
    tried: set[WorkerId] = msgspec.field(default_factory=set)

    @property
    def model(self) -> ModelName:
        return self.models[self.model_index]


class _Leg(msgspec.Struct):
    id: LegId
    request: RequestId
    worker: WorkerId
    outstanding: int
    breaker: Breaker  # of the worker as it was at the start: a leg's end says nothing of a later incarnation
    is_trial: bool


class _Worker:
    def __init__(self, view: WorkerView) -> None:
        self.view = view
        self.breaker = Breaker()
        self.num_running = 0
        self.outstanding = 0


class Scheduler:
    """Orders waiting requests and gives each its worker. Same events, same effects: it may be replayed.

    ``limits`` may be replaced between two events; what waits already stays.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._requests: dict[RequestId, _Request] = {}
        self._legs: dict[LegId, _Leg] = {}
        self._workers: dict[WorkerId, _Worker] = {}
        self._by_model: dict[ModelName, list[_Worker]] = {}
        self._queues: dict[ModelName, TenantQueues] = {}
        self._wakeups: list[tuple[float, int, ModelName, RequestId | None]] = []
        self._order = itertools.count()  # keeps the heap from comparing what has no order

    def on(self, event: Event) -> list[Effect]:
        """Take one event and return what has to be done, in this order."""
        match event:
            case Submit():
                return self._on_submit(event)
            case Tokens():
                return self._on_tokens(event)
            case FirstToken():
                return self._on_first_token(event)
            case LegEnded():
                return self._on_leg_ended(event)
            case Cancel():
                return self._on_cancel(event)
            case Worker():
                return self._on_worker(event)
            case Tick():
                return self._on_tick(event)
            case _:
                assert_never(event)

    def next_wakeup(self) -> float | None:
        """Return when a ``Tick`` is wanted at the latest; None if nothing waits for time to pass."""
        while self._wakeups:
            at, _, _, request = self._wakeups[0]
            if request is None or request in self._requests:
                return at
            heapq.heappop(self._wakeups)
        return None

    def knows(self, request: RequestId) -> bool:
        """Whether the request waits or runs, or a worker has not let go of it yet."""
        return request in self._requests

    def num_waiting(self, model: ModelName) -> int:
        """Return how many requests wait for the model."""
        queue = self._queues.get(model)
        return len(queue) if queue is not None else 0

    def num_running(self, worker: WorkerId) -> int:
        """Return how many legs hold a slot of the worker."""
        state = self._workers.get(worker)
        return state.num_running if state is not None else 0

    def is_tripped(self, worker: WorkerId) -> bool:
        """Return whether the worker has failed so often that it is given no work, or one request on trial."""
        state = self._workers.get(worker)
        return state is not None and state.breaker.open_until is not None

    def _on_submit(self, event: Submit) -> list[Effect]:
        request = _Request(
            id=event.request,
            tenant=event.tenant,
            models=event.models,
            tokens_estimate=event.tokens_estimate,
            queue_timeout=event.queue_timeout,
            rank=event.rank,
        )
        self._requests[request.id] = request
        return self._enqueue(request, event.now, front=False)

    def _on_first_token(self, event: FirstToken) -> list[Effect]:
        if (leg := self._legs.get(event.leg)) is not None:
            self._requests[leg.request].is_committed = True
        return []

    def _on_tokens(self, event: Tokens) -> list[Effect]:
        if (leg := self._legs.get(event.leg)) is not None:
            done = min(event.num, leg.outstanding)
            leg.outstanding -= done
            self._workers[leg.worker].outstanding -= done
        return []

    def _on_leg_ended(self, event: LegEnded) -> list[Effect]:
        leg = self._legs.pop(event.leg, None)
        if leg is None:
            return []
        request = self._requests[leg.request]
        worker = self._workers[leg.worker]
        worker.num_running -= 1
        worker.outstanding -= leg.outstanding
        request.leg = None
        self._judge(leg, event)
        effects = self._after_leg(request, leg, event)
        return effects + self._start_waiting(worker.view.model, event.now)

    def _on_cancel(self, event: Cancel) -> list[Effect]:
        request = self._requests.get(event.request)
        if request is None or request.is_cancelled:
            return []
        request.is_cancelled = True
        if request.leg is not None:
            return [Abort(leg=request.leg, why="cancelled")]
        self._forget(request)
        return []

    def _on_worker(self, event: Worker) -> list[Effect]:
        view = event.view
        worker = self._workers.get(view.id)
        if worker is None:
            worker = self._workers[view.id] = _Worker(view)
            self._by_model.setdefault(view.model, []).append(worker)
        elif view.model != worker.view.model:  # an operator has given the id to another model's worker
            self._by_model[worker.view.model].remove(worker)
            self._by_model.setdefault(view.model, []).append(worker)
            worker.breaker = Breaker()
        elif view.incarnation != worker.view.incarnation:
            worker.breaker = Breaker()
        worker.view = view
        effects = self._start_waiting(view.model, event.now)
        return effects + self._give_up_on(view.model, event.now)

    def _on_tick(self, event: Tick) -> list[Effect]:
        effects: list[Effect] = []
        models: dict[ModelName, None] = {}
        while self._wakeups and self._wakeups[0][0] <= event.now:
            _, _, model, request_id = heapq.heappop(self._wakeups)
            models[model] = None
            request = self._requests.get(request_id) if request_id is not None else None
            if request is not None and request.leg is None and event.now >= request.deadline:
                effects += self._expire(request, event.now)
        for model in models:
            effects += self._start_waiting(model, event.now)
        return effects

    def _judge(self, leg: _Leg, event: LegEnded) -> None:
        """Tell the breaker how the leg ended, if the worker had a part in it."""
        match event.cause:
            case "done" | "refused":
                leg.breaker.on_success()
            case "lost" | "unreachable" | "broken" | "timed_out":
                leg.breaker.on_failure(event.now, was_trial=leg.is_trial)
                if leg.breaker.open_until is not None:
                    self._wake(leg.breaker.open_until, self._workers[leg.worker].view.model)
            case "busy" | "hurried" | "aborted":
                leg.breaker.on_inconclusive(was_trial=leg.is_trial)
            case _:
                assert_never(event.cause)

    def _after_leg(self, request: _Request, leg: _Leg, event: LegEnded) -> list[Effect]:
        if request.is_cancelled or request.is_committed or event.cause in {"done", "refused", "aborted"}:
            self._forget(request)
            ended_well = request.is_cancelled or event.cause == "done"
            return [] if ended_well else [Reject(request=request.id, why="failed", retry_after=event.retry_after)]
        request.tried.add(leg.worker)
        if event.cause != "unreachable":
            request.num_attempts += 1
        advice = self._pause_after(request, event)
        if request.num_attempts >= self.limits.attempts or advice > self.limits.max_retry_after:
            return self._fall_back(request, event.now, Reject(request.id, why="failed", retry_after=event.retry_after))
        request.not_before = event.now + advice
        if event.cause != "unreachable":  # else it has waited all the while, and tries without end have to end
            request.deadline = event.now + request.queue_timeout
        return self._enqueue(request, event.now, front=True)

    def _pause_after(self, request: _Request, event: LegEnded) -> float:
        """Return how long the request stays away: as the engine says, else a little if all workers are busy."""
        if event.retry_after is not None or event.cause != "busy":
            return event.retry_after or 0.0
        workers = self._by_model.get(request.model, ())
        if any(worker.view.is_ready and worker.view.id not in request.tried for worker in workers):
            return 0.0
        return BUSY_PAUSE_S * 2.0 ** (request.num_attempts - 1)

    def _enqueue(self, request: _Request, now: float, *, front: bool) -> list[Effect]:
        """Start the request if a worker has room and nobody waits before it; queue it otherwise."""
        queue = self._queues.setdefault(request.model, TenantQueues())
        if not front:
            request.deadline = now + request.queue_timeout
        if not len(queue) and (start := self._try_start(request, now)) is not None:
            return [start]
        if not self._has_hope(request.model):
            return self._fall_back(request, now, Reject(request.id, why="no_healthy_worker", retry_after=1.0))
        if not front and (
            len(queue) >= self.limits.queue or queue.num_waiting(request.tenant) >= self.limits.queue_per_tenant
        ):
            return self._fall_back(request, now, Reject(request.id, why="queue_full", retry_after=1.0))
        queue.push(request.tenant, request.id, rank=request.rank, front=front)
        self._wake(request.deadline, request.model, request.id)
        if request.not_before > now:
            self._wake(request.not_before, request.model)
        return self._start_waiting(request.model, now)

    def _fall_back(self, request: _Request, now: float, otherwise: Reject) -> list[Effect]:
        """Queue the request for its next model; without one, end it as told."""
        if request.model_index + 1 >= len(request.models):
            self._forget(request)
            return [otherwise]
        request.model_index += 1
        request.num_attempts = 0
        request.not_before = 0.0
        return self._enqueue(request, now, front=False)

    def _expire(self, request: _Request, now: float) -> list[Effect]:
        """The request has waited as long as it may."""
        self._queues[request.model].remove(request.tenant, request.id)
        has_worker = any(worker.view.is_ready for worker in self._by_model.get(request.model, ()))
        why: Why = "queue_timeout" if has_worker else "no_healthy_worker"
        return self._fall_back(request, now, Reject(request.id, why=why, retry_after=1.0))

    def _start_waiting(self, model: ModelName, now: float) -> list[Effect]:
        """Start waiting requests, tenant by tenant, while there is room."""
        queue = self._queues.get(model)
        effects: list[Effect] = []
        while queue is not None and len(queue) and self._has_room(model, now):
            turn = queue.first(lambda request: now >= self._requests[request].not_before)
            if turn is None:
                break
            tenant, request_id = turn
            start = self._try_start(self._requests[request_id], now)
            assert start is not None
            queue.serve(tenant, request_id)
            effects.append(start)
        return effects

    def _has_room(self, model: ModelName, now: float) -> bool:
        return any(self._can_take(worker, now) for worker in self._by_model.get(model, ()))

    def _give_up_on(self, model: ModelName, now: float) -> list[Effect]:
        """End all that wait for a model when its last worker is gone for good."""
        queue = self._queues.get(model)
        effects: list[Effect] = []
        while queue is not None and not self._has_hope(model) and (turn := queue.first(lambda _: True)) is not None:
            tenant, request_id = turn
            queue.remove(tenant, request_id)
            reject = Reject(request_id, why="no_healthy_worker", retry_after=1.0)
            effects += self._fall_back(self._requests[request_id], now, reject)
        return effects

    def _has_hope(self, model: ModelName) -> bool:
        return any(worker.view.is_ready or worker.view.may_return for worker in self._by_model.get(model, ()))

    def _can_take(self, worker: _Worker, now: float) -> bool:
        return worker.view.is_ready and worker.num_running < worker.view.max_inflight and worker.breaker.allows(now)

    def _try_start(self, request: _Request, now: float) -> Start | None:
        if now < request.not_before:
            return None
        able = [worker for worker in self._by_model.get(request.model, ()) if self._can_take(worker, now)]
        if not able:
            return None
        chosen = (
            able[0].view.id
            if len(able) == 1
            else choose(
                Candidate(
                    worker=worker.view.id,
                    outstanding_tokens=worker.outstanding,
                    is_healthy=worker.view.is_healthy,
                    was_tried=worker.view.id in request.tried,
                )
                for worker in able
            )
        )
        assert chosen is not None
        return self._start(request, self._workers[chosen])

    def _start(self, request: _Request, worker: _Worker) -> Start:
        leg = _Leg(
            id=LegId(f"{request.id}/{request.num_legs}"),
            request=request.id,
            worker=worker.view.id,
            outstanding=request.tokens_estimate,
            breaker=worker.breaker,
            is_trial=worker.breaker.on_start(),
        )
        request.num_legs += 1
        request.leg = leg.id
        self._legs[leg.id] = leg
        worker.num_running += 1
        worker.outstanding += leg.outstanding
        return Start(
            leg=leg.id,
            request=request.id,
            worker=leg.worker,
            model=request.model,
            attempt=request.num_legs,
        )

    def _wake(self, at: float, model: ModelName, request: RequestId | None = None) -> None:
        """Ask for a tick: something of the model may start then, or the request has to be given up."""
        heapq.heappush(self._wakeups, (at, next(self._order), model, request))

    def _forget(self, request: _Request) -> None:
        if request.leg is None and (queue := self._queues.get(request.model)) is not None:
            queue.remove(request.tenant, request.id)
        del self._requests[request.id]
