"""S6: fairness cannot be gamed. A tenant gets its share by what engines produce for it, however it slices its requests.

All of it runs production's scheduler; what tenants were given is what the engines counted, not what the scheduler says.
"""

from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.chat import Call, Endpoint, Prefix, Role
from core.errors import InvalidRequest
from core.ids import ModelName, RequestId, TenantId, new_request_id
from gateway.auth import Principal
from gateway.requests import read_call
from routing.catalog import Catalog, Model
from routing.fairness.policy import Fairness
from tests.fakes.tenancy import key, tenant
from tests.security.town import FAIRNESS, MODEL, Town

STEPS = 1500
HONEST = TenantId("honest")
GREEDY = TenantId("greedy")

Attack = Callable[[Town], Iterator[None]]
"""Acts once per step, from its first ``next`` on."""


def keep_waiting(town: Town, of: str, at_least: int, **more: object) -> None:
    """Submit until so many requests of the tenant wait."""
    while town.waiting(of) < at_least:
        town.submit(of, **more)  # type: ignore[arg-type]


def play(attack: Attack, *, steps: int = STEPS, fairness: Fairness = FAIRNESS) -> Town:
    """Let the attack run beside a tenant that plainly always has requests waiting."""
    town = Town(fairness=fairness)
    acting = attack(town)
    for _ in range(steps):
        keep_waiting(town, HONEST, 2 * town.slots)
        next(acting)
        town.step()
    return town


def honest(town: Town) -> Iterator[None]:
    while True:
        keep_waiting(town, GREEDY, 4)
        yield


def in_many_programs(town: Town) -> Iterator[None]:
    """A program, or a session, for each request: each seems new, and none has had anything yet."""
    names = count()
    while True:
        keep_waiting(town, GREEDY, 4)
        for _ in range(3):
            if town.waiting(GREEDY) < 60:
                town.submit(GREEDY, program=f"p{next(names)}")
        yield


def in_a_crowd(town: Town) -> Iterator[None]:
    """Hundreds at once, as if each were urgent."""
    while True:
        keep_waiting(town, GREEDY, 100, rank=0)
        yield


def in_crumbs(town: Town) -> Iterator[None]:
    """Answers that are over before anybody may cut them."""
    while True:
        keep_waiting(town, GREEDY, 8, length=FAIRNESS.quantum - 1)
        yield


def that_lie_of_their_length(town: Town) -> Iterator[None]:
    """Now a single token is asked for, now a million, and forty come; prompts are larger than their bytes look."""
    for number in count():
        keep_waiting(town, GREEDY, 4, estimate=1 if number % 2 else 10**6, prompt=80, told=1)
        yield


def that_leave_early(town: Town) -> Iterator[None]:
    """Leave when the answer is nearly there, and when it has not begun."""
    mine: list[RequestId] = []
    while True:
        while town.waiting(GREEDY) < 4:
            mine.append(town.submit(GREEDY, length=60))
        if len(mine) > 8:
            town.cancel(mine.pop(7))
        for request in [one for one in mine if town.jobs[one].delivered > 55]:
            town.cancel(request)
            mine.remove(request)
        yield


def that_come_and_go(town: Town) -> Iterator[None]:
    """Away until credit is there, then all at once, over and over."""
    while True:
        for _ in range(40):
            yield
        for _ in range(10):
            town.submit(GREEDY)
        for _ in range(20):
            yield


def that_come_whenever_nobody_looks(town: Town) -> Iterator[None]:
    """An empty queue, again and again, so that each arrival is lifted anew."""
    while True:
        if not town.waiting(GREEDY):
            town.submit(GREEDY, length=60)
        yield


def that_must_not_be_cut(town: Town) -> Iterator[None]:
    """Requests that no engine can go on with."""
    while True:
        keep_waiting(town, GREEDY, 4, is_pinned=True, length=60)
        yield


