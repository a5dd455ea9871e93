"""What the workflow benchmarks say of their targets, by cells whose outcome is known."""

from pathlib import Path

import msgspec
import pytest

from benchmarks.dataflow import cells, chaos
from benchmarks.dataflow.cells import Run
from benchmarks.dataflow.engines import Stable
from benchmarks.dataflow.plans import chosen, full
from benchmarks.dataflow.seen import Done, Said, Seen
from benchmarks.dataflow.verdicts import bound, judged, table
from benchmarks.dataflow.workloads import App


def seen(jct: float, *, computed: float | None = None, chats: tuple[float, ...] = (), text: str = "t") -> Seen:
    """Two applications that take that long in the mean, and chats that take so long each."""
    apps = [Done("one", 0.0, jct - 0.1, text), Done("two", 1.0, 1.0 + jct + 0.1, text)]
    return Seen(apps, [Said(1.0, 1.0 + took / 2, 1.0 + took) for took in chats], computed)


def run_of(part: str, places: dict[tuple[int, str], list[Seen | None]]) -> Run:
    run = Run(chosen(full(), [part.partition("@")[0]]))
    run.cells = {(part, *place): found for place, found in places.items()}
    return run


def lines_of(run: Run) -> tuple[list[str], bool]:
    told = judged(run)
    return [line for line in told.lines if line.startswith("target")], told.held


def test_a_target_is_held_where_every_round_holds_it() -> None:
    run = run_of("chains", {(0, "good"): [seen(15.0), seen(14.5)], (0, "forebay"): [seen(10.0), seen(10.0)]})

    lines, held = lines_of(run)

    assert held
    assert lines[0] == "target chains: want ≥ 1.4 × the good client, RTT 0, measured 1.48 [1.45–1.50], held"


def test_one_round_that_falls_short_is_a_miss() -> None:
    run = run_of("chains", {(0, "good"): [seen(15.0), seen(13.0)], (0, "forebay"): [seen(10.0), seen(10.0)]})

    lines, held = lines_of(run)

    assert not held
    assert lines[0].endswith("missed")


def test_rounds_in_which_one_of_two_arms_failed_are_not_compared() -> None:
    run = run_of("chains", {(0, "good"): [seen(1.0), seen(15.0)], (0, "forebay"): [None, seen(10.0)]})

    assert lines_of(run)[0][0].endswith("measured 1.50 [1.50–1.50], held")


def test_a_cell_that_failed_is_a_miss_whatever_the_times_are() -> None:
    run = run_of("chains", {(0, "good"): [seen(15.0)], (0, "forebay"): [seen(10.0)]})
    run.problems.append("round 1 chains, RTT 0 ms, g1: Failed")

    lines, held = lines_of(run)

    assert not held
    assert lines[-1].endswith("measured a cell failed: round 1 chains, RTT 0 ms, g1: Failed, missed")


def test_an_output_that_did_not_come_is_a_miss() -> None:
    bad = seen(10.0)
    bad.apps[1].problem = "503"
    run = run_of("chains", {(0, "good"): [seen(15.0)], (0, "forebay"): [bad]})

    lines, held = lines_of(run)

    assert not held
    assert "chains forebay at 0 ms: two: 503" in lines[-1]


def test_the_gain_from_far_away_is_parted_into_that_of_scheduling_and_that_of_the_network() -> None:
    run = run_of(
        "chains",
        {(0, "good"): [seen(15.0)], (0, "forebay"): [seen(10.0)],
         (100, "good"): [seen(18.0)], (100, "forebay"): [seen(10.0)]},
    )  # fmt: skip

    shares = next(line for line in judged(run).lines if "of which scheduling" in line)

    assert shares == (
        "chains at RTT 100 ms: 1.80 [1.80–1.80] × `good`, of which scheduling 1.50 and the network 1.20, "
        "nothing promised"
    )


def test_prompt_tokens_are_compared_with_engines_in_turn() -> None:
    places: dict[tuple[int, str], list[Seen | None]] = {
        (0, "good"): [seen(10.0, computed=3000.0)],
        (0, "good-affinity"): [seen(10.0, computed=1100.0)],
        (0, "forebay"): [seen(10.0, computed=1500.0)],
    }

    told = judged(run_of("shared_prefix", places))

    assert told.held
    assert any("shared_prefix" in line and "2.00 [2.00–2.00], held" in line for line in told.lines)
    assert any("affinity over ours, nothing promised: 0.73" in line for line in told.lines)


def test_chats_are_judged_by_the_95th_percentile_of_all_rounds_and_applications_beside_them_by_their_mean() -> None:
    many = tuple(1.0 for _ in range(20))
    places: dict[tuple[int, str], list[Seen | None]] = {
        (0, "good-latency"): [seen(40.0, chats=many)],
        (0, "good"): [seen(10.0, chats=(9.0,) * 20)],
        (0, "forebay"): [seen(10.5, chats=(1.05,) * 20)],
    }

    lines, held = lines_of(run_of("mixed", places))

    assert held
    assert [line.partition(":")[0] for line in lines] == ["target mixed_chat_p95", "target mixed_jct", "target whole"]


