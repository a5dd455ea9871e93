"""What the workflow benchmarks ask, how it is carried out and handed over, and how bytes are held on their way."""

import asyncio
import itertools
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from benchmarks.dataflow import rival, submitting, workloads
from benchmarks.dataflow.arms import ARMS, MECHANISMS, OURS
from benchmarks.dataflow.clients import Target, carried_out
from benchmarks.dataflow.delay import Line
from benchmarks.dataflow.plans import chosen, full, quick
from benchmarks.dataflow.workloads import App, Ask, Loop, Of, Tool, Workload, needs
from gateway.settings.tree import FairnessSettings, WorkflowSettings
from semantic_vars.calls import Workflow
from semantic_vars.graph import USUAL, Reader

TARGET = Target(("http://127.0.0.1:1", "http://127.0.0.1:2"), "m")
DRAWN = [(part.name, part.make("00000007")) for part in (*full(), *quick())]
ALL = [*DRAWN, ("warm_up", workloads.warm_up(2))]


@pytest.mark.parametrize(("name", "workload"), ALL)
def test_nodes_stand_behind_those_that_they_use(name: str, workload: Workload) -> None:
    for app in workload.apps:
        known: set[str] = set()
        for node in app.nodes:
            assert set(needs(node)) <= known, f"{name}: {node.name}"
            known.add(node.name)
        assert app.output in known


@pytest.mark.parametrize(("name", "workload"), DRAWN)
def test_a_workload_is_drawn_alike_each_time_and_its_mark_changes_nothing_else(name: str, workload: Workload) -> None:
    part = next(part for part in (*full(), *quick()) if part.name == name and part.make("00000007") == workload)

    marked = msgspec.json.encode(part.make("00000008"))

    assert marked.replace(b"00000008", b"00000007") == msgspec.json.encode(workload)


@pytest.mark.parametrize(("name", "workload"), ALL)
def test_the_gateway_understands_what_is_handed_over(name: str, workload: Workload) -> None:
    for app in workload.apps[:3]:
        workflow = msgspec.convert(submitting.workflow_of(app, TARGET), Workflow)
        nodes = Reader(USUAL).nodes(workflow.calls, frozenset(workflow.variables))
        assert {node.call.id for node in nodes} == {node.name for node in app.nodes}, name


