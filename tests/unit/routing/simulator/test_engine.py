"""A modelled worker: how long steps take, what they bring, what memory does."""

from core.ids import LegId
from routing.simulator.engine import Engine, Job, ModelledWorker, StepTime, blocks_of
from routing.simulator.prefixes import PrefixCache

STEP = StepTime(base=1.0, per_sequence=0.1, per_kv_token=0.001, per_prefill_token=0.01)


def job(name: str, prompt: int, output: int, *, shared: tuple[int, ...] = (), owner: int = 1, block: int = 32) -> Job:
    return Job(LegId(name), owner, prompt, output, blocks_of(shared, owner, block))


def run(worker: ModelledWorker, stride: int = 1) -> list[tuple[float, list[tuple[LegId, int, str]]]]:
    """Step until nothing is left; return each step's seconds and what it brought."""
    steps: list[tuple[float, list[tuple[LegId, int, str]]]] = []
    while (seconds := worker.begin_step(stride)) is not None:
        steps.append((seconds, [(one.id, num, end) for one, num, end in worker.end_step()]))
    return steps


def test_a_step_takes_what_the_four_numbers_say() -> None:
    assert STEP.seconds(2, 1000, 50) == 1.0 + 0.2 + 1.0 + 0.5


def test_a_prompt_is_computed_in_chunks_and_the_first_token_comes_with_the_last() -> None:
    worker = ModelledWorker(Engine(step=StepTime(1.0, 0.1, 0.0, 0.01), chunk=100))
    worker.give(job("a", 250, 2))
    steps = run(worker)
    assert [round(seconds, 6) for seconds, _ in steps] == [2.0, 2.0, 1.6, 1.1]
    assert [found[0][1:] for _, found in steps] == [(0, ""), (0, ""), (1, ""), (1, "done")]


def test_what_runs_goes_on_while_a_prompt_is_computed() -> None:
    worker = ModelledWorker(Engine(chunk=100))
    worker.give(job("a", 10, 5))
    worker.begin_step(1)
    worker.end_step()
    worker.give(job("b", 150, 1, owner=2))
    worker.begin_step(1)
    assert [(one.id, num) for one, num, _ in worker.end_step()] == [("a", 1), ("b", 0)]


def test_more_requests_than_slots_wait_in_the_engine_first_come_first_served() -> None:
    worker = ModelledWorker(Engine(slots=1))
    worker.give(job("a", 10, 1))
    worker.give(job("b", 10, 1, owner=2))
    assert [found for _, found in run(worker)] == [[("a", 1, "done")], [("b", 1, "done")]]


def test_a_request_that_failed_is_computed_and_gives_nothing() -> None:
    worker = ModelledWorker(Engine())
    worker.give(job("a", 10, 0))
    assert [found for _, found in run(worker)] == [[("a", 0, "done")]]


def test_a_stride_takes_the_same_time_as_its_steps() -> None:
    def total(stride: int) -> tuple[float, int]:
        worker = ModelledWorker(Engine(step=STEP))
        worker.give(job("a", 50, 40))
        worker.give(job("b", 50, 20, owner=2))
        steps = run(worker, stride)
        return round(sum(seconds for seconds, _ in steps), 6), len(steps)

    exact, coarse = total(1), total(8)
    assert exact[0] == coarse[0]
    assert coarse[1] < exact[1] / 4


def test_a_cut_during_a_step_counts_at_its_end_and_gives_no_token() -> None:
    worker = ModelledWorker(Engine())
    worker.give(job("a", 10, 9))
    worker.begin_step(1)
    assert not worker.cut(LegId("a"))
    assert [(num, end) for _, num, end in worker.end_step()] == [(0, "aborted")]
    assert worker.begin_step(1) is None


def test_a_cut_between_steps_counts_at_once() -> None:
    worker = ModelledWorker(Engine())
    worker.give(job("a", 10, 9))
    assert worker.cut(LegId("a"))
    worker.give(job("b", 10, 9))
    worker.begin_step(1)
    worker.end_step()
    assert worker.cut(LegId("b"))
    assert worker.begin_step(1) is None


