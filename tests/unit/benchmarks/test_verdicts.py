"""What the fairness benchmarks say of their targets, by cells whose outcome is known."""

from array import array

import pytest

from benchmarks import fairness, fairness_gpu, handover
from benchmarks.contention.arms import ARMS
from benchmarks.contention.replay import Answer
from benchmarks.contention.trace import HOG, URGENT, Ask
from benchmarks.loopback.processes import Cores


def light(wait: float, number: int) -> Answer:
    asked = float(number)
    return Answer(
        Ask(asked, "light", "Hi.", 1), asked, array("d", [asked + wait]), first=asked + wait, end=asked + wait, tokens=1
    )


def heavy(num_tokens: int, recomputed: int = 0) -> Answer:
    times = array("d", [0.1 * number for number in range(1, num_tokens + 1)])
    return Answer(
        Ask(0.0, HOG, "Hi.", num_tokens), 0.0, times, first=times[0], end=times[-1], tokens=num_tokens,
        prompt_tokens=10, recomputed=recomputed,
    )  # fmt: skip


def run_of(waits: dict[str, float], *, rounds: int = 2, lights: int = 160, recomputed: int = 0) -> fairness.Run:
    """A run whose light tenants wait that long in each arm, beside eight long answers of the hog."""
    run = fairness.Run([arm for arm in ARMS if arm.name in waits], rounds, [], Cores(0, 1))
    for cells in run.cells:
        for name, wait in waits.items():
            again = recomputed if name == fairness.OURS else 0
            hogs = [heavy(2000, again) for _ in range(8)]
            cells[name] = hogs + [light(wait, number) for number in range(lights)]
    return run


def test_targets_are_held_where_every_round_holds_them() -> None:
    lines, kept = fairness.verdicts(run_of({"fcfs": 40.0, "vtc": 10.0, "cap": 3.0, "vtc-pc": 1.0}))

    assert kept
    assert len([line for line in lines if line.startswith("target light_p")]) == 6
    assert any("the best other (cap)" in line for line in lines)


@pytest.mark.parametrize(
    ("waits", "missed"),
    [
        ({"fcfs": 7.0, "vtc": 7.0, "vtc-pc": 1.0}, "light_p99_vs_fcfs"),
        ({"fcfs": 40.0, "vtc": 2.5, "vtc-pc": 1.0}, "light_p90_vs_vtc"),
        ({"fcfs": 40.0, "vtc": 10.0, "cap": 1.5, "vtc-pc": 1.0}, "light_p90_vs_best_other"),
    ],
)
def test_a_target_is_missed_where_the_others_come_too_near(waits: dict[str, float], missed: str) -> None:
    lines, kept = fairness.verdicts(run_of(waits))

    assert not kept
    assert any(line.startswith(f"target {missed}:") and line.endswith("missed") for line in lines)


def test_a_p99_of_few_samples_is_not_judged_and_is_no_miss() -> None:
    lines, kept = fairness.verdicts(run_of({"fcfs": 40.0, "vtc": 10.0, "vtc-pc": 1.0}, rounds=1))

    assert kept
    assert "target light_p99: not judged: 160 samples, and a p99 needs 300" in lines


def test_work_done_twice_beyond_the_budget_is_a_miss() -> None:
    lines, kept = fairness.verdicts(run_of({"fcfs": 40.0, "vtc": 10.0, "vtc-pc": 1.0}, recomputed=300))

    assert not kept
    assert any(line.startswith("target waste:") and line.endswith("missed") for line in lines)


def test_an_answer_that_is_not_whole_is_a_miss_whatever_the_times_are() -> None:
    run = run_of({"fcfs": 40.0, "vtc": 10.0, "vtc-pc": 1.0})
    run.cells[0]["vtc-pc"][0].problem = "worker_lost"

    lines, kept = fairness.verdicts(run)

    assert not kept
    assert "1 not: ['vtc-pc: worker_lost']" in lines[-1]


