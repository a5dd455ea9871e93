"""This gateway among others that share its Redis: who lives, who decides for which model, what they tell each other.

Redis is all that gateways share, and all that they need: leases say who decides (``storage/redis/lease.py``), channels
carry events to whoever does and effects back (``routing/replicas``). Who may use that Redis is one of us: its password
is what replicas prove themselves with, as it is for limits and budgets.

Without Redis, or where messages do not arrive though it answers, every gateway decides alone, with its share of every
worker's slots, as soon as nobody's lease can last any more.
"""

import asyncio
import contextlib
import secrets
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

import structlog

from core.clock import Clock
from core.ids import ModelName, RequestId, WorkerId
from engines.tasks import Tasks
from gateway.settings import RedisSettings, Settings
from routing.replicas.desk import Status
from routing.replicas.desks import Desks
from routing.replicas.messages import Envelope, Handover, ReplicaId, pack, unpack
from routing.scheduler import Effect, Event, Scheduler, Tokens, Worker
from routing.scheduler.decisions import Decision
from routing.scheduler.views import FairnessView
from storage.redis.connection import RedisAwayError, RedisConnection
from storage.redis.lease import Leases, Round

_log = structlog.get_logger(__name__)

_TOKENS_WAIT_S = 0.05
_AGAIN_S = 0.2
_SLACK_S = 0.005
_PATIENCE_S = 1.0
_LONGEST_S = 0.5  # a lease is short: who waits longer for Redis has lost it