class Noting:
    """Hands that answer with the node's name, in the order in which the test lets them."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.texts: dict[str, str] = {}
        self.gates: dict[str, asyncio.Event] = {}
        self.used: list[str] = []

    async def ask(self, node: Ask, text: str) -> str:
        self.begun.append(node.name)
        self.texts[node.name] = text
        if node.name in self.gates:
            await self.gates[node.name].wait()
        return f"<{node.name}>"

    async def use(self, tool: Tool, text: str) -> None:
        self.used.append(f"{tool.name} {text}")


DIAMOND = (
    Ask("a", ("Begin.",), 1),
    Ask("b", ("B of ", Of("a")), 1),
    Ask("c", ("C of ", Of("a")), 1),
    Ask("d", (Of("b"), " and ", Of("c")), 1),
)


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_good_client_makes_every_call_as_soon_as_its_last_input_is_there() -> None:
    hands = Noting()
    hands.gates["b"] = asyncio.Event()
    task = asyncio.create_task(carried_out((*DIAMOND, Ask("e", ("E of ", Of("c")), 1)), {}, hands, at_once=True))

    await settled()
    assert hands.begun == ["a", "b", "c", "e"], "not in supersteps: e does not wait for b"
    hands.gates["b"].set()

    assert (await task)["d"] == "<d>"
    assert hands.texts["d"] == "<b> and <c>"


async def test_a_sequential_client_makes_one_call_after_the_other() -> None:
    hands = Noting()
    hands.gates["b"] = asyncio.Event()
    task = asyncio.create_task(carried_out(DIAMOND, {}, hands, at_once=False))

    await settled()
    assert hands.begun == ["a", "b"]
    hands.gates["b"].set()

    assert (await task)["d"] == "<d>"
    assert hands.begun == ["a", "b", "c", "d"]


@pytest.mark.parametrize("at_once", [True, False])
async def test_a_loop_hands_its_state_on_until_its_tool_is_content(at_once: bool) -> None:
    hands = Noting()
    body = (Ask("think", ("Of ", Of("notes")), 1), Tool("try", "think", 0.0))
    loop = Loop("work", "notes", "plan", body, "think", "try", 3)

    values = await carried_out((Ask("plan", ("Plan.",), 1), loop), {}, hands, at_once=at_once)

    assert hands.used == ["try <think>"] * 3
    assert hands.begun == ["plan", "think", "think", "think"]
    assert hands.texts["think"] == "Of <think>"
    assert values["work"] == "<think>"


def test_a_loop_is_handed_over_with_a_bound_and_its_tool_is_the_clients() -> None:
    app = workloads.loop_tools("x", apps=1, most=3, words=4, tokens=4, seconds=(0.1, 0.2), per_s=1.0).apps[0]

    loop = submitting.workflow_of(app, TARGET)["calls"][1]

    assert loop["state"] == {"notes": "{{plan}}"}
    assert loop["next"] == {"notes": "{{think}}"}
    assert loop["until"] == "{{try | json('$.done')}}"
    assert loop["max_iterations"] > next(node.times for node in app.nodes if isinstance(node, Loop))
    assert loop["calls"][1]["server"] == {"type": "client", "tool": "try"}


def test_applications_of_one_session_go_to_one_engine_of_langgraph_with_affinity_or_to_all_in_turn() -> None:
    workload = workloads.shared_prefix("x", prefixes=4, users=4, prefix_words=4, words=4, tokens=4, per_s=1.0)

    order = rival.order_of(workload, TARGET, "affinity")

    chosen_for: dict[str, set[str]] = {}
    for app in order["apps"]:
        chosen_for.setdefault(app["session"], set()).update(app["urls"])
    assert all(len(urls) == 1 for urls in chosen_for.values())
    assert all(app["urls"] == TARGET.urls for app in rival.order_of(workload, TARGET, "round_robin")["apps"])
    assert order["apps"][0]["needs"] == {"q": ("q",)[:0], "r": ("q",)}


def test_the_ladder_adds_one_mechanism_after_the_other_and_forebay_comes_with_all() -> None:
    steps = [ARMS[f"g{number}"].settings for number in range(1, len(MECHANISMS) + 1)]

    def on(settings: Any) -> list[tuple[str, str]]:
        return [(section, name) for section, name in MECHANISMS if settings[section][name]]

    assert [on(step) for step in steps] == [list(MECHANISMS[:number]) for number in range(len(MECHANISMS))]
    usual = {"workflows": WorkflowSettings().model_dump(), "fairness": FairnessSettings().model_dump()}
    assert not ARMS[OURS].settings
    assert on(usual) == list(MECHANISMS)


def test_engines_tuned_for_latency_and_stock_ones_are_for_the_arms_that_want_them() -> None:
    mixed = next(part for part in full() if part.name == "mixed")
    chains = next(part for part in full() if part.name == "chains")

    assert mixed.stand_for(ARMS["good-latency"]).slots == mixed.few_slots < mixed.stand_for(ARMS[OURS]).slots
    assert chains.stand_for(ARMS["good"]).is_stock
    assert not chains.stand_for(ARMS["good-gateway"]).is_stock


def test_parts_are_chosen_by_workload_engine_distance_and_arm() -> None:
    (part,) = chosen(full(), ["chains", "map_reduce"], arms=["good"], engine="llamacpp", rtts=[0, 244])

    assert (part.name, part.arms) == ("chains", {0: ("good",)})
    assert [part.name for part in chosen(full(), ["chain"])] == ["chain@0s", "chain@0.1s", "chain@0.3s", "chain@1.9s"]


# Bytes on their way


class Far:
    """The far end of a line, and a clock that only the test moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.got: list[tuple[float, bytes | None]] = []
        self._timers: list[tuple[float, Any]] = []

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, callback: Any) -> object:
        self._timers.append((when, callback))
        return object()

    def write(self, data: bytes) -> None:
        self.got.append((self.now, data))

    def close(self) -> None:
        self.got.append((self.now, None))

    def pass_time(self, until: float) -> None:
        while due := [timer for timer in self._timers if timer[0] <= until]:
            timer = min(due, key=lambda one: one[0])
            self._timers.remove(timer)
            self.now = timer[0]
            timer[1]()
        self.now = until


def line_to(far: Far, delay_s: float, not_before: float) -> Line:
    line = Line(far, delay_s, not_before)  # type: ignore[arg-type]
    line.connect(far)  # type: ignore[arg-type]
    return line


def test_bytes_come_out_in_order_half_a_round_trip_later_and_so_does_the_end() -> None:
    far = Far()
    line = line_to(far, 0.05, 0.0)

    for at, data in ((0.0, b"a"), (0.01, b"b"), (0.02, None)):
        far.pass_time(at)
        line.put(data)
    far.pass_time(1.0)

    assert [data for _, data in far.got] == [b"a", b"b", None]
    assert [at for at, _ in far.got] == pytest.approx([0.05, 0.06, 0.07])


def test_a_new_connection_costs_a_round_trip_before_its_first_byte_leaves() -> None:
    far = Far()
    line = line_to(far, 0.05, 0.1)

    line.put(b"first")
    far.pass_time(0.2)
    line.put(b"later")
    far.pass_time(1.0)

    assert [at for at, _ in far.got] == pytest.approx([0.15, 0.25])


def test_what_is_sent_before_the_far_end_is_there_is_not_lost() -> None:
    far = Far()
    line = Line(far, 0.05, 0.0)  # type: ignore[arg-type]
    line.put(b"a")

    far.pass_time(1.0)
    line.connect(far)  # type: ignore[arg-type]

    assert far.got == [(1.0, b"a")]


def pairs(values: Sequence[float]) -> list[float]:
    return [later - sooner for sooner, later in itertools.pairwise(values)]


def test_arrivals_are_in_order_and_the_first_is_at_once() -> None:
    team = workloads.multi_agent("x", apps=6, coders=2, rounds=1, words=8, tokens=4, per_s=0.5)
    apps: Sequence[App] = team.apps

    assert apps[0].at == 0.0
    assert all(step > 0 for step in pairs([app.at for app in apps]))