def in_a_hurry(town: Town) -> Iterator[None]:
    """All are late, read by somebody, and the last step of a run that began long ago."""
    while True:
        keep_waiting(
            town, GREEDY, 8, rank=0, program="old", deadline_s=0.01, role=Role(10**6, 0.0), is_urgent=True,
            prefixes=(Prefix(1, 1000),),
        )  # fmt: skip
        yield


ATTACKS: list[Attack] = [
    in_a_hurry, in_many_programs, in_a_crowd, in_crumbs, that_lie_of_their_length, that_leave_early, that_come_and_go,
    that_come_whenever_nobody_looks, that_must_not_be_cut,
]  # fmt: skip


def test_two_tenants_that_ask_alike_get_alike() -> None:
    town = play(honest)

    assert abs(town.given[GREEDY] - town.given[HONEST]) <= town.bound / 2
    assert town.given[GREEDY] + town.given[HONEST] >= 2 * STEPS * town.slots * 0.95


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("policy", ["vtc-pc", "vtc"])
def test_no_slicing_of_requests_gets_more_than_a_share(attack: Attack, policy: str) -> None:
    town = play(attack, fairness=msgspec.structs.replace(FAIRNESS, policy=policy))

    assert town.given[GREEDY] - town.given[HONEST] <= town.bound
    assert town.bound < 0.2 * sum(town.given.values()), "else nothing is shown"


@pytest.mark.parametrize("attack", [in_a_crowd, in_many_programs, that_come_and_go, in_a_hurry])
def test_hurry_gets_no_more_than_a_share(attack: Attack) -> None:
    """Targets let a request go before its turn, and not for a tenant that is ahead."""
    town = play(attack, fairness=msgspec.structs.replace(FAIRNESS, targets=(0.05, 0.05, 0.05), rescue_share=1.0))

    assert town.given[GREEDY] - town.given[HONEST] <= town.bound


def test_where_first_come_is_first_served_a_crowd_gets_it_all() -> None:
    """Else the tests above would show nothing."""
    town = play(in_a_crowd, fairness=msgspec.structs.replace(FAIRNESS, policy="fcfs"))

    assert town.given[GREEDY] - town.given[HONEST] > 4 * town.bound


