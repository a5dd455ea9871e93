"""Whose turn it is: one queue per tenant, the most urgent class first inside it, round-robin between them."""

from collections import OrderedDict
from collections.abc import Callable

from core.ids import RequestId, TenantId


class TenantQueues:
    """Waiting requests of one model. Every operation is O(1) but ``first``, which walks over what it skips.

    A tenant that has just been served goes behind all others that wait, so a tenant with a thousand waiting
    requests delays another tenant's first by at most one of its own per turn. ``rank`` orders inside a tenant only: a
    lower one goes first, equal ones in order of arrival.
    """

    def __init__(self) -> None:
        self._queues: OrderedDict[TenantId, list[OrderedDict[RequestId, None]]] = OrderedDict()
        self._num_waiting = 0

    def __len__(self) -> int:
        return self._num_waiting

    def num_waiting(self, tenant: TenantId) -> int:
        """Return how many requests of the tenant wait."""
        return sum(map(len, self._queues.get(tenant, ())))

    def push(self, tenant: TenantId, request: RequestId, *, rank: int = 0, front: bool = False) -> None:
        """Add a request behind its tenant's of the same rank, or before them if it had its turn and lost its worker."""
        ranks = self._queues.setdefault(tenant, [])
        while len(ranks) <= rank:
            ranks.append(OrderedDict())
        queue = ranks[rank]
        queue[request] = None
        if front:
            queue.move_to_end(request, last=False)
            self._queues.move_to_end(tenant, last=False)
        self._num_waiting += 1

    def remove(self, tenant: TenantId, request: RequestId) -> None:
        """Take a request out wherever it stands; one that is not there is left alone."""
        ranks = self._queues.get(tenant, [])
        queue = next((queue for queue in ranks if request in queue), None)
        if queue is None:
            return
        del queue[request]
        self._num_waiting -= 1
        if not any(ranks):
            del self._queues[tenant]

    def first(self, is_due: Callable[[RequestId], bool]) -> tuple[TenantId, RequestId] | None:
        """Return whose turn it is: the first due request of the first tenant that has one. Others are passed over."""
        for tenant, ranks in self._queues.items():
            for queue in ranks:
                for request in queue:
                    if is_due(request):
                        return tenant, request
        return None

    def serve(self, tenant: TenantId, request: RequestId) -> None:
        """Take the request out, and put its tenant behind all others that wait."""
        self.remove(tenant, request)
        if tenant in self._queues:
            self._queues.move_to_end(tenant)
