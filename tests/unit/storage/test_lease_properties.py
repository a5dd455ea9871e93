"""No two replicas ever believe in one lease, whatever the network and their clocks do."""

from collections.abc import Sequence
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from storage.redis.connection import RedisAwayError, Script
from storage.redis.lease import Lease, Leases
from tests.fakes.clock import ManualClock
from tests.fakes.leases import LeaseServer

RATES = st.sampled_from((1 - Leases.DRIFT, 1.0, 1.2))  # how fast a replica's clock runs beside the server's
DELAYS = st.sampled_from((0.0, 0.01, 0.2, 1.5))


class Server:
    """A replica's way to the server: what it asks arrives late, is answered late, or one of the two is lost."""

    def __init__(self, world: "Leasing", replica: "Replica") -> None:
        self._world = world
        self._replica = replica

    async def run_script(self, operation: str, script: Script, keys: Sequence[bytes], argument: bytes) -> Any:
        there, back, is_asked, is_answered = self._world.fate
        self._world.advance(there)
        if not is_asked:
            raise RedisAwayError("the question was lost")
        answer = self._world.server.run(keys, argument)
        self._world.advance(back)
        if not is_answered:
            raise RedisAwayError("the answer was lost")
        return answer


class Replica:
    def __init__(self, world: "Leasing", name: str, rate: float) -> None:
        self.name = name
        self.rate = rate
        self.clock = ManualClock()
        self.leases = Leases(Server(world, self), self.clock, name)
        self.ours: Lease | None = None

    @property
    def believes(self) -> bool:
        return self.ours is not None and self.clock.monotonic() < self.ours.valid_until


class Leasing(RuleBasedStateMachine):
    @initialize(rates=st.lists(RATES, min_size=2, max_size=4))
    def begin(self, rates: list[float]) -> None:
        self.time = ManualClock()
        self.server = LeaseServer(self.time)
        self.replicas = [Replica(self, f"r{number}", rate) for number, rate in enumerate(rates)]
        self.fate = (0.0, 0.0, True, True)
        self.epochs: list[tuple[int, str]] = []

    def advance(self, seconds: float) -> None:
        """Time passes for all, for each as its clock goes; at no moment do two believe."""
        for _ in range(4):
            self.time.advance(seconds / 4)
            for replica in self.replicas:
                replica.clock.advance(seconds / 4 * replica.rate)
            self.one_believes()

    @rule(which=st.integers(0, 3), there=DELAYS, back=DELAYS, lost=st.sampled_from(["nothing"] * 4 + ["one", "other"]))
    def hold(self, which: int, there: float, back: float, lost: str) -> None:
        replica = self.replicas[which % len(self.replicas)]
        self.fate = (there, back, lost != "one", lost != "other")
        try:
            found = run(replica.leases.hold(["m"])).leases["m"]
        except RedisAwayError:
            return
        replica.ours = found if found.holder == replica.name else None
        if (found.epoch, found.holder) not in self.epochs:
            self.epochs.append((found.epoch, found.holder))

    @rule(seconds=st.sampled_from((0.1, 0.5, 1.0, 1.9, 2.0, 2.05, 3.0)))
    def wait(self, seconds: float) -> None:
        self.advance(seconds)

    @precondition(lambda self: any(replica.ours for replica in self.replicas))
    @rule()
    def leave(self) -> None:
        replica = next(replica for replica in self.replicas if replica.ours)
        assert replica.ours is not None
        self.fate = (0.0, 0.0, True, True)
        epoch, replica.ours = replica.ours.epoch, None
        run(replica.leases.leave({"m": epoch}))

    @invariant()
    def one_believes(self) -> None:
        believers = [replica.name for replica in self.replicas if replica.believes]
        assert len(believers) <= 1, f"{believers} all believe"

    @invariant()
    def an_epoch_has_one_holder(self) -> None:
        numbers = [epoch for epoch, _ in self.epochs]
        assert len(numbers) == len(set(numbers))


def run(coroutine: Any) -> Any:
    """Run what never really waits."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("it waits")


TestLeasing = Leasing.TestCase
TestLeasing.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


def test_a_holder_whose_clock_runs_slow_stops_in_time() -> None:
    leasing = Leasing()
    leasing.begin([1 - Leases.DRIFT, 1.0])
    leasing.hold(0, 0.0, 0.0, "nothing")
    leasing.wait(Leases.TTL_S + 0.001)
    leasing.hold(1, 0.0, 0.0, "nothing")
    assert [replica.believes for replica in leasing.replicas] == [False, True]
