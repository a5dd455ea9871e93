"""What is measured: each workload on its engines, by which arms and from how far away, in full and in a quick run."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from benchmarks.dataflow import workloads
from benchmarks.dataflow.arms import Arm
from benchmarks.dataflow.engines import Kind, Stand
from benchmarks.dataflow.workloads import Workload

RTTS = (0, 20, 100, 244)
CALLS_S = (0.1, 0.3, 1.9)
LADDER = ("g1", "g2", "g3", "g4", "g5", "g6")


@dataclass(frozen=True)
class Part:
    """One workload on one kind of engine. ``make`` draws it, for a mark that begins its prompts; ``arms``: by how far
    away the client is, in milliseconds of a round trip; ``few_slots``: those of an engine tuned for latency;
    ``repeated``: the arms of every round, the others being measured in the last one alone; None: all."""

    name: str
    make: Callable[[str], Workload]
    stand: Stand
    arms: Mapping[int, tuple[str, ...]]
    few_slots: int = 4
    repeated: Mapping[int, tuple[str, ...]] | None = None

    @property
    def workload(self) -> str:
        """What it is chosen by: the name less the time that a call takes."""
        return self.name.partition("@")[0]

    def is_repeated(self, rtt_ms: int, arm: Arm) -> bool:
        """Whether the arm is measured in every round."""
        return self.repeated is None or arm.name in self.repeated.get(rtt_ms, ())

    def stand_for(self, arm: Arm) -> Stand:
        """Return the engines that the arm has."""
        slots = self.few_slots if arm.tuning == "latency" else self.stand.slots
        is_stock = self.stand.kind == "llamacpp" and not arm.uses_gateway
        return Stand(self.stand.kind, self.stand.workers, slots, self.stand.call_s, is_stock)


def chain_name(call_s: float) -> str:
    """Return the part's name of a chain on the fake engine whose calls take so long."""
    return f"chain@{call_s:g}s"


def _chain(call_s: float, arms: Mapping[int, tuple[str, ...]]) -> Part:
    # So long that the one round trip of handing it over is less than 4 % of it.
    steps = {0.0: 64, 0.1: 64, 0.3: 24, 1.9: 8}[call_s]
    make = partial(workloads.chains, apps=1, steps=steps, words=40, tokens=8)
    repeated = dict.fromkeys(arms, ("good", "forebay"))
    return Part(chain_name(call_s), make, Stand("fake", call_s=call_s), arms, repeated=repeated)


def full() -> tuple[Part, ...]:
    """Return all parts of a full run."""
    beside = ("good", "good-gateway", "langgraph", "g1", "forebay")
    everywhere = {rtt: beside if rtt in {0, 100} else ("good", "forebay") for rtt in RTTS}
    llamacpp, pair = Stand("llamacpp", 1, 4), Stand("llamacpp", 2, 4)
    far = ("good", "langgraph", "forebay")
    return (
        _chain(0.0, {0: beside}),
        *(_chain(call_s, everywhere) for call_s in CALLS_S),
        Part(
            "chain-real",
            partial(workloads.chains, apps=1, steps=16, words=60, tokens=24),
            llamacpp,
            {0: ("good", "good-gateway", "g1", "forebay")},
            repeated={0: ("good", "forebay")},
        ),
        Part(
            "chains",
            partial(workloads.chains, apps=25, steps=5, words=60, tokens=16, spread_s=2.0),
            llamacpp,
            {0: ("good", "good-gateway", "good-labels", "langgraph", *LADDER, "forebay"), 20: far, 100: far},
            repeated={0: ("good", "forebay")},
        ),
        Part(
            "map_reduce",
            partial(workloads.map_reduce, width=32, words=60, tokens=24, last=32),
            Stand("vllm", 1, 32),
            {0: ("sequential", "good-latency", "good", "good-gateway", "langgraph", *LADDER, "forebay")},
            few_slots=2,
            repeated={0: ("good-latency", "good", "forebay")},
        ),
        Part(
            "shared_prefix",
            partial(workloads.shared_prefix, prefixes=6, users=6, prefix_words=860, words=20, tokens=16, per_s=0.8),
            pair,
            {0: ("good", "good-affinity", "good-gateway", "good-labels", *LADDER, "forebay")},
            repeated={0: ("good", "good-affinity", "forebay")},
        ),
        Part(
            "multi_agent",
            partial(workloads.multi_agent, apps=6, coders=4, rounds=3, words=120, tokens=20, per_s=0.5),
            pair,
            {0: ("good", "good-affinity", "good-labels", "langgraph", "langgraph-affinity", *LADDER, "forebay"),
             100: ("good-affinity", "langgraph", "langgraph-affinity", "forebay")},
            repeated={0: ("good-affinity", "forebay"), 100: ("langgraph", "langgraph-affinity", "forebay")},
        ),
        Part(
            "mixed",
            partial(
                workloads.mixed, chats=40, chats_per_s=0.5, chat_words=30, chat_tokens=24, apps=4, apps_per_s=0.1,
                width=16, words=60, tokens=24, last=32,
            ),
            Stand("vllm", 1, 32),
            {0: ("good-latency", "good", "good-gateway", "forebay")},
            few_slots=4,
        ),
        Part(
            "loop_tools",
            partial(workloads.loop_tools, apps=12, most=4, words=40, tokens=16, seconds=(0.1, 3.0), per_s=2.0),
            llamacpp,
            {0: ("good", "langgraph", "g1", "forebay"), 100: ("good", "langgraph", "forebay")},
            repeated={0: ("good", "forebay")},
        ),
    )  # fmt: skip


def quick() -> tuple[Part, ...]:
    """Return the parts of a quick run: the arms that targets name, smaller, without what takes a vLLM."""
    two = ("good", "forebay")
    return (
        _chain(0.0, {0: two}),
        _chain(0.1, {0: two, 100: two}),
        Part(
            "chains",
            partial(workloads.chains, apps=12, steps=3, words=40, tokens=12, spread_s=1.0),
            Stand("llamacpp", 1, 4),
            {0: two},
        ),
        Part(
            "shared_prefix",
            partial(workloads.shared_prefix, prefixes=4, users=3, prefix_words=120, words=12, tokens=8, per_s=1.0),
            Stand("llamacpp", 2, 4),
            {0: two},
        ),
        Part(
            "multi_agent",
            partial(workloads.multi_agent, apps=3, coders=3, rounds=1, words=60, tokens=12, per_s=1.0),
            Stand("llamacpp", 2, 4),
            {0: ("good-affinity", "forebay")},
        ),
    )


def chosen(
    parts: Iterable[Part],
    workloads: Collection[str],
    *,
    arms: Sequence[str] | None = None,
    engine: Kind | None = None,
    rtts: Collection[int] | None = None,
) -> tuple[Part, ...]:
    """Return what of the parts is wanted. ``arms``: in the place of those that each part has."""
    made = []
    for part in parts:
        if part.workload in workloads and engine in {None, part.stand.kind}:
            near = {rtt: tuple(arms or own) for rtt, own in part.arms.items() if rtts is None or rtt in rtts}
            if near:
                made.append(replace(part, arms=near, repeated=None if arms else part.repeated))
    return tuple(made)