def test_a_tenant_with_half_the_weight_gets_half_as_much_however_many_it_seems() -> None:
    def light(town: Town) -> Iterator[None]:
        names = count()
        while True:
            keep_waiting(town, GREEDY, 8, weight=0.5, program=f"p{next(names)}")
            yield

    town = play(light)

    assert town.given[GREEDY] / 0.5 - town.given[HONEST] <= town.bound / 0.5


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_no_mixture_of_tricks_gets_more_than_a_share(data: st.DataObject) -> None:
    """Whatever it does, step by step; the sizes are bounded, as keys' ceilings bound them."""
    tricks: list[dict[str, Any]] = data.draw(st.lists(_TRICK, min_size=1, max_size=12))

    def mixed(town: Town) -> Iterator[None]:
        mine: list[RequestId] = []
        while True:
            for trick in tricks:
                for _ in range(trick["crowd"]):
                    if len(town.jobs) < 4000:
                        asked = {
                            name: value for name, value in trick.items() if name not in {"crowd", "leaves", "away"}
                        }
                        mine.append(town.submit(GREEDY, **asked))
                for _ in range(min(trick["leaves"], len(mine))):
                    town.cancel(mine.pop(len(mine) // 2))
                for _ in range(1 + trick["away"]):
                    yield

    town = play(mixed, steps=500)

    assert town.given[GREEDY] - town.given[HONEST] <= town.bound


_TRICK = st.fixed_dictionaries(
    {
        "crowd": st.integers(0, 6),
        "leaves": st.integers(0, 3),
        "away": st.sampled_from([0, 0, 1, 5, 40]),
        "length": st.integers(1, 60),
        "prompt": st.integers(1, 60),
        "told": st.sampled_from([1, 10, 1000]),
        "estimate": st.sampled_from([1, 60, 10**6]),
        "program": st.sampled_from(["", "a", "b", "c"]),
        "rank": st.integers(0, 2),
        "is_pinned": st.booleans(),
        "is_urgent": st.booleans(),
        "deadline_s": st.sampled_from([None, 0.01, 5.0]),
        "role": st.sampled_from([None, Role(10**6, 0.0), Role(0.0, 60.0)]),
        "prefixes": st.sampled_from([(), (Prefix(1, 1000),), (Prefix(1, 1000), Prefix(2, 2000))]),
    }
)


def test_who_leaves_pays_for_what_was_produced_and_for_nothing_else() -> None:
    town = Town(slots=1)
    first = town.submit(GREEDY, length=1000, estimate=10**6)
    waits = town.submit(GREEDY, prompt=500)
    for _ in range(50):
        town.step()
    town.cancel(waits)
    town.cancel(first)
    for _ in range(3):
        town.step()

    assert town.charged(GREEDY) == town.given[GREEDY] == 10 + 2 * town.jobs[first].delivered


def test_a_prompt_is_charged_as_the_engine_found_it() -> None:
    town = Town(slots=1)
    town.submit(GREEDY, prompt=700, told=3, length=5)
    for _ in range(10):
        town.step()

    assert town.charged(GREEDY) == town.given[GREEDY] == 700 + 2 * 5


def test_what_our_own_cuts_cost_is_nobody_s_to_pay() -> None:
    town = Town(slots=2)
    for _ in range(4):
        town.submit(GREEDY, length=600)
    for _ in range(200):
        town.step()
    town.submit(HONEST)
    for _ in range(2000):
        town.step()

    assert town.preempted > 0
    assert town.charged(GREEDY) == town.given[GREEDY]
    assert town.charged(HONEST) == town.given[HONEST]


# Who a request belongs to


def call_of(caller: Principal, headers: dict[bytes, bytes] | None = None, **more: object) -> Call:
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], **more}
    raw = msgspec.json.encode(body)
    catalog = Catalog((Model(name=ModelName(MODEL)),))
    return read_call(Endpoint.CHAT, raw, headers or {}, request_id=new_request_id(), principal=caller, catalog=catalog)


@pytest.mark.parametrize(
    "more",
    [
        {"user": "ann"},
        {"safety_identifier": "ann"},
        {"forebay": {"session": "s1"}},
        {"forebay": {"program": "p1", "run": "r1", "stage": "t1"}},
        {"forebay": {"end_user": "honest"}},
        {"prompt_cache_key": "x", "metadata": {"tenant": "honest"}},
        {"priority": -1000},
    ],
)
def test_a_request_belongs_to_the_tenant_of_its_key_whatever_it_says(more: dict[str, object]) -> None:
    owner = tenant("acme", weight=0.5)
    for name in ("first", "second"):  # two keys of one tenant are one tenant
        caller = Principal.of(key(f"fbk_0123456789-{name}", id=name), owner)
        call = call_of(caller, {b"x-forebay-session": b"s2"}, **more)
        assert (call.context.tenant, call.context.weight) == ("acme", 0.5)
        assert "priority" not in call.body


@pytest.mark.parametrize("name", ["weight", "tenant", "priority", "credit"])
def test_a_request_cannot_give_itself_weight_or_credit(name: str) -> None:
    caller = Principal.of(key(), tenant())
    with pytest.raises(InvalidRequest):
        call_of(caller, forebay={name: 5})
    with pytest.raises(InvalidRequest):
        call_of(caller, {b"x-forebay-" + name.replace("_", "-").encode(): b"5"})


def test_a_class_is_capped_by_the_key() -> None:
    caller = Principal.of(key(max_class="standard"), tenant())
    assert call_of(caller, forebay={"class": "interactive"}).context.urgency == "standard"
    assert call_of(caller, service_tier="priority").context.urgency == "standard"
    assert call_of(caller, forebay={"class": "batch"}).context.urgency == "batch"
