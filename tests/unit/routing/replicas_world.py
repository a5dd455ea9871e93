"""Several gateways with one lease table and a network between them, under a clock that is turned by hand."""

from collections import Counter, deque
from collections.abc import Sequence

from core.ids import LegId, ModelName, RequestId, TenantId, WorkerId
from routing.fairness.policy import Fairness
from routing.replicas.desks import Desks
from routing.replicas.messages import Envelope, Handover, ReplicaId, Summons, pack, unpack
from routing.replicas.names import request_of
from routing.scheduler import (
    Abort,
    Cancel,
    Cause,
    Effect,
    Event,
    LegEnded,
    Limits,
    Reject,
    Scheduler,
    Start,
    Submit,
    Tick,
    Worker,
    WorkerView,
)

MODEL = ModelName("m")
TTL_S = 2.0
BEAT_S = 0.4
DEAD_AFTER_S = 2.0


class Gateway:
    """One gateway: its desks, and what its clients and legs have come to."""

    def __init__(self, world: "World", name: str, shared: Sequence[str]) -> None:
        self.name = ReplicaId(name)
        self.world = world
        self.desks = Desks(self.name, world.scheduler(), world.scheduler, lambda model: model in shared)
        self.legs: dict[LegId, WorkerId] = {}
        self.cut: list[LegId] = []
        self.waiting: set[RequestId] = set()  # what clients wait for
        self.ended: Counter[RequestId] = Counter()
        self.rejected: list[Reject] = []
        self.heard_at = 0.0
        self.last_round = 0.0
        self.num_replicas = 1

    def on(self, event: Event) -> None:
        self.carry_out(self.desks.on(event))

    def carry_out(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            match effect:
                case Start():
                    assert effect.request in self.waiting, f"{effect} for a client who has gone"
                    running = [leg for leg in self.legs if request_of(leg) == effect.request]
                    assert not running, f"{effect.request} runs twice"
                    self.legs[effect.leg] = effect.worker
                    self.world.check_slots(effect.worker)
                case Abort(why="cancelled"):
                    if effect.leg in self.legs:
                        self.end(effect.leg, "aborted")
                case Abort():
                    assert effect.leg in self.legs, f"{effect} of a leg that does not run"
                    self.cut.append(effect.leg)  # its engine takes its time to let go
                case Reject():
                    self.rejected.append(effect)
                    self.finish(effect.request)

    def submit(
        self,
        name: str,
        models: Sequence[str] = (MODEL,),
        *,
        tenant: str = "t",
        queue_timeout: float = 30.0,
        is_pinned: bool = True,
    ) -> None:
        request = RequestId(name)
        self.waiting.add(request)
        self.on(
            Submit(
                request=request,
                tenant=TenantId(tenant),
                models=tuple(ModelName(model) for model in models),
                tokens_estimate=10_000,
                queue_timeout=queue_timeout,
                now=self.world.now,
                prompt_tokens=5,
                is_pinned=is_pinned,
            )
        )

    def end(self, leg: LegId, cause: Cause) -> None:
        """End the leg so, or as it was told to be ended before."""
        del self.legs[leg]
        was_cut = leg in self.cut
        if was_cut:
            self.cut.remove(leg)
            cause = "aborted"
        if cause == "done":
            self.finish(request_of(leg))
        self.on(LegEnded(leg=leg, cause=cause, now=self.world.now, can_resume=cause != "done"))

    def cancel(self, request: RequestId) -> None:
        self.waiting.discard(request)
        if self.desks.knows(request):
            self.on(Cancel(request=request, now=self.world.now))

    def finish(self, request: RequestId) -> None:
        self.ended[request] += 1
        assert self.ended[request] == 1, f"{request} ends twice"
        self.waiting.discard(request)


class World:
    """``num`` gateways before ``workers`` of ``MODEL``. ``is_strict``: slots have never to be given away twice."""

    def __init__(
        self, num: int = 3, workers: dict[str, int] | None = None, *, shared: Sequence[str] = (MODEL,)
    ) -> None:
        self.now = 0.0
        self.is_strict = True
        self.is_redis_up = True
        self.workers = {WorkerId(name): slots for name, slots in (workers or {"w0": 2, "w1": 2}).items()}
        self.gateways = [Gateway(self, f"g{number}", shared) for number in range(num)]
        self.network: dict[tuple[ReplicaId, ReplicaId], deque[bytes]] = {}
        self.leases: dict[ModelName, tuple[int, ReplicaId, float]] = {}
        self.epoch = 0
        self.num_waiting_when_killed = 0
        for gateway in self.gateways:
            for worker in self.workers:
                self.tell_worker(gateway, worker)

    @staticmethod
    def scheduler() -> Scheduler:
        return Scheduler(Limits(attempts=100), {MODEL: Fairness(waste_share=1.0, waste_burst=10**6)})

    def tell_worker(self, gateway: Gateway, worker: WorkerId, *, model: str = MODEL, is_draining: bool = False) -> None:
        view = WorkerView(
            id=worker,
            model=ModelName(model),
            is_ready=True,
            is_healthy=True,
            may_return=True,
            max_inflight=self.workers[worker],
            is_draining=is_draining,
        )
        gateway.on(Worker(view=view, now=self.now))

    def running(self, worker: WorkerId) -> int:
        return sum(list(gateway.legs.values()).count(worker) for gateway in self.gateways)

    def check_slots(self, worker: WorkerId) -> None:
        if self.is_strict:
            assert self.running(worker) <= self.workers[worker], f"{worker} has too many legs"

    # Redis

    def round(self, gateway: Gateway) -> None:
        """One gateway's round, as ``gateway/replicas.py`` does it."""
        if not self.is_redis_up:
            if self.now >= gateway.last_round + TTL_S:
                gateway.carry_out(gateway.desks.stand_alone(gateway.num_replicas, self.now))
            return
        gateway.heard_at = gateway.last_round = self.now
        living = [one.name for one in self.gateways if one.heard_at > self.now - DEAD_AFTER_S]
        gateway.num_replicas = len(living)
        for model in gateway.desks.models:
            epoch, holder, until = self.leases.get(model, (0, ReplicaId(""), 0.0))
            if until <= self.now or holder == gateway.name:
                if holder != gateway.name or until <= self.now:
                    self.epoch += 1
                    epoch = self.epoch
                self.leases[model] = (epoch, gateway.name, self.now + TTL_S)
                gateway.carry_out(gateway.desks.lead(model, epoch, self.now + TTL_S * 0.95, living, self.now))
            else:
                gateway.desks.follow(model, holder, epoch, self.now)
        gateway.carry_out(gateway.desks.lose(living, self.now))
        gateway.desks.beat()
        if (due := gateway.desks.to_hand_over(self.now)) is not None:
            model, epoch, successor = due
            gateway.desks.give_up(model, self.now)
            if self.leases[model][:2] == (epoch, gateway.name) and successor in living:
                self.epoch += 1
                self.leases[model] = (self.epoch, successor, self.now + TTL_S)
                gateway.desks.announce(model, successor)

    # The network

    def post(self) -> None:
        for gateway in self.gateways:
            for receiver, messages in gateway.desks.take_letters().items():
                packed = pack(Envelope(gateway.name, tuple(messages)))
                if self.is_redis_up:
                    self.network.setdefault((gateway.name, receiver), deque()).append(packed)

    def deliver(self, sender: ReplicaId, receiver: ReplicaId) -> None:
        """Deliver the oldest envelope between two."""
        envelope = unpack(self.network[sender, receiver].popleft())
        gateway = next((one for one in self.gateways if one.name == receiver), None)
        if gateway is not None:
            for message in envelope.messages:
                gateway.carry_out(gateway.desks.receive(envelope.sender, message, self.now))
                if isinstance(message, Handover):
                    self.round(gateway)

    def begin_again(self, gateway: Gateway) -> None:
        """Summon the gateway, whatever session it is in."""
        status = gateway.desks.statuses[0]
        gateway.desks.receive(ReplicaId(status.holder), Summons(MODEL, status.epoch, session=1 << 60), self.now)

    def settle(self) -> None:
        """Deliver all that is under way, and what follows."""
        for _ in range(1000):
            self.post()
            links = [link for link, queue in self.network.items() if queue]
            if not links:
                return
            for link in links:
                self.deliver(*link)
        raise AssertionError("they never stop talking")

    def turn(self, seconds: float = BEAT_S) -> None:
        """Let time pass, and every gateway have its round."""
        self.now += seconds
        for gateway in self.gateways:
            gateway.on(Tick(now=self.now))
            self.round(gateway)

    def live(self, seconds: float) -> None:
        """Let time pass in an orderly way."""
        for _ in range(round(seconds / BEAT_S)):
            self.turn()
            self.settle()

    def kill(self, gateway: Gateway) -> None:
        """Its legs end with it, and so do its clients' connections."""
        self.gateways.remove(gateway)
        self.network = {link: queue for link, queue in self.network.items() if gateway.name not in link}

    @property
    def holder(self) -> Gateway:
        (leading,) = [one for one in self.gateways if one.desks.statuses[0].role == "leading"]
        return leading

    @property
    def legs(self) -> list[LegId]:
        return [leg for gateway in self.gateways for leg in gateway.legs]
