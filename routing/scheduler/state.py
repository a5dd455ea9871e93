"""What the scheduler remembers of requests, legs, workers and models."""

from core.ids import LegId, ModelName, WorkerId
from routing.breaker import Breaker
from routing.fairness.account import Account
from routing.fairness.account import Request as Waiting
from routing.fairness.line import Line
from routing.fairness.policy import Fairness
from routing.fairness.preemption import PER_WORKER
from routing.fairness.resume_cost import ResumeCost
from routing.fairness.running import Running
from routing.scheduler.cost import Cost
from routing.scheduler.effects import CutFor
from routing.scheduler.events import Submit, WorkerView
from routing.scheduler.pace import Pace
from routing.scheduler.warmth import Warmth

FOREVER = float("inf")
USUAL_ANSWER = 256  # tokens: many callers allow far more than they get

FULL_AT = 0.75
"""The share of an engine's memory from which on it is given nothing more: what runs there grows."""
_LEARNS = 0.1


class Request(Waiting):
    """A request from its ``Submit`` to its end. ``deadline``: until when it may wait; a begun answer may for ever.

    ``delivered``: tokens of its answer so far. ``charged``: what its tenant has paid for the prompt, in tokens, and
    None before its first start; ``is_settled``: that this is what the engine really did. ``spent``: milli weighted
    tokens in all. ``home``: the worker, and its incarnation, that ran it last and may hold its cache. ``target``: the
    worker that keeps a slot for it. ``cut_for``: why its last leg was cut; None if it failed. ``owed``: tokens that are
    held in the budget for waste until it goes on. ``pays_again``: that its tenant pays for it, since its reader kept an
    engine waiting. ``patient_since``: since when it waits for a better worker than there is.
    """

    __slots__ = (
        "charged",
        "cut_for",
        "deadline",
        "delivered",
        "earned",
        "home",
        "is_cancelled",
        "is_committed",
        "is_pinned",
        "is_settled",
        "is_urgent",
        "leg",
        "model_index",
        "models",
        "num_attempts",
        "num_cuts",
        "num_legs",
        "owed",
        "patient_since",
        "pays_again",
        "prefixes",
        "prompt_tokens",
        "queue_timeout",
        "spent",
        "target",
        "tokens_estimate",
        "tried",
        "waits_since",
        "weight",
    )

    def __init__(self, event: Submit, account: Account, number: int) -> None:
        super().__init__(
            event.request,
            account,
            rank=event.rank,
            program=event.program,
            number=number,
            arrived_at=event.now,
            role=event.role,
            deadline_s=event.deadline_s,
        )
        self.models = event.models
        self.tokens_estimate = event.tokens_estimate
        self.prompt_tokens = event.prompt_tokens
        self.queue_timeout = event.queue_timeout
        self.weight = event.weight
        self.is_pinned = event.is_pinned
        self.is_urgent = event.is_urgent
        self.prefixes = event.prefixes
        self.deadline = FOREVER
        self.waits_since = event.now
        self.model_index = 0
        self.num_legs = 0
        self.num_attempts = 0
        self.num_cuts = 0
        self.delivered = 0
        self.charged: int | None = None
        self.is_settled = False
        self.spent = 0
        self.earned = 0
        self.cut_for: CutFor | None = None
        self.owed = 0
        self.pays_again = False
        self.patient_since: float | None = None
        self.leg: Leg | None = None
        self.home: tuple[WorkerId, int] | None = None
        self.target: WorkerState | None = None
        self.is_committed = False
        self.is_cancelled = False
        self.tried: set[WorkerId] = set()

    @property
    def model(self) -> ModelName:
        """The model that it waits for or runs on."""
        return self.models[self.model_index]

    @property
    def context(self) -> int:
        """Tokens that its next leg has to begin with."""
        return self.prompt_tokens + self.delivered

    @property
    def remaining(self) -> int:
        """Tokens that its answer may still have, at most."""
        return self.tokens_estimate - self.prompt_tokens - self.delivered


