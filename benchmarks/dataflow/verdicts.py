"""What the cells of a run say of the targets, and where a gain comes from."""

from collections.abc import Callable, Sequence
from functools import partial

from benchmarks.contention import figures
from benchmarks.dataflow.arms import GOOD, OURS
from benchmarks.dataflow.cells import Run
from benchmarks.dataflow.plans import CALLS_S, RTTS, chain_name
from benchmarks.dataflow.seen import Seen
from benchmarks.loopback.stats import Interval, interval

OF_BOUND, NO_LOSS = 0.95, 0.98
P95 = partial(figures.quantile, share=0.95)

Figure = Callable[[Seen], float]


def base_of(part: str) -> str:
    """Return the good client that a workload's targets are about."""
    return "good-affinity" if part == "multi_agent" else GOOD


def jct(seen: Seen) -> float:
    """Mean time of an application."""
    return seen.jct


def computed(seen: Seen) -> float:
    """Prompt tokens that the engines computed."""
    return seen.computed or float("nan")


def chat_times(seen: Seen) -> list[float]:
    """Seconds from each chat's question to the end of its answer."""
    return [one.ended - one.asked for one in seen.chats if one.ended is not None]


def ratio(run: Run, part: str, above: tuple[int, str], below: tuple[int, str], figure: Figure = jct) -> Interval | None:
    """Return a figure of one place over that of another, inside each round; None where no round has both."""
    values = [figure(one) / figure(other) for one, other in run.pairs(part, above, below)]
    return interval(values) if values else None


def bound(call_s: float, rtt_s: float, client_s: float, server_s: float) -> float:
    """Return the most that a chain can gain: each call's round trip and what the client does for it."""
    return (call_s + rtt_s + client_s) / (call_s + server_s)


def overheads(run: Run, num_calls: int) -> tuple[float, float] | None:
    """Return what a call costs beside the engine's time, in seconds: carried out by the good client, and by us."""
    places = [run.of(chain_name(0.0), 0, arm) for arm in (GOOD, OURS)]
    if not all(places):
        return None
    client, server = (figures.middle([seen.jct for seen in cells]) / num_calls for cells in places)
    return client, server


class Verdicts:
    """Lines of targets, as they are judged. ``held``: all of them so far."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self.lines: list[str] = []
        self.held = not run.problems

    def at_least(self, name: str, least: float, whom: str, measured: Interval | None) -> None:
        """Judge a figure that is to be so large, by its interval's lower end."""
        self._judge(name, f"≥ {least:g} × {whom}", measured, lambda found: found.low >= least)

    def at_most(self, name: str, most: float, whom: str, measured: Interval | None) -> None:
        """Judge a figure that is to be so small, by its interval's upper end."""
        self._judge(name, f"≤ {most:g} × {whom}", measured, lambda found: found.high <= most)

    def tell(self, what: str, measured: Interval | None) -> None:
        """Add a figure that nothing was promised of."""
        if measured is not None:
            self.lines.append(f"{what}: {measured.show()}")

    def _judge(self, name: str, want: str, measured: Interval | None, is_held: Callable[[Interval], bool]) -> None:
        if measured is None:
            return
        held = is_held(measured)
        self.lines.append(f"target {name}: want {want}, measured {measured.show()}, {'held' if held else 'missed'}")
        self.held = self.held and held

    def whole(self) -> None:
        """Judge that nothing failed, in any cell."""
        wrong = [
            f"{part} {arm} at {rtt} ms: {problem}"
            for (part, rtt, arm), cells in self._run.cells.items()
            for seen in cells
            if seen is not None
            for problem in seen.problems
        ]
        failed = [f"a cell failed: {problem}" for problem in self._run.problems]
        shown = "; ".join([*failed, *wrong][:3]) or "all"
        held = not wrong and not failed
        self.lines.append(f"target whole: want every output, in every cell, measured {shown}, "
                          f"{'held' if held else 'missed'}")  # fmt: skip
        self.held = self.held and held


