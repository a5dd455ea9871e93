"""The order of those that run says what a look at every one of them would."""

from collections.abc import Iterable

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from core.ids import LegId, TenantId
from routing.fairness.account import MILLI, Account
from routing.fairness.policy import Fairness
from routing.fairness.preemption import choose_victim
from routing.fairness.programs import Ladder
from routing.fairness.running import STRIDE, Running
from routing.fairness.vtc import Vtc


class Leg(msgspec.Struct, eq=False):
    """A leg as the choice sees it."""

    name: str
    tokens: int = 0
    num_cuts: int = 0
    can_be_cut: bool = True

    def is_eligible(self, quantum: int) -> bool:
        return self.can_be_cut

    def resume_tokens(self) -> int:
        return self.tokens


def account(name: str, counter: int = 0) -> Account:
    one = Account(TenantId(name), Ladder(), is_flat=False)
    one.counter = counter
    return one


def in_order(running: Running[Leg], known: Iterable[Account], above: int, num: int) -> list[Account]:
    """Look at all of them."""
    ahead = [one for one in known if one.counter > above]
    return sorted(ahead, key=lambda one: one.counter, reverse=True)[:num]


AMOUNTS = st.sampled_from([1, 2, 2, 500, STRIDE // MILLI - 1, STRIDE // MILLI, STRIDE // MILLI + 1, 10_000])
STEPS = st.one_of(
    st.tuples(st.just("charge"), st.integers(0, 9), AMOUNTS),
    st.tuples(st.just("refund"), st.integers(0, 9), AMOUNTS),
    st.tuples(st.just("lift"), st.integers(0, 9), st.integers(0, 20_000)),
    st.tuples(st.just("start"), st.integers(0, 9), st.just(0)),
    st.tuples(st.just("end"), st.integers(0, 9), st.just(0)),
    st.tuples(st.just("look"), st.integers(0, 5), st.integers(0, 20_000)),
)


@given(st.lists(STEPS, max_size=120))
def test_those_furthest_ahead_are_found_as_if_all_were_looked_at(steps: list[tuple[str, int, int]]) -> None:
    running: Running[Leg] = Running()
    accounts = [account(str(number)) for number in range(10)]
    legs: dict[Account, list[LegId]] = {}
    for number, (step, which, amount) in enumerate(steps):
        one = accounts[which % len(accounts)]
        match step:
            case "charge":
                one.charge(amount * MILLI)
            case "refund":
                one.charge(-amount * MILLI)
            case "lift":
                one.lift(amount * MILLI)
            case "start":
                name = LegId(str(number))
                running.add(one, name, Leg(name))
                legs.setdefault(one, []).append(name)
            case "end":
                if one in legs:
                    running.remove(one, legs[one].pop())
                    if not legs[one]:
                        del legs[one]
            case _:
                above, num = amount * MILLI, which + 1
                assert running.furthest(above, num) == in_order(running, legs, above, num)
        assert len(running) == len(legs)


@given(
    tenants=st.lists(
        st.tuples(
            st.integers(0, 3_000),
            st.lists(st.tuples(st.integers(0, 400), st.integers(0, 4), st.booleans()), min_size=1, max_size=4),
        ),
        min_size=1,
        max_size=4,  # as many as the choice looks at
    ),
    threshold=st.integers(1, 1_000),
)
def test_the_leg_that_is_cut_has_the_best_score_of_all(
    tenants: list[tuple[int, list[tuple[int, int, bool]]]], threshold: int
) -> None:
    running: Running[Leg] = Running()
    everyone: list[tuple[Account, Leg]] = []
    for number, (counter, legs) in enumerate(tenants):
        one = account(str(number), counter * MILLI)
        for tokens, num_cuts, can_be_cut in legs:
            leg = Leg(f"{number}/{len(everyone)}", tokens, num_cuts, can_be_cut)
            running.add(one, LegId(leg.name), leg)
            everyone.append((one, leg))
    claimant, fairness = account("claimant", 100 * MILLI), Fairness(threshold=threshold)

    def score(one: Account, leg: Leg) -> float:
        return one.counter - MILLI * (leg.tokens / 2 + fairness.penalty * leg.num_cuts**2)

    able = [
        score(one, leg)
        for one, leg in everyone
        if leg.can_be_cut and one.counter > claimant.counter + MILLI * (threshold + leg.tokens)
    ]
    found = choose_victim(claimant, running, fairness)

    assert (found is None) == (not able)
    if found is not None:
        leg, cost = found
        assert cost == leg.tokens
        owner = next(one for one, other in everyone if other is leg)
        assert score(owner, leg) == max(able)


def test_the_order_survives_counters_being_made_smaller_all_at_once() -> None:
    running: Running[Leg] = Running()
    accounts = [account(str(number), 2**50 + number * 10 * STRIDE) for number in range(5)]
    for one in accounts:
        running.add(one, LegId(one.tenant), Leg(one.tenant))
    turns = Vtc(Fairness())
    turns.virtual = 2**50

    turns.rebase(accounts)

    assert running.furthest(15 * STRIDE, 9) == accounts[:1:-1]
    accounts[2].charge(100 * STRIDE)
    assert running.furthest(15 * STRIDE, 1) == [accounts[2]]


def test_the_order_does_not_grow_with_what_is_charged() -> None:
    running: Running[Leg] = Running()
    one = account("busy")
    running.add(one, LegId("leg"), Leg("leg"))

    for _ in range(1000):
        one.charge(STRIDE)

    assert len(running._heap) < 50


def test_tenants_that_come_and_go_leave_no_entries_behind() -> None:
    running: Running[Leg] = Running()
    stays = Account(TenantId("stays"), Ladder(), is_flat=False)
    running.add(stays, LegId("stays/0"), Leg("stays"))
    for number in range(200):
        short = Account(TenantId(f"t{number}"), Ladder(), is_flat=False)
        running.add(short, LegId(f"{number}/0"), Leg("short"))
        running.remove(short, LegId(f"{number}/0"))

    assert len(running._heap) <= 2 * len(running) + 20
