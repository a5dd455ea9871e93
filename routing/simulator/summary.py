"""From a run to the figures that are compared: latencies by class of tenants, throughput, fairness, what cuts cost."""

from array import array
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from core.ids import TenantId
from routing.simulator.simulation import Run, Served

_MOST_GAPS = 400_000


class Spread(msgspec.Struct, frozen=True):
    """Percentiles in seconds, of ``num`` values: the value at the place, none is made up between two. NaN of none."""

    num: int
    p50: float
    p90: float
    p99: float
    most: float


class ClassSummary(msgspec.Struct, frozen=True):
    """What one class of tenants saw. ``tbt``: between one token and the next, pauses by preemption included."""

    name: str
    tenants: int
    requests: int
    rejected: int
    ttft: Spread
    tbt: Spread
    preempted: int


class Summary(msgspec.Struct, frozen=True):
    """All figures of a run. ``waste``: tokens computed again, over those computed once and those given."""

    classes: tuple[ClassSummary, ...]
    requests: int
    makespan: float
    requests_per_s: float
    tokens_per_s: float
    tokens_per_s_backlogged: float
    jain: float | None
    gap: float
    preemptions: int
    migrations: int
    recomputed: int
    waste: float
    restarts: int


def summarise(run: Run, classes: Mapping[TenantId, str]) -> Summary:
    """Return the figures by class, ``all`` first; a tenant without one is in ``all`` only."""
    names = sorted(set(classes.values()))
    parts = [_of_class("all", run.served)]
    parts += [_of_class(name, [one for one in run.served if classes.get(one.arrival.tenant) == name]) for name in names]
    tokens = sum(one.num_tokens for one in run.served)
    useful = tokens + run.num_prefilled - run.num_recomputed
    service = run.service
    makespan = max(run.makespan, 1e-9)
    return Summary(
        classes=tuple(parts),
        requests=len(run.served),
        makespan=run.makespan,
        requests_per_s=sum(one.end == "done" for one in run.served) / makespan,
        tokens_per_s=tokens / makespan,
        tokens_per_s_backlogged=service.backlogged_tokens / service.backlogged_s if service.backlogged_s else 0.0,
        jain=service.jain,
        gap=service.gap,
        preemptions=run.num_aborts.get("preempted", 0),
        migrations=run.num_aborts.get("migrated", 0),
        recomputed=run.num_recomputed,
        waste=run.num_recomputed / useful if useful else 0.0,
        restarts=run.num_restarts,
    )


def spread(values: Iterable[float]) -> Spread:
    """Return the percentiles of the values."""
    ordered = sorted(values)
    if not ordered:
        nan = float("nan")
        return Spread(num=0, p50=nan, p90=nan, p99=nan, most=nan)
    at = [ordered[min(len(ordered) - 1, len(ordered) * part // 100)] for part in (50, 90, 99)]
    return Spread(num=len(ordered), p50=at[0], p90=at[1], p99=at[2], most=ordered[-1])


def _of_class(name: str, served: Sequence[Served]) -> ClassSummary:
    gaps = array("f")
    for one in served:
        gaps.extend(one.gaps)
    every = (
        len(gaps) // _MOST_GAPS + 1
    )  # percentiles of every so-many-th gap: sorting millions takes longer than the run
    between = spread(gaps[::every])
    return ClassSummary(
        name=name,
        tenants=len({one.arrival.tenant for one in served}),
        requests=len(served),
        rejected=sum(one.end == "rejected" for one in served),
        ttft=spread(one.ttft for one in served if one.ttft is not None),
        tbt=msgspec.structs.replace(between, num=len(gaps), most=max(gaps, default=between.most)),
        preempted=sum(one.num_preempted for one in served),
    )
