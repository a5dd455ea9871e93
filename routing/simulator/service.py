"""Who was served how much while who waited: the service gap, Jain's index, and what was made while anybody waited.

Service is VTC's: a prompt token counts 1, an output token 2, divided by the tenant's weight; what is computed again
after a cut counts for nobody. Backlogged is who has a request that waits in the gateway.
"""

from collections.abc import Mapping

from core.ids import TenantId

PROMPT_WEIGHT = 1
OUTPUT_WEIGHT = 2
_JAIN_WINDOW_S = 10.0


class Service:
    """Told of every change as it happens; looks at the pairs of backlogged tenants each ``interval`` virtual seconds.

    ``gap``: the most that one of two tenants got ahead of the other while both were backlogged; ``waiting``: how many
    requests waited, every 10 s. A look costs the square of the number of tenants backlogged.
    """

    def __init__(self, weights: Mapping[TenantId, float], interval: float) -> None:
        self.received: dict[TenantId, float] = {}
        self.gap = 0.0
        self.gap_between: tuple[TenantId, TenantId] | None = None
        self.backlogged_s = 0.0
        self.backlogged_tokens = 0
        self._weights = weights
        self._interval = interval
        self._next_look = 0.0
        self._waiting: dict[TenantId, int] = {}
        self._since: dict[TenantId, int] = {}  # which of its backlogs a tenant is in
        self._num_backlogs = 0
        self._now = 0.0
        self._pairs: dict[tuple[TenantId, TenantId], tuple[int, int, float, float]] = {}
        self.waiting: list[tuple[float, int]] = []
        self._window_ends = _JAIN_WINDOW_S
        self._at_window: dict[TenantId, tuple[int, float]] = {}
        self._jains: list[float] = []

    @property
    def num_waiting(self) -> int:
        """Requests that wait now."""
        return sum(self._waiting.values())

    @property
    def jain(self) -> float | None:
        """Jain's index of service among the tenants backlogged all the while, averaged over windows of 10 s with two or
        more of them; 1 is equal. None if there was no such window."""
        return sum(self._jains) / len(self._jains) if self._jains else None

    def at(self, now: float) -> None:
        """Time has come to ``now``; call it before what happens then."""
        if self._waiting:
            self.backlogged_s += now - self._now
        self._now = now
        if now >= self._next_look:
            self._look()
            self._next_look = now + self._interval
        if now >= self._window_ends:
            self._close_window()
            self._window_ends = now + _JAIN_WINDOW_S
            self.waiting.append((now, self.num_waiting))

    def waits(self, tenant: TenantId) -> None:
        """A request of the tenant waits."""
        num = self._waiting.get(tenant, 0)
        self._waiting[tenant] = num + 1
        if not num:
            self._num_backlogs += 1
            self._since[tenant] = self._num_backlogs

    def leaves(self, tenant: TenantId) -> None:
        """A request of the tenant does not wait any more."""
        num = self._waiting[tenant] - 1
        if num:
            self._waiting[tenant] = num
        else:
            del self._waiting[tenant]

    def serves(self, tenant: TenantId, prompt: int, output: int) -> None:
        """The tenant has received this."""
        tokens = PROMPT_WEIGHT * prompt + OUTPUT_WEIGHT * output
        self.received[tenant] = self.received.get(tenant, 0.0) + tokens / self._weights.get(tenant, 1.0)
        if self._waiting:
            self.backlogged_tokens += output

    def _look(self) -> None:
        backlogged = list(self._waiting)
        received = self.received
        for index, one in enumerate(backlogged):
            first, mine = self._since[one], received.get(one, 0.0)
            for other in backlogged[index + 1 :]:
                pair = (one, other) if one < other else (other, one)
                ahead = mine - received.get(other, 0.0)
                if pair[0] != one:
                    ahead = -ahead
                second = self._since[other]
                key = (first, second) if pair[0] == one else (second, first)
                known = self._pairs.get(pair)
                if known is None or known[:2] != key:
                    self._pairs[pair] = (*key, ahead, ahead)
                    continue
                low, high = min(known[2], ahead), max(known[3], ahead)
                if (low, high) != known[2:]:
                    self._pairs[pair] = (*key, low, high)
                    if high - low > self.gap:
                        self.gap, self.gap_between = high - low, pair

    def _close_window(self) -> None:
        served = [
            self.received.get(tenant, 0.0) - before
            for tenant, (since, before) in self._at_window.items()
            if tenant in self._waiting and self._since[tenant] == since
        ]
        if len(served) > 1 and any(served):
            self._jains.append(sum(served) ** 2 / (len(served) * sum(one * one for one in served)))
        self._at_window = {name: (self._since[name], self.received.get(name, 0.0)) for name in self._waiting}