def test_cells_come_back_from_the_store_as_they_were_but_for_texts() -> None:
    run = run_of({"vtc-pc": 1.0}, rounds=1, lights=2)
    answers = run.cells[0]["vtc-pc"]
    trace = [answer.ask for answer in answers]

    again = fairness._answers(trace, fairness._rows(answers))

    assert fairness.busy_rate(again) == pytest.approx(fairness.busy_rate(answers))
    assert [answer.is_whole for answer in again] == [True] * len(answers)
    assert len({answer.text for answer in again}) == 1  # of equal texts the digests are equal


def seen(arm: str, wait: float, rate: float = 1000.0) -> fairness_gpu.Seen:
    return fairness_gpu.Seen(
        arm=arm, urgent=[[wait] * 50 for _ in range(fairness_gpu.BLOCKS)], tokens_per_s=[rate], prompts_per_s=[0.0],
        tbt_p99=0.0, tbt_p999=0.0, longest_pause=0.0, cuts=0, recomputed=0, reused=None,
        engine={"num_preemptions_total": 0.0},
    )  # fmt: skip


def test_the_urgent_tenant_is_compared_with_the_engines_own_priorities_on_the_same_server() -> None:
    arms = [seen("vllm", 9.0), seen("vllm-priority", 4.0), seen("fcfs", 9.0, 990.0), seen("vtc-pc", 0.2, 980.0)]

    lines, kept = fairness_gpu.verdicts(arms + arms[::-1], [])

    assert kept
    assert [line.partition(":")[0] for line in lines if line.startswith("target")] == [
        "target urgent_p99", "target tokens_per_s", "target gateway_tokens_per_s", "target whole",
    ]  # fmt: skip


def test_the_slowest_round_on_the_gpu_has_to_keep_the_promise() -> None:
    first = [seen("vllm-priority", 4.0), seen("vtc-pc", 0.2, 990.0)]
    second = [seen("vllm-priority", 4.0), seen("vtc-pc", 0.2, 960.0)]

    lines, kept = fairness_gpu.verdicts(first + second, [])

    assert not kept
    assert "target tokens_per_s: want ≥ 0.97 × vllm-priority (vtc-pc), measured 0.975 [0.960–0.990], missed" in lines


def test_a_server_that_could_not_be_measured_is_a_miss() -> None:
    lines, kept = fairness_gpu.verdicts([seen("vllm", 9.0)], ["no time for the server '+offload'"])

    assert not kept
    assert lines[0].endswith("missed")


def test_what_the_engine_kept_is_counted_beyond_the_prompts_of_first_legs() -> None:
    one, two = heavy(10), heavy(10)
    two.prompt_tokens = 0  # cut off by the window: its prompt is taken to be as long as the others'
    counts = {
        "prefix_cache_queries_total": 120.0,
        "prefix_cache_hits_total": 90.0,
        "external_prefix_cache_hits_total": 0.0,
    }

    assert fairness_gpu._reused([one, two], counts) == pytest.approx(0.9)
    assert fairness_gpu._reused([one, two], {**counts, "prefix_cache_queries_total": 20.0}) is None


def test_every_arm_on_the_gpu_is_asked_the_same_under_prompts_of_its_own() -> None:
    one, other = fairness_gpu.GPU.trace("vtc"), fairness_gpu.GPU.trace("vtc-pc")

    assert [(ask.at, ask.tenant, ask.tokens) for ask in one] == [(ask.at, ask.tenant, ask.tokens) for ask in other]
    assert not {ask.prompt for ask in one} & {ask.prompt for ask in other}
    assert sum(ask.tenant == URGENT for ask in one) >= 300


def test_a_stream_that_is_not_whole_and_a_move_that_was_not_seen_are_misses() -> None:
    whole = handover.Step("drain", 4, 4, 1.0, {"drained": 2, "migrated": 1}, 0.5, 10, 3.0)
    kill = handover.Step("kill", 4, 3, 1.0, {}, 0.5, 0, 3.0)

    lines, kept = handover.verdicts([whole, kill], "")

    assert not kept
    assert [line.rpartition(" ")[2] for line in lines] == ["held", "missed", "held", "held", "missed"]