def test_what_a_cut_leg_leaves_behind_makes_its_return_cheap() -> None:
    worker = ModelledWorker(Engine())
    worker.give(job("a", 100, 50))
    for _ in range(21):
        worker.begin_step(1)
        worker.end_step()
    worker.cut(LegId("a"))
    again = job("b", 121, 29)
    worker.give(again)
    worker.begin_step(1)
    worker.end_step()
    assert again.num_prefilled == 121 - 112  # all but what does not fill 16 tokens


def test_a_leg_that_is_cut_often_finds_its_context_each_time() -> None:
    worker = ModelledWorker(Engine())
    context = 1000
    for number in range(6):
        leg = job(f"a{number}", context, 500, block=512)
        worker.give(leg)
        for _ in range(40):
            worker.begin_step(1)
            worker.end_step()
        worker.cut(leg.id)
        assert number == 0 or leg.num_prefilled <= 17
        context += leg.num_given
    assert worker.num_kv_tokens <= context


def test_without_kept_prefixes_a_return_computes_all_again() -> None:
    worker = ModelledWorker(Engine(keeps_prefixes=False))
    worker.give(job("a", 100, 50))
    worker.begin_step(1)
    worker.end_step()
    worker.cut(LegId("a"))
    assert worker.num_kv_tokens == 0
    again = job("b", 101, 49)
    worker.give(again)
    worker.begin_step(1)
    worker.end_step()
    assert again.num_prefilled == 101


def test_a_prompt_that_begins_like_anothers_is_computed_from_where_they_part() -> None:
    worker = ModelledWorker(Engine())
    worker.give(job("a", 100, 1, shared=(7, 8, 9)))
    run(worker)
    other = job("b", 100, 1, shared=(7, 8, 5), owner=2)
    worker.give(other)
    run(worker)
    assert other.num_prefilled == 100 - 64


def test_kept_blocks_give_way_to_what_runs_longest_unused_first() -> None:
    worker = ModelledWorker(Engine(kv_tokens=200))
    for owner in (1, 2):
        worker.give(job(f"a{owner}", 96, 1, owner=owner))
        run(worker)
    worker.give(job("c", 96, 1, owner=3))
    run(worker)
    second = job("b", 96, 1, owner=2)
    worker.give(second)
    run(worker)
    assert worker.num_kv_tokens <= 200
    assert second.num_prefilled < 96


def test_a_prompt_that_does_not_fit_beside_what_runs_waits_in_the_engine() -> None:
    worker = ModelledWorker(Engine(kv_tokens=200))
    worker.give(job("a", 150, 3))
    worker.give(job("b", 100, 1, owner=2))
    assert [[name for name, _, _ in found] for _, found in run(worker)] == [["a"], ["a"], ["a"], ["b"]]


def test_when_answers_outgrow_the_memory_the_youngest_starts_again_and_loses_no_token() -> None:
    worker = ModelledWorker(Engine(kv_tokens=200))
    old, young = job("a", 60, 60), job("b", 60, 60, owner=2)
    worker.give(old)
    worker.give(young)
    run(worker)
    assert worker.num_restarts == 1
    assert (old.num_given, young.num_given) == (60, 60)
    assert worker.begin_step(1) is None


def test_a_dead_process_has_lost_its_jobs_and_its_memory() -> None:
    worker = ModelledWorker(Engine(slots=1))
    worker.give(job("a", 50, 9))
    worker.give(job("b", 50, 9, owner=2))
    worker.begin_step(1)
    assert [one.id for one in worker.lose_all()] == ["a", "b"]
    assert (worker.begin_step(1), worker.num_kv_tokens) == (None, 0)


def test_a_held_block_is_never_evicted() -> None:
    cache = PrefixCache()
    blocks = [((1,), 10), ((2,), 10)]
    cache.add(blocks)
    assert cache.evict(20) == 0
    cache.release(blocks)
    assert cache.evict(5) == 10
    assert cache.hold_prefix(blocks) == (1, 10)  # the end went first
    assert (cache.num_tokens, cache.num_idle) == (10, 0)
