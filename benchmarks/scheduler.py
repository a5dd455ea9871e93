"""What a decision costs: the scheduler alone, with 10,000 requests waiting, 1,000 tenants and 64 workers.

Claim: 99 of 100 decisions are made within 200 µs, whatever they lead to, and one core takes at least 10,000 token
events a second from the engines' streams.

Method: one process, no I/O, the clock turned by hand. The queue is filled to 10,000 requests of 1,000 tenants (Zipf),
64 workers of 24 slots are full. Then events come as a busy gateway would feed them: every running leg gains tokens, now
and then one ends and another request comes; legs of who is ahead are cut for who is behind. Each `on(event)` is timed
by itself, in CPU time of the thread, with the garbage collector on. A decision is every event but the tokens and first
tokens from which nothing followed. A round is a fresh scheduler; its p99 is one sample, the median over rounds stands
with the 95 % bootstrap interval. Token events are also timed in a row.

    python -m benchmarks.scheduler             all policies, about 3 minutes
    python -m benchmarks.scheduler --quick     vtc-pc and vtc, within 1 minute
"""

import argparse
import random
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import get_args

from benchmarks.loopback.stats import Interval, interval
from benchmarks.reporting import beginning, exit_status, say, write_results
from core.ids import LegId, RequestId, TenantId, WorkerId
from routing.fairness.policy import Fairness, Policy
from routing.scheduler import (
    Abort,
    Effect,
    Event,
    FirstToken,
    LegEnded,
    Reject,
    Scheduler,
    Start,
    Submit,
    Tick,
    Tokens,
    Worker,
    WorkerView,
)
from routing.simulator.simulation import MODEL, scheduler
from routing.simulator.trace import zipf_tenants

QUEUED = 10_000
TENANTS = 1000
WORKERS = 64
SLOTS = 24
DECISION_US = 200.0
TOKEN_EVENTS = 10_000.0
FULL_ROUNDS, QUICK_ROUNDS = 5, 3
FULL_EVENTS, QUICK_EVENTS = 60_000, 30_000
STEADY = ("Tokens", "FirstToken")  # events that bring nothing to decide
QUICK_POLICIES: tuple[Policy, ...] = ("vtc-pc", "vtc")


class Busy:
    """A scheduler whose workers are full and whose queue is long, and what it takes to keep it so."""

    def __init__(self, policy: Policy, seed: int) -> None:
        self.scheduler: Scheduler = scheduler(Fairness(policy=policy))
        self.spent: dict[str, list[int]] = defaultdict(list)
        self._rng = random.Random(seed)
        self._tenant = zipf_tenants(TENANTS, seed)
        self._running: list[LegId] = []
        self._place: dict[LegId, int] = {}
        self._cut: list[LegId] = []
        self._num = 0
        self.now = 0.0
        for index in range(WORKERS):
            self.feed(Worker(WorkerView(WorkerId(f"w{index}"), MODEL, True, True, True, SLOTS), now=0.0))
        while self.scheduler.num_waiting(MODEL) < QUEUED:
            self.submit()
        for leg in self._running:
            self.feed(FirstToken(leg=leg, now=self.now, prefilled=100))
        for leg in list(self._running):  # long enough at it that they may be cut
            self.feed(Tokens(leg=leg, num=self._rng.randrange(500), now=self.now))
        self.spent.clear()

    def feed(self, event: Event) -> Sequence[Effect]:
        """One event, timed, and what follows from its effects noted."""
        began = time.thread_time_ns()
        effects = self.scheduler.on(event)
        took = time.thread_time_ns() - began
        self.spent[_kind(event, effects)].append(took)
        for effect in effects:
            match effect:
                case Start():
                    self._place[effect.leg] = len(self._running)
                    self._running.append(effect.leg)
                case Abort():
                    self._cut.append(effect.leg)
                case Reject():
                    raise AssertionError(effect)
        return effects

    def submit(self) -> None:
        """One more request."""
        self._num += 1
        request = RequestId(str(self._num))
        prompt = self._rng.randrange(20, 2000)
        self.feed(
            Submit(
                request, self._next_tenant(), (MODEL,), prompt + 512, 1e6, self.now, prompt_tokens=prompt,
                program=str(self._num % 5000), is_pinned=False,
            )
        )  # fmt: skip

    def go_on(self, num: int) -> None:
        """So many events: mostly tokens, an end and an arrival each 40 events, what was cut ends soon."""
        for count in range(num):
            self.now += 0.0002
            if self._cut and count % 7 == 0:
                self._end(self._cut.pop(0), "aborted")
            elif count % 40 == 0:
                self._end(self._rng.choice(self._running), "done")
            elif count % 40 == 20 and self.scheduler.num_waiting(MODEL) <= QUEUED:
                self.submit()
            elif count % 250 == 1:
                self.feed(Tick(now=self.now))
            else:
                self.feed(Tokens(leg=self._rng.choice(self._running), num=1, now=self.now))

    def tokens_a_second(self, num: int) -> float:
        """Take so many token events in a row, and return how many of them fit into a second."""
        legs = [self._rng.choice(self._running) for _ in range(num)]
        events = [Tokens(leg=leg, num=1, now=self.now + 0.0001 * index) for index, leg in enumerate(legs)]
        began = time.thread_time_ns()
        for event in events:
            self.scheduler.on(event)
        return num / (time.thread_time_ns() - began) * 1e9

    def _next_tenant(self) -> TenantId:
        """Zipf, but all tenants are there: the first requests are one of each."""
        return TenantId(f"tenant-{self._num:04d}") if self._num < TENANTS else self._tenant()

    def _end(self, leg: LegId, cause: str) -> None:
        if (place := self._place.pop(leg, None)) is None:
            return
        last = self._running.pop()
        if last != leg:
            self._running[place] = last
            self._place[last] = place
        done = cause == "done"
        for effect in self.feed(LegEnded(leg, "done" if done else "aborted", self.now, can_resume=not done)):
            if isinstance(effect, Start):
                self.feed(FirstToken(leg=effect.leg, now=self.now, prefilled=50))


