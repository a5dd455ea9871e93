"""What a policy promises over time, on an engine of one token a step: bounds, no starvation, no gain by tricks."""

import math

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from core.ids import ModelName
from routing.fairness.policy import Fairness, Policy
from tests.unit.routing.stepping import Job, Run, waits

M = ModelName("m")
EXAMPLES = settings().max_examples // 10  # few: each is a whole run
LONGEST_PROMPT = 40
LONGEST_ANSWER = 60
FREE = Fairness(threshold=40, credit=0, quantum=4, penalty=5, waste_share=1.0, waste_burst=100_000, interval=0.05)

jobs = st.lists(
    st.builds(
        Job,
        at=st.integers(0, 60),
        tenant=st.sampled_from("abc"),
        prompt=st.integers(1, LONGEST_PROMPT),
        answer=st.integers(1, LONGEST_ANSWER),
        program=st.sampled_from(["", "p", "q"]),
        rank=st.integers(0, 2),
    ),
    min_size=2,
    max_size=15,
)
crowds = st.lists(
    st.builds(
        Job,
        at=st.integers(0, 20),
        tenant=st.sampled_from("abc"),
        prompt=st.integers(1, LONGEST_PROMPT),
        answer=st.sampled_from([5, LONGEST_ANSWER]),
    ),
    min_size=8,
    max_size=16,
)


def bound(fairness: Fairness, slots: int) -> float:
    """Return how far apart two tenants' service may drift while both have a queue; DESIGN.md has the proof's sketch."""
    wq, wp = fairness.output_price, fairness.prompt_price
    resume = wp * (LONGEST_PROMPT + LONGEST_ANSWER)
    overrun = slots * wq * (2 * fairness.quantum + 1 * (math.ceil(slots / 2) + 1))
    return 2 * (fairness.threshold + resume + wp * LONGEST_PROMPT * slots + overrun) + fairness.credit


@given(crowd=crowds, slots=st.integers(1, 4), credit=st.sampled_from([0, 100]))
@settings(max_examples=EXAMPLES, deadline=None)
def test_preemption_bounds_the_difference_between_two_tenants_that_wait(
    crowd: list[Job], slots: int, credit: int
) -> None:
    fairness = msgspec.structs.replace(FREE, credit=credit)

    assert Run(crowd, fairness, slots=slots).max_gap <= bound(fairness, slots)


@given(crowd=crowds, slots=st.integers(1, 4), policy=st.sampled_from(["vtc", "vtc-pc"]))
@settings(max_examples=EXAMPLES, deadline=None)
def test_without_a_budget_for_waste_it_is_no_worse_than_vtc(crowd: list[Job], slots: int, policy: Policy) -> None:
    fairness = msgspec.structs.replace(FREE, policy=policy, waste_share=0.0, waste_burst=1)
    most = slots * (fairness.prompt_price * LONGEST_PROMPT + fairness.output_price * LONGEST_ANSWER)

    assert Run(crowd, fairness, slots=slots).max_gap <= 2 * most


@given(some=jobs, slots=st.integers(1, 3), kept=st.sampled_from([0, 50, 98]), share=st.sampled_from([0.02, 0.1]))
@settings(max_examples=EXAMPLES, deadline=None)
def test_waste_stays_within_its_share_and_a_burst(some: list[Job], slots: int, kept: int, share: float) -> None:
    fairness = msgspec.structs.replace(FREE, credit=500, waste_share=share, waste_burst=200)

    waste = Run(some, fairness, slots=slots, kept=kept).world.scheduler._books.models[M].line.waste

    context = LONGEST_PROMPT + LONGEST_ANSWER
    assert waste.wasted <= share * waste.useful + 2 * fairness.waste_burst + 2 * slots * context
    assert waste.held == 0


@given(some=jobs, slots=st.integers(1, 3), policy=st.sampled_from(["fcfs", "drr", "vtc", "vtc-pc", "priority"]))
@settings(max_examples=EXAMPLES, deadline=None)
def test_everyone_is_served_and_given_exactly_what_was_asked(some: list[Job], slots: int, policy: Policy) -> None:
    run = Run(some, msgspec.structs.replace(FREE, policy=policy, credit=500), slots=slots)

    assert run.given == {name: job.answer for name, job in run.jobs.items()}
    assert set(run.world.ended.values()) == {"leg"}


