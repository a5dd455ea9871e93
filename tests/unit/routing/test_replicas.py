"""Gateways that share a scheduler: who decides, what a take-over keeps, and what is refused."""

import pytest

from core.ids import LegId, ModelName, RequestId, WorkerId
from routing.replicas.messages import Effects, Learned, ReplicaId
from routing.replicas.spreading import SETTLED_S, best_of
from routing.scheduler import FirstToken, Start, Tokens
from tests.unit.routing.replicas_world import BEAT_S, DEAD_AFTER_S, MODEL, Gateway, World

W0 = WorkerId("w0")


@pytest.fixture
def world() -> World:
    world = World()
    world.live(1.0)
    return world


def followers(world: World) -> list[Gateway]:
    return [gateway for gateway in world.gateways if gateway is not world.holder]


def roles(world: World) -> list[str]:
    return [gateway.desks.statuses[0].role for gateway in world.gateways]


def finish_all(world: World) -> None:
    """Let all that runs be done, until nothing waits; nothing was to be rejected."""
    for _ in range(200):
        for gateway in world.gateways:
            for leg in tuple(gateway.legs):
                gateway.end(leg, "done")
        world.settle()
        if not any(gateway.waiting for gateway in world.gateways):
            assert not any(gateway.rejected for gateway in world.gateways)
            return
    raise AssertionError([gateway.waiting for gateway in world.gateways])


def test_one_gateway_decides_and_the_others_follow(world: World) -> None:
    assert sorted(roles(world)) == ["following", "following", "leading"]


def test_a_request_of_any_gateway_is_started_by_the_holder(world: World) -> None:
    for gateway in world.gateways:
        gateway.submit(f"r-{gateway.name}")
    world.settle()
    assert [len(gateway.legs) for gateway in world.gateways] == [1, 1, 1]
    finish_all(world)


def test_slots_are_counted_once_for_all(world: World) -> None:
    for number in range(12):
        world.gateways[number % 3].submit(f"r{number}")
    world.settle()
    assert [world.running(worker) for worker in world.workers] == [2, 2]
    finish_all(world)
    assert sum(sum(gateway.ended.values()) for gateway in world.gateways) == 12


def test_two_clients_may_choose_one_id_at_two_gateways(world: World) -> None:
    for gateway in world.gateways:
        gateway.submit("same")
    world.settle()
    assert [list(gateway.legs) for gateway in world.gateways] == [["same/0"]] * 3
    finish_all(world)


def test_tenants_have_their_turns_across_gateways() -> None:
    world = World(2, {"w0": 1})
    world.live(1.0)
    for number in range(6):
        world.gateways[0].submit(f"crowd{number}", tenant="crowd")
    world.settle()
    world.gateways[1].submit("one", tenant="other")
    world.settle()
    for _ in range(2):
        (leg,) = world.legs
        next(gateway for gateway in world.gateways if leg in gateway.legs).end(leg, "done")
        world.settle()
        if world.gateways[1].legs:
            break
    assert list(world.gateways[1].legs) == ["one/0"]


def test_a_killed_holder_is_followed_by_another_that_loses_nothing(world: World) -> None:
    for number in range(12):
        followers(world)[number % 2].submit(f"r{number}")
    world.settle()
    running = set(world.legs)
    world.kill(world.holder)
    for number in range(12, 16):
        world.gateways[number % 2].submit(f"r{number}")
    died_at = world.now
    while "leading" not in roles(world):
        world.turn()
        world.settle()
    assert world.now - died_at <= 3.0
    assert set(world.legs) == running, "what ran before runs on"
    finish_all(world)
    assert sum(sum(gateway.ended.values()) for gateway in world.gateways) == 16


def test_slots_of_a_killed_gateway_are_free_again(world: World) -> None:
    lost, other = followers(world)
    for number in range(6):
        lost.submit(f"lost{number}")
    world.settle()
    other.submit("r")
    world.settle()
    assert not other.legs
    world.kill(lost)
    world.live(3.0)
    assert list(other.legs) == ["r/0"]