def judged(run: Run) -> Verdicts:
    """Return the verdicts on all targets that the run's cells bear on."""
    told = Verdicts(run)
    _chains_on_the_fake(run, told)
    told.at_least("chain_no_loss", NO_LOSS, "the good client, RTT 0, real engine",
                  ratio(run, "chain-real", (0, GOOD), (0, OURS)))  # fmt: skip
    told.at_least("chains", 1.4, "the good client, RTT 0", ratio(run, "chains", (0, GOOD), (0, OURS)))
    told.at_least("map_reduce", 1.8, "the good client on an engine tuned for latency",
                  ratio(run, "map_reduce", (0, "good-latency"), (0, OURS)))  # fmt: skip
    told.tell("map_reduce against the good client, nothing promised", ratio(run, "map_reduce", (0, GOOD), (0, OURS)))
    told.at_least("shared_prefix", 1.5, "fewer prompt tokens computed than by the good client, engines in turn",
                  ratio(run, "shared_prefix", (0, GOOD), (0, OURS), computed))  # fmt: skip
    told.tell("shared_prefix, prompt tokens computed by the client with affinity over ours, nothing promised",
              ratio(run, "shared_prefix", (0, "good-affinity"), (0, OURS), computed))  # fmt: skip
    told.at_least("multi_agent", 1.3, "the good client with affinity, RTT 0",
                  ratio(run, "multi_agent", (0, "good-affinity"), (0, OURS)))  # fmt: skip
    told.at_least("multi_agent_langgraph", 2.0, "LangGraph, engines in turn, RTT 100",
                  ratio(run, "multi_agent", (100, "langgraph"), (100, OURS)))  # fmt: skip
    told.tell("multi_agent against LangGraph with affinity, RTT 100, nothing promised",
              ratio(run, "multi_agent", (100, "langgraph-affinity"), (100, OURS)))  # fmt: skip
    _mixed(run, told)
    for part in dict.fromkeys(part for part, _, _ in run.cells):
        _shares(run, told, part)
    told.whole()
    return told


def _chains_on_the_fake(run: Run, told: Verdicts) -> None:
    calls = {part.name: part.make("").num_calls for part in run.parts}
    zero = chain_name(0.0)
    if zero not in calls or (known := overheads(run, calls[zero])) is None:
        return
    client_s, server_s = known
    told.lines.append(f"a call costs {1e3 * client_s:.2f} ms by the good client, {1e3 * server_s:.2f} ms by us (T = 0)")
    for call_s in CALLS_S:
        for rtt in RTTS:
            gain = ratio(run, chain_name(call_s), (rtt, GOOD), (rtt, OURS))
            if gain is not None:
                most = bound(call_s, rtt / 1e3, client_s, server_s)
                share = Interval(*(value / most for value in gain))
                told.at_least(f"chain_{call_s:g}s_rtt{rtt}", OF_BOUND, f"the bound, {most:.2f}", share)


def _mixed(run: Run, told: Verdicts) -> None:
    pairs = list(run.pairs("mixed", (0, OURS), (0, "good-latency")))
    if pairs and all(chat_times(seen) for pair in pairs for seen in pair):
        ours, theirs = ([chat_times(pair[which]) for pair in pairs] for which in (0, 1))
        told.at_most("mixed_chat_p95", 1.1, "an engine tuned for latency", figures.ratio(ours, theirs, P95))
    told.at_most("mixed_jct", 1.1, "an engine tuned for throughput", ratio(run, "mixed", (0, OURS), (0, GOOD)))


def _shares(run: Run, told: Verdicts, part: str) -> None:
    """Tell what of a gain at some distance is that of the network, and what that of scheduling: the gain at none."""
    base = base_of(part)
    near = ratio(run, part, (0, base), (0, OURS))
    if near is None or part.startswith("chain@"):
        return
    for rtt in sorted({rtt for name, rtt, _ in run.cells if name == part and rtt}):
        far = ratio(run, part, (rtt, base), (rtt, OURS))
        if far is not None:
            told.lines.append(
                f"{part} at RTT {rtt} ms: {far.show()} × `{base}`, of which scheduling {near.middle:.2f} "
                f"and the network {far.middle / near.middle:.2f}, nothing promised"
            )


def same_text(cells: Sequence[tuple[Seen, Seen]]) -> float | None:
    """Return the share of outputs that are equal in both cells of the pairs; None if there is none to compare."""
    texts = [
        (mine.text, theirs.text)
        for one, other in cells
        for mine, theirs in zip(one.apps, other.apps, strict=True)
        if mine.text and theirs.text
    ]
    return sum(mine == theirs for mine, theirs in texts) / len(texts) if texts else None


def table(run: Run) -> list[str]:
    """One line a place."""
    heads = ("workload", "RTT, ms", "arm", "mean time of an application, s", "over ours", "until the last, s",
             "prompt tokens computed", "chats p95, s", "same text")  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for (part, rtt, arm), cells in run.cells.items():
        found = [seen for seen in cells if seen is not None]
        if not found:
            continue
        gain = ratio(run, part, (rtt, arm), (rtt, OURS)) if arm != OURS else None
        counts = [seen.computed for seen in found if seen.computed is not None]
        chats = [value for seen in found for value in chat_times(seen)]
        base = base_of(part)
        same = same_text(list(run.pairs(part, (rtt, arm), (rtt, base)))) if arm != base else None
        row = (
            part, str(rtt), arm, interval([seen.jct for seen in found]).show(), gain.show() if gain else "–",
            interval([seen.makespan for seen in found]).show(1),
            interval(counts).show(0) if counts else "–", f"{P95(chats):.2f}" if chats else "–",
            f"{100 * same:.0f} %" if same is not None else "–",
        )  # fmt: skip
        lines.append("| " + " | ".join(row) + " |")
    return lines
