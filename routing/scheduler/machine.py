"""The machine itself: one handler per event, and the few decisions that they end in."""

import itertools
from collections.abc import Mapping
from typing import assert_never

import msgspec

from core.ids import LegId, ModelName, RequestId, WorkerId
from routing.fairness.account import Place
from routing.fairness.account import Request as Waiting
from routing.fairness.policy import Fairness
from routing.scheduler.adoption import adopt
from routing.scheduler.books import Books
from routing.scheduler.cutting import cut, drain, migrate, take_slots
from routing.scheduler.decisions import Decision, Decisions, Kind
from routing.scheduler.effects import Effect, Reject, Start, Why
from routing.scheduler.events import (
    Adopt,
    Cancel,
    Event,
    FirstToken,
    LegEnded,
    Stalled,
    Submit,
    Tick,
    Tokens,
    Worker,
)
from routing.scheduler.keeping import is_worth_keeping
from routing.scheduler.memory import Memory, recall, remember
from routing.scheduler.paying import (
    charge_prompt,
    charge_tokens,
    earn_prompt,
    expect_again,
    release_owed,
    settle_prompt,
)
from routing.scheduler.placing import able_workers, worker_for
from routing.scheduler.state import FOREVER, Leg, Model, Request, WorkerState
from routing.scheduler.views import FairnessView, fairness_view
from routing.scheduler.waves import has_led, must_follow

BUSY_PAUSE_S = 0.1
"""How long a request first stays away from a model whose engine is busy and does not say for how long."""


class Limits(msgspec.Struct, frozen=True):
    """Bounds of the scheduler: requests that wait per model, and per tenant of it; legs that one request may use."""

    queue: int = 2048
    queue_per_tenant: int = 1024
    attempts: int = 3
    max_retry_after: float = 10.0


