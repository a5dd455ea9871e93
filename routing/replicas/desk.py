"""One model in one gateway: decides for all gateways, or asks the one that does, or decides for itself alone.

| role | who decides for the requests of this gateway |
|---|---|
| ``seeking`` | nobody yet: they wait |
| ``following`` | the holder of the lease, by messages |
| ``collecting`` | this gateway, as soon as all others have told it what they run |
| ``leading`` | this gateway, for all |
| ``alone`` | this gateway for its own requests, with its part of every worker's slots |

Whatever the role, legs run and requests stand where they stood: ``Standings`` is kept here, a scheduler is made anew
and told of it each time a role begins that needs one, with what the last one was heard to know. So what a take-over
loses is no request, and of what tenants were served only what came after the last beat that was heard.
"""

from collections.abc import Callable, Collection, Iterable
from typing import Literal

import msgspec

from core.ids import LegId, ModelName, RequestId, WorkerId
from routing.replicas.messages import Effects, Events, Handover, Learned, Message, ReplicaId, Summons
from routing.replicas.names import from_replica, request_of, to_replica
from routing.replicas.spreading import Spreading
from routing.replicas.standing import Standings
from routing.scheduler import (
    Abort,
    Adopt,
    Cancel,
    Effect,
    Event,
    FairnessView,
    LegEnded,
    Memory,
    Reject,
    Scheduler,
    Start,
    Submit,
    Tick,
    Tokens,
    Worker,
    WorkerView,
)
from routing.scheduler.decisions import Decision

Role = Literal["seeking", "following", "collecting", "leading", "alone"]

MOST_TENANTS = 256
"""Of how many tenants a holder tells the others what they have had: those that it would be most wrong to forget."""

MAX_UNSENT = 16_384
"""Events or effects that wait to be sent to one gateway; with more of them a session is begun anew."""


class Status(msgspec.Struct, frozen=True):
    """How a model is decided at a moment. ``share``: the part of every worker's slots that this gateway uses alone."""

    model: ModelName
    role: Role
    holder: str
    epoch: int
    share: float


class _Link:
    """A gateway that asks us."""

    def __init__(self, session: int) -> None:
        self.session = session
        self.heard = 0  # the number of its last message
        self.said = 0
        self.is_broken = False
        self.told: list[Event] = []  # while collecting: what it has told
        self.unsent: list[Effect] = []
        self.requests: dict[RequestId, LegId | None] = {}
        self.views: dict[WorkerId, WorkerView] = {}


