"""All models of one gateway: those that are decided together with other gateways, and those that are not.

A model is shared if every gateway reaches all its workers. What one gateway has started for itself, only that one can
use: such models are decided by a scheduler of its own, as if there were no other gateway.
"""

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping

import msgspec

from core.ids import ModelName, RequestId, WorkerId
from routing.replicas.desk import Desk, Status
from routing.replicas.messages import Events, Message, ReplicaId, Summons
from routing.replicas.names import request_of
from routing.scheduler import (
    Adopt,
    Cancel,
    Effect,
    Event,
    FirstToken,
    LegEnded,
    Reject,
    Scheduler,
    Start,
    Submit,
    Tick,
    Worker,
)
from routing.scheduler.decisions import Decision
from routing.scheduler.views import FairnessView


class _Chain(msgspec.Struct):
    """A request whose models are not decided in one place; the schedulers are told of one model at a time."""

    submit: Submit
    index: int = 0
    num_legs: int = 0
    may_go_on: bool = True


class Desks:
    """Finds for every event who decides. Fits what the dispatcher wants of a scheduler.

    ``local`` decides for the models that are not shared. Effects that nobody here has caused come from ``receive`` and
    the methods named after what has happened. A model that was shared once stays so until the process ends.
    """

    def __init__(
        self,
        replica: ReplicaId,
        local: Scheduler,
        make: Callable[[], Scheduler],
        is_shared: Callable[[ModelName], bool],
    ) -> None:
        self.replica = replica
        self._local = local
        self._make = make
        self._is_shared = is_shared
        self._desks: dict[ModelName, Desk] = {}
        self._desk_of: dict[RequestId, Desk] = {}
        self._model_of: dict[WorkerId, ModelName] = {}
        self._chains: dict[RequestId, _Chain] = {}
        self._letters: list[tuple[ReplicaId, Message]] = []

    def on(self, event: Event) -> list[Effect]:
        """Take one event and return what has to be done now."""
        if isinstance(event, Tick):
            effects = self._local.on(event)
            effects += [effect for desk in self._desks.values() for effect in desk.on(event)]
            return self._fall_back(effects, event.now)
        if isinstance(event, Worker):
            return self._fall_back(self._on_worker(event), event.now)
        if isinstance(event, Submit):
            return self._fall_back(self._submit(event), event.now)
        assert not isinstance(event, Adopt), "nobody hands this gateway a request"
        request = event.request if isinstance(event, Cancel) else request_of(event.leg)
        if self._chains and (chain := self._chains.get(request)) is not None:
            _note(chain, event)
        desk = self._desk_of.get(request)
        effects = self._fall_back((desk or self._local).on(event), event.now)
        if isinstance(event, LegEnded | Cancel):
            self._forget_if_over(request)
        return effects

    def next_wakeup(self) -> float | None:
        """Return when a ``Tick`` is wanted at the latest."""
        wakeups = [self._local.next_wakeup(), *(desk.next_wakeup() for desk in self._desks.values())]
        return min((at for at in wakeups if at is not None), default=None)

    def knows(self, request: RequestId) -> bool:
        """Whether the request waits or runs here."""
        return request in self._desk_of or self._local.knows(request)

    def num_waiting(self, model: ModelName) -> int:
        """Return how many of this gateway's requests wait for the model."""
        desk = self._desks.get(model)
        return desk.num_waiting if desk is not None else self._local.num_waiting(model)

    def num_running(self, worker: WorkerId) -> int:
        """Return how many slots of the worker are taken by all gateways, as far as is known here."""
        desk = self._desk_behind(worker)
        return desk.num_running(worker) if desk is not None else self._local.num_running(worker)

    def num_running_here(self, worker: WorkerId) -> int:
        """Return how many slots of the worker this gateway's own requests hold."""
        desk = self._desk_behind(worker)
        return desk.num_running_here(worker) if desk is not None else self._local.num_running(worker)

    def is_tripped(self, worker: WorkerId) -> bool:
        """Return whether failures keep work away from the worker; False where another gateway decides."""
        desk = self._desk_behind(worker)
        scheduler = desk.scheduler if desk is not None else self._local
        return scheduler is not None and scheduler.is_tripped(worker)

    def explain(self, request: RequestId) -> tuple[Decision, ...]:
        """Return what was decided here about a request of this gateway."""
        decided = [self._local.explain(request), *(desk.explain(request) for desk in self._desks.values())]
        return tuple(sorted((one for some in decided for one in some), key=lambda one: one.at))

    def fairness_view(self, model: ModelName, now: float) -> FairnessView:
        """Return how the model is shared: as it is here, or as the gateway that decides has told last."""
        desk = self._desks.get(model)
        view = desk.fairness_view(now) if desk is not None else None
        return view or self._local.fairness_view(model)

    def waste_left(self, model: ModelName) -> float | None:
        """Return what of the model may be computed again; None where that is not decided here."""
        desk = self._desks.get(model)
        scheduler = desk.scheduler if desk is not None else self._local
        return scheduler.waste_left(model) if scheduler is not None else None

    def schedulers(self) -> list[Scheduler]:
        """Return all that decide here now, for new settings to be put into."""
        return [self._local, *(desk.scheduler for desk in self._desks.values() if desk.scheduler is not None)]

    # What happens between gateways

    @property
    def models(self) -> tuple[ModelName, ...]:
        """The shared models."""
        return tuple(self._desks)

    @property
    def statuses(self) -> tuple[Status, ...]:
        """How each shared model is decided now."""
        return tuple(desk.status for desk in self._desks.values())

    @property
    def num_refused(self) -> int:
        """How many messages came from a holder, or to one, that is none any more."""
        return sum(desk.num_refused for desk in self._desks.values())

    def epochs(self) -> Mapping[str, int]:
        """Return the leases that are held here."""
        held = {"collecting", "leading"}
        return {model: desk.epoch for model, desk in self._desks.items() if desk.role in held}

    def lead(
        self, model: ModelName, epoch: int, valid_until: float, living: Collection[ReplicaId], now: float
    ) -> list[Effect]:
        """The model's lease is held here; ``living`` are the gateways whose word has to be waited for."""
        return self._fall_back(self._desks[model].lead(epoch, valid_until, living, now), now)

    def to_hand_over(self, now: float) -> tuple[ModelName, int, ReplicaId] | None:
        """Return a lease that should be given to another gateway now, and to which; None if there is none such."""
        for model, desk in self._desks.items():
            successor = desk.successor(now)
            if successor is not None:
                return model, desk.epoch, successor
        return None

    def give_up(self, model: ModelName, now: float) -> None:
        """The model's lease is about to be another's."""
        self._desks[model].give_up(now)

    def announce(self, model: ModelName, successor: ReplicaId) -> None:
        """Let the successor know that the lease is its own now."""
        self._desks[model].announce(successor)

    def follow(self, model: ModelName, holder: ReplicaId, epoch: int, now: float) -> None:
        """The model's lease is held elsewhere."""
        self._desks[model].follow(holder, epoch, now)

    def stand_alone(self, num_replicas: int, now: float) -> list[Effect]:
        """Nobody can be reached: every model is decided here, with a share of its workers' slots."""
        return self._fall_back([e for desk in self._desks.values() for e in desk.stand_alone(num_replicas, now)], now)

    def lose(self, living: Iterable[ReplicaId], now: float) -> list[Effect]:
        """Forget gateways that live no more."""
        alive = set(living)
        return self._fall_back([e for desk in self._desks.values() for e in desk.lose(alive, now)], now)

    def receive(self, sender: ReplicaId, message: Message, now: float) -> list[Effect]:
        """Take a message and return what has to be done here."""
        desk = self._desks.get(message.model)
        if desk is not None:
            return self._fall_back(desk.receive(sender, message, now), now)
        if isinstance(message, Summons):  # it is waited for, and nothing of the model is here
            self._letters.append((sender, Events(message.model, message.epoch, session=0, number=0)))
        return []

    def beat(self) -> None:
        """Say something to everyone that there is business with."""
        for desk in self._desks.values():
            desk.beat()

    def take_letters(self) -> dict[ReplicaId, list[Message]]:
        """Return what has to be sent, by receiver; it counts as sent."""
        letters: dict[ReplicaId, list[Message]] = {}
        own, self._letters = self._letters, []
        for receiver, message in itertools.chain(own, *(desk.take_letters() for desk in self._desks.values())):
            letters.setdefault(receiver, []).append(message)
        return letters

    def _place(self, model: ModelName) -> Desk | Scheduler:
        desk = self._desks.get(model)
        if desk is None and self._is_shared(model):
            desk = self._desks[model] = Desk(self.replica, model, self._make)
        return desk or self._local

    def _desk_behind(self, worker: WorkerId) -> Desk | None:
        model = self._model_of.get(worker)
        return self._desks.get(model) if model is not None else None

    def _on_worker(self, event: Worker) -> list[Effect]:
        view = event.view
        before = self._model_of.get(view.id)
        self._model_of[view.id] = view.model
        effects: list[Effect] = []
        if before is not None and before != view.model and self._place(before) is not self._place(view.model):
            gone = msgspec.structs.replace(view, model=before, is_ready=False, may_return=False)
            effects += self._place(before).on(Worker(gone, event.now))
        return effects + self._place(view.model).on(event)

    def _submit(self, event: Submit) -> list[Effect]:
        models = event.models
        place = self._place(models[0])
        if len(models) > 1 and any(self._place(model) is not self._local for model in models):
            self._chains[event.request] = _Chain(event)
            event = msgspec.structs.replace(event, models=models[:1])
        if isinstance(place, Desk):
            self._desk_of[event.request] = place
        return place.on(event)

    def _fall_back(self, effects: list[Effect], now: float) -> list[Effect]:
        """Give a request that was rejected to the next of its models, where it may go on; pass on all else."""
        if not self._chains and not any(isinstance(effect, Reject) for effect in effects):
            return effects
        passed: list[Effect] = []
        for effect in effects:
            request = request_of(effect.leg) if not isinstance(effect, Reject) else effect.request
            chain = self._chains.get(request)
            if isinstance(effect, Start) and chain is not None:
                chain.num_legs = effect.attempt
            if not isinstance(effect, Reject):
                passed.append(effect)
            elif (
                chain is None
                or chain.index + 1 >= len(chain.submit.models)
                or not (chain.may_go_on or effect.why != "failed")
            ):
                self._chains.pop(request, None)
                self._desk_of.pop(request, None)
                passed.append(effect)
            else:
                passed += self._fall_back(self._go_on(chain, now), now)
        return passed

    def _go_on(self, chain: _Chain, now: float) -> list[Effect]:
        chain.index += 1
        chain.may_go_on = True
        model = chain.submit.models[chain.index]
        place = self._place(model)
        self._desk_of.pop(chain.submit.request, None)
        if isinstance(place, Desk):
            self._desk_of[chain.submit.request] = place
        submit = msgspec.structs.replace(chain.submit, models=(model,))
        return place.on(Adopt(submit=submit, now=now, num_legs=chain.num_legs)) + place.on(Tick(now=now))

    def _forget_if_over(self, request: RequestId) -> None:
        desk = self._desk_of.get(request)
        if desk is not None and not desk.knows(request):
            del self._desk_of[request]
        if self._chains and not self.knows(request):
            self._chains.pop(request, None)


def _note(chain: _Chain, event: Event) -> None:
    """Remember whether what has happened may be followed by another model."""
    if isinstance(event, LegEnded):
        chain.may_go_on = chain.may_go_on and event.cause not in {"refused", "aborted"}
    elif isinstance(event, FirstToken):
        chain.may_go_on = False
