"""What each call is for, deduced backwards from what is wanted (Parrot, section 5.2).

Who wants a variable says whether soon or as part of much. What it comes of in sequence is wanted alike; of parallel
calls for one consumer the last counts, so they are a *group* that runs as a wide batch: throughput, until one is left;
but for what is wanted soon for itself. The paper's code gives every ancestor the urgency of the output; this follows
the paper. A group is found by consumers that are shared, directly or by way of others at the same distance from the
end.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import msgspec

from semantic_vars.calls import Criteria
from semantic_vars.events import Standing


class Stage(msgspec.Struct, frozen=True):
    """A call as deduction sees it. ``criteria``: of who wants its output, None if only other calls do; ``seconds``: how
    long it takes; ``members``: how many there are of it, of a map; ``due``: when its output is wanted, if at a time."""

    consumers: tuple[str, ...] = ()
    criteria: Criteria | None = None
    seconds: float = 0.0
    members: int = 1
    due: float | None = None


def deduce(stages: Mapping[str, Stage]) -> dict[str, Standing]:
    """Return the standing of each stage, in O(stages and edges). Consumers that are not among them do not count."""
    standings: dict[str, Standing] = {}
    for name in _consumers_first(stages):
        stage = stages[name]
        after = [standings[one] for one in stage.consumers if one in standings]
        is_urgent = stage.criteria == "latency" or any(one.criteria == "latency" for one in after)
        standings[name] = Standing(
            criteria="latency" if is_urgent else "throughput",
            level=1 + max((one.level for one in after), default=-1),
            remaining_s=stage.seconds + max((one.remaining_s for one in after), default=0.0),
            due=min((due for due in (stage.due, *(one.due for one in after)) if due is not None), default=None),
        )
    groups = _groups(stages, standings)
    run_s = max((standing.remaining_s for standing in standings.values()), default=0.0)
    run_calls = sum(stage.members for stage in stages.values())
    return {
        name: msgspec.structs.replace(
            standing,
            criteria="throughput" if name in groups else standing.criteria,
            group=groups.get(name),
            run_s=run_s,
            run_calls=run_calls,
        )
        for name, standing in standings.items()
    }


def _consumers_first(stages: Mapping[str, Stage]) -> Sequence[str]:
    num_open = {name: sum(one in stages for one in stage.consumers) for name, stage in stages.items()}
    producers = defaultdict(list)
    for name, stage in stages.items():
        for consumer in stage.consumers:
            producers[consumer].append(name)
    order = [name for name, num in num_open.items() if not num]
    for name in order:
        for producer in producers[name]:
            num_open[producer] -= 1
            if not num_open[producer]:
                order.append(producer)  # a queue
    return order


def _groups(stages: Mapping[str, Stage], standings: Mapping[str, Standing]) -> dict[str, str]:
    """Return for each member of a group of two or more the group's name, which is that of its first member."""
    able = [name for name, one in standings.items() if one.criteria == "latency" != stages[name].criteria]
    head: dict[str, str] = {name: name for name in able}

    def find(name: str) -> str:
        while head[name] != name:
            head[name] = name = head[head[name]]
        return name

    first: dict[tuple[str, int], str] = {}
    for name in able:
        for consumer in stages[name].consumers:
            head[find(name)] = find(first.setdefault((consumer, standings[name].level), name))
    size: dict[str, int] = defaultdict(int)
    for name in able:
        size[find(name)] += stages[name].members
    return {name: find(name) for name in able if size[find(name)] > 1}
