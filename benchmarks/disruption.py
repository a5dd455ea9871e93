"""Streams whose workers are killed, drained, restarted and taken away: what their clients notice.

Claim: no byte that was delivered is lost, doubled or altered; every stream that may be cut completes, and one that may
not ends in exactly one error if its worker dies; and the fake engine, whose next token depends on all before it,
answers as if nothing had happened.

Method: a mixture of requests of three tenants (streams and whole answers, chats and completions, stop strings, scripts
with several bytes a letter, some that cannot be continued) is asked three times of real engines behind a real gateway:
twice in peace, which is the control, and once while workers are killed with SIGKILL, drained and restarted at random
moments of a seeded generator and tenants preempt each other at the least difference. An answer is

- `broken` if it offends a rule of the wire: frames, one role, one finish reason, one usage that adds up, one [DONE],
  the same id all through;
- `not as said` if it is not what its engines said. What they are told and say is written down: the last leg's prompt
  and answer have to be the client's text, letter by letter, and every other leg's prompt the beginning of it;
- `unfinished` if it ends in an error without having to;
- different if it says something else than it did in peace. Real engines are not exact under changing batches: the
  control says how far. With one slot nothing is computed beside a request, so what differs there differs by the cut
  alone. Sampled answers are not compared.

    python -m benchmarks.disruption                       200 requests each of all engines, half an hour
    python -m benchmarks.disruption --quick               fake and llama.cpp, within 4 minutes
    python -m benchmarks.disruption --engines fake,vllm   some of them

Ends with 1 if a target is missed.
"""

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.reporting import beginning, exit_status, say, write_results
from tests.e2e.disrupting import Plan, Reply, Trial, trial
from tests.e2e.plans import fake_plan, llamacpp_plan, vllm_plan


@dataclass(frozen=True)
class Arm:
    """An engine, and how many requests it is asked: in full, and in a quick run (0: not at all)."""

    name: str
    note: str
    plan: Callable[[Path], Plan]
    count: int
    quick: int
    is_exact: bool = False  # answers have to be the undisturbed ones


ARMS = (
    Arm("fake", "2 fake engines of 4 slots", lambda _: fake_plan(), 200, 200, is_exact=True),
    Arm(
        "llamacpp",
        "2 llama.cpp of 4 slots, SmolLM2-135M Q4_1, a thread each",
        lambda at: llamacpp_plan(at, times=3),
        200,
        40,
    ),
    Arm("llamacpp_one_slot", "the same with one slot each", lambda at: llamacpp_plan(at, slots=1, times=3), 200, 24),
    Arm("vllm", "2 vLLM (CPU) of 4 slots, SmolLM2-135M bfloat16", lambda at: vllm_plan(at, times=2), 200, 0),
)


def percentile(values: Sequence[float], share: float) -> float:
    """The value that so many of them do not exceed; 0 of none."""
    return sorted(values)[min(int(len(values) * share), len(values) - 1)] if values else 0.0


def pauses(replies: Sequence[Reply]) -> list[float]:
    """The longest pause of each stream, in seconds."""
    return [reply.pause_s for reply in replies if reply.question.streams and reply.story.error is None]


def acts_of(seen: Trial) -> str:
    """What was done to workers, and how often."""
    return ", ".join(f"{count} × {act}" for act, count in seen.acts.most_common()) or "nothing"


