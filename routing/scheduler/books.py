"""The scheduler's books: requests, legs, workers, models, and when time has to be told."""

import heapq
import itertools
from collections.abc import Iterator, Mapping

from core.ids import LegId, ModelName, RequestId, TenantId, WorkerId
from routing.fairness.policy import Fairness
from routing.fairness.programs import run_ends_at
from routing.scheduler.events import WorkerView
from routing.scheduler.keeping import KEPT_S, Kept, Program, program_of
from routing.scheduler.paying import release_owed
from routing.scheduler.state import FOREVER, Leg, Model, Request, WorkerState
from routing.scheduler.waves import has_led, lead

_DEFAULT = Fairness()


class Books:
    """What is known by name, and the entries that concern several of them at once. Nothing is decided here."""

    def __init__(self, fairness: Mapping[ModelName, Fairness]) -> None:
        self.requests: dict[RequestId, Request] = {}
        self.legs: dict[LegId, Leg] = {}
        self.workers: dict[WorkerId, WorkerState] = {}
        self.models: dict[ModelName, Model] = {}
        self._fairness = fairness
        self._kept: dict[Program, Kept] = {}
        self._wakeups: list[tuple[float, int, ModelName, RequestId | None]] = []
        self._order = itertools.count()  # keeps the heap from comparing what has no order

    @property
    def fairness(self) -> Mapping[ModelName, Fairness]:
        """The policies by model. What waits is ordered anew when they are replaced; counters stay."""
        return self._fairness

    @fairness.setter
    def fairness(self, fairness: Mapping[ModelName, Fairness]) -> None:
        self._fairness = fairness
        for name, model in self.models.items():
            model.line.fairness = self.fairness_of(name)
            for worker in model.workers:
                model.refresh(worker)  # how many legs it is given may have changed

    def fairness_of(self, model: ModelName) -> Fairness:
        """Return the model's policy."""
        return self._fairness.get(model, _DEFAULT)

    def model(self, name: ModelName) -> Model:
        """Return the model, which is opened if nobody has named it before."""
        model = self.models.get(name)
        if model is None:
            model = self.models[name] = Model(name, self.fairness_of(name))
        return model

    def note_worker(self, view: WorkerView) -> Model:
        """Note how a worker is now, and return its model."""
        worker = self.workers.get(view.id)
        model = self.model(view.model)
        if worker is None:
            worker = self.workers[view.id] = WorkerState(view)
            model.workers.append(worker)
        elif view.model != worker.view.model:  # an operator has given the id to another model's worker
            former = self.models[worker.view.model]
            former.workers.remove(worker)
            former.with_room.pop(view.id, None)
            former.draining.pop(view.id, None)
            model.workers.append(worker)
            worker.begin_anew()
        elif view.incarnation != worker.view.incarnation:
            worker.begin_anew()
        worker.view = view
        model.refresh(worker)
        if view.is_draining:
            model.draining[view.id] = worker
        else:
            model.draining.pop(view.id, None)
        return model

    def hold(self, leg: Leg) -> None:
        """The leg holds a slot of its worker from now on."""
        request, worker = leg.request, leg.worker
        model = self.models[request.model]
        request.leg = leg
        self.legs[leg.id] = leg
        worker.legs[leg.id] = leg
        worker.num_running += 1
        worker.cost.start(leg.started_at)
        worker.num_urgent += request.is_urgent
        worker.outstanding += leg.outstanding
        worker.kv_tokens += leg.kv_tokens
        lead(leg)
        most_roots = worker.view.num_prefixes or worker.view.max_inflight
        worker.warmth.note(request.prefixes, most_roots=most_roots, most_tokens=worker.view.kv_tokens)
        model.refresh(worker)
        request.account.num_running += 1
        if not request.is_pinned:
            model.cuttable.add(request.account, leg.id, leg)

    def release(self, leg: Leg, now: float) -> None:
        """Give back what the leg held."""
        request, worker = leg.request, leg.worker
        model = self.models[request.model]
        del self.legs[leg.id], worker.legs[leg.id]
        has_led(leg, model.line, now)
        worker.num_running -= 1
        worker.cost.end(now, has_begun=leg.has_begun)
        worker.num_urgent -= request.is_urgent
        worker.outstanding -= leg.outstanding
        worker.kv_tokens -= leg.kv_tokens
        self.models[worker.view.model].refresh(worker)
        request.leg = None
        request.home = (worker.view.id, worker.view.incarnation) if leg.breaker is worker.breaker else None
        request.account.num_running -= 1
        if not request.is_pinned:
            model.cuttable.remove(request.account, leg.id)
            model.unread.pop(leg.id, None)
        if leg.cut_for == "cancelled":
            model.line.num_leaving -= 1
        elif leg.cut_for is not None:
            worker.num_cutting -= 1

    def keep(self, request: Request, worker: WorkerState, now: float) -> None:
        """Keep a slot of the worker, which has room, for the next call of a request's run; one at a time."""
        program, model = program_of(request), self.models[request.model]
        role = request.role
        if role is None or program in self._kept or worker.room <= 0 or worker.view.model != model.name:
            return
        self._kept[program] = Kept(worker, model.name, now + KEPT_S, run_ends_at(request, role))
        self._hold_slot(model, worker, 1)
        self.wake(now + KEPT_S, model.name)

    def claim_kept(self, request: Request) -> None:
        """Make the slot that is kept for the request's run its own, if there is one."""
        kept = self._kept.get(program_of(request))
        if kept is not None and kept.model == request.model and request.role is not None:
            del self._kept[program_of(request)]
            request.target = kept.worker

    def is_kept_for_earlier(self, worker: WorkerState, tenant: TenantId, ends_at: float) -> bool:
        """Return whether a slot of the worker is kept for a run of the tenant that is to end before then."""
        return any(
            kept.worker is worker and program[0] == tenant and kept.ends_at < ends_at
            for program, kept in self._kept.items()
        )

    def drop_kept(self, model: Model, now: float) -> None:
        """Give free what was kept of the model's slots and is wanted no more."""
        for program, kept in list(self._kept.items()):
            if kept.model == model.name and kept.until <= now:
                del self._kept[program]
                self._hold_slot(model, kept.worker, -1)

    def _hold_slot(self, model: Model, worker: WorkerState, num: int) -> None:
        worker.num_held += num
        model.num_held += num
        self.models[worker.view.model].refresh(worker)

    def drop_target(self, request: Request) -> None:
        """Give free the slot that is kept for the request, if there is one."""
        target = request.target
        if target is not None:
            request.target = None
            self._hold_slot(self.models[request.model], target, -1)

    def forget(self, request: Request, now: float) -> None:
        """The request is over."""
        self.drop_target(request)
        line = self.models[request.model].line
        release_owed(line, request)
        line.remove(request)
        line.depart(request, request.spent, now)
        del self.requests[request.id]

    def wake(self, at: float, model: ModelName, request: RequestId | None = None) -> None:
        """Ask for a tick: something of the model may start then, or the request has to be given up."""
        if at < FOREVER:
            heapq.heappush(self._wakeups, (at, next(self._order), model, request))

    def next_wakeup(self) -> float | None:
        """Return when a tick is wanted at the latest; None if nothing waits for time to pass."""
        while self._wakeups:
            at, _, _, request = self._wakeups[0]
            if request is None or request in self.requests:
                return at
            heapq.heappop(self._wakeups)
        return None

    def due(self, now: float) -> Iterator[tuple[ModelName, Request | None]]:
        """Yield the wake-ups whose time has come, and forget them; those of requests that are over are left out."""
        while self._wakeups and self._wakeups[0][0] <= now:
            _, _, model, name = heapq.heappop(self._wakeups)
            request = self.requests.get(name) if name is not None else None
            if name is not None and request is None:
                continue  # as in ``next_wakeup``, which may have been asked or not: that must not change what happens
            yield model, request