class Desk:
    """See the module. Fits what the dispatcher wants of a scheduler; what comes later is returned by ``receive``.

    ``take_letters`` has what is to be sent. A role that rests on a lease ends by itself at its ``valid_until``.
    """

    def __init__(self, replica: ReplicaId, model: ModelName, make: Callable[[], Scheduler]) -> None:
        self.replica = replica
        self.model = model
        self.role: Role = "seeking"
        self.holder = ReplicaId("")
        self.epoch = 0
        self.num_refused = 0
        self._make = make
        self._mine = Standings()
        self._views: dict[WorkerId, WorkerView] = {}
        self._letters: list[tuple[ReplicaId, Message]] = []
        # Deciding: for all or alone.
        self._scheduler: Scheduler | None = None
        self._memory: Memory | None = None  # what a scheduler knew that decides no more, or decides elsewhere
        self._memory_at = 0.0
        self._share = 1.0
        # Holding the lease.
        self._valid_until = 0.0
        self._links: dict[ReplicaId, _Link] = {}
        self._expected: set[ReplicaId] = set()
        self._spreading = Spreading()
        # Following.
        self._session = 0
        self._said = 0
        self._heard = 0
        self._unsent: list[Event] = []
        self._tokens_at: dict[LegId, int] = {}
        self._running: dict[WorkerId, int] = {}

    # What the dispatcher wants

    def on(self, event: Event) -> list[Effect]:
        """Take an event of this gateway's own and return what has to be done here at once."""
        self._mind_lease(event.now)
        cut: list[Effect] = []
        if isinstance(event, Cancel) and (leg := self._mine.leg_of(event.request)) is not None:
            cut.append(Abort(leg=leg, why="cancelled"))  # nobody has to be asked for that
        if isinstance(event, Worker):
            self._views[event.view.id] = event.view
        self._mine.note(event)
        if self.role == "following":
            self._tell(event)
        elif self._scheduler is not None:
            return cut + self._decide(self.replica, event, event.now)
        return cut

    def next_wakeup(self) -> float | None:
        """Return when a ``Tick`` is wanted at the latest."""
        return self._scheduler.next_wakeup() if self._scheduler is not None else None

    def knows(self, request: RequestId) -> bool:
        """Whether the request waits or runs here."""
        return request in self._mine

    @property
    def num_waiting(self) -> int:
        """How many of this gateway's requests wait."""
        return self._mine.num_waiting

    def num_running_here(self, worker: WorkerId) -> int:
        """Return how many slots of the worker this gateway's requests hold."""
        return self._mine.num_running(worker)

    def num_running(self, worker: WorkerId) -> int:
        """Return how many slots of the worker are taken by all gateways, as far as is known here."""
        if self._scheduler is not None:
            return self._scheduler.num_running(worker)
        here = self._mine.num_running(worker)
        return max(here, self._running.get(worker, 0)) if self.role == "following" else here

    def explain(self, request: RequestId) -> tuple[Decision, ...]:
        """Return what was decided here about a request of this gateway's own; others' keep their gateway's name."""
        if self._scheduler is None:
            return ()
        prefix = f"{self.replica}:"
        return tuple(
            msgspec.structs.replace(
                decision,
                request=RequestId(decision.request.removeprefix(prefix)),
                other=decision.other and RequestId(decision.other.removeprefix(prefix)),
            )
            for decision in self._scheduler.explain(RequestId(prefix + request))
        )

    def fairness_view(self, now: float) -> FairnessView | None:
        """Return how the model is shared, as known here: now, or as last heard; None if nothing was heard yet."""
        if self._scheduler is not None:
            view, at = self._scheduler.fairness_view(self.model), now
        elif self._memory is not None:
            view, at = self._memory.view, self._memory_at
        else:
            return None
        return msgspec.structs.replace(view, holder=self.holder, age=now - at)

    @property
    def scheduler(self) -> Scheduler | None:
        """What decides here, if anything does."""
        return self._scheduler

    @property
    def status(self) -> Status:
        """How the model is decided now."""
        return Status(self.model, self.role, self.holder, self.epoch, self._share)

    # Roles

    def lead(self, epoch: int, valid_until: float, living: Collection[ReplicaId], now: float) -> list[Effect]:
        """The lease is ours: begin to decide when every other gateway has told what it runs, or lives no more.

        Of a lease that was ours already the time is taken, and, until it is begun, who lives now.
        """
        if now >= valid_until:
            self._rest(now)
            return []
        self._valid_until = valid_until
        if self.role not in {"collecting", "leading"} or epoch != self.epoch:
            self._rest(now)
            self.role, self.holder, self.epoch = "collecting", self.replica, epoch
        if self.role == "leading":
            return []
        untold = set(living) - self._links.keys() - {self.replica}
        for replica in sorted(untold - self._expected):
            self._summon(replica, 0)
        self._expected = untold
        return self._begin_if_told(now)

    def follow(self, holder: ReplicaId, epoch: int, now: float) -> None:
        """Another gateway holds the lease: tell it what there is, and do as it says."""
        if self.role == "following" and (holder, epoch) == (self.holder, self.epoch):
            return
        self._rest(now)
        self.role, self.holder, self.epoch = "following", holder, epoch
        self._begin_session(now)

    def successor(self, now: float) -> ReplicaId | None:
        """Return who should have the lease instead of this gateway; None if nobody should, or it is not ours."""
        if self.role != "leading":
            return None
        followers = [replica for replica, link in self._links.items() if link.views]  # they have the model's workers
        return self._spreading.successor(self.model, self.replica, followers, now)

    def give_up(self, now: float) -> None:
        """The lease is about to be another's: decide no more."""
        self._rest(now)

    def announce(self, successor: ReplicaId) -> None:
        """Let the successor know that it has the lease, and what was known up to the end."""
        if self._memory is not None:
            self._letters.append((successor, Learned(self.model, self.epoch, self._memory)))
        self._letters.append((successor, Handover(self.model)))

    def stand_alone(self, num_replicas: int, now: float) -> list[Effect]:
        """Nobody can be reached: decide for what is here, with a share of the slots, as ``num_replicas`` do."""
        if self.role == "alone":
            return []
        self._rest(now)
        self.role, self.holder, self._share = "alone", self.replica, 1 / max(1, num_replicas)
        return self._begin(now)

    def lose(self, living: Collection[ReplicaId], now: float) -> list[Effect]:
        """Forget gateways that live no more: what they ran has ended with them."""
        effects: list[Effect] = []
        for replica in [replica for replica in self._links if replica not in living]:
            link = self._links.pop(replica)
            if self._scheduler is not None:
                cancels, ends = _ends_of(replica, link.requests, now)
                effects += self._decide_all(cancels + ends, now)
                drained = [view.id for view in link.views.values() if view.is_draining and view.id in self._views]
                effects += self._decide_all([(self.replica, Worker(self._views[id], now)) for id in drained], now)
        return effects

    # Messages

    def receive(self, sender: ReplicaId, message: Message, now: float) -> list[Effect]:
        """Take a message and return what has to be done here. What is out of date is refused."""
        self._mind_lease(now)
        match message:
            case Summons():
                self._on_summons(sender, message, now)
                return []
            case Effects():
                return self._on_effects(sender, message, now)
            case Learned():
                if self.role == "following" and (sender, message.epoch) == (self.holder, self.epoch):
                    self._memory, self._memory_at = message.memory, now
                return []
            case Events():
                return self._on_events(sender, message, now)
            case Handover():
                return []  # leases are looked at by whoever owns the desk

    def beat(self) -> None:
        """Say something to everyone, lest what was lost last stay unnoticed."""
        if self.role == "following":
            self._say_events()
        elif self.role == "leading" and self._scheduler is not None:
            running = {worker: self._scheduler.num_running(worker) for worker in self._views}
            learned = Learned(self.model, self.epoch, self._scheduler.memory(self.model, MOST_TENANTS))
            for replica, link in self._links.items():
                self._say_effects(replica, link, running)
                self._letters.append((replica, learned))

    def take_letters(self) -> list[tuple[ReplicaId, Message]]:
        """Return what has to be sent, and to whom; it counts as sent."""
        if self._unsent:
            self._say_events()
        for replica, link in self._links.items():
            if link.unsent:
                self._say_effects(replica, link, {})
        letters, self._letters = self._letters, []
        return letters

    # Holding the lease

    def _mind_lease(self, now: float) -> None:
        if self.role in {"collecting", "leading"} and now >= self._valid_until:
            self._rest(now)

    def _rest(self, now: float) -> None:
        """Decide nothing, ask nobody."""
        self.role = "seeking"
        self.holder = ReplicaId("")
        self._share = 1.0
        if self._scheduler is not None:
            self._memory, self._memory_at = self._scheduler.memory(self.model, MOST_TENANTS), now
        self._scheduler = None
        self._expected.clear()
        self._links.clear()
        self._letters.clear()
        self._unsent.clear()
        self._tokens_at.clear()
        self._running = {}

    def _on_events(self, sender: ReplicaId, message: Events, now: float) -> list[Effect]:
        if self.role not in {"collecting", "leading"} or message.epoch > self.epoch:
            self.num_refused += 1
            return []
        if message.epoch < self.epoch:
            self._summon(sender, 0)
            return []
        link = self._links.get(sender)
        if message.number == 0:
            if link is not None and message.session <= link.session:
                return []
            return self._on_session(sender, message, link, now)
        if link is None:
            self._summon(sender, message.session)
            return []
        if message.session < link.session:
            return []
        if link.is_broken or (message.session, message.number) != (link.session, link.heard + 1):
            link.is_broken = True
            self._summon(sender, message.session)  # each time: a summons may be lost too
            return []
        link.heard = message.number
        if self.role == "collecting":
            link.told += message.events
            return []
        return self._decide_all([(sender, event) for event in message.events], now)

    def _on_session(self, sender: ReplicaId, message: Events, before: _Link | None, now: float) -> list[Effect]:
        link = self._links[sender] = _Link(message.session)
        if self.role == "collecting":
            link.told = list(message.events)
            self._expected.discard(sender)
            return self._begin_if_told(now)
        running, waiting, rest = _sorted((sender, event) for event in message.events)
        known = dict(before.requests) if before is not None else {}
        for _, event in running:
            if isinstance(event, Adopt):
                known.pop(event.submit.request, None)
        # What was known is forgotten before any of it is told anew: else a slot that comes free meanwhile is given to a
        # request that is then told to wait, and its gateway starts it all the same. Slots whose requests are not told
        # again come free last: those that wait have their turn by then.
        told = {event.submit.request for _, event in waiting if isinstance(event, Adopt)}
        cancels, _ = _ends_of(sender, known, now)
        _, ends = _ends_of(sender, {id: leg for id, leg in known.items() if id not in told}, now)
        return self._decide_all(running + cancels + waiting + ends + rest, now)

    def _begin_if_told(self, now: float) -> list[Effect]:
        return self._begin(now) if self.role == "collecting" and not self._expected else []

    def _begin(self, now: float) -> list[Effect]:
        """Decide from now on, beginning with all that has been told.

        Nothing waiting is told before all that runs, so no slot is given away that is taken.
        """
        if self.role == "collecting":
            self.role = "leading"
        self._scheduler = self._make()
        effects = self._decide_all([(self.replica, Worker(view=view, now=now)) for view in self._views.values()], now)
        if self._memory is not None:
            self._scheduler.recall(self._memory, now)
        told: list[tuple[ReplicaId, Event]] = [(self.replica, event) for event in self._mine.retell(now)]
        for replica, link in self._links.items():
            told += [(replica, event) for event in link.told]
            link.told = []
        running, waiting, rest = _sorted(told)
        return effects + self._decide_all(running + waiting + rest, now)

    def _decide_all(self, events: Iterable[tuple[ReplicaId, Event]], now: float) -> list[Effect]:
        effects = [effect for replica, event in events for effect in self._decide(replica, event, now)]
        return effects + self._decide(self.replica, Tick(now=now), now)  # those that were adopted take turns now

    def _decide(self, replica: ReplicaId, event: Event, now: float) -> list[Effect]:
        """Feed the scheduler a gateway's event; keep what others have to do, and return what is to be done here."""
        assert self._scheduler is not None
        link = self._links.get(replica)
        if isinstance(event, Worker):
            if link is not None:
                link.views[event.view.id] = event.view
            event = Worker(view=self._view_of(event.view.id), now=now)
        effects = self._scheduler.on(from_replica(event, replica, now))
        if link is not None:
            self._keep(replica, link, event)
        return self._hand_out(effects, now)

    def _hand_out(self, effects: Iterable[Effect], now: float) -> list[Effect]:
        here: list[Effect] = []
        for effect in effects:
            replica, told = to_replica(effect)
            if replica == self.replica:
                here += self._obey((told,), now)
                continue
            link = self._links.get(replica)
            if link is None:
                continue
            link.unsent.append(told)
            if isinstance(told, Start):
                link.requests[told.request] = told.leg
            elif isinstance(told, Reject):
                link.requests.pop(told.request, None)
            if len(link.unsent) > MAX_UNSENT:
                link.unsent.clear()
                link.is_broken = True
                self._summon(replica, link.session)
        return here

    def _keep(self, replica: ReplicaId, link: _Link, event: Event) -> None:
        """Remember what a gateway has with us, for the day that it is no more."""
        match event:
            case Submit():
                link.requests[event.request] = None
            case Adopt():
                link.requests[event.submit.request] = event.leg
            case LegEnded():
                link.requests[request_of(event.leg)] = None
                self._prune(replica, link, request_of(event.leg))
            case Cancel():
                self._prune(replica, link, event.request)
            case _:
                pass

    def _prune(self, replica: ReplicaId, link: _Link, request: RequestId) -> None:
        if self._scheduler is not None and not self._scheduler.knows(RequestId(f"{replica}:{request}")):
            link.requests.pop(request, None)

    def _view_of(self, worker: WorkerId) -> WorkerView:
        """Return a worker as decisions see it: as this gateway does; drained if any gateway drains it."""
        views = [view for link in self._links.values() if (view := link.views.get(worker)) is not None]
        view = self._views.get(worker) or views[0]
        if any(other.is_draining for other in views):
            view = msgspec.structs.replace(view, is_draining=True)
        if self.role == "alone":
            view = msgspec.structs.replace(view, max_inflight=max(1, int(view.max_inflight * self._share)))
        return view

    def _summon(self, replica: ReplicaId, session: int) -> None:
        summons = (replica, Summons(self.model, self.epoch, session))
        if summons not in self._letters:
            self._letters.append(summons)

    def _say_effects(self, replica: ReplicaId, link: _Link, running: dict[WorkerId, int]) -> None:
        link.said += 1
        said = Effects(self.model, self.epoch, link.session, link.said, tuple(link.unsent), running)
        link.unsent.clear()
        self._letters.append((replica, said))

    # Following

    def _on_summons(self, sender: ReplicaId, message: Summons, now: float) -> None:
        if message.epoch < self.epoch or sender == self.replica:
            return
        is_followed = self.role == "following" and (sender, message.epoch) == (self.holder, self.epoch)
        if is_followed and message.session < self._session:
            return  # a later session is on its way
        self.role = "seeking"
        self.follow(sender, message.epoch, now)

    def _on_effects(self, sender: ReplicaId, message: Effects, now: float) -> list[Effect]:
        fence = (sender, message.epoch, message.session)
        if self.role != "following" or fence != (self.holder, self.epoch, self._session):
            self.num_refused += 1
            return []
        if message.number != self._heard + 1:
            self._begin_session(now)
            return []
        self._heard = message.number
        if message.running:
            self._running = dict(message.running)
        return self._obey(message.effects, now)

    def _obey(self, effects: Iterable[Effect], now: float) -> list[Effect]:
        """Return what still means something here; a start that does not frees its slot at once."""
        here: list[Effect] = []
        for effect in effects:
            if self._mine.obey(effect):
                here.append(effect)
            elif isinstance(effect, Start) and effect.leg != self._mine.leg_of(effect.request):
                unwanted = LegEnded(leg=effect.leg, cause="aborted", now=now)
                if self.role == "following":
                    self._tell(unwanted)
                else:
                    here += self._decide(self.replica, unwanted, now)
        return here

    def _begin_session(self, now: float) -> None:
        self._session += 1
        self._said = self._heard = 0
        self._unsent.clear()
        self._tokens_at.clear()
        told: list[Event] = [Worker(view=view, now=now) for view in self._views.values()]
        told += self._mine.retell(now)
        self._letters.append((self.holder, Events(self.model, self.epoch, self._session, 0, tuple(told))))

    def _tell(self, event: Event) -> None:
        if isinstance(event, Tick):
            return
        if isinstance(event, Tokens):
            at = self._tokens_at.get(event.leg)
            if at is not None:
                before = self._unsent[at]
                assert isinstance(before, Tokens)
                self._unsent[at] = msgspec.structs.replace(before, num=before.num + event.num)
                return
            self._tokens_at[event.leg] = len(self._unsent)
        self._unsent.append(event)
        if len(self._unsent) > MAX_UNSENT:
            self._begin_session(event.now)

    def _say_events(self) -> None:
        self._said += 1
        said = Events(self.model, self.epoch, self._session, self._said, tuple(self._unsent))
        self._unsent.clear()
        self._tokens_at.clear()
        self._letters.append((self.holder, said))


