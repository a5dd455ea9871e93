"""Whatever happens, in whatever order: no request is lost, none is answered twice, and no slot stays empty."""

from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from core.chat import Prefix, Role
from core.ids import ModelName
from routing.fairness.policy import Fairness, Policy
from routing.scheduler import Cause, Effect, Event, Limits, Scheduler, Start
from tests.fakes.workers import view
from tests.unit.routing.world import World, starts

WORKERS = ("m-0", "m-1", "n-0")
POLICIES: tuple[Policy, ...] = ("vtc-pc", "vtc-pc", "vtc", "drr", "priority", "fcfs")
MODELS = (("m",), ("n",), ("m", "n"), ("n", "m"))
CAUSES: tuple[Cause, ...] = (
    "done",
    "refused",
    "busy",
    "broken",
    "lost",
    "unreachable",
    "timed_out",
    "hurried",
    "aborted",
)
SHORT, LONG, OTHER = Prefix(1, 100), Prefix(2, 1000), Prefix(3, 2000)
LIMITS = Limits(queue=5, queue_per_tenant=3, attempts=2, max_retry_after=10.0)


class AnyHistory(RuleBasedStateMachine):
    """Random events; the world itself objects to effects that break a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World(view("m-0", slots=2), view("m-1"), view("n-0"), limits=LIMITS)

    @initialize(policy=st.sampled_from(POLICIES), knows=st.booleans())
    def begin(self, policy: Policy, *, knows: bool) -> None:
        fairness = Fairness(
            policy=policy,
            threshold=20,
            credit=10,
            quantum=5,
            penalty=1,
            waste_share=1.0,
            targets=(1.0,),
            step_target=0.01,
        )
        both = {ModelName("m"): fairness, ModelName("n"): fairness}
        self.world = World(view("m-0", slots=2), view("m-1"), view("n-0"), limits=LIMITS, fairness=both)
        if knows:
            learn(self.world)

    @rule(
        tenant=st.sampled_from("abc"),
        models=st.sampled_from(MODELS),
        tokens=st.sampled_from([0, 5, 50, 400]),
        timeout=st.sampled_from([0.5, 5.0, 60.0]),
        more=st.fixed_dictionaries(
            {
                "prompt": st.one_of(st.integers(0, 20), st.just(1100)),
                "pinned": st.sampled_from([False, False, True]),
                "rank": st.integers(0, 2),
                "program": st.sampled_from(["", "p", "q"]),
                "weight": st.sampled_from([0.5, 1.0, 3.0]),
                "role": st.sampled_from([None, None, Role(0.0, 5.0), Role(60.0, 1.0, is_followed=True)]),
                "prefixes": st.sampled_from([(), (), (SHORT,), (SHORT, LONG), (LONG, OTHER)]),
                "deadline": st.sampled_from([None, None, 1.0, 30.0]),
                "urgent": st.booleans(),
            }
        ),
    )
    def submit(self, tenant: str, models: tuple[str, ...], tokens: int, timeout: float, more: dict[str, Any]) -> None:
        name = f"r{len(self.world.requests)}"
        self.world.submit(name, tenant, *models, tokens=tokens + more["prompt"], timeout=timeout, **more)

    @precondition(lambda self: self.world.running)
    @rule(
        data=st.data(),
        cause=st.sampled_from(CAUSES),
        advice=st.sampled_from([None, 0.0, 2.0, 20.0]),
        resumes=st.booleans(),
        prefilled=st.sampled_from([None, 0, 7]),
    )
    def end(
        self, data: st.DataObject, cause: Cause, advice: float | None, resumes: bool, prefilled: int | None
    ) -> None:
        leg = data.draw(st.sampled_from(self.world.legs()))
        self.world.end(leg, cause, advice, can_resume=resumes, prefilled=prefilled)

    @precondition(lambda self: self.world.cuts)
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        self.world.end(data.draw(st.sampled_from(sorted(self.world.cuts))), "aborted", can_resume=True)

    @precondition(lambda self: self.world.running)
    @rule(data=st.data(), num=st.integers(0, 40), commits=st.booleans())
    def deliver(self, data: st.DataObject, num: int, commits: bool) -> None:
        leg = data.draw(st.sampled_from(self.world.legs()))
        if commits:
            self.world.first_token(leg)
        self.world.tokens(leg, num)

    @precondition(lambda self: self.world.running)
    @rule(data=st.data())
    def stall(self, data: st.DataObject) -> None:
        self.world.stall(data.draw(st.sampled_from(self.world.legs())))

    @rule(tenant=st.sampled_from("abc"), model=st.sampled_from("mn"), num=st.integers(5, 80))
    def contend(self, tenant: str, model: str, num: int) -> None:
        """Two long answers that have come some way: what others may want to cut."""
        for _ in range(2):
            self.world.submit(f"r{len(self.world.requests)}", tenant, model, tokens=400, prompt=10, pinned=False)
        for leg in self.world.legs():
            if not self.world.ran[leg]:
                self.world.first_token(leg)
            self.world.tokens(leg, num)

    @precondition(lambda self: self.world.requests)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.world.cancel(data.draw(st.sampled_from(sorted(self.world.requests))))

    @rule(
        worker=st.sampled_from(WORKERS),
        state=st.sampled_from(["ready", "ill", "away", "gone", "draining", "drained"]),
        slots=st.integers(1, 2),
        incarnation=st.integers(0, 1),
        kv_tokens=st.sampled_from([None, None, 30, 200]),
    )
    def change(self, worker: str, state: str, slots: int, incarnation: int, kv_tokens: int | None) -> None:
        is_ready = state in {"ready", "ill", "draining"}
        self.world.worker(
            view(
                worker,
                ready=is_ready,
                healthy=state == "ready",
                may_return=state == "away",
                draining=state in {"draining", "drained"},
                slots=slots,
                incarnation=incarnation,
                kv_tokens=kv_tokens,
            )
        )

    @rule(seconds=st.sampled_from([0.1, 0.3, 1.0, 7.0, 40.0]))
    def advance(self, seconds: float) -> None:
        self.world.advance(seconds)

    @invariant()
    def works_while_there_is_room(self) -> None:
        wakeup = self.world.scheduler.next_wakeup()
        if wakeup is None or wakeup > self.world.now:
            self.world.check_work_conserving()

    def teardown(self) -> None:
        finish(self.world)
        assert self.world.ended.keys() == self.world.requests.keys()
        quiet(self.world)
        again = replayed(self.world)
        for event, was, now in zip(self.world.events, self.world.effects, again, strict=True):
            assert now == was, event


AnyHistory.TestCase.settings = settings(
    max_examples=max(120, settings().max_examples), stateful_step_count=40, deadline=None
)
test_any_history_keeps_the_rules = AnyHistory.TestCase


def learn(world: World) -> None:
    """Let the first worker of either model show how fast it is, and that it gains nothing by legs beside each other."""
    for model in "mn":
        for number in range(8):
            name = f"{model}{number}"
            world.submit(name, "teacher", model, tokens=120, prompt=100)
            world.advance(1.0)
            world.first_token(f"{name}/0", prefilled=100)
            for _ in range(10):
                world.advance(0.01)
                world.tokens(f"{name}/0", 1)
            world.end(f"{name}/0")


def quiet(world: World) -> None:
    """Nothing runs and nothing waits: no slot, promise or debt may be left."""
    scheduler = world.scheduler
    assert not scheduler._books.requests
    assert not scheduler._books.legs
    for worker in scheduler._books.workers.values():
        assert (worker.num_running, worker.num_cutting, worker.num_held) == (0, 0, 0)
        assert (worker.outstanding, worker.kv_tokens) == (0, 0)
        assert not worker.legs
    for model in scheduler._books.models.values():
        assert not len(model.line)
        assert not model.cuttable
        assert not model.unread
        assert model.num_held == 0
        assert (model.line.num_leaving, model.line.num_claiming) == (0, 0)
        assert model.line.waste.held == 0
        for account in model.line.accounts.values():
            assert (account.num_waiting, account.num_running) == (0, 0)
            assert not account.is_backlogged


def finish(world: World) -> None:
    """Let every leg end and time pass until nothing waits; 40 seconds end every wait of 60 in two rounds.

    What was cut waits for a worker without a deadline of its own, so in the end all workers come back.
    """
    for turn in range(20):
        for leg in world.legs():
            world.end(leg)
        is_done = not world.waiting and not world.running
        world.advance(40.0)  # what is kept for a run's next call is given back as well
        if is_done:
            return
        if turn == 5:
            for worker in WORKERS:
                world.worker(view(worker, incarnation=7))
    raise AssertionError(f"still waiting: {world.waiting}")


def replayed(world: World) -> list[list[Effect]]:
    """Return the effects of a new scheduler on the same events, both having travelled as JSON."""
    events = msgspec.json.decode(msgspec.json.encode(world.events), type=list[Event])
    scheduler = Scheduler(world.limits, world.fairness)
    effects = [scheduler.on(event) for event in events]
    sent: list[list[Effect]] = msgspec.json.decode(msgspec.json.encode(effects), type=list[list[Effect]])
    return sent


def drain(world: World, draw: Any) -> list[tuple[str, str]]:
    """End legs in any order until none is left; return (tenant, request) of what was started meanwhile."""
    order: list[tuple[str, str]] = []
    while world.running:
        leg = draw(st.sampled_from(world.legs()))
        order += [(world.requests[start.request].tenant, start.request) for start in _starts(world.end(leg))]
    return order


def _starts(effects: list[Effect]) -> list[Start]:
    return [effect for effect in effects if isinstance(effect, Start)]


def crowd(tenants: list[str], slots: int) -> World:
    """Return a world with all slots taken by a stranger, and one waiting request per entry of ``tenants``."""
    world = World(view(slots=slots))
    for index in range(slots):
        world.submit(f"stranger{index}", "stranger")
    for index, tenant in enumerate(tenants):
        world.submit(f"{tenant}{index:04}", tenant)
    return world


@given(st.lists(st.sampled_from("abc"), max_size=30), st.integers(1, 3), st.data())
@settings(max_examples=60, deadline=None)
def test_within_a_tenant_the_first_to_come_is_the_first_to_start(
    tenants: list[str], slots: int, data: st.DataObject
) -> None:
    order = drain(crowd(tenants, slots), data.draw)

    for tenant in "abc":
        started = [request for owner, request in order if owner == tenant]
        assert started == sorted(started)
    assert len(order) == len(tenants)


@given(st.lists(st.sampled_from("abc"), max_size=30), st.integers(1, 3), st.data())
@settings(max_examples=60, deadline=None)
def test_no_tenant_starts_twice_while_another_waits_for_its_turn(
    tenants: list[str], slots: int, data: st.DataObject
) -> None:
    order = [tenant for tenant, _ in drain(crowd(tenants, slots), data.draw)]

    for now, tenant in enumerate(order):
        if tenant in order[:now]:
            last = max(turn for turn in range(now) if order[turn] == tenant)
            assert set(order[now:]) - {tenant} <= set(order[last:now])


def test_a_thousand_waiting_requests_delay_another_tenant_by_one_turn() -> None:
    world = crowd(["heavy"] * 1000, slots=1)
    world.submit("light", "light")

    first = starts(world.end("stranger0/0"))
    second = starts(world.end(f"{first[0][0]}/0"))

    assert [request for request, _ in first + second] == ["heavy0000", "light"]