class Replicas:
    """Fits what the dispatcher wants of a scheduler. An async context manager: leaving it gives the leases to others.

    ``carry_out`` is given what has to be done because of others. ``num_expected``: how many gateways there are, as long
    as none has been heard of.
    """

    BEAT_S = 0.4

    def __init__(
        self,
        connection: RedisConnection,
        clock: Clock,
        local: Scheduler,
        make: Callable[[], Scheduler],
        *,
        is_shared: Callable[[ModelName], bool],
        carry_out: Callable[[Sequence[Effect]], None],
        num_expected: int = 1,
    ) -> None:
        self.id = ReplicaId(secrets.token_hex(8))
        self._desks = Desks(self.id, local, make, is_shared)
        self._connection = connection
        self._leases = Leases(connection, clock, self.id)
        self._clock = clock
        self._carry_out = carry_out
        self._num_expected = num_expected
        self._living: set[ReplicaId] = set()
        self._remembered: set[ReplicaId] = set()
        self._remember_until = float("-inf")
        self._heard_at = float("-inf")
        self._asked_at = float("-inf")
        self._missed_since: float | None = None
        self._is_due = asyncio.Event()
        self._has_news = asyncio.Event()
        self._news_timer: asyncio.TimerHandle | None = None
        self._tasks = Tasks()
        self._running: list[asyncio.Task[None]] = []
        self._is_leaving = False

    async def __aenter__(self) -> Self:
        await self._connection.__aenter__()
        await self._tasks.__aenter__()
        work = (self._listen_for_ever(), self._beat_for_ever(), self._send_for_ever())
        self._running = [self._tasks.create_task(one) for one in work]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_leaving = True  # a cancellation may be lost in the client, while it gives up a connection
        for task in self._running:
            task.cancel()
        await self._tasks.__aexit__(None, None, None)
        if self._news_timer is not None:
            self._news_timer.cancel()
        with contextlib.suppress(RedisAwayError):  # then the others notice by themselves
            await self._send()
            await self._leases.leave(self._desks.epochs())
        await self._connection.__aexit__(None, None, None)

    # What the dispatcher wants

    def on(self, event: Event) -> list[Effect]:
        """Take an event of this gateway's own and return what has to be done at once; the rest is carried out later."""
        effects = self._desks.on(event)
        if isinstance(event, Tokens):
            if self._news_timer is None:
                self._news_timer = asyncio.get_running_loop().call_later(_TOKENS_WAIT_S, self._tell_tokens)
        else:
            self._has_news.set()
            if isinstance(event, Worker):
                self._is_due.set()  # a model that is new to us may have no holder yet
        return effects

    def next_wakeup(self) -> float | None:
        """Return when a ``Tick`` is wanted at the latest."""
        return self._desks.next_wakeup()

    def knows(self, request: RequestId) -> bool:
        """Whether the request waits or runs here."""
        return self._desks.knows(request)

    def num_waiting(self, model: ModelName) -> int:
        """Return how many of this gateway's requests wait for the model."""
        return self._desks.num_waiting(model)

    def num_running(self, worker: WorkerId) -> int:
        """Return how many slots of the worker are taken by all gateways, as far as is known here."""
        return self._desks.num_running(worker)

    def num_running_here(self, worker: WorkerId) -> int:
        """Return how many slots of the worker this gateway's own requests hold."""
        return self._desks.num_running_here(worker)

    def is_tripped(self, worker: WorkerId) -> bool:
        """Return whether failures keep work away from the worker."""
        return self._desks.is_tripped(worker)

    # How it is

    def explain(self, request: RequestId) -> tuple[Decision, ...]:
        """Return what was decided here about a request of this gateway."""
        return self._desks.explain(request)

    def fairness_view(self, model: ModelName) -> FairnessView:
        """Return how the model is shared: as it is here, or as the gateway that decides has told last."""
        return self._desks.fairness_view(model, self._clock.monotonic())

    def waste_left(self, model: ModelName) -> float | None:
        """Return what of the model may be computed again; None where that is not decided here."""
        return self._desks.waste_left(model)

    def schedulers(self) -> list[Scheduler]:
        """Return all that decide here now, for new settings to be put into."""
        return self._desks.schedulers()

    @property
    def statuses(self) -> tuple[Status, ...]:
        """How each shared model is decided now."""
        return self._desks.statuses

    @property
    def num_replicas(self) -> int:
        """How many gateways there are, this one among them, as far as is known."""
        return len(self._living) or self._num_expected

    @property
    def num_refused(self) -> int:
        """How many messages were out of date."""
        return self._desks.num_refused

    # What it does

    async def _listen_for_ever(self) -> None:
        while not self._is_leaving:
            try:
                async with contextlib.aclosing(
                    self._connection.listen(_channel(self.id), silence=Leases.TTL_S)
                ) as messages:
                    async for packed in messages:
                        self._hear(packed)
            except RedisAwayError:
                await asyncio.sleep(_AGAIN_S)

    def _hear(self, packed: bytes | None) -> None:
        now = self._clock.monotonic()
        if packed is None:
            self._heard_at = now
            self._is_due.set()
            return
        try:
            envelope = unpack(packed)
        except ValueError as error:
            _log.warning("replica_message_refused", error=str(error))
            return
        if envelope.sender == self.id:
            if now >= self._heard_at + Leases.TTL_S:
                self._is_due.set()
            self._heard_at = now
        elif self._living:
            self._living.add(envelope.sender)  # it may be younger than our last round
        for message in envelope.messages:
            self._carry_out(self._desks.receive(envelope.sender, message, now))
            if isinstance(message, Handover):
                self._is_due.set()
        if envelope.messages:
            self._has_news.set()

    async def _send_for_ever(self) -> None:
        while not self._is_leaving:
            await self._has_news.wait()
            self._has_news.clear()
            with contextlib.suppress(RedisAwayError):  # the numbers of messages tell that some are missing
                await self._send()

    async def _send(self) -> None:
        letters = self._desks.take_letters()
        if letters:
            packed = {_channel(to): pack(Envelope(self.id, tuple(messages))) for to, messages in letters.items()}
            await self._connection.publish(packed)

    def _tell_tokens(self) -> None:
        self._news_timer = None
        self._has_news.set()

    async def _beat_for_ever(self) -> None:
        while not self._is_leaving:
            pause = self.BEAT_S
            self._is_due.clear()
            try:
                pause = await self._beat()
            except RedisAwayError:
                self._miss_beat()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._is_due.wait()

    async def _beat(self) -> float:
        """Have a round, and return after how many seconds the next one is due. Raises ``RedisAwayError``."""
        await self._connection.publish({_channel(self.id): pack(Envelope(self.id))})  # do we hear what is sent?
        asked_at = self._clock.monotonic()
        if asked_at >= self._heard_at + Leases.TTL_S:
            raise RedisAwayError("what gateways send does not arrive")
        found = await self._leases.hold(self._desks.models)
        self._asked_at = asked_at
        self._missed_since = None
        now = self._clock.monotonic()
        self._take(found, now)
        self._desks.beat()
        if (due := self._desks.to_hand_over(now)) is not None:
            model, epoch, successor = due
            self._desks.give_up(model, now)
            if await self._leases.hand_over(model, epoch, successor):
                self._desks.announce(model, successor)
        self._has_news.set()
        ends = [lease.valid_until - now for lease in found.leases.values() if lease.holder != self.id]
        return max(_SLACK_S, min([self.BEAT_S, *(end + _SLACK_S for end in ends)]))

    def _take(self, found: Round, now: float) -> None:
        """Do as the leases say."""
        living = {ReplicaId(replica) for replica in found.replicas}
        if found.is_new:  # it has forgotten all of us, and nobody has gone
            self._remembered = self._living
            self._remember_until = now + Leases.DEAD_AFTER_S
        known = living | self._remembered if now < self._remember_until else living
        self._living = living
        for model, lease in found.leases.items():
            if lease.holder == self.id:
                self._carry_out(self._desks.lead(ModelName(model), lease.epoch, lease.valid_until, known, now))
            else:
                self._desks.follow(ModelName(model), ReplicaId(lease.holder), lease.epoch, now)
        self._carry_out(self._desks.lose(known, now))

    def _miss_beat(self) -> None:
        """Decide alone once no lease can last any more that this gateway has heard of.

        Not at the first beats that are missed: a process that was paused has missed nothing but time.
        """
        now = self._clock.monotonic()
        if self._missed_since is None:
            self._missed_since = now
        if now >= self._missed_since + _PATIENCE_S and now >= self._asked_at + Leases.TTL_S:
            if any(status.role != "alone" for status in self.statuses):
                _log.warning("replicas_unreachable", share=1 / self.num_replicas)
            self._carry_out(self._desks.stand_alone(self.num_replicas, now))


def _channel(replica: ReplicaId) -> str:
    return f"replica:{replica}"


def replicas_of(
    settings: RedisSettings,
    clock: Clock,
    local: Scheduler,
    make: Callable[[], Scheduler],
    *,
    is_shared: Callable[[ModelName], bool],
    carry_out: Callable[[Sequence[Effect]], None],
) -> Replicas | None:
    """Return what makes this gateway one of several, not entered yet; None unless the settings ask for it."""
    if settings.url is None or settings.scheduling == "own":
        return None
    connection = RedisConnection(
        settings.url.get_secret_value(),
        clock,
        connect_timeout=min(settings.connect_timeout, _LONGEST_S),
        command_timeout=min(settings.command_timeout, _LONGEST_S),
        breaker_failures=settings.breaker_failures,
        breaker_open=_LONGEST_S,
    )
    return Replicas(
        connection,
        clock,
        local,
        make,
        is_shared=is_shared,
        carry_out=carry_out,
        num_expected=settings.replicas,
    )


def is_shared(settings: Settings, model: ModelName) -> bool:
    """Whether every gateway with these settings reaches all workers of the model: none is started by a gateway."""
    found = settings.models.get(model)
    return found is not None and all(worker.url is not None for worker in found.workers)