def test_a_new_holder_waits_for_those_that_live_for_as_long_as_they_live(world: World) -> None:
    silent, other = followers(world)
    for number in range(4):
        silent.submit(f"r{number}")
    world.settle()
    world.kill(world.holder)
    world.gateways.sort(key=lambda one: one is silent)  # the other one is the first to look at the lease
    other.submit("waits")
    for _ in range(60):
        world.turn(0.1)
        world.post()
        world.network.clear()  # nothing arrives
    assert roles(world) == ["collecting", "following"]
    world.kill(silent)
    world.live(DEAD_AFTER_S + 2 * BEAT_S)
    assert roles(world) == ["leading"]
    assert list(other.legs) == ["waits/0"]


def test_a_gateway_that_does_not_have_the_model_is_not_waited_for() -> None:
    world = World(2)
    world.gateways.append(Gateway(world, "stranger", ()))
    world.live(1.0)
    world.gateways[0].submit("r")
    world.settle()
    assert list(world.gateways[0].legs) == ["r/0"]


def test_what_waits_is_started_once_though_it_is_told_twice(world: World) -> None:
    """As by one that sees the lease change hands, and is summoned a moment later."""
    gateway = followers(world)[0]
    for number in range(12):
        gateway.submit(f"r{number}")
    for _ in range(2):
        world.begin_again(gateway)
        world.post()
        world.deliver(gateway.name, world.holder.name)
    world.settle()
    assert [world.running(worker) for worker in world.workers] == [2, 2]
    finish_all(world)


@pytest.mark.parametrize("field", ["epoch", "session", "number"])
def test_effects_of_another_time_are_refused(world: World, field: str) -> None:
    gateway = followers(world)[0]
    world.holder.submit("x")
    for number in range(8):
        gateway.submit(f"r{number}")
    world.settle()
    running = set(gateway.legs)
    epoch = gateway.desks.statuses[0].epoch
    told = {"epoch": epoch, "session": 1, "number": 2} | {field: 99}
    start = Start(leg=LegId("r7/9"), request=RequestId("r7"), worker=W0, model=MODEL, attempt=10)
    late = Effects(MODEL, told["epoch"], told["session"], told["number"], effects=(start,))
    gateway.carry_out(gateway.desks.receive(world.holder.name, late, world.now))
    world.settle()
    assert set(gateway.legs) == running
    stranger = ReplicaId("stranger")
    gateway.carry_out(gateway.desks.receive(stranger, Effects(MODEL, epoch, 1, 1, effects=(start,)), world.now))
    assert set(gateway.legs) == running
    finish_all(world)


def test_a_lost_message_is_noticed_and_everything_told_again(world: World) -> None:
    gateway = followers(world)[0]
    for number in range(6):
        gateway.submit(f"r{number}")
    world.post()
    world.network.clear()  # the holder hears nothing of them
    world.settle()
    assert not gateway.legs
    world.live(0.8)
    assert len(gateway.legs) == 4
    for leg in tuple(gateway.legs):
        gateway.end(leg, "done")
    world.post()
    for link in world.network:  # the holder hears, its answer is lost
        while world.network[link]:
            world.deliver(*link)
    world.post()
    world.network.clear()
    assert not gateway.legs
    world.live(1.2)
    assert len(gateway.legs) == 2
    finish_all(world)


def test_a_holder_that_was_paused_does_nothing_with_a_lease_that_is_over(world: World) -> None:
    paused = world.holder
    world.gateways.remove(paused)
    world.live(3.0)
    assert world.holder is not paused
    for number in range(4):
        world.gateways[number % 2].submit(f"r{number}")
    world.settle()
    world.gateways.append(paused)
    paused.submit("late")
    assert not paused.legs
    world.live(1.0)
    assert not paused.legs
    finish_all(world)


def test_a_client_who_goes_while_nobody_decides_ends_its_leg_at_once(world: World) -> None:
    gateway = followers(world)[0]
    gateway.submit("r")
    world.settle()
    world.kill(world.holder)
    gateway.cancel(RequestId("r"))
    assert not gateway.legs
    world.live(3.0)
    assert not gateway.legs
    assert not gateway.desks.knows(RequestId("r"))