class Scheduler:
    """Orders waiting requests and gives each its worker. Same events, same effects: it may be replayed.

    ``limits`` and ``fairness`` may be replaced between two events; what waits already stays. A model that ``fairness``
    does not name has the default policy.
    """

    def __init__(self, limits: Limits, fairness: Mapping[ModelName, Fairness] | None = None) -> None:
        self.limits = limits
        self._books = Books(fairness or {})
        self._arrivals = itertools.count()
        self._decisions = Decisions()

    def on(self, event: Event) -> list[Effect]:
        """Take one event and return what has to be done, in this order."""
        match event:
            case Tokens():
                return self._on_tokens(event)
            case Submit():
                return self._on_submit(event)
            case FirstToken():
                return self._on_first_token(event)
            case LegEnded():
                return self._on_leg_ended(event)
            case Cancel():
                return self._on_cancel(event)
            case Stalled():
                return self._on_stalled(event)
            case Worker():
                return self._on_worker(event)
            case Tick():
                return self._on_tick(event)
            case Adopt():
                return self._on_adopt(event)
            case _:
                assert_never(event)

    # What others may look at

    @property
    def fairness(self) -> Mapping[ModelName, Fairness]:
        """The policies by model. What waits is ordered anew when they are replaced; counters stay."""
        return self._books.fairness

    @fairness.setter
    def fairness(self, fairness: Mapping[ModelName, Fairness]) -> None:
        self._books.fairness = fairness

    def next_wakeup(self) -> float | None:
        """Return when a ``Tick`` is wanted at the latest; None if nothing waits for time to pass."""
        return self._books.next_wakeup()

    def knows(self, request: RequestId) -> bool:
        """Whether the request waits or runs, or a worker has not let go of it yet."""
        return request in self._books.requests

    def num_waiting(self, model: ModelName) -> int:
        """Return how many requests wait for the model."""
        state = self._books.models.get(model)
        return len(state.line) if state is not None else 0

    def num_running(self, worker: WorkerId) -> int:
        """Return how many legs hold a slot of the worker."""
        state = self._books.workers.get(worker)
        return state.num_running if state is not None else 0

    def is_tripped(self, worker: WorkerId) -> bool:
        """Return whether the worker has failed so often that it is given no work, or one request on trial."""
        state = self._books.workers.get(worker)
        return state is not None and state.breaker.open_until is not None

    def explain(self, request: RequestId) -> tuple[Decision, ...]:
        """Return what was decided about the request and why, oldest first, as far as it is remembered."""
        return self._decisions.of(request)

    def waste_left(self, model: ModelName) -> float | None:
        """Return how many tokens may be computed again by choice; None if the model's policy never chooses to."""
        if self._books.fairness_of(model).policy != "vtc-pc":
            return None
        state = self._books.models.get(model)
        return state.line.waste.left if state is not None else 0.0

    def fairness_view(self, model: ModelName) -> FairnessView:
        """Return the model's live values. Costs O(tenants): it is for people."""
        return fairness_view(self._books.models.get(model) or Model(model, self._books.fairness_of(model)))

    def memory(self, model: ModelName, most_tenants: int) -> Memory:
        """Return what another scheduler needs to go on with the model, beside its requests. Costs O(tenants)."""
        return remember(self._books.model(model), most_tenants)

    def recall(self, memory: Memory, now: float) -> None:
        """Go on from what another scheduler knew. When workers have been told, and nothing else of the model."""
        recall(self._books, memory, now)

    # Events

    def _on_submit(self, event: Submit) -> list[Effect]:
        model = self._books.model(event.models[0])
        model.line.come_forward()  # a newcomer is measured by all who wait
        account = model.line.account(event.tenant, event.weight)
        request = Request(event, account, next(self._arrivals))
        self._books.requests[request.id] = request
        model.line.arrive(request)
        self._books.claim_kept(request)
        return self._enqueue(request, event.now)

    def _on_tokens(self, event: Tokens) -> list[Effect]:
        leg = self._books.legs.get(event.leg)
        if leg is None:
            return []
        num = event.num
        request, worker = leg.request, leg.worker
        model = self._books.models[request.model]
        effects = self._begin(leg, event.now)
        leg.deliver(num)
        worker.cost.deliver(num)
        leg.ran += num
        leg.kv_tokens += num
        worker.kv_tokens += num
        if worker.view.kv_tokens is not None and worker.view.id in model.with_room:
            model.refresh(worker)
        request.delivered += num
        charge_tokens(model.line, request, num)
        return effects + take_slots(model, self._decisions, event.now) if model.line.num_in_turn else effects

    def _begin(self, leg: Leg, now: float) -> list[Effect]:
        """The leg's prompt is done: those that wait for that may go on."""
        if leg.has_begun:
            return []
        leg.begin(now)
        model = self._books.models[leg.request.model]
        expect_again(model.line, leg)
        return self._decide(model, now) if has_led(leg, model.line, now) else []

    def _on_stalled(self, event: Stalled) -> list[Effect]:
        leg = self._books.legs.get(event.leg)
        if leg is None or leg.request.is_pinned:
            return []
        model = self._books.models[leg.request.model]
        model.unread[leg.id] = leg
        return self._decide(model, event.now)

    def _on_first_token(self, event: FirstToken) -> list[Effect]:
        leg = self._books.legs.get(event.leg)
        if leg is None:
            return []
        request = leg.request
        request.is_committed = True
        effects = self._begin(leg, event.now)
        if leg.first_at is None:
            leg.first_at = event.now
            if not request.earned and not leg.resumed:
                earn_prompt(self._books.models[request.model].line, request, request.charged or 0)
        if event.prefilled is not None:
            settle_prompt(self._books.models[request.model].line, leg, event.prefilled)
        return effects

    def _on_leg_ended(self, event: LegEnded) -> list[Effect]:
        leg = self._books.legs.get(event.leg)
        if leg is None:
            return []
        request, worker = leg.request, leg.worker
        self._books.models[worker.view.model].line.come_forward()
        self._books.release(leg, event.now)
        line = self._books.models[request.model].line
        if event.num_tokens:
            charge_tokens(line, request, event.num_tokens)
        if event.prefilled is not None:
            settle_prompt(line, leg, event.prefilled)
        else:
            expect_again(line, leg)
        if event.num_tokens and not leg.has_begun:
            worker.cost.pass_over()
        if event.cause in {"done", "aborted"} and leg.first_at is not None and leg.ran > 1:  # else it may have hung
            worker.pace.observe_step((leg.load + worker.num_running + 1) / 2, (event.now - leg.first_at) / leg.ran)
            self._books.models[worker.view.model].refresh(worker)  # it may take more now, or less
        self._judge(leg, event)
        if event.cause == "done" and is_worth_keeping(self._books.models[request.model], request, event.now):
            self._books.keep(request, worker, event.now)
        effects = self._after_leg(request, leg, event)
        effects += self._decide(self._books.models[worker.view.model], event.now)
        return effects

    def _on_cancel(self, event: Cancel) -> list[Effect]:
        request = self._books.requests.get(event.request)
        if request is None or request.is_cancelled:
            return []
        request.is_cancelled = True
        leg = request.leg
        if leg is None:
            self._books.forget(request, event.now)
            return []
        if leg.cut_for is not None:  # it is being cut already
            return []
        return [cut(self._books.models[request.model], leg, "cancelled")]

    def _on_worker(self, event: Worker) -> list[Effect]:
        model = self._books.note_worker(event.view)
        effects = self._decide(model, event.now)
        return effects + self._give_up_on(model, event.now)

    def _on_tick(self, event: Tick) -> list[Effect]:
        effects: list[Effect] = []
        models: dict[ModelName, None] = {}
        for due, request in self._books.due(event.now):
            models[due] = None
            if request is not None and request.leg is None and event.now >= request.deadline:
                effects += self._expire(request, event.now)
        for name in models:
            model = self._books.models[name]
            self._books.drop_kept(model, event.now)
            effects += self._decide(model, event.now)
        return effects

    def _on_adopt(self, event: Adopt) -> list[Effect]:
        request = adopt(self._books, event, next(self._arrivals))
        if request.leg is None:
            model = self._books.models[request.model]
            model.line.push(request)
            self._books.wake(request.deadline, model.name, request.id)
            self._books.wake(event.now, model.name)
            return self._give_up_on(model, event.now)
        if event.cut_for is not None:
            request.is_cancelled = event.cut_for == "cancelled"
            cut(self._books.models[request.model], request.leg, event.cut_for)
        return []

    # After a leg

    def _judge(self, leg: Leg, event: LegEnded) -> None:
        """Tell the breaker how the leg ended, if the worker had a part in it."""
        match event.cause:
            case "done" | "refused":
                leg.breaker.on_success()
            case "lost" | "unreachable" | "broken" | "timed_out":
                leg.breaker.on_failure(event.now, was_trial=leg.is_trial)
                if leg.breaker.open_until is not None:
                    self._books.wake(leg.breaker.open_until, leg.worker.view.model)
            case "busy" | "hurried" | "aborted":
                leg.breaker.on_inconclusive(was_trial=leg.is_trial)
            case _:
                assert_never(event.cause)

    def _after_leg(self, request: Request, leg: Leg, event: LegEnded) -> list[Effect]:
        if request.is_cancelled or event.cause == "done":
            self._books.forget(request, event.now)
            return []
        may_go_on = not request.is_committed or (event.can_resume and not request.is_pinned)
        was_cut = leg.cut_for is not None and event.cause == "aborted"
        if not may_go_on or event.cause == "refused" or (event.cause == "aborted" and not was_cut):
            self._books.forget(request, event.now)
            return [Reject(request=request.id, why="failed", retry_after=event.retry_after)]
        if was_cut:
            return self._come_back(request, leg, event.now)
        self._books.drop_target(request)
        return self._try_again(request, leg, event)

    def _come_back(self, request: Request, leg: Leg, now: float) -> list[Effect]:
        """The leg was cut by our choice: the request waits to go on, and has no deadline."""
        model = self._books.models[request.model]
        request.cut_for = leg.cut_for
        # What a part of the answer was made for waits for ever: no other model could go on with it.
        has_begun = request.is_committed or request.delivered > 0
        request.deadline = FOREVER if has_begun else now + request.queue_timeout
        self._books.wake(request.deadline, request.model, request.id)
        request.not_before = 0.0
        request.waits_since = now
        if leg.cut_for == "preempted":
            model.line.push(request, front=True)
        else:
            model.line.push_returned(request, now)
        return self._give_up_on(model, now)

    def _try_again(self, request: Request, leg: Leg, event: LegEnded) -> list[Effect]:
        """The leg has failed: the request has its turn again at once, or when the engine says, or it is given up."""
        request.cut_for = None
        release_owed(self._books.models[request.model].line, request)
        request.tried.add(leg.worker.view.id)
        if event.cause != "unreachable":
            request.num_attempts += 1
        advice = self._pause_after(request, event)
        if request.num_attempts >= self.limits.attempts or advice > self.limits.max_retry_after:
            return self._fall_back(request, event.now, Reject(request.id, why="failed", retry_after=event.retry_after))
        request.not_before = event.now + advice
        if event.cause != "unreachable" or request.deadline == FOREVER:
            # else it has waited all the while, and tries without end have to end
            request.deadline = event.now + request.queue_timeout
        return self._enqueue(request, event.now, has_returned=True)

    def _pause_after(self, request: Request, event: LegEnded) -> float:
        """Return how long the request stays away: as the engine says, else a little if all workers are busy."""
        if event.retry_after is not None or event.cause != "busy":
            return event.retry_after or 0.0
        workers = self._books.models[request.model].workers
        if any(worker.view.is_ready and worker.view.id not in request.tried for worker in workers):
            return 0.0
        return BUSY_PAUSE_S * 2.0 ** (request.num_attempts - 1)

    # Waiting

    def _enqueue(self, request: Request, now: float, *, has_returned: bool = False) -> list[Effect]:
        """Start the request if a worker has room and nobody waits before it; queue it otherwise."""
        model = self._books.models[request.model]
        line = model.line
        if not has_returned:
            request.deadline = now + request.queue_timeout
        request.waits_since = now
        may_begin = not len(line) or request.target is not None
        if may_begin and (start := self._try_start(model, request, now)) is not None:
            return [start]
        if not model.has_hope:
            return self._fall_back(request, now, Reject(request.id, why="no_healthy_worker", retry_after=1.0))
        if has_returned:
            line.push_returned(request, now)
        elif len(line) >= self.limits.queue or request.account.num_waiting >= self.limits.queue_per_tenant:
            return self._fall_back(request, now, Reject(request.id, why="queue_full", retry_after=1.0))
        else:
            line.push(request)
        self._books.wake(request.deadline, request.model, request.id)
        if request.not_before > now:
            self._books.wake(request.not_before, request.model)
        return self._decide(model, now)

    def _fall_back(self, request: Request, now: float, otherwise: Reject) -> list[Effect]:
        """Queue the request for its next model; without one, or with a part of its answer given, end it as told."""
        if request.is_committed or request.model_index + 1 >= len(request.models):
            self._books.forget(request, now)
            return [otherwise]
        self._books.drop_target(request)
        release_owed(self._books.models[request.model].line, request)
        account = request.account
        self._books.models[request.model].line.depart(request, request.spent, now)
        request.model_index += 1
        request.num_attempts = 0
        request.not_before = 0.0
        request.charged = None
        request.is_settled = False
        request.spent = request.earned = request.delivered = 0
        model = self._books.model(request.model)
        request.account = model.line.account(account.tenant, request.weight)
        model.line.arrive(request)
        return self._enqueue(request, now)

    def _expire(self, request: Request, now: float) -> list[Effect]:
        """The request has waited as long as it may."""
        model = self._books.models[request.model]
        model.line.remove(request)
        has_worker = any(worker.view.is_ready for worker in model.workers)
        why: Why = "queue_timeout" if has_worker else "no_healthy_worker"
        return self._fall_back(request, now, Reject(request.id, why=why, retry_after=1.0))

    def _give_up_on(self, model: Model, now: float) -> list[Effect]:
        """End all that wait for a model when its last worker is gone for good."""
        effects: list[Effect] = []
        if not len(model.line) or model.has_hope:
            return effects
        for waiting in model.line.waiting():
            request = self._books.requests[waiting.id]
            model.line.remove(request)
            reject = Reject(request.id, why="no_healthy_worker", retry_after=1.0)
            effects += self._fall_back(request, now, reject)
        return effects

    # Decisions

    def _decide(self, model: Model, now: float) -> list[Effect]:
        """Give free slots to who had its turn already, to what drains, to who waits; then see whom a slot should be
        taken from, and what should move."""
        effects: list[Effect] = []
        line = model.line
        line.come_forward()
        if model.draining and model.with_room:
            while line.num_had_turn and self._start_first(model, now, effects):
                pass
            effects += drain(model, self._decisions, now)
        while self._start_first(model, now, effects):
            pass
        if line.num_in_turn:
            effects += take_slots(model, self._decisions, now)
        elif len(model.workers) > 1 and model.with_room and not len(line):
            effects += migrate(model, self._decisions, now)
        return effects

    def _start_first(self, model: Model, now: float, effects: list[Effect]) -> bool:
        """Start who is first in line; return False if nobody is, or there is no room for it."""
        line = model.line
        if not (model.with_room or model.num_held) or not len(line) or (turn := line.first(now)) is None:
            return False
        request = self._books.requests[turn.id]
        if not model.with_room and request.target is None:
            return any(self._start_on_target(model, returned, now, effects) for returned in line.returned())
        start = self._try_start(model, request, now)
        if start is None:
            if request.place is Place.TURN and able_workers(model, now):  # it waits for better
                line.stand_back(request)
                return True
            return request.place is Place.FOLLOWING
        effects.append(start)
        return True

    def _start_on_target(self, model: Model, turn: Waiting, now: float, effects: list[Effect]) -> bool:
        """Start a request that a slot is kept for, whoever stands before it: no other may have that slot."""
        request = self._books.requests[turn.id]
        if request.target is None or (start := self._try_start(model, request, now)) is None:
            return False
        effects.append(start)
        return True

    # Starting

    def _try_start(self, model: Model, request: Request, now: float) -> Start | None:
        if now < request.not_before:
            return None
        worker = worker_for(self._books, model, request, now)
        if worker is None or must_follow(model, request, worker):
            return None
        return self._start(model, request, worker, now)

    def _start(self, model: Model, request: Request, worker: WorkerState, now: float) -> Start:
        self._note_start(request, worker, now)
        model.line.serve(request)
        leg = Leg(LegId(f"{request.id}/{request.num_legs}"), request, worker, now)
        request.num_legs += 1
        self._books.hold(leg)
        charge_prompt(model.line, request)
        return Start(
            leg=leg.id, request=request.id, worker=worker.view.id, model=request.model, attempt=request.num_legs
        )

    def _note_start(self, request: Request, worker: WorkerState, now: float) -> None:
        """Remember why the request starts, if that is worth telling."""
        if request.place is Place.NOWHERE and not request.num_legs:
            return
        kind: Kind = "started"
        if request.num_legs:
            kind = "recovered" if request.cut_for is None else "resumed"
            if kind == "recovered" and request.is_committed:
                self._books.models[request.model].num_recovered += 1
        since = now - request.waits_since
        tenant = request.account.tenant
        self._decisions.add(
            Decision(at=now, kind=kind, request=request.id, tenant=tenant, worker=worker.view.id, seconds=since)
        )
