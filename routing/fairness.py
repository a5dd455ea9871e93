"""Whose turn it is: one queue per tenant, first come first served inside it, round-robin between them."""

from collections import OrderedDict
from collections.abc import Callable

from core.ids import RequestId, TenantId


class TenantQueues:
    """Waiting requests of one model. Every operation is O(1) but ``first``, which walks over what it skips.

    A tenant that has just been served goes behind all others that wait, so a tenant with a thousand waiting
    requests delays another tenant's first by at most one of its own per turn.
    """

    def __init__(self) -> None:
        self._queues: OrderedDict[TenantId, OrderedDict[RequestId, None]] = OrderedDict()
        self._num_waiting = 0

    def __len__(self) -> int:
        return self._num_waiting

    def num_waiting(self, tenant: TenantId) -> int:
        """Return how many requests of the tenant wait."""
        return len(self._queues.get(tenant, ()))

    def push(self, tenant: TenantId, request: RequestId, *, front: bool = False) -> None:
        """Add a request at the end of its tenant's queue, or at its front if it had its turn and lost its worker."""
        queue = self._queues.setdefault(tenant, OrderedDict())
        queue[request] = None
        if front:
            queue.move_to_end(request, last=False)
            self._queues.move_to_end(tenant, last=False)
        self._num_waiting += 1

    def remove(self, tenant: TenantId, request: RequestId) -> None:
        """Take a request out wherever it stands; one that is not there is left alone."""
        queue = self._queues.get(tenant)
        if queue is None or request not in queue:
            return
        del queue[request]
        self._num_waiting -= 1
        if not queue:
            del self._queues[tenant]

    def first(self, is_due: Callable[[RequestId], bool]) -> tuple[TenantId, RequestId] | None:
        """Return whose turn it is: the first due request of the first tenant that has one. Others are passed over."""
        for tenant, queue in self._queues.items():
            for request in queue:
                if is_due(request):
                    return tenant, request
        return None

    def serve(self, tenant: TenantId, request: RequestId) -> None:
        """Take the request out, and put its tenant behind all others that wait."""
        self.remove(tenant, request)
        if tenant in self._queues:
            self._queues.move_to_end(tenant)