def _kind(event: Event, effects: Sequence[Effect]) -> str:
    """What a time is filed under: the event, and the dearest thing that followed."""
    for kind, name in ((Abort, "preempts"), (Start, "starts")):
        if any(isinstance(effect, kind) for effect in effects):
            return f"{type(event).__name__} that {name}"
    return type(event).__name__


def at_99(values: Sequence[int]) -> float:
    """The 99th percentile in microseconds."""
    return sorted(values)[len(values) * 99 // 100] / 1000


def main() -> int:
    """Measures, prints and writes; 0 when every target was held, else 1."""
    parser = argparse.ArgumentParser(prog="benchmarks.scheduler", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two policies, within 1 minute")
    chosen = parser.parse_args()
    return exit_status("scheduler", lambda: bench(chosen.quick))


def bench(quick: bool) -> bool:
    """Measures, prints and writes; whether every target was held."""
    began = beginning()
    policies: tuple[Policy, ...] = QUICK_POLICIES if quick else get_args(Policy)
    rounds, events = (QUICK_ROUNDS, QUICK_EVENTS) if quick else (FULL_ROUNDS, FULL_EVENTS)
    p99s: dict[str, list[float]] = defaultdict(list)
    rates: dict[str, list[float]] = defaultdict(list)
    kinds: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for number in range(rounds):
        for policy in policies if number % 2 == 0 else tuple(reversed(policies)):
            busy = Busy(policy, seed=number + 1)
            busy.go_on(events)
            p99s[policy].append(at_99([took for kind in busy.spent for took in busy.spent[kind] if kind not in STEADY]))
            for kind, values in busy.spent.items():
                kinds[policy][kind] += values
            rates[policy].append(busy.tokens_a_second(20_000))
            say(f"round {number + 1} {policy}: p99 {p99s[policy][-1]:.0f} µs, {rates[policy][-1]:,.0f} token events/s")
    table = ["| policy | event | num | p50 µs | p99 µs | most µs |", "|---|---|---|---|---|---|"]
    for name, found in kinds.items():
        for kind, values in sorted(found.items()):
            middle = sorted(values)[len(values) // 2] / 1000
            line = (
                f"| {name} | {kind} | {len(values)} | {middle:.1f} | {at_99(values):.1f} | {max(values) / 1000:.0f} |"
            )
            table.append(line)
    lines, kept = verdicts({name: interval(values) for name, values in p99s.items()},
                           {name: interval(values) for name, values in rates.items()})  # fmt: skip
    raw = {"p99_us": p99s, "token_events_per_s": rates}
    write_results("scheduler", "What a decision costs", began, quick=quick, table=table, lines=lines, raw=raw)
    return kept


def verdicts(p99s: dict[str, Interval], rates: dict[str, Interval]) -> tuple[list[str], bool]:
    """A line for each target, and whether all were held."""
    lines, kept = [], True
    for policy, found in p99s.items():
        held = found.high <= DECISION_US
        word = "held" if held else "missed"
        lines.append(f"target decision_p99_{policy}: want ≤ {DECISION_US:.0f} µs, measured {found.show(0)}, {word}")
        rate = rates[policy]
        enough = rate.low >= TOKEN_EVENTS
        word = "held" if enough else "missed"
        lines.append(f"target token_events_{policy}: want ≥ {TOKEN_EVENTS:,.0f}/s, measured {rate.show(0)}, {word}")
        kept = kept and held and enough
    return lines, kept


if __name__ == "__main__":
    sys.exit(main())
