"""Stands in for the dispatcher: feeds a scheduler by hand, and objects to every effect that breaks a rule."""

from collections import Counter
from collections.abc import Mapping

from core.chat import Prefix, Role
from core.ids import LegId, ModelName, RequestId, TenantId, WorkerId
from routing.fairness.account import Place
from routing.fairness.policy import Fairness
from routing.fairness.preemption import PER_DECISION, PER_WORKER
from routing.fairness.programs import run_ends_at
from routing.scheduler import (
    BUSY_PAUSE_S,
    Abort,
    Cancel,
    Cause,
    CutFor,
    Effect,
    Event,
    FirstToken,
    LegEnded,
    Limits,
    Reject,
    Scheduler,
    Stalled,
    Start,
    Submit,
    Tick,
    Tokens,
    Worker,
    WorkerView,
)
from routing.scheduler.state import FOREVER, Request, WorkerState

LIMITS = Limits()
M = ModelName("m")
_DEFAULT = Fairness()


class World:
    """What the scheduler has been told, what it said, and what must be true in between."""

    def __init__(
        self, *views: WorkerView, limits: Limits = LIMITS, fairness: Fairness | Mapping[ModelName, Fairness] = _DEFAULT
    ) -> None:
        self.limits = limits
        self.checks_always = True
        self.fairness = {M: fairness} if isinstance(fairness, Fairness) else fairness
        self.scheduler = Scheduler(limits, self.fairness)
        self.now = 100.0
        self.events: list[Event] = []
        self.effects: list[list[Effect]] = []
        self.views: dict[WorkerId, WorkerView] = {}
        self.requests: dict[RequestId, Submit] = {}
        self.running: dict[LegId, Start] = {}
        self.committed: set[RequestId] = set()
        self.cuts: dict[LegId, CutFor] = {}
        self.ran: Counter[LegId] = Counter()
        self.stalled: set[LegId] = set()
        self.delivered: Counter[RequestId] = Counter()
        self.may_go_on: set[RequestId] = set()
        self.num_cuts = 0
        self._most_slots: Counter[WorkerId] = Counter()
        self._claimants: dict[RequestId, ModelName] = {}
        self._is_kept_for: RequestId | None = None
        self.cancelled: set[RequestId] = set()
        self.ended: dict[RequestId, str] = {}
        self._not_before: dict[tuple[RequestId, ModelName], float] = {}
        self._attempts: Counter[tuple[RequestId, ModelName]] = Counter()
        self._model_index: dict[RequestId, int] = {}
        self._tried: dict[RequestId, set[WorkerId]] = {}
        for view in views:
            self.worker(view)

    # Events

    def submit(
        self,
        request: str,
        tenant: str = "t",
        *models: str,
        tokens: int = 10,
        timeout: float = 30.0,
        prompt: int = 0,
        pinned: bool = True,
        rank: int = 0,
        program: str = "",
        weight: float = 1.0,
        role: Role | None = None,
        prefixes: tuple[Prefix, ...] = (),
        deadline: float | None = None,
        urgent: bool = False,
    ) -> list[Effect]:
        event = Submit(
            request=RequestId(request),
            tenant=TenantId(tenant),
            models=tuple(ModelName(model) for model in models) or (ModelName("m"),),
            tokens_estimate=tokens,
            queue_timeout=timeout,
            now=self.now,
            rank=rank,
            prompt_tokens=prompt,
            weight=weight,
            program=program,
            is_pinned=pinned,
            role=role,
            prefixes=prefixes,
            deadline_s=deadline,
            is_urgent=urgent,
        )
        self.requests[event.request] = event
        return self.feed(event)

    def end(
        self,
        leg: str,
        cause: Cause = "done",
        retry_after: float | None = None,
        *,
        can_resume: bool = False,
        prefilled: int | None = None,
    ) -> list[Effect]:
        start = self.running.pop(LegId(leg))
        request = start.request
        was_cut = self.cuts.pop(start.leg, None) is not None and cause == "aborted"
        self.may_go_on.discard(request)
        if can_resume and not self.requests[request].is_pinned:
            self.may_go_on.add(request)
        if not was_cut:
            if cause != "unreachable":
                self._attempts[request, start.model] += 1
            self._tried.setdefault(request, set()).add(start.worker)
        pause = retry_after if retry_after is not None else self._busy_pause(start) if cause == "busy" else 0.0
        self._not_before[request, start.model] = self.now + (0.0 if was_cut else pause)
        if cause == "done" or request in self.cancelled:
            self._end(request, "leg")
        return self.feed(
            LegEnded(
                leg=start.leg,
                cause=cause,
                now=self.now,
                retry_after=retry_after,
                can_resume=can_resume,
                prefilled=prefilled,
            )
        )

    def let_go(self) -> list[Effect]:
        """End every leg that has been told to, as an engine does that lets go at once."""
        effects: list[Effect] = []
        for leg in list(self.cuts):
            effects += self.end(leg, "aborted", can_resume=True)
        return effects

    def _busy_pause(self, start: Start) -> float:
        ready = {view.id for view in self.views.values() if view.model == start.model and view.is_ready}
        if ready - self._tried[start.request]:
            return 0.0
        return BUSY_PAUSE_S * 2.0 ** (self._attempts[start.request, start.model] - 1)

    def first_token(self, leg: str, prefilled: int | None = None) -> list[Effect]:
        self.committed.add(self.running[LegId(leg)].request)
        is_followed = bool(self.scheduler._books.legs[LegId(leg)].followers)
        effects = self.feed(FirstToken(leg=LegId(leg), now=self.now, prefilled=prefilled))
        assert is_followed or not effects
        return effects

    def tokens(self, leg: str, num: int) -> list[Effect]:
        self.ran[LegId(leg)] += num
        self.delivered[self.running[LegId(leg)].request] += num
        return self.feed(Tokens(leg=LegId(leg), num=num, now=self.now))

    def stall(self, leg: str) -> list[Effect]:
        self.stalled.add(LegId(leg))
        return self.feed(Stalled(leg=LegId(leg), now=self.now))

    def cancel(self, request: str) -> list[Effect]:
        name = RequestId(request)
        if name not in self.ended and name not in self.cancelled:
            self.cancelled.add(name)
            if all(start.request != name for start in self.running.values()):
                self._end(name, "cancel")
        return self.feed(Cancel(request=name, now=self.now))

    def worker(self, view: WorkerView) -> list[Effect]:
        self.views[view.id] = view
        self._most_slots[view.id] = max(self._most_slots[view.id], view.max_inflight)
        return self.feed(Worker(view=view, now=self.now))

    def advance(self, seconds: float) -> list[Effect]:
        self.now += seconds
        return self.feed(Tick(now=self.now))

    def feed(self, event: Event) -> list[Effect]:
        self.events.append(event)
        self._is_kept_for = self._finds_kept(event)
        effects = self.scheduler.on(event)
        self.effects.append(effects)
        preempted = Counter(
            self.running[effect.leg].model
            for effect in effects
            if isinstance(effect, Abort) and effect.why == "preempted" and effect.leg not in self.stalled
        )
        assert all(num <= PER_DECISION for num in preempted.values())
        for effect in effects:
            self._take(effect)
        if self.checks_always:
            self.check()
        return effects

    def _finds_kept(self, event: Event) -> RequestId | None:
        """Return the request that comes just now, if a slot is kept for its run: it was freed for nobody else."""
        if isinstance(event, Submit) and event.role is not None:
            kept = self.scheduler._books._kept.get((event.tenant, event.program))
            if kept is not None and kept.model == event.models[0]:
                return event.request
        return None

    # Rules of effects

    def _take(self, effect: Effect) -> None:
        match effect:
            case Start():
                self._start(effect)
            case Abort():
                self._cut(effect)
            case Reject():
                assert effect.request not in self.cancelled
                assert all(start.request != effect.request for start in self.running.values())
                self._end(effect.request, effect.why)

    def _cut(self, abort: Abort) -> None:
        start = self.running[abort.leg]
        assert abort.leg not in self.cuts
        assert (abort.why == "cancelled") == (start.request in self.cancelled)
        self.cuts[abort.leg] = abort.why
        if abort.why == "cancelled":
            return
        self.num_cuts += 1
        if abort.why == "preempted":
            for request in self.waiting:
                known = self.scheduler._books.requests.get(request)
                if known is not None and known.place is Place.CLAIMING and known.model == start.model:
                    self._claimants[request] = start.model
        assert not self.requests[start.request].is_pinned
        pending = [leg for leg, why in self.cuts.items() if self.running[leg].worker == start.worker]
        assert sum(self.cuts[leg] != "cancelled" for leg in pending) <= PER_WORKER
        if abort.why in {"drained", "migrated"}:
            target = self.scheduler._books.requests[start.request].target
            assert target is not None, "nowhere to go on"
            assert target.view.id != start.worker
        if abort.why != "drained" and abort.leg not in self.stalled:
            assert self.ran[abort.leg] >= self.fairness.get(start.model, _DEFAULT).quantum
            assert not self.views[start.worker].is_draining

    def _start(self, start: Start) -> None:
        request = start.request
        view = self.views[start.worker]
        assert request not in self.ended
        assert request not in self.committed or request in self.may_go_on
        assert request not in self.cancelled
        assert start.leg not in self.running
        assert all(other.request != request for other in self.running.values())
        known = self.scheduler._books.requests
        claimants = [
            one
            for one, model in self._claimants.items()
            if model == start.model and one in self.waiting and known[one].model == model
        ]
        is_kept = request == self._is_kept_for
        assert not claimants or request in claimants or is_kept, "a slot that was freed for another"
        self._claimants.pop(request, None)
        assert view.is_ready
        assert not view.is_draining
        assert view.model == start.model
        assert self.num_running(start.worker) < view.max_inflight
        assert self._attempts[request, start.model] < self.limits.attempts
        assert self.now >= self._not_before.get((request, start.model), 0.0)
        index = self.requests[request].models.index(start.model)
        assert index >= self._model_index.get(request, 0)
        self._model_index[request] = index
        self.running[start.leg] = start

    def _end(self, request: RequestId, how: str) -> None:
        assert request in self.requests
        assert request not in self.ended
        self.ended[request] = how

    # What holds between events

    def check(self) -> None:
        models = {view.model for view in self.views.values()}
        assert sum(self.scheduler.num_waiting(model) for model in models) == len(self.waiting)
        slots: Counter[ModelName] = Counter()
        for view in self.views.values():
            slots[view.model] += self._most_slots[view.id]
        for model in models:
            assert self.scheduler.num_waiting(model) <= self.limits.queue + slots[model]
        for worker in self.views:
            assert self.scheduler.num_running(worker) == self.num_running(worker)
            assert self.scheduler._books.workers[worker].num_cutting == sum(
                why != "cancelled" and self.running[leg].worker == worker for leg, why in self.cuts.items()
            )
            self._check_tokens(worker)
        self._check_wakeup()

    def _check_tokens(self, worker: WorkerId) -> None:
        outstanding = self.scheduler._books.workers[worker].outstanding
        most = sum(self.requests[s.request].tokens_estimate for s in self.running.values() if s.worker == worker)
        assert 0 <= outstanding <= most

    def _check_wakeup(self) -> None:
        deadlines = [self.scheduler._books.requests[request].deadline for request in self.waiting]
        deadlines = [deadline for deadline in deadlines if deadline < FOREVER]
        if deadlines:
            wakeup = self.scheduler.next_wakeup()
            assert wakeup is not None
            assert wakeup <= min(deadlines)

    def check_work_conserving(self) -> None:
        """Call when no wake-up is overdue."""
        for request in self.waiting:
            state = self.scheduler._books.requests[request]
            for view in self.views.values():
                worker = self.scheduler._books.workers[view.id]
                is_able = view.model == state.model and worker.room > 0 and worker.breaker.allows(self.now)
                if state.place is Place.FOLLOWING:
                    assert any(state in leg.followers for leg in self.scheduler._books.legs.values())
                    continue
                if not is_able or self.now < state.not_before:
                    continue
                assert self._has_reason(state, worker), f"{request} waits, and {view.id} has room"

    def _has_reason(self, waits: Request, worker: WorkerState) -> bool:
        """Whether a call of a run that has never run may wait all the same: for its tenant's runs there that end
        before it, or for a worker that holds much more of its prompt."""
        fairness = self.fairness_of(waits.model)
        if waits.role is None or waits.num_legs or fairness.policy == "fcfs":
            return False
        ends_at = run_ends_at(waits, waits.role)
        beside = [leg.request for leg in worker.legs.values() if leg.request.account is waits.account]
        earlier = [run_ends_at(one, one.role) < ends_at for one in beside if one.role and one.program != waits.program]
        kept = [
            kept.worker is worker and tenant == waits.account.tenant and kept.ends_at < ends_at
            for (tenant, _), kept in self.scheduler._books._kept.items()
        ]
        if fairness.focus and any(earlier + kept):
            return True
        saved = worker.warmth.saved(waits.prefixes)
        workers = self.scheduler._books.models[waits.model].workers
        return fairness.affinity and any(other.warmth.saved(waits.prefixes) - saved >= 256 for other in workers)

    def fairness_of(self, model: ModelName) -> Fairness:
        return self.scheduler._books.fairness_of(model)

    # Views

    @property
    def waiting(self) -> set[RequestId]:
        return self.requests.keys() - self.ended.keys() - {start.request for start in self.running.values()}

    def num_running(self, worker: WorkerId) -> int:
        return sum(start.worker == worker for start in self.running.values())

    def place(self, request: str) -> Place:
        return self.scheduler._books.requests[RequestId(request)].place

    def legs(self) -> list[LegId]:
        return list(self.running)


def starts(effects: list[Effect]) -> list[tuple[str, str]]:
    """Return (request, worker) of every start among the effects."""
    return [(effect.request, effect.worker) for effect in effects if isinstance(effect, Start)]


def aborts(effects: list[Effect]) -> list[tuple[str, str]]:
    """Return (leg, why) of every leg that is cut by the effects."""
    return [(effect.leg, effect.why) for effect in effects if isinstance(effect, Abort)]


def rejects(effects: list[Effect]) -> list[tuple[str, str]]:
    """Return (request, why) of every rejection among the effects."""
    return [(effect.request, effect.why) for effect in effects if isinstance(effect, Reject)]
