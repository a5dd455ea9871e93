"""Workers are killed, drained and restarted and tenants take slots from each other under a mixture of requests, and the
clients notice nothing but a pause."""

from pathlib import Path

from tests.e2e.disrupting import trial
from tests.e2e.plans import fake_plan, llamacpp_plan


async def test_two_hundred_answers_of_the_fake_engine_are_what_they_are_undisturbed() -> None:
    seen = await trial(fake_plan(), 200)
    print(f"\n{seen.summary()}")
    assert seen.control is not None
    for verdict in (seen.control, seen.disturbed):
        assert verdict.broken == []
        assert verdict.unfinished == []
        assert verdict.different == []
    assert seen.num_cut >= 20
    assert {"lost", "preempted"} <= set(seen.ended)


async def test_a_drained_worker_gives_its_streams_to_another_that_has_room() -> None:
    plan = fake_plan(itl_ms=30)._replace(at_once=3, acts=("drain", "restart", "drain"), pause_s=(0.2, 0.4))
    seen = await trial(plan, 12, num_quiet=1)
    print(f"\n{seen.summary()}")
    assert seen.disturbed.broken == []
    assert seen.disturbed.unfinished == []
    assert seen.disturbed.different == []
    assert seen.ended["drained"] >= 1


async def test_forty_answers_of_llamacpp_are_what_its_workers_said_whatever_becomes_of_them(tmp_path: Path) -> None:
    seen = await trial(llamacpp_plan(tmp_path), 40, num_quiet=0)
    print(f"\n{seen.summary()}")
    assert seen.disturbed.broken == []
    assert seen.disturbed.unfinished == []
    assert seen.seams == []
    assert seen.num_cut >= 5
