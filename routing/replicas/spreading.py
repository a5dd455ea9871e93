"""Which gateway should decide for a model: rendezvous hashing (Thaler and Ravishankar, IEEE/ACM ToN 6(1), 1998).

Every gateway has a score for every model, and the highest decides: so models are spread evenly, a newcomer takes its
part and no other model moves. Where we differ: nobody is elected by it. Whoever holds a lease keeps it for as long as
it lives, unless another one of those that follow it has been the better one for ``SETTLED_S``.
"""

from collections.abc import Iterable
from hashlib import blake2b

from core.ids import ModelName
from routing.replicas.messages import ReplicaId

SETTLED_S = 3.0
"""For how long a gateway has to be the one that should decide, before it is made to."""


def best_of(model: ModelName, replicas: Iterable[ReplicaId]) -> ReplicaId:
    """Return which of them should decide for the model; the same one wherever it is asked."""
    return max(replicas, key=lambda replica: blake2b(f"{replica}:{model}".encode(), digest_size=8).digest())


class Spreading:
    """Remembers for how long a lease should have been another's. For the holder of one model's lease."""

    def __init__(self) -> None:
        self._best: ReplicaId | None = None
        self._since = 0.0

    def successor(
        self, model: ModelName, holder: ReplicaId, followers: Iterable[ReplicaId], now: float
    ) -> ReplicaId | None:
        """Return who should be given the lease now; None if nobody should. To be asked with every beat."""
        best = best_of(model, (holder, *followers))
        if best != self._best:
            self._best, self._since = best, now
        return best if best != holder and now >= self._since + SETTLED_S else None