def test_a_start_that_nobody_wants_any_more_frees_its_slot() -> None:
    world = World(2, {"w0": 1})
    world.live(1.0)
    (gateway,) = followers(world)
    gateway.submit("r")
    world.post()
    world.deliver(gateway.name, world.holder.name)
    world.post()  # the start is under way
    gateway.cancel(RequestId("r"))
    world.settle()
    assert not gateway.legs
    world.holder.submit("next")
    world.settle()
    assert list(world.holder.legs) == ["next/0"]


def test_without_redis_each_decides_alone_with_a_share_of_the_slots() -> None:
    world = World(3, {"w0": 6})
    world.live(1.0)
    world.is_redis_up = False
    for gateway in world.gateways:
        for number in range(6):
            gateway.submit(f"{gateway.name}-{number}")
    world.is_strict = False  # the holder may have used all slots before it knew
    world.live(3.0)
    assert roles(world) == ["alone"] * 3
    world.is_strict = True
    while world.running(W0) > 6:
        gateway = max(world.gateways, key=lambda one: len(one.legs))
        gateway.end(next(iter(gateway.legs)), "done")
    for _ in range(10):
        for gateway in world.gateways:
            for leg in tuple(gateway.legs):
                gateway.end(leg, "done")
            assert len(gateway.legs) <= 2
    assert not any(gateway.waiting for gateway in world.gateways)


def test_when_redis_is_back_one_decides_again_and_nothing_is_lost_or_doubled(world: World) -> None:
    world.is_redis_up = False
    world.is_strict = False
    for gateway in world.gateways:
        for number in range(6):
            gateway.submit(f"{gateway.name}-{number}")
    world.live(3.0)
    running = set(world.legs)
    world.is_redis_up = True
    world.live(1.2)
    assert sorted(roles(world)) == ["following", "following", "leading"]
    assert running <= set(world.legs)
    finish_all(world)
    assert sum(sum(gateway.ended.values()) for gateway in world.gateways) == 18


def test_one_slot_is_left_to_each_however_many_they_are() -> None:
    world = World(3, {"w0": 2})
    world.live(1.0)
    world.is_redis_up = False
    world.is_strict = False
    world.live(3.0)
    for gateway in world.gateways:
        gateway.submit(f"r-{gateway.name}")
    assert [len(gateway.legs) for gateway in world.gateways] == [1, 1, 1]


def test_a_worker_that_any_gateway_drains_gets_no_work(world: World) -> None:
    gateway = followers(world)[0]
    world.tell_worker(gateway, W0, is_draining=True)
    world.settle()
    for number in range(6):
        gateway.submit(f"r{number}")
    world.settle()
    assert world.running(W0) == 0
    world.kill(gateway)
    world.live(3.0)
    for number in range(6):
        world.gateways[0].submit(f"s{number}")
    world.settle()
    assert world.running(W0) == 2


def test_how_a_leg_failed_is_told_to_the_next_holder(world: World) -> None:
    gateway = followers(world)[0]
    gateway.submit("r")
    world.settle()
    world.kill(world.holder)
    gateway.end(LegId("r/0"), "refused")
    world.live(3.0)
    assert gateway.ended[RequestId("r")] == 1, "a refused request is not run again"
    assert not gateway.legs


@pytest.fixture
def mixed() -> tuple[World, Gateway]:
    """Two gateways that share ``MODEL``, and have a model ``own`` each; and the one of them that does not decide."""
    world = World(2, {"w0": 1, "own": 2})
    world.live(1.0)
    world.is_strict = False  # of `own` there is one each
    for gateway in world.gateways:
        world.tell_worker(gateway, WorkerId("own"), model="own")
    return world, followers(world)[0]


def test_a_request_falls_back_from_a_shared_model_to_one_that_is_not(mixed: tuple[World, Gateway]) -> None:
    world, gateway = mixed
    world.holder.submit("first")
    gateway.submit("patient", (MODEL, "own"), queue_timeout=1.0)
    world.live(2.0)
    assert gateway.legs == {"patient/0": "own"}
    finish_all(world)


