"""The machine itself: one handler per event, and the few decisions that they end in."""

import heapq
import itertools
from collections.abc import Mapping
from typing import Literal, assert_never

import msgspec

from core.ids import LegId, ModelName, RequestId, WorkerId
from routing.breaker import Breaker
from routing.fairness.account import MILLI, Place
from routing.fairness.credit import allowance
from routing.fairness.policy import Fairness
from routing.fairness.preemption import PER_DECISION, choose_victim
from routing.placement import Candidate, choose
from routing.scheduler.decisions import Decision, Decisions, FairnessView, Kind, TenantView
from routing.scheduler.effects import Abort, CutFor, Effect, Reject, Start, Why
from routing.scheduler.events import (
    Adopt,
    Cancel,
    Event,
    FirstToken,
    LegEnded,
    Submit,
    Tick,
    Tokens,
    Worker,
    WorkerView,
)
from routing.scheduler.moving import best_move, leg_to_drain, roomiest
from routing.scheduler.state import FOREVER, Leg, Model, Request, WorkerState

BUSY_PAUSE_S = 0.1
"""How long a request first stays away from a model whose engine is busy and does not say for how long."""

Moved = Literal["migrated", "drained"]

_DEFAULT = Fairness()


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
        self._fairness: Mapping[ModelName, Fairness] = fairness or {}
        self._requests: dict[RequestId, Request] = {}
        self._legs: dict[LegId, Leg] = {}
        self._workers: dict[WorkerId, WorkerState] = {}
        self._models: dict[ModelName, Model] = {}
        self._wakeups: list[tuple[float, int, ModelName, RequestId | None]] = []
        self._order = itertools.count()  # keeps the heap from comparing what has no order
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
        return self._fairness

    @fairness.setter
    def fairness(self, fairness: Mapping[ModelName, Fairness]) -> None:
        self._fairness = fairness
        for name, model in self._models.items():
            model.line.fairness = fairness.get(name, _DEFAULT)

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
        state = self._models.get(model)
        return len(state.line) if state is not None else 0

    def num_running(self, worker: WorkerId) -> int:
        """Return how many legs hold a slot of the worker."""
        state = self._workers.get(worker)
        return state.num_running if state is not None else 0

    def is_tripped(self, worker: WorkerId) -> bool:
        """Return whether the worker has failed so often that it is given no work, or one request on trial."""
        state = self._workers.get(worker)
        return state is not None and state.breaker.open_until is not None

    def explain(self, request: RequestId) -> tuple[Decision, ...]:
        """Return what was decided about the request and why, oldest first, as far as it is remembered."""
        return self._decisions.of(request)

    def waste_left(self, model: ModelName) -> float | None:
        """Return how many tokens may be computed again by choice; None if the model's policy never chooses to."""
        state = self._models.get(model)
        if self._fairness.get(model, _DEFAULT).policy != "vtc-pc":
            return None
        return state.line.waste.left if state is not None else 0.0

    def fairness_view(self, model: ModelName) -> FairnessView:
        """Return the model's live values. Costs O(tenants): it is for people."""
        state = self._models.get(model) or Model(model, self._fairness.get(model, _DEFAULT))
        line = state.line
        virtual = line.turns.base()
        return FairnessView(
            model=model,
            policy=line.fairness.policy,
            virtual=virtual / MILLI,
            tenants=tuple(
                TenantView(
                    tenant=account.tenant,
                    counter=account.counter / MILLI,
                    weight=account.weight / MILLI,
                    queued=account.num_waiting,
                    running=account.num_running,
                    attained=account.attained / MILLI,
                    credit=allowance(account, virtual, line.fairness) * account.weight / MILLI**2
                    if line.fairness.policy == "vtc-pc"
                    else 0.0,
                )
                for account in line.accounts.values()
            ),
            queued=len(line),
            waste_left=line.waste.left,
            useful_tokens=line.waste.useful,
            wasted_tokens=line.waste.wasted,
            lost_tokens=line.waste.lost,
            reserved=line.num_claiming + sum(worker.num_held for worker in state.workers),
            preemptions=line.num_preempted,
            migrations=state.num_migrated,
            drained=state.num_drained,
            recovered=state.num_recovered,
        )

    # Events

    def _on_submit(self, event: Submit) -> list[Effect]:
        model = self._model(event.models[0])
        account = model.line.account(event.tenant, event.weight)
        request = Request(event, account, next(self._arrivals))
        self._requests[request.id] = request
        model.line.arrive(request)
        return self._enqueue(request, event.now)

    def _on_tokens(self, event: Tokens) -> list[Effect]:
        leg = self._legs.get(event.leg)
        if leg is None:
            return []
        num = event.num
        if not leg.has_begun:
            self._begin(leg)
        leg.deliver(num)
        leg.ran += num
        request = leg.request
        request.delivered += num
        model = self._models[request.model]
        line = model.line
        amount = num * line.output_price
        request.spent += amount
        request.account.charge(amount)
        line.waste.earn(num, line.fairness)
        return self._preempt(model, event.now) if line.num_in_turn else []

    def _on_first_token(self, event: FirstToken) -> list[Effect]:
        leg = self._legs.get(event.leg)
        if leg is None:
            return []
        request = leg.request
        request.is_committed = True
        if leg.first_at is None:
            leg.first_at = event.now
            self._begin(leg)
            if not request.earned and not leg.resumed:
                self._earn(request, request.charged or 0)
        if event.prefilled is not None:
            self._settle_prefill(leg, event.prefilled)
        return []

    def _begin(self, leg: Leg) -> None:
        """The leg's prompt is done."""
        leg.has_begun = True
        leg.deliver(leg.context)

    def _on_leg_ended(self, event: LegEnded) -> list[Effect]:
        leg = self._legs.pop(event.leg, None)
        if leg is None:
            return []
        request, worker = leg.request, leg.worker
        model = self._models[request.model]
        self._release(model, leg)
        if event.prefilled is not None:
            self._settle_prefill(leg, event.prefilled)
        elif leg.resumed and leg.has_begun and not leg.is_told:  # nor will it be
            self._pay(leg, worker.resume_cost.tokens(leg.context, is_home=leg.is_home))
        if leg.first_at is not None and leg.ran > 1:
            worker.pace.observe_step((leg.load + worker.num_running + 1) / 2, (event.now - leg.first_at) / leg.ran)
        self._judge(leg, event)
        effects = self._after_leg(request, leg, event)
        effects += self._decide(self._models[worker.view.model], event.now)
        return effects

    def _on_cancel(self, event: Cancel) -> list[Effect]:
        request = self._requests.get(event.request)
        if request is None or request.is_cancelled:
            return []
        request.is_cancelled = True
        leg = request.leg
        if leg is None:
            self._forget(request, event.now)
            return []
        if leg.cut_for is not None:  # it is being cut already
            return []
        return [self._cut(leg, "cancelled")]

    def _on_worker(self, event: Worker) -> list[Effect]:
        view = event.view
        worker = self._workers.get(view.id)
        model = self._model(view.model)
        if worker is None:
            worker = self._workers[view.id] = WorkerState(view)
            model.workers.append(worker)
        elif view.model != worker.view.model:  # an operator has given the id to another model's worker
            former = self._models[worker.view.model]
            former.workers.remove(worker)
            former.with_room.pop(view.id, None)
            model.workers.append(worker)
            worker.breaker = Breaker()
        elif view.incarnation != worker.view.incarnation:
            worker.breaker = Breaker()
        worker.view = view
        model.refresh(worker)
        effects = self._decide(model, event.now)
        return effects + self._give_up_on(model, event.now)

    def _on_tick(self, event: Tick) -> list[Effect]:
        effects: list[Effect] = []
        models: dict[ModelName, None] = {}
        while self._wakeups and self._wakeups[0][0] <= event.now:
            _, _, model, request_id = heapq.heappop(self._wakeups)
            request = self._requests.get(request_id) if request_id is not None else None
            if request is None and request_id is not None:
                continue  # as in ``next_wakeup``, which may have been asked or not: that must not change what happens
            models[model] = None
            if request is not None and request.leg is None and event.now >= request.deadline:
                effects += self._expire(request, event.now)
        for model in models:
            effects += self._decide(self._models[model], event.now)
        return effects

    def _on_adopt(self, event: Adopt) -> list[Effect]:
        submit = event.submit
        if (known := self._requests.get(submit.request)) is not None:
            self._disown(known, event.now)
        model = self._model(submit.models[0])
        account = model.line.account(submit.tenant, submit.weight)
        request = Request(submit, account, next(self._arrivals))
        request.arrived_at = event.now - event.waited
        request.deadline = request.arrived_at + submit.queue_timeout
        request.num_legs = event.num_legs
        request.num_attempts = event.num_attempts
        request.is_committed = event.is_committed
        request.delivered = event.num_tokens
        request.charged = submit.prompt_tokens if event.num_legs else None
        self._requests[request.id] = request
        model.line.arrive(request)
        if event.leg is None or event.worker is None:
            return self._enqueue(request, event.now, has_returned=True)
        worker = self._workers.get(event.worker)
        if worker is None:  # it is heard of later; until then it only holds the leg
            view = WorkerView(event.worker, submit.models[0], is_ready=False, is_healthy=False, may_return=True,
                              max_inflight=0)  # fmt: skip
            worker = self._workers[view.id] = WorkerState(view)
            model.workers.append(worker)
        leg = Leg(event.leg, request, worker, event.now)
        self._hold(model, leg)
        if event.cut_for is not None:
            request.is_cancelled = event.cut_for == "cancelled"
            self._cut(leg, event.cut_for)
        return []

    def _disown(self, request: Request, now: float) -> None:
        if request.leg is not None:
            leg = self._legs.pop(request.leg.id)
            self._release(self._models[request.model], leg)
        self._forget(request, now)

    # After a leg

    def _release(self, model: Model, leg: Leg) -> None:
        """Give back what the leg held."""
        request, worker = leg.request, leg.worker
        worker.num_running -= 1
        worker.outstanding -= leg.outstanding
        del worker.legs[leg.id]
        self._models[worker.view.model].refresh(worker)
        request.leg = None
        request.home = (worker.view.id, worker.view.incarnation) if leg.breaker is worker.breaker else None
        request.account.num_running -= 1
        if not request.is_pinned:
            legs = model.cuttable[request.account]
            del legs[leg.id]
            if not legs:
                del model.cuttable[request.account]
        if leg.cut_for == "cancelled":
            model.line.num_leaving -= 1
        elif leg.cut_for is not None:
            worker.num_cutting -= 1

    def _settle_prefill(self, leg: Leg, prefilled: int) -> None:
        """The engine tells what it computed for the leg's prompt: settle who pays, and learn from it."""
        if leg.is_told:
            return
        leg.is_told = True
        request = leg.request
        line = self._models[request.model].line
        if leg.first_at is not None:
            leg.worker.pace.observe_prefill(prefilled, leg.first_at - leg.started_at)
        if leg.resumed:
            leg.worker.resume_cost.observe(leg.context, prefilled, is_home=leg.is_home)
            self._pay(leg, prefilled)
        elif not request.is_settled:
            request.is_settled = True
            assert request.charged is not None
            amount = (prefilled - request.charged) * line.prompt_price
            request.charged = prefilled
            request.spent += amount
            request.account.charge(amount)
            line.turns.changed(request.account)
            self._earn(request, prefilled)

    def _pay(self, leg: Leg, tokens: int) -> None:
        """So many tokens were computed again for a leg that goes on: by our choice, or because a worker failed."""
        waste = self._models[leg.request.model].line.waste
        self._release_owed(leg.request)
        if leg.goes_on_after in {"preempted", "migrated"}:
            waste.spend(tokens)
        else:
            waste.lost += tokens

    def _release_owed(self, request: Request) -> None:
        """What was held for the request is known now, or will never be."""
        self._models[request.model].line.waste.held -= request.owed
        request.owed = 0

    def _earn(self, request: Request, tokens: int) -> None:
        """That many tokens of the request's prompt were of use."""
        line = self._models[request.model].line
        line.waste.earn(tokens - request.earned, line.fairness)
        request.earned = tokens

    def _judge(self, leg: Leg, event: LegEnded) -> None:
        """Tell the breaker how the leg ended, if the worker had a part in it."""
        match event.cause:
            case "done" | "refused":
                leg.breaker.on_success()
            case "lost" | "unreachable" | "broken" | "timed_out":
                leg.breaker.on_failure(event.now, was_trial=leg.is_trial)
                if leg.breaker.open_until is not None:
                    self._wake(leg.breaker.open_until, leg.worker.view.model)
            case "busy" | "hurried" | "aborted":
                leg.breaker.on_inconclusive(was_trial=leg.is_trial)
            case _:
                assert_never(event.cause)

    def _after_leg(self, request: Request, leg: Leg, event: LegEnded) -> list[Effect]:
        if request.is_cancelled or event.cause == "done":
            self._forget(request, event.now)
            return []
        may_go_on = not request.is_committed or (event.can_resume and not request.is_pinned)
        was_cut = leg.cut_for is not None and event.cause == "aborted"
        if not may_go_on or event.cause == "refused" or (event.cause == "aborted" and not was_cut):
            self._forget(request, event.now)
            return [Reject(request=request.id, why="failed", retry_after=event.retry_after)]
        if was_cut:
            return self._come_back(request, leg, event.now)
        self._drop_target(request)
        return self._try_again(request, leg, event)

    def _come_back(self, request: Request, leg: Leg, now: float) -> list[Effect]:
        """The leg was cut by our choice: the request waits to go on, and has no deadline."""
        model = self._models[request.model]
        request.cut_for = leg.cut_for
        request.deadline = FOREVER if request.is_committed else now + request.queue_timeout
        self._wake(request.deadline, request.model, request.id)
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
        self._release_owed(request)
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
        workers = self._models[request.model].workers
        if any(worker.view.is_ready and worker.view.id not in request.tried for worker in workers):
            return 0.0
        return BUSY_PAUSE_S * 2.0 ** (request.num_attempts - 1)

    # Waiting

    def _enqueue(self, request: Request, now: float, *, has_returned: bool = False) -> list[Effect]:
        """Start the request if a worker has room and nobody waits before it; queue it otherwise."""
        model = self._models[request.model]
        line = model.line
        if not has_returned:
            request.deadline = now + request.queue_timeout
        request.waits_since = now
        if not len(line) and (start := self._try_start(model, request, now)) is not None:
            return [start]
        if not model.has_hope:
            return self._fall_back(request, now, Reject(request.id, why="no_healthy_worker", retry_after=1.0))
        if has_returned:
            line.push_returned(request, now)
        elif len(line) >= self.limits.queue or request.account.num_waiting >= self.limits.queue_per_tenant:
            return self._fall_back(request, now, Reject(request.id, why="queue_full", retry_after=1.0))
        else:
            line.push(request)
        self._wake(request.deadline, request.model, request.id)
        if request.not_before > now:
            self._wake(request.not_before, request.model)
        return self._decide(model, now)

    def _fall_back(self, request: Request, now: float, otherwise: Reject) -> list[Effect]:
        """Queue the request for its next model; without one, or with a part of its answer given, end it as told."""
        if request.is_committed or request.model_index + 1 >= len(request.models):
            self._forget(request, now)
            return [otherwise]
        self._drop_target(request)
        self._release_owed(request)
        account = request.account
        self._models[request.model].line.depart(request, request.spent, now)
        request.model_index += 1
        request.num_attempts = 0
        request.not_before = 0.0
        request.charged = None
        request.is_settled = False
        request.spent = request.earned = request.delivered = 0
        model = self._model(request.model)
        request.account = model.line.account(account.tenant, request.weight)
        model.line.arrive(request)
        return self._enqueue(request, now)

    def _expire(self, request: Request, now: float) -> list[Effect]:
        """The request has waited as long as it may."""
        model = self._models[request.model]
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
            request = self._requests[waiting.id]
            model.line.remove(request)
            reject = Reject(request.id, why="no_healthy_worker", retry_after=1.0)
            effects += self._fall_back(request, now, reject)
        return effects

    # Decisions

    def _decide(self, model: Model, now: float) -> list[Effect]:
        """Start who waits while there is room; then see whom a slot should be taken from, and what should move."""
        effects: list[Effect] = []
        while (model.with_room or model.num_held) and len(model.line) and (turn := model.line.first(now)) is not None:
            request = self._requests[turn.id]
            if not model.with_room and request.target is None:
                break
            start = self._try_start(model, request, now)
            if start is None:
                break
            effects.append(start)
        if model.line.num_in_turn:
            effects += self._preempt(model, now)
        elif len(model.workers) > 1 and model.with_room and not len(model.line):
            effects += self._move(model, now)
        return effects

    def _preempt(self, model: Model, now: float) -> list[Effect]:
        """Take slots for tenants that are behind from those that are ahead, if that is worth it."""
        line = model.line
        fairness = line.fairness
        if (
            fairness.policy != "vtc-pc"
            or now < line.may_preempt_at
            or line.num_leaving  # a slot comes free without it
            or not line.waste.has_budget(fairness)
            or not model.cuttable
        ):
            return []
        effects: list[Effect] = []
        for _ in range(PER_DECISION):
            claimant = line.first_in_turn(now)
            if claimant is None or not line.waste.has_budget(fairness):
                break
            line.may_preempt_at = now + fairness.interval
            found = choose_victim(claimant.account, model.cuttable, fairness)
            if found is None:
                break
            leg, cost = found
            line.num_preempted += 1
            leg.request.num_cuts += 1
            self._decisions.add(
                Decision(
                    at=now,
                    kind="preempted",
                    request=leg.request.id,
                    tenant=leg.request.account.tenant,
                    worker=leg.worker.view.id,
                    other=claimant.id,
                    other_tenant=claimant.account.tenant,
                    behind=(leg.request.account.counter - claimant.account.counter) // MILLI,
                    threshold=fairness.threshold,
                    cost=int(cost * fairness.prompt_price),
                )
            )
            line.claim(claimant)
            leg.request.owed = cost
            line.waste.held += cost
            effects.append(self._cut(leg, "preempted"))
        return effects

    def _move(self, model: Model, now: float) -> list[Effect]:
        """Nobody waits and there is room: empty the workers that drain, else even out the load."""
        effects: list[Effect] = []
        while (draining := leg_to_drain(model)) is not None:
            target = roomiest(model, beside=draining.worker)
            if target is None:
                return effects
            model.num_drained += 1
            effects.append(self._send(draining, target, "drained", now))
        line = model.line
        if now >= line.may_move_at and line.waste.has_budget(line.fairness):
            line.may_move_at = now + line.fairness.interval
            move = best_move(model, line.fairness.quantum)
            if move is not None:
                leg, target, gain, cost = move
                model.num_migrated += 1
                leg.request.owed = cost
                line.waste.held += cost
                effects.append(self._send(leg, target, "migrated", now, gain=gain, cost=cost))
        return effects

    def _send(
        self, leg: Leg, target: WorkerState, why: Moved, now: float, *, gain: float = 0.0, cost: int = 0
    ) -> Abort:
        """Cut the leg so that its request goes on elsewhere, and keep a slot for it there."""
        self._decisions.add(
            Decision(
                at=now,
                kind=why,
                request=leg.request.id,
                tenant=leg.request.account.tenant,
                worker=leg.worker.view.id,
                target=target.view.id,
                seconds=gain,
                cost=cost,
            )
        )
        leg.request.target = target
        target.num_held += 1
        self._models[leg.request.model].num_held += 1
        self._models[target.view.model].refresh(target)
        return self._cut(leg, why)

    def _cut(self, leg: Leg, why: CutFor) -> Abort:
        leg.cut_for = why
        if why == "cancelled":
            self._models[leg.request.model].line.num_leaving += 1
        else:
            leg.worker.num_cutting += 1
        return Abort(leg=leg.id, why=why)

    def _drop_target(self, request: Request) -> None:
        """Give free the slot that is kept for the request, if there is one."""
        target = request.target
        if target is not None:
            request.target = None
            target.num_held -= 1
            self._models[request.model].num_held -= 1
            self._models[target.view.model].refresh(target)

    # Starting

    def _try_start(self, model: Model, request: Request, now: float) -> Start | None:
        if now < request.not_before:
            return None
        target = request.target
        self._drop_target(request)
        able = [worker for worker in model.with_room.values() if worker.breaker.allows(now)]
        if not able:
            return None
        if target is not None and target in able:
            return self._start(model, request, target, now)
        home = self._workers.get(request.home[0]) if request.home is not None else None
        if home is not None and home in able and home.view.id not in request.tried and home.view.is_healthy:
            return self._start(model, request, home, now)
        if len(able) == 1:
            return self._start(model, request, able[0], now)
        chosen = choose(
            Candidate(
                worker=worker.view.id,
                outstanding_tokens=worker.outstanding,
                is_healthy=worker.view.is_healthy,
                was_tried=worker.view.id in request.tried,
            )
            for worker in able
        )
        assert chosen is not None
        return self._start(model, request, self._workers[chosen], now)

    def _start(self, model: Model, request: Request, worker: WorkerState, now: float) -> Start:
        self._note_start(request, worker, now)
        model.line.serve(request)
        leg = Leg(LegId(f"{request.id}/{request.num_legs}"), request, worker, now)
        request.num_legs += 1
        self._hold(model, leg)
        if request.charged is None:
            request.charged = request.prompt_tokens or 1  # what costs nothing would keep its turn for ever
            amount = request.charged * model.line.prompt_price
            request.spent += amount
            request.account.charge(amount)
        return Start(
            leg=leg.id, request=request.id, worker=worker.view.id, model=request.model, attempt=request.num_legs
        )

    def _hold(self, model: Model, leg: Leg) -> None:
        """Note that the leg holds a slot of its worker."""
        request, worker = leg.request, leg.worker
        request.leg = leg
        self._legs[leg.id] = leg
        worker.legs[leg.id] = leg
        worker.num_running += 1
        worker.outstanding += leg.outstanding
        model.refresh(worker)
        request.account.num_running += 1
        if not request.is_pinned:
            model.cuttable.setdefault(request.account, {})[leg.id] = leg

    def _note_start(self, request: Request, worker: WorkerState, now: float) -> None:
        """Remember why the request starts, if that is worth telling."""
        if request.place is Place.NOWHERE and not request.num_legs:
            return
        kind: Kind = "started"
        if request.num_legs:
            kind = "recovered" if request.cut_for is None else "resumed"
            if kind == "recovered" and request.is_committed:
                self._models[request.model].num_recovered += 1
        since = now - request.waits_since
        tenant = request.account.tenant
        self._decisions.add(
            Decision(at=now, kind=kind, request=request.id, tenant=tenant, worker=worker.view.id, seconds=since)
        )

    # Books

    def _model(self, name: ModelName) -> Model:
        model = self._models.get(name)
        if model is None:
            model = self._models[name] = Model(name, self._fairness.get(name, _DEFAULT))
        return model

    def _wake(self, at: float, model: ModelName, request: RequestId | None = None) -> None:
        """Ask for a tick: something of the model may start then, or the request has to be given up."""
        if at < FOREVER:
            heapq.heappush(self._wakeups, (at, next(self._order), model, request))

    def _forget(self, request: Request, now: float) -> None:
        self._drop_target(request)
        self._release_owed(request)
        line = self._models[request.model].line
        line.remove(request)
        line.depart(request, request.spent, now)
        del self._requests[request.id]