@given(some=jobs, slots=st.integers(1, 3), policy=st.sampled_from(["drr", "vtc", "vtc-pc", "priority"]))
@settings(max_examples=EXAMPLES, deadline=None)
def test_prices_are_a_matter_of_scale(some: list[Job], slots: int, policy: Policy) -> None:
    fairness = msgspec.structs.replace(FREE, policy=policy, credit=100)
    scaled = msgspec.structs.replace(
        fairness,
        prompt_price=fairness.prompt_price * 4,
        output_price=fairness.output_price * 4,
        threshold=fairness.threshold * 4,
        credit=fairness.credit * 4,
        penalty=fairness.penalty * 4,
    )

    assert Run(some, scaled, slots=slots).order == Run(some, fairness, slots=slots).order


@given(some=jobs, slots=st.integers(1, 3), policy=st.sampled_from(["fcfs", "drr", "vtc", "vtc-pc", "priority"]))
@settings(max_examples=EXAMPLES, deadline=None)
def test_names_of_tenants_do_not_matter(some: list[Job], slots: int, policy: Policy) -> None:
    fairness = msgspec.structs.replace(FREE, policy=policy, credit=100)
    renamed = [msgspec.structs.replace(job, tenant={"a": "z", "b": "a", "c": "m"}[job.tenant]) for job in some]

    assert Run(renamed, fairness, slots=slots).order == Run(some, fairness, slots=slots).order


@given(some=jobs, slots=st.integers(1, 3), policy=st.sampled_from(["drr", "vtc", "vtc-pc"]))
@settings(max_examples=EXAMPLES, deadline=None)
def test_programs_and_classes_gain_a_tenant_nothing(some: list[Job], slots: int, policy: Policy) -> None:
    """With requests that are alike, who is served when does not depend on how a tenant names its own."""
    fairness = msgspec.structs.replace(FREE, policy=policy, credit=100)
    alike = [msgspec.structs.replace(job, prompt=20, answer=30) for job in some]
    plain = [msgspec.structs.replace(job, program="", rank=0) for job in alike]

    split, whole = Run(alike, fairness, slots=slots), Run(plain, fairness, slots=slots)

    if policy != "vtc-pc":  # which of a tenant's own legs is cut may differ, and with it whose turn comes when
        assert [split.jobs[name].tenant for name in split.order] == [whole.jobs[name].tenant for name in whole.order]
    assert split.service == whole.service
    for tenant, found in waits(split).items():
        assert len(found) == len(waits(whole)[tenant])


@given(some=jobs, slots=st.integers(1, 3))
@settings(max_examples=EXAMPLES, deadline=None)
def test_what_is_cancelled_while_it_waits_gains_a_tenant_nothing(some: list[Job], slots: int) -> None:
    """Requests that are taken back in the step in which they came leave no trace in the order of the others."""
    fairness = msgspec.structs.replace(FREE, policy="vtc")
    busy = [Job(at=0, tenant="c", prompt=10, answer=150) for _ in range(slots + 2)]
    real = [
        *busy,
        *(msgspec.structs.replace(job, at=job.at + 1, tenant="ab"[index % 2]) for index, job in enumerate(some)),
    ]
    junk = [Job(at=job.at, tenant="a", prompt=5, answer=5, cancelled_at=job.at) for job in real[len(busy) :]]

    with_junk = Run([*real, *junk], fairness, slots=slots)
    without = Run(real, fairness, slots=slots)

    assert with_junk.service["a"] - without.service["a"] <= fairness.prompt_price * 5 * len(junk)


def test_a_crowd_delays_a_light_tenant_by_steps_and_not_by_answers() -> None:
    crowd = [Job(at=0, tenant="hog", prompt=20, answer=150) for _ in range(12)]
    light = [Job(at=40 + 30 * index, tenant="light", prompt=20, answer=10) for index in range(6)]
    settled = Fairness(threshold=100, credit=200, quantum=8, waste_share=0.5)

    def longest(policy: Policy) -> int:
        run = Run([*crowd, *light], msgspec.structs.replace(settled, policy=policy), slots=2)
        return max(waits(run)["light"])

    fcfs, vtc, ours = longest("fcfs"), longest("vtc"), longest("vtc-pc")

    assert ours <= 10
    assert vtc >= 5 * ours
    assert fcfs >= 3 * vtc