_Told = list[tuple[ReplicaId, Event]]


def _ends_of(replica: ReplicaId, requests: dict[RequestId, LegId | None], now: float) -> tuple[_Told, _Told]:
    """Return what ends requests that their gateway has no more: cancelling them, then the ends of what runs."""
    cancels: _Told = [(replica, Cancel(request=request, now=now)) for request in requests]
    legs = [leg for leg in requests.values() if leg is not None]
    return cancels, [(replica, LegEnded(leg=leg, cause="aborted", now=now)) for leg in legs]


def _sorted(told: Iterable[tuple[ReplicaId, Event]]) -> tuple[_Told, _Told, _Told]:
    """Part what was told in workers and what runs, what waits (the longest first), and the rest in its order."""
    running: _Told = []
    waiting: list[tuple[float, ReplicaId, Adopt]] = []
    rest: _Told = []
    views: _Told = []
    for replica, event in told:
        if isinstance(event, Worker):
            views.append((replica, event))
        elif isinstance(event, Adopt) and event.leg is not None:
            running.append((replica, event))
        elif isinstance(event, Adopt):
            waiting.append((event.waited, replica, event))
        else:
            rest.append((replica, event))
    waiting.sort(key=lambda entry: -entry[0])
    return views + running, [(replica, event) for _, replica, event in waiting], rest
