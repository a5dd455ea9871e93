"""Requests like those that BurstGPT (arXiv 2401.17644) describes, for who has not got its file: "BurstGPT-like".

What is kept: gamma arrivals whose burstiness changes from window to window, a load that swings slowly, Zipf-like
lengths (many short, few very long), few sessions of more than one turn, failures. What is not: its models, its
weekdays, and any figure that is not an option here.
"""

import math
import random
from bisect import bisect
from itertools import accumulate

import msgspec

from core.ids import TenantId
from routing.simulator.trace import Arrival, Trace, trace, zipf_tenants

_BLOCK = 32
_THINKING_S = 20.0


class Bursts(msgspec.Struct, frozen=True):
    """What to make. ``rate``: mean requests a second; ``burstiness``: the gaps' coefficient of variation, drawn anew
    for each ``window`` seconds between these two; ``swing``: how far the load goes up and down over all, 0 to 1.

    Lengths are Zipf(``exponent``) over steps up to the longest; ``turns``: the share of sessions that go on after each
    turn; ``failures``: the share of requests without an answer. Tenants: Zipf(1.0) over ``tenants``.
    """

    requests: int = 2000
    rate: float = 2.0
    burstiness: tuple[float, float] = (0.5, 4.0)
    window: float = 60.0
    swing: float = 0.5
    exponent: float = 1.1
    longest_prompt: int = 4096
    longest_answer: int = 1024
    turns: float = 0.04
    failures: float = 0.03
    tenants: int = 27
    seed: int = 1


def burstgpt_like(bursts: Bursts) -> Trace:
    """Return a made-up trace; the same ``bursts`` give the same one."""
    rng = random.Random(bursts.seed)  # noqa: S311 - a seeded replay, no secret
    owner = zipf_tenants(bursts.tenants, bursts.seed)
    prompts = _Zipf(bursts.longest_prompt, bursts.exponent)
    answers = _Zipf(bursts.longest_answer, bursts.exponent)
    arrivals: list[Arrival] = []
    now, window_ends, variation = 0.0, 0.0, 1.0
    length = bursts.requests / bursts.rate
    session = 0
    while len(arrivals) < bursts.requests:
        if now >= window_ends:
            window_ends = now + bursts.window
            variation = rng.uniform(*bursts.burstiness)
        rate = bursts.rate * (1 + bursts.swing * math.sin(2 * math.pi * now / length))
        shape = 1 / variation**2  # of a gamma with this coefficient of variation
        now += rng.gammavariate(shape, 1 / (rate * shape))
        session += 1
        arrivals += _Session(session, owner(), prompts, answers, bursts).turns(now, rng)
    note = f"BurstGPT-like, made up: {bursts.requests} requests at {bursts.rate} a second, seed {bursts.seed}"
    return trace("burstgpt-like", sorted(arrivals, key=lambda one: one.at)[: bursts.requests], note, _BLOCK)


class _Session(msgspec.Struct, frozen=True):
    """What one session's turns are made from."""

    number: int
    tenant: TenantId
    prompts: "_Zipf"
    answers: "_Zipf"
    bursts: Bursts

    def turns(self, at: float, rng: random.Random) -> list[Arrival]:
        """Return its requests from ``at`` on: each prompt begins with all that was said before."""
        arrivals: list[Arrival] = []
        said = 0
        while True:
            prompt, output = said + self.prompts.draw(rng), self.answers.draw(rng)
            if rng.random() < self.bursts.failures:
                output = 0
            blocks = tuple((self.number << 20) + index for index in range((prompt + output) // _BLOCK))
            arrivals.append(Arrival(at, self.tenant, prompt, output, blocks, program=f"s{self.number}"))
            said = prompt + output
            if rng.random() >= self.bursts.turns or said > self.bursts.longest_prompt:
                return arrivals
            at += rng.expovariate(1 / _THINKING_S)


class _Zipf:
    """Lengths in steps of 1/64 of the longest: step k is drawn in proportion to ``1 / k ** exponent``."""

    def __init__(self, longest: int, exponent: float) -> None:
        self._step = max(1, longest // 64)
        self._sums = list(accumulate(1 / k**exponent for k in range(1, max(2, longest // self._step + 1))))

    def draw(self, rng: random.Random) -> int:
        k = bisect(self._sums, rng.random() * self._sums[-1])
        return k * self._step + rng.randint(1, self._step)