def test_chats_that_wait_longer_are_a_miss() -> None:
    places: dict[tuple[int, str], list[Seen | None]] = {
        (0, "good-latency"): [seen(40.0, chats=(1.0,) * 20)],
        (0, "good"): [seen(10.0, chats=(9.0,) * 20)],
        (0, "forebay"): [seen(10.5, chats=(1.0,) * 18 + (1.2,) * 2)],
    }

    lines, held = lines_of(run_of("mixed", places))

    assert not held
    assert lines[0].endswith("missed")


def test_the_bound_of_a_chain_is_the_round_trip_over_the_call() -> None:
    assert bound(1.9, 0.244, 0.0, 0.0) == pytest.approx(1.128, abs=0.001)
    assert bound(0.1, 0.244, 0.001, 0.002) == pytest.approx(0.345 / 0.102)


def test_a_chain_is_judged_by_its_share_of_the_bound_with_the_overheads_that_were_measured() -> None:
    run = Run(chosen(full(), ["chain"]))
    zero, some = "chain@0s", "chain@0.1s"
    run.cells = {
        (zero, 0, "good"): [seen(64 * 0.002)],
        (zero, 0, "forebay"): [seen(64 * 0.004)],
        (some, 100, "good"): [seen(64 * 0.202)],
        (some, 100, "forebay"): [seen(64 * 0.104 + 0.1)],
    }

    lines, held = lines_of(run)

    assert held
    assert lines[0].startswith("target chain_0.1s_rtt100: want ≥ 0.95 × the bound, 1.94, measured 0.99")


def test_the_table_has_a_line_for_each_place_that_was_measured() -> None:
    run = run_of(
        "chains",
        {(0, "good"): [seen(15.0)], (0, "g1"): [None], (0, "forebay"): [seen(10.0, text="other")]},
    )  # fmt: skip

    lines = table(run)

    assert len(lines) == 4
    assert lines[2] == "| chains | 0 | good | 15.00 [15.00–15.00] | 1.50 [1.50–1.50] | 16.1 [16.1–16.1] | – | – | – |"
    assert lines[3].endswith("| 0 % |")


def test_cells_come_back_from_the_store_as_they_were(tmp_path: Path) -> None:
    store = tmp_path / "cells"
    one = seen(3.0, computed=5.0, chats=(1.0,))
    row = msgspec.json.encode({"key": "k", "seen": msgspec.to_builtins(one)}).decode()
    store.write_text(f"{row}\n{row[:20]}")  # the last line was cut off

    assert cells._kept(store) == {"k": one}
    assert cells._kept(None) == {}


async def test_arms_that_are_not_repeated_are_measured_in_the_last_round_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    async def measured(*place: object, is_cold: bool) -> Seen:
        return seen(1.0)

    monkeypatch.setattr(cells, "measured", measured)
    (part,) = chosen(full(), {"loop_tools"}, rtts={0})
    run = Run([part])

    async with Stable(None) as stable:
        await run.measure([part], 2, stable)

    have = {arm: [cell is not None for cell in found] for (_, _, arm), found in run.cells.items()}
    once, twice = [False, True], [True, True]
    assert have == {"good": twice, "langgraph": once, "g1": once, "forebay": twice}


def test_rounds_go_forward_and_backward_and_arms_that_share_a_vllm_follow_each_other() -> None:
    (part,) = chosen(full(), ["mixed"])
    (chains,) = chosen(full(), ["chains"])

    assert next(arm.name for _, _, arm in cells.places([part], 0)) == "good-latency"
    assert [arm.name for _, _, arm in cells.places([part], 1)] == ["forebay", "good-gateway", "good", "good-latency"]
    assert list(cells.places([chains], 1)) == list(cells.places([chains], 0))[::-1]


def app(name: str) -> App:
    return App(name, 0.0, (), "x", name)


def test_a_fifth_of_the_runs_is_cancelled_and_another_left() -> None:
    drawn = chaos.fates(tuple(app(f"a{number}") for number in range(10)), seed=4)

    assert sorted(drawn.values()) == ["cancelled"] * 2 + ["left alone"] * 6 + ["left by its client"] * 2


def test_a_run_that_is_lost_or_never_resolves_is_a_miss() -> None:
    good = chaos.Storm(seen(5.0), seen(6.0), {"left alone": {"done": 6}, "cancelled": {"cancelled": 2}}, 1)
    bad = chaos.Storm(seen(5.0), seen(6.0), {"left alone": {"done": 5, "never resolved": 1}, "cancelled": {}}, 1)

    assert chaos.verdicts(good)[1]
    lines, held = chaos.verdicts(bad)

    assert not held
    assert "target chaos_lost: want 0 runs lost, measured 1 of 6 (never resolved), missed" in lines