def test_a_request_falls_back_to_a_shared_model_and_its_legs_go_on_counting(mixed: tuple[World, Gateway]) -> None:
    world, gateway = mixed
    gateway.submit("r", ("own", MODEL))
    for number in range(100):  # attempts
        gateway.end(LegId(f"r/{number}"), "hurried")
    world.settle()
    assert gateway.legs == {"r/100": "w0"}
    finish_all(world)


@pytest.mark.parametrize("models", [(MODEL, "own"), ("own", MODEL)])
def test_a_refused_request_falls_back_nowhere(mixed: tuple[World, Gateway], models: tuple[str, str]) -> None:
    world, gateway = mixed
    gateway.submit("r", models)
    world.settle()
    gateway.end(LegId("r/0"), "refused")
    world.settle()
    assert not gateway.legs
    assert [reject.why for reject in gateway.rejected] == ["failed"]
    assert not gateway.desks.knows(RequestId("r"))


def test_tokens_are_told_together() -> None:
    world = World(2)
    world.live(1.0)
    (gateway,) = followers(world)
    gateway.submit("r")
    world.settle()
    leg = LegId("r/0")
    gateway.on(FirstToken(leg=leg, now=world.now))
    for _ in range(100):
        gateway.on(Tokens(leg=leg, num=1, now=world.now))
    (messages,) = gateway.desks.take_letters().values()
    (told,) = messages
    assert [type(event).__name__ for event in told.events] == ["FirstToken", "Tokens"]  # type: ignore[union-attr]
    assert told.events[1].num == 100  # type: ignore[union-attr]


def test_slots_taken_by_all_are_known_to_each(world: World) -> None:
    for number in range(6):
        world.gateways[number % 3].submit(f"r{number}")
    world.settle()
    world.live(0.8)
    assert [gateway.desks.num_running(W0) for gateway in world.gateways] == [2, 2, 2]
    assert sum(gateway.desks.num_running_here(W0) for gateway in world.gateways) == 2


def test_a_model_that_is_not_shared_is_decided_here() -> None:
    world = World(2, {"w0": 1}, shared=())
    world.is_strict = False  # nobody counts for both
    for gateway in world.gateways:
        gateway.submit(f"r-{gateway.name}")
        assert gateway.desks.models == ()
        assert gateway.desks.num_waiting(ModelName(MODEL)) == 0


def test_a_request_that_was_cut_for_another_goes_on_under_the_next_holder() -> None:
    world = World(3, {"w0": 1})
    world.live(1.0)
    hog, _ = followers(world)
    hog.submit("hog", tenant="hog", is_pinned=False)
    world.settle()
    hog.on(FirstToken(leg=LegId("hog/0"), now=world.now))
    hog.submit("light", tenant="light")
    world.live(1.2)
    hog.on(Tokens(leg=LegId("hog/0"), num=5000, now=world.now))
    world.live(1.2)
    assert hog.cut == ["hog/0"], "it is told to end"
    world.kill(world.holder)
    hog.end(LegId("hog/0"), "aborted")
    world.live(3.0)
    assert list(hog.legs) == ["light/0"]
    hog.end(LegId("light/0"), "done")
    world.live(1.2)
    assert list(hog.legs) == ["hog/1"]
    finish_all(world)


def test_what_waits_is_started_once_when_an_end_was_lost() -> None:
    world = World(2, {"w0": 1})
    world.live(1.0)
    (gateway,) = followers(world)
    gateway.submit("first")
    gateway.submit("second")
    world.settle()
    gateway.end(LegId("first/0"), "done")
    world.post()
    world.network.clear()
    world.live(1.2)
    assert list(gateway.legs) == ["second/0"]
    assert not gateway.rejected
    finish_all(world)


