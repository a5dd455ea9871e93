"""Whatever is lost, killed, paused or late: a request ends once, a leg runs once, a slot is given away once."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from routing.scheduler import FirstToken, Tokens
from tests.unit.routing.replicas_world import World

CAUSES = st.sampled_from(["done", "done", "done", "unreachable"])


class Gateways(RuleBasedStateMachine):
    """``World`` holds the rules: it objects to a second leg, a second end, and a slot given away twice."""

    @initialize(num=st.integers(2, 4), slots=st.integers(1, 3))
    def begin(self, num: int, slots: int) -> None:
        self.world = World(num, {"w0": slots, "w1": slots})
        self.world.live(0.8)
        self.number = 0

    @rule(which=st.integers(0, 3), tenant=st.sampled_from("abc"))
    def submit(self, which: int, tenant: str) -> None:
        gateway = self.world.gateways[which % len(self.world.gateways)]
        gateway.submit(f"r{self.number}", tenant=tenant, queue_timeout=1e9, is_pinned=False)
        self.number += 1

    @rule(which=st.integers(0, 3))
    def submit_many(self, which: int) -> None:
        for _ in range(6):
            self.submit(which, "d")

    @precondition(lambda self: self.world.legs)
    @rule()
    def end_all(self) -> None:
        for gateway in self.world.gateways:
            for leg in tuple(gateway.legs):
                gateway.end(leg, "done")

    @precondition(lambda self: self.world.legs)
    @rule(which=st.integers(0, 100))
    def deliver_tokens(self, which: int) -> None:
        """So many that whoever waits has a claim to the slot."""
        running = [(gateway, leg) for gateway in self.world.gateways for leg in gateway.legs]
        gateway, leg = running[which % len(running)]
        gateway.on(FirstToken(leg=leg, now=self.world.now))
        gateway.on(Tokens(leg=leg, num=1500, now=self.world.now))

    @precondition(lambda self: self.world.legs)
    @rule(which=st.integers(0, 100), cause=CAUSES)
    def end(self, which: int, cause: str) -> None:
        running = [(gateway, leg) for gateway in self.world.gateways for leg in gateway.legs]
        gateway, leg = running[which % len(running)]
        gateway.end(leg, cause)  # type: ignore[arg-type]

    @rule(which=st.integers(0, 100))
    def cancel(self, which: int) -> None:
        waiting = [(gateway, request) for gateway in self.world.gateways for request in sorted(gateway.waiting)]
        if waiting:
            gateway, request = waiting[which % len(waiting)]
            gateway.cancel(request)

    @rule(which=st.integers(0, 100))
    def deliver_one(self, which: int) -> None:
        self.world.post()
        links = sorted(link for link, queue in self.world.network.items() if queue)
        if links:
            self.world.deliver(*links[which % len(links)])

    @rule()
    def deliver_all(self) -> None:
        self.world.settle()

    @rule(which=st.integers(0, 100))
    def lose(self, which: int) -> None:
        """All that is under way between two is lost."""
        self.world.post()
        links = sorted(link for link, queue in self.world.network.items() if queue)
        if links:
            self.world.network[links[which % len(links)]].clear()

    @rule(which=st.integers(0, 3))
    def begin_again(self, which: int) -> None:
        gateway = self.world.gateways[which % len(self.world.gateways)]
        if gateway.desks.statuses[0].role == "following":
            self.world.begin_again(gateway)

    @rule()
    def turn(self) -> None:
        self.world.turn()
        self.world.settle()

    @precondition(lambda self: len(self.world.gateways) > 1)
    @rule(which=st.integers(0, 3))
    def kill(self, which: int) -> None:
        self.world.kill(self.world.gateways[which % len(self.world.gateways)])

    @rule()
    def redis_goes(self) -> None:
        self.world.is_redis_up = False
        self.world.network.clear()
        self.world.is_strict = False  # from here on slots may be given away twice until old legs end

    @rule()
    def redis_returns(self) -> None:
        self.world.is_redis_up = True

    @invariant()
    def books_agree(self) -> None:
        for gateway in self.world.gateways:
            known = {request for request in gateway.waiting if gateway.desks.knows(request)}
            assert known == gateway.waiting, "a request is lost"
            assert not gateway.rejected, "there was no reason to reject it"

    def teardown(self) -> None:
        """All comes to an end once the world is as it should be."""
        world = self.world
        world.is_redis_up = True
        for _ in range(200):
            world.live(0.4)
            for gateway in world.gateways:
                for leg in tuple(gateway.legs):
                    gateway.end(leg, "done")
            world.now += 1.0
            if not any(gateway.waiting for gateway in world.gateways) and world.now > 5:
                break
        assert not any(gateway.waiting for gateway in world.gateways), "a request waits for ever"
        world.live(4.0)
        for worker in world.workers:
            assert world.holder.desks.num_running(worker) == 0, "a slot is lost"
        assert world.holder.desks.num_waiting(next(iter(world.holder.desks.models))) == 0


TestGateways = Gateways.TestCase
TestGateways.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