def row(name: str, seen: Trial) -> str:
    """A row of the table."""
    before, after = pauses(seen.undisturbed), pauses(seen.replies)
    cells = [
        name,
        str(len(seen.replies)),
        acts_of(seen),
        ", ".join(f"{count} {cause}" for cause, count in seen.ended.most_common()),
        str(len(seen.disturbed.broken)),
        str(len(seen.seams)) if seen.seams is not None else "–",
        str(len(seen.disturbed.unfinished)),
        str(seen.disturbed.cut),
        f"{seen.disturbed.equal_share:.1%} of {seen.disturbed.compared}",
        f"{seen.control.equal_share:.1%}" if seen.control is not None else "–",
        f"{percentile(before, 0.5) * 1e3:.0f} → {percentile(after, 0.5) * 1e3:.0f}",
        f"{max(before, default=0) * 1e3:.0f} → {max(after, default=0) * 1e3:.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


HEADS = (
    *("engine", "requests", "done to workers", "legs ended by", "broken", "not as said", "unfinished", "pinned, cut"),
    *("as undisturbed", "undisturbed twice", "longest pause of a stream, p50, ms", "of all streams, ms"),
)


def verdicts(arm: Arm, seen: Trial) -> list[tuple[str, bool]]:
    """The lines of an arm's targets, and whether they are held."""
    disturbed = seen.disturbed
    wrong = len(disturbed.broken) + len(seen.seams or ())
    streams = [reply for reply in seen.replies if reply.question.streams and not reply.question.is_pinned]
    complete = sum(reply.story.error is None for reply in streams)
    checks = [
        ("bytes", "0 faults", f"{wrong} in {len(seen.replies)} answers", not wrong),
        ("complete", "100 % of unpinned streams", f"{complete} of {len(streams)}", complete == len(streams)),
        ("ended", "no other errors but `worker_lost` of pinned streams", f"{len(disturbed.unfinished)} others",
         not disturbed.unfinished),
        ("acts", "workers killed and drained", acts_of(seen), {"kill", "drain"} <= set(seen.acts)),
        ("cuts", "legs cut ≥ a tenth of requests", f"{seen.num_cut}", seen.num_cut * 10 >= len(seen.replies)),
    ]  # fmt: skip
    if arm.is_exact:
        different = len(disturbed.different)
        checks.append(("same", "0 answers differ", f"{different} of {disturbed.compared}", different == 0))
    return [
        (f"target {name}_{arm.name}: want {want}, measured {measured}, {'held' if held else 'missed'}", held)
        for name, want, measured, held in checks
    ]


def main() -> int:
    """Measure, print and write; 0 when every target was held, 1 when not."""
    names = [arm.name for arm in ARMS]
    parser = argparse.ArgumentParser(prog="benchmarks.disruption", description="What clients notice of lost workers.")
    parser.add_argument("--quick", action="store_true", help="without vLLM, and fewer requests of llama.cpp")
    parser.add_argument("--engines", help=f"some, with commas between them: {', '.join(names)}")
    parser.add_argument("--requests", type=int, help="of each engine")
    chosen = parser.parse_args()
    wanted = chosen.engines.split(",") if chosen.engines else names
    if unknown := set(wanted) - set(names):
        parser.error(f"there is no engine {min(unknown)!r}; there are {', '.join(names)}")
    arms = [arm for arm in ARMS if arm.name in wanted and (not chosen.quick or arm.quick)]
    return exit_status("disruption", lambda: bench(chosen, arms))


def bench(chosen: argparse.Namespace, arms: Sequence[Arm]) -> bool:
    """Measure, print and write; whether every target was held."""
    began_all = beginning()
    trials: dict[str, Trial] = {}
    lines: list[tuple[str, bool]] = []
    for arm in arms:
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="disruption-") as at:
            count = chosen.requests or (arm.quick if chosen.quick else arm.count)
            seen = asyncio.run(trial(arm.plan(Path(at)), count))
        say(f"{arm.name}: {seen.summary()}, {time.monotonic() - began:.0f} s")
        trials[arm.name] = seen
        lines += verdicts(arm, seen)
    table = ["| " + " | ".join(HEADS) + " |", "|---" * len(HEADS) + "|"]
    table += [row(name, seen) for name, seen in trials.items()]
    faults = [
        f"{name}: {fault}"
        for name, seen in trials.items()
        for fault in (*seen.disturbed.broken, *(seen.seams or ()), *seen.disturbed.unfinished)
    ]
    write_results(
        "disruption", "What clients notice of lost workers", began_all,
        quick=chosen.quick, table=table, lines=[line for line, _ in lines],
        raw={"trials": {name: figures_of(seen) for name, seen in trials.items()}},
        notes=[*(f"{arm.name}: {arm.note}." for arm in arms), *(f"FAULT {fault}" for fault in faults[:20])],
    )  # fmt: skip
    return all(held for _, held in lines)


def figures_of(seen: Trial) -> object:
    """All that was counted, and of each answer what its client noticed; no texts."""
    return {
        "disturbed": seen.disturbed._asdict(),
        "control": seen.control._asdict() if seen.control is not None else None,
        "acts": dict(seen.acts),
        "legs_ended": dict(seen.ended),
        "answers": [
            {
                "number": reply.question.number,
                "path": reply.question.path,
                "streams": reply.question.streams,
                "pinned": reply.question.is_pinned,
                "error": reply.story.error,
                "tokens": reply.story.completion_tokens,
                "latency_s": round(reply.latency_s, 4),
                "pause_s": round(reply.pause_s, 4),
            }
            for reply in seen.replies
        ],
    }


if __name__ == "__main__":
    sys.exit(main())
