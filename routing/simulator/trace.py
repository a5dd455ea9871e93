"""What is replayed: when requests came, whose they were, how long prompt and answer were, what they have in common."""

import math
import random
from bisect import bisect
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate

import msgspec

from core.ids import TenantId


class Arrival(msgspec.Struct, frozen=True):
    """One request. ``at`` in seconds from the trace's beginning; ``output`` 0: the service failed it.

    ``blocks`` names the leading blocks of prompt and answer that other requests may begin with, too.
    """

    at: float
    tenant: TenantId
    prompt: int
    output: int
    blocks: tuple[int, ...] = ()
    program: str = ""


class Trace(msgspec.Struct, frozen=True):
    """Requests in order of arrival; ``note`` says where they are from and how they got their tenants."""

    name: str
    arrivals: tuple[Arrival, ...]
    note: str
    block_tokens: int = 512

    @property
    def duration(self) -> float:
        """Seconds from the beginning to the last arrival."""
        return self.arrivals[-1].at if self.arrivals else 0.0

    def first(self, num: int) -> "Trace":
        """Return the same trace ended after ``num`` requests."""
        return msgspec.structs.replace(self, arrivals=self.arrivals[:num])

    def faster(self, factor: float) -> "Trace":
        """Return the same requests with all times divided by ``factor``: as much more load."""
        arrivals = tuple(msgspec.structs.replace(one, at=one.at / factor) for one in self.arrivals)
        return msgspec.structs.replace(self, arrivals=arrivals)


class BadTrace(Exception):
    """A line that is not of the format; the message names it."""


def trace(name: str, arrivals: Iterable[Arrival], note: str, block_tokens: int = 512) -> Trace:
    """Return the requests as a trace: sorted by time, the first at 0. Raises ``BadTrace`` if there are none."""
    ordered = sorted(arrivals, key=lambda one: one.at)
    if not ordered:
        raise BadTrace(f"{name}: there is no request in it")
    began = ordered[0].at
    moved = (msgspec.structs.replace(one, at=one.at - began) for one in ordered)
    return Trace(name=name, arrivals=tuple(moved), note=note, block_tokens=block_tokens)


def zipf_tenants(num: int, seed: int, exponent: float = 1.0) -> Callable[[], TenantId]:
    """Return a draw of tenants of which the k-th has a share in proportion to ``1 / k ** exponent``.

    The rule for traces that do not tell whose requests they hold. The same seed gives the same draws.
    """
    rng = random.Random(seed)  # noqa: S311 - a seeded replay, no secret
    shares = list(accumulate(1 / k**exponent for k in range(1, num + 1)))
    width = int(math.log10(num)) + 1

    def draw() -> TenantId:
        return TenantId(f"tenant-{bisect(shares, rng.random() * shares[-1]):0{width}d}")

    return draw


def light_and_heavy(arrivals: Sequence[Arrival]) -> dict[TenantId, str]:
    """Return each tenant's class by the tokens that it asks for, an output token counted twice.

    ``heavy``: the fewest tenants that together ask for half of all; ``light``: who asks for less than half of an equal
    share; ``middle``: the others. A tenant alone is ``heavy``.
    """
    asked: dict[TenantId, int] = {}
    for one in arrivals:
        asked[one.tenant] = asked.get(one.tenant, 0) + one.prompt + 2 * one.output
    total, so_far = sum(asked.values()), 0
    classes: dict[TenantId, str] = {}
    for tenant in sorted(asked, key=lambda name: (-asked[name], name)):
        if so_far * 2 < total:
            classes[tenant] = "heavy"
        else:
            classes[tenant] = "light" if asked[tenant] * 2 * len(asked) < total else "middle"
        so_far += asked[tenant]
    return classes
