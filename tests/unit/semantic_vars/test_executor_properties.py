"""Whatever the graph, the order of answers, failures, cancels and crashes: every variable ends once, as it should."""

import hashlib
import random

from hypothesis import given
from hypothesis import strategies as st

from semantic_vars.calls import Workflow
from semantic_vars.events import Cancel, Work
from semantic_vars.graph import Bounds, Reader
from semantic_vars.values import Value
from semantic_vars.variable import State
from tests.unit.semantic_vars.graphs import workflows
from tests.unit.semantic_vars.runs import Broken, Engine, Missing, Oracle, Run, said

SEEDS = st.integers(0, 2**16)


def engine_of(share: int) -> Engine:
    """Return an engine whose answer to a prompt is always the same, and which always fails for ``share`` in ten."""

    def engine(work: Work) -> Value:
        digest = hashlib.sha256(said(work).encode()).hexdigest()
        if int(digest[0], 16) % 10 < share:
            raise Broken("it broke")
        return digest[1:5]

    return engine


def same(run: Run, graph: Workflow, engine: Engine) -> None:
    """What is wanted is what a client would have; what is not may have been cancelled when nobody needed it."""
    oracle = Oracle(graph, engine)
    wanted = {call.variable for call in graph.calls} - used(graph)
    for call in graph.calls:
        try:
            expected: tuple[State, Value] = (State.DONE, oracle.value(call.variable))
        except Missing as error:
            expected = (error.state, None)
        outcome = run.executor.outcome(call.variable)
        if call.variable in wanted or outcome.state not in {State.CANCELLED, State.PENDING}:
            assert (outcome.state, outcome.value) == expected


def used(graph: Workflow) -> frozenset[str]:
    """Return the variables that some call uses."""
    nodes = Reader(Bounds()).nodes(graph.calls, frozenset(graph.variables))
    return frozenset[str]().union(*(node.uses for node in nodes))


@given(workflows(), SEEDS, st.sampled_from([0, 1, 3]))
def test_a_run_comes_to_what_a_client_would_have_come_to(graph: Workflow, seed: int, share: int) -> None:
    engine = engine_of(share)
    run = Run(graph, engine=engine).finish(random.Random(seed))
    same(run, graph, engine)
    assert len(run.ended) == 1
    assert run.executor.num_running == 0


@given(workflows(), SEEDS, st.integers(0, 12))
def test_a_run_that_crashes_anywhere_goes_on_and_makes_no_committed_call_again(
    graph: Workflow, seed: int, num_steps: int
) -> None:
    engine, draw = engine_of(1), random.Random(seed)
    run = Run(graph, engine=engine)
    for _ in range(num_steps):
        run.step(draw)
    committed = set(run.log)
    again = Run(graph, engine=engine, facts=run.log)
    again.finish(draw)
    assert not committed & set(again.starts)
    same(again, graph, engine)
    assert len(again.ended) == 1
    third = Run(graph, engine=engine, facts=again.log).finish(draw)
    assert [path for path in third.starts if path in again.log] == []


@given(workflows(), SEEDS, st.integers(0, 12), st.booleans())
def test_a_run_that_is_cancelled_anywhere_ends_and_leaves_nothing_behind(
    graph: Workflow, seed: int, num_steps: int, is_whole: bool
) -> None:
    draw = random.Random(seed)
    run = Run(graph, engine=engine_of(1))
    for _ in range(num_steps):
        run.step(draw)
    run.on(Cancel() if is_whole else Cancel((draw.choice([call.id for call in graph.calls]),)))
    run.finish(draw)
    assert run.ended
    assert run.executor.num_running == 0
    assert not run.started
    if is_whole:
        assert State.PENDING not in {run.executor.outcome(call.variable).state for call in graph.calls}
        assert not run.executor._live


@given(workflows(), SEEDS)
def test_the_same_answers_in_the_same_order_have_the_same_effects(graph: Workflow, seed: int) -> None:
    one, other = (Run(graph, engine=engine_of(1)).finish(random.Random(seed)) for _ in range(2))
    assert (one.starts, one.resolved, one.log) == (other.starts, other.resolved, other.log)