def test_a_hog_does_not_start_even_when_the_holder_is_killed() -> None:
    world = World(4, {"w0": 1})
    world.live(1.0)
    hog, light, _ = followers(world)
    world.gateways.sort(key=lambda one: one in (hog, light))  # they are the last to look at the lease
    for number in range(4):
        hog.submit(f"hog{number}", tenant="hog")
    world.settle()
    hog.on(FirstToken(leg=LegId("hog0/0"), now=world.now))
    hog.on(Tokens(leg=LegId("hog0/0"), num=20_000, now=world.now))
    world.live(0.4)
    light.submit("light", tenant="light")
    for _ in range(2):
        world.kill(world.holder)
        world.live(3.2)
    hog.end(LegId("hog0/0"), "done")
    world.settle()
    assert list(light.legs) == ["light/0"], "who had nothing is first, though the others wait for longer"
    view = world.holder.desks.fairness_view(MODEL, world.now)
    assert max(view.tenants, key=lambda one: one.counter).tenant == "hog"


def test_how_a_model_is_shared_is_known_to_all_and_how_long_ago_it_was_told(world: World) -> None:
    holder, gateway = world.holder, followers(world)[0]
    gateway.submit("r", tenant="acme")
    world.settle()
    world.live(0.4)
    world.kill(holder)
    view = gateway.desks.fairness_view(MODEL, world.now + 0.3)
    assert [(one.tenant, one.running) for one in view.tenants] == [("acme", 1)]
    assert (view.holder, round(view.age, 3)) == (holder.name, 0.3)
    assert gateway.desks.waste_left(MODEL) is None


def test_learned_values_of_another_time_are_refused(world: World) -> None:
    gateway = followers(world)[0]
    before = gateway.desks.fairness_view(MODEL, world.now)
    memory = World.scheduler().memory(MODEL, 1)
    for sender, epoch in ((ReplicaId("stranger"), gateway.desks.statuses[0].epoch), (world.holder.name, 0)):
        gateway.desks.receive(sender, Learned(MODEL, epoch, memory), world.now + 1)
    assert gateway.desks.fairness_view(MODEL, world.now) == before


def twelve_models(num_gateways: int) -> tuple[list[ModelName], World]:
    """Return gateways that share twelve models of one worker each."""
    models = [ModelName(f"m{number}") for number in range(12)]
    world = World(num_gateways, {}, shared=models)
    for number, model in enumerate(models):
        world.workers[WorkerId(f"w{number}")] = 1
        for gateway in world.gateways:
            world.tell_worker(gateway, WorkerId(f"w{number}"), model=model)
    return models, world


def test_leases_are_spread_over_the_gateways_and_stay_where_they_are() -> None:
    models, world = twelve_models(3)
    world.live(0.8)
    assert {holder for _, holder, _ in world.leases.values()} == {world.gateways[0].name}
    world.live(SETTLED_S + 12 * BEAT_S)
    spread = {model: holder for model, (_, holder, _) in world.leases.items()}
    assert set(spread.values()) == {gateway.name for gateway in world.gateways}
    assert spread == {model: best_of(model, [gateway.name for gateway in world.gateways]) for model in models}
    epochs = {model: epoch for model, (epoch, _, _) in world.leases.items()}
    world.live(10 * SETTLED_S)
    assert epochs == {model: epoch for model, (epoch, _, _) in world.leases.items()}, "nothing moves any more"


def test_at_most_one_lease_is_handed_over_with_a_beat() -> None:
    _, world = twelve_models(2)
    before = dict(world.leases)
    for _ in range(30):
        world.live(BEAT_S)
        moved = [model for model in before if world.leases[model][0] != before[model][0]]
        assert len(moved) <= 1
        before = dict(world.leases)


def test_a_lease_is_handed_over_without_a_pause_and_nothing_is_lost() -> None:
    world = World(3)
    world.live(0.8)
    assert best_of(MODEL, [gateway.name for gateway in world.gateways]) != world.holder.name, "choose other names"
    for number in range(12):
        world.gateways[number % 3].submit(f"r{number}")
    world.settle()
    first, running = world.holder, set(world.legs)
    while world.holder is first:
        world.live(BEAT_S)  # in which one always leads
    assert set(world.legs) == running
    assert world.now <= SETTLED_S + 4 * BEAT_S
    finish_all(world)
    assert sum(sum(gateway.ended.values()) for gateway in world.gateways) == 12