def usual_answer(request: Request) -> int:
    """Return how many tokens the rest of the request's answer will have, about."""
    return min(request.remaining, USUAL_ANSWER)


class Leg:
    """One run of a request. ``breaker``: of the worker as it was at the start, since a leg's end says nothing of a
    later incarnation. ``ran``: tokens that it has delivered. ``context``: tokens that it began with, of which
    ``resumed`` were of the answer, and ``saved`` were probably in the worker's cache. ``load``: legs on the worker when
    it started. ``has_begun``: its prompt is done; ``is_told``: the engine has said what it prefilled.
    ``goes_on_after``: why the leg before it was cut, if it was. ``kv_tokens``: what it takes of the engine's memory,
    beside what others have there anyway. ``again``: tokens computed again that have been paid for, and ``pays_again``
    that its tenant pays. ``leads``: beginnings of prompts that it computes as the first one there, and ``followers``
    the requests that wait for that."""

    __slots__ = (
        "again",
        "breaker",
        "context",
        "cut_for",
        "first_at",
        "followers",
        "goes_on_after",
        "has_begun",
        "id",
        "is_home",
        "is_told",
        "is_trial",
        "kv_tokens",
        "leads",
        "load",
        "outstanding",
        "pays_again",
        "ran",
        "request",
        "resumed",
        "saved",
        "started_at",
        "worker",
    )

    def __init__(self, name: LegId, request: Request, worker: "WorkerState", now: float) -> None:
        self.id = name
        self.request = request
        self.worker = worker
        self.saved = min(worker.warmth.saved(request.prefixes), request.context)
        self.outstanding = max(0, request.tokens_estimate - self.saved)
        self.has_begun = False
        self.goes_on_after = request.cut_for
        self.pays_again, request.pays_again = request.pays_again, False
        self.again = 0
        self.breaker = worker.breaker
        self.is_trial = worker.breaker.on_start()
        self.is_told = False
        self.is_home = request.home == (worker.view.id, worker.view.incarnation)
        self.context = request.context
        self.kv_tokens = int(self.context * worker.fresh)
        self.resumed = request.delivered
        self.started_at = now
        self.first_at: float | None = None
        self.load = worker.num_running + 1
        self.ran = 0
        self.cut_for: CutFor | None = None
        self.leads: tuple[int, ...] = ()
        self.followers: list[Request] = []

    @property
    def num_cuts(self) -> int:
        """How often the request was cut for others."""
        return self.request.num_cuts

    @property
    def is_movable(self) -> bool:
        """Whether it may be cut at all: nobody has done so, and its worker has let go of most that were."""
        return self.cut_for is None and self.worker.num_cutting < PER_WORKER

    def begin(self, now: float) -> None:
        """Its prompt is done."""
        if not self.has_begun:
            self.has_begun = True
            self.worker.cost.begin(now)
            self.deliver(self.context - self.saved)

    def deliver(self, tokens: int) -> None:
        """So many tokens, of the prompt or of the answer, are no longer outstanding."""
        done = min(tokens, self.outstanding)
        self.outstanding -= done
        self.worker.outstanding -= done

    def is_eligible(self, quantum: int) -> bool:
        """Whether it may be cut for another tenant: it ran long enough, has more to do, and its slot could be used."""
        return self.ran >= quantum and self.is_movable and self.request.remaining > quantum and self.has_slot_of_use

    @property
    def has_slot_of_use(self) -> bool:
        """Whether another could have its slot once it has ended."""
        worker = self.worker
        if worker.would_be_full(self.kv_tokens):
            return False
        return worker.is_usable and worker.num_running <= worker.most_legs and worker.breaker.open_until is None

    def resume_tokens(self) -> int:
        """Return how many tokens will probably be computed again when the request goes on."""
        return self.worker.resume_cost.tokens(self.request.context, is_home=True)


