"""Stands in for the dispatcher: feeds a scheduler by hand, and objects to every effect that breaks a rule."""

from collections import Counter

from core.ids import LegId, ModelName, RequestId, TenantId, WorkerId
from routing.scheduler import (
    BUSY_PAUSE_S,
    Abort,
    Cancel,
    Cause,
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

LIMITS = Limits()


class World:
    """What the scheduler has been told, what it said, and what must be true in between."""

    def __init__(self, *views: WorkerView, limits: Limits = LIMITS) -> None:
        self.limits = limits
        self.scheduler = Scheduler(limits)
        self.now = 100.0
        self.events: list[Event] = []
        self.effects: list[list[Effect]] = []
        self.views: dict[WorkerId, WorkerView] = {}
        self.requests: dict[RequestId, Submit] = {}
        self.running: dict[LegId, Start] = {}
        self.committed: set[RequestId] = set()
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
        self, request: str, tenant: str = "t", *models: str, tokens: int = 10, timeout: float = 30.0
    ) -> list[Effect]:
        event = Submit(
            request=RequestId(request),
            tenant=TenantId(tenant),
            models=tuple(ModelName(model) for model in models) or (ModelName("m"),),
            tokens_estimate=tokens,
            queue_timeout=timeout,
            now=self.now,
        )
        self.requests[event.request] = event
        return self.feed(event)

    def end(self, leg: str, cause: Cause = "done", retry_after: float | None = None) -> list[Effect]:
        start = self.running.pop(LegId(leg))
        request = start.request
        if cause != "unreachable":
            self._attempts[request, start.model] += 1
        self._tried.setdefault(request, set()).add(start.worker)
        pause = retry_after if retry_after is not None else self._busy_pause(start) if cause == "busy" else 0.0
        self._not_before[request, start.model] = self.now + pause
        if cause == "done" or request in self.cancelled:
            self._end(request, "leg")
        return self.feed(LegEnded(leg=start.leg, cause=cause, now=self.now, retry_after=retry_after))

    def _busy_pause(self, start: Start) -> float:
        ready = {view.id for view in self.views.values() if view.model == start.model and view.is_ready}
        if ready - self._tried[start.request]:
            return 0.0
        return BUSY_PAUSE_S * 2.0 ** (self._attempts[start.request, start.model] - 1)

    def first_token(self, leg: str) -> None:
        self.committed.add(self.running[LegId(leg)].request)
        assert self.feed(FirstToken(leg=LegId(leg), now=self.now)) == []

    def tokens(self, leg: str, num: int) -> None:
        assert self.feed(Tokens(leg=LegId(leg), num=num, now=self.now)) == []

    def cancel(self, request: str) -> list[Effect]:
        name = RequestId(request)
        if name not in self.ended and name not in self.cancelled:
            self.cancelled.add(name)
            if all(start.request != name for start in self.running.values()):
                self._end(name, "cancel")
        return self.feed(Cancel(request=name, now=self.now))

    def worker(self, view: WorkerView) -> list[Effect]:
        self.views[view.id] = view
        return self.feed(Worker(view=view, now=self.now))

    def advance(self, seconds: float) -> list[Effect]:
        self.now += seconds
        return self.feed(Tick(now=self.now))

    def feed(self, event: Event) -> list[Effect]:
        self.events.append(event)
        effects = self.scheduler.on(event)
        self.effects.append(effects)
        for effect in effects:
            self._take(effect)
        self.check()
        return effects

    # Rules of effects

    def _take(self, effect: Effect) -> None:
        match effect:
            case Start():
                self._start(effect)
            case Abort():
                assert effect.leg in self.running
            case Reject():
                assert effect.request not in self.cancelled
                assert all(start.request != effect.request for start in self.running.values())
                self._end(effect.request, effect.why)

    def _start(self, start: Start) -> None:
        request = start.request
        view = self.views[start.worker]
        assert request not in self.ended
        assert request not in self.committed
        assert request not in self.cancelled
        assert start.leg not in self.running
        assert all(other.request != request for other in self.running.values())
        assert view.is_ready
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
        slots = Counter({view.model: view.max_inflight for view in self.views.values()})
        for model in models:
            assert self.scheduler.num_waiting(model) <= self.limits.queue + slots[model]
        for worker in self.views:
            assert self.scheduler.num_running(worker) == self.num_running(worker)
            self._check_tokens(worker)
        self._check_wakeup()

    def _check_tokens(self, worker: WorkerId) -> None:
        outstanding = self.scheduler._workers[worker].outstanding
        most = sum(self.requests[s.request].tokens_estimate for s in self.running.values() if s.worker == worker)
        assert 0 <= outstanding <= most

    def _check_wakeup(self) -> None:
        deadlines = [self.scheduler._requests[request].deadline for request in self.waiting]
        if deadlines:
            wakeup = self.scheduler.next_wakeup()
            assert wakeup is not None
            assert wakeup <= min(deadlines)

    def check_work_conserving(self) -> None:
        """Call when no wake-up is overdue."""
        for request in self.waiting:
            state = self.scheduler._requests[request]
            for view in self.views.values():
                is_able = (
                    view.model == state.model
                    and view.is_ready
                    and self.num_running(view.id) < view.max_inflight
                    and self.scheduler._workers[view.id].breaker.allows(self.now)
                )
                assert not (is_able and self.now >= state.not_before), f"{request} waits, and {view.id} has room"

    # Views

    @property
    def waiting(self) -> set[RequestId]:
        return self.requests.keys() - self.ended.keys() - {start.request for start in self.running.values()}

    def num_running(self, worker: WorkerId) -> int:
        return sum(start.worker == worker for start in self.running.values())

    def legs(self) -> list[LegId]:
        return list(self.running)


def starts(effects: list[Effect]) -> list[tuple[str, str]]:
    """Return (request, worker) of every start among the effects."""
    return [(effect.request, effect.worker) for effect in effects if isinstance(effect, Start)]


def rejects(effects: list[Effect]) -> list[tuple[str, str]]:
    """Return (request, why) of every rejection among the effects."""
    return [(effect.request, effect.why) for effect in effects if isinstance(effect, Reject)]
