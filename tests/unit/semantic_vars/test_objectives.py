"""What calls are for, from what is wanted: chains, groups, stragglers."""

from collections.abc import Mapping

from hypothesis import given
from hypothesis import strategies as st

from semantic_vars.events import Failed
from semantic_vars.objectives import Stage, deduce
from tests.unit.semantic_vars.runs import Run, llm, workflow


def test_what_a_wanted_variable_comes_of_in_sequence_is_urgent() -> None:
    seen = deduce({"a": Stage(("b",), seconds=1), "b": Stage(("c",), seconds=2), "c": Stage((), "latency", seconds=3)})
    assert {name: (one.criteria, one.level, one.remaining_s, one.group) for name, one in seen.items()} == {
        "c": ("latency", 0, 3, None), "b": ("latency", 1, 5, None), "a": ("latency", 2, 6, None),
    }  # fmt: skip


def test_what_is_wanted_for_throughput_makes_nothing_urgent() -> None:
    seen = deduce({"a": Stage(("c",)), "b": Stage(("c",)), "c": Stage((), "throughput")})
    assert {one.criteria for one in seen.values()} == {"throughput"}
    assert {one.group for one in seen.values()} == {None}


def test_parallel_producers_of_one_consumer_are_a_group() -> None:
    seen = deduce({"a": Stage(("c",)), "b": Stage(("c",)), "c": Stage((), "latency")})
    assert {name: (one.criteria, one.group) for name, one in seen.items()} == {
        "a": ("throughput", "a"), "b": ("throughput", "a"), "c": ("latency", None),
    }  # fmt: skip


def test_a_variable_that_two_outputs_share_is_as_urgent_as_the_more_urgent() -> None:
    seen = deduce({"a": Stage(("x", "y")), "x": Stage((), "throughput"), "y": Stage((), "latency")})
    assert seen["a"].criteria == "latency"


def test_groups_that_share_a_consumer_are_one_and_levels_apart_are_two() -> None:
    seen = deduce(
        {
            "a": Stage(("x",)), "b": Stage(("x", "y")), "c": Stage(("y",)), "far": Stage(("a", "x")),
            "x": Stage(("end",)), "y": Stage(("end",)), "end": Stage((), "latency"),
        }
    )  # fmt: skip
    assert {name: one.group for name, one in seen.items()} == {
        "a": "a", "b": "a", "c": "a", "far": None, "x": "x", "y": "x", "end": None,
    }  # fmt: skip


def test_a_map_is_a_group_by_itself() -> None:
    seen = deduce({"m": Stage(("r",), members=8), "r": Stage((), "latency")})
    assert (seen["m"].criteria, seen["m"].group) == ("throughput", "m")
    assert {one.run_calls for one in seen.values()} == {9}


def test_the_last_of_a_group_becomes_urgent() -> None:
    run = Run(workflow(llm("a", "x"), llm("b", "y", retry={"max": 1, "backoff_s": 0}), llm("c", "{{a}}{{b}}")))
    assert {start.standing.criteria for start in run.started.values()} == {"throughput"}
    run.answer("a")
    start = run.started.pop("b")
    run.on(Failed("b", start.epoch, "engine", "broken", "again"))
    assert run.started["b"].standing.criteria == "latency"


@st.composite
def stages(draw: st.DrawFn) -> Mapping[str, Stage]:
    num = draw(st.integers(1, 12))
    later = [[f"s{n}" for n in range(at + 1, num)] for at in range(num)]
    return {
        f"s{at}": Stage(
            tuple(draw(st.lists(st.sampled_from(later[at]), unique=True, max_size=3))) if later[at] else (),
            draw(st.sampled_from([None, "latency", "throughput"])),
            draw(st.floats(0, 9)),
            draw(st.integers(1, 3)),
        )
        for at in range(num)
    }


@given(stages())
def test_nothing_is_less_urgent_than_what_waits_for_it_unless_it_is_of_a_group(given: Mapping[str, Stage]) -> None:
    seen = deduce(given)
    assert seen.keys() == given.keys()
    for name, stage in given.items():
        for consumer in stage.consumers:
            assert seen[name].level > seen[consumer].level
            assert seen[name].remaining_s >= seen[consumer].remaining_s
            if seen[consumer].criteria == "latency":
                assert seen[name].criteria == "latency" or seen[name].group is not None
    for group in {one.group for one in seen.values()} - {None}:
        members = [name for name, one in seen.items() if one.group == group]
        assert sum(given[name].members for name in members) > 1
        assert len({seen[name].level for name in members}) == 1


def test_what_something_comes_of_is_wanted_as_soon_as_the_earliest_of_all_that_it_is_for() -> None:
    stages = {
        "a": Stage(("b", "c")), "b": Stage((), "latency", due=9.0), "c": Stage((), "latency", due=7.0),
        "d": Stage((), "latency"),
    }  # fmt: skip
    assert {name: one.due for name, one in deduce(stages).items()} == {"a": 7.0, "b": 9.0, "c": 7.0, "d": None}