class WorkerState:
    """``outstanding``: tokens its legs may still deliver. ``num_cutting``: legs that were cut for another's sake and
    have not ended. ``num_held``: free slots that are kept for legs on their way here. ``kv_tokens``: what its
    legs take of its engine's memory. ``fresh``: the share of a prompt that was not in its cache already, so far.
    ``warmth``: what its cache probably holds; ``leaders``: by their digests the beginnings that are being computed.
    ``num_urgent``: legs whose answers somebody reads; ``step_target``: in seconds, what a token of those may take."""

    def __init__(self, view: WorkerView) -> None:
        self.view = view
        self.breaker = Breaker()
        self.num_running = 0
        self.num_cutting = 0
        self.num_held = 0
        self.outstanding = 0
        self.kv_tokens = 0
        self.fresh = 1.0
        self.legs: dict[LegId, Leg] = {}
        self.resume_cost = ResumeCost()
        self.pace = Pace()
        self.cost = Cost()
        self.warmth = Warmth()
        self.leaders: dict[int, Leg] = {}
        self.num_urgent = 0
        self.step_target = 0.0

    def begin_anew(self) -> None:
        """Another engine runs under its name: what was known of the one before says nothing of it."""
        self.breaker = Breaker()
        self.warmth.clear()
        self.leaders.clear()

    @property
    def is_usable(self) -> bool:
        """Whether it takes new work at all."""
        return self.view.is_ready and not self.view.is_draining

    @property
    def room(self) -> int:
        """How many more legs it may be given; those that slots are kept for come on top."""
        view = self.view
        if not view.is_ready or view.is_draining or (view.kv_tokens is not None and self.is_full):
            return 0
        return self.most_legs - self.num_running - self.num_held

    @property
    def most_legs(self) -> int:
        """How many legs it is given: as many as it takes, or while an urgent one runs, so many that its tokens come as
        soon as was promised, as far as that is known; never fewer than the urgent ones and one more."""
        if not self.num_urgent or not self.step_target:
            return self.view.max_inflight
        return self.capped(self.num_urgent)

    def capped(self, num_urgent: int) -> int:
        """Return how many legs it is given while so many urgent ones run."""
        able = self.pace.most_legs(self.step_target) if self.step_target else None
        most = self.view.max_inflight
        return most if able is None else min(most, max(able, num_urgent + 1))

    @property
    def is_full(self) -> bool:
        """Whether its engine's memory has no room for another leg, as far as is known. For one it always has."""
        return self.num_running > 0 and self.would_be_full(0)

    def would_be_full(self, less: int) -> bool:
        """Whether it were full with so many tokens less."""
        most = self.view.kv_tokens
        return most is not None and self.kv_tokens - less > FULL_AT * most

    def observe_prompt(self, context: int, prefilled: int) -> None:
        """An engine has computed so many tokens of a prompt of that length."""
        if context > 0:
            self.fresh += _LEARNS * (min(1.0, prefilled / context) - self.fresh)


class Model:
    """One model: who waits for it, its workers, those with room or that drain, by account the legs that may be cut, and
    those whose engines wait for a reader."""

    def __init__(self, name: ModelName, fairness: Fairness) -> None:
        self.name = name
        self.line = Line(fairness)
        self.workers: list[WorkerState] = []
        self.with_room: dict[WorkerId, WorkerState] = {}
        self.draining: dict[WorkerId, WorkerState] = {}
        self.unread: dict[LegId, Leg] = {}
        self.cuttable: Running[Leg] = Running()
        self.num_held = 0  # requests that a slot is kept for
        self.num_migrated = 0
        self.num_drained = 0
        self.num_recovered = 0

    def refresh(self, worker: WorkerState) -> None:
        """Note whether the worker, which is the model's, has room now."""
        worker.step_target = self.line.fairness.step_target
        if worker.room > 0:
            self.with_room[worker.view.id] = worker
        else:
            self.with_room.pop(worker.view.id, None)

    def keep_slot(self, request: Request, worker: WorkerState) -> None:
        """Keep a slot of the worker, which has room, for the request."""
        request.target = worker
        worker.num_held += 1
        self.num_held += 1
        self.refresh(worker)

    @property
    def has_hope(self) -> bool:
        """Whether a worker is ready or may be again."""
        return any(worker.view.is_ready or worker.view.may_return for worker in self.workers)
