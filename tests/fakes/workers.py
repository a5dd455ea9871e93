"""Workers as the scheduler sees them."""

from core.ids import ModelName, WorkerId
from routing.scheduler import WorkerView


def view(
    worker: str = "m-0",
    *,
    ready: bool = True,
    healthy: bool = True,
    may_return: bool = False,
    slots: int = 1,
    incarnation: int = 0,
    draining: bool = False,
    kv_tokens: int | None = None,
) -> WorkerView:
    """Return the view of a worker named ``<model>-<index>``."""
    return WorkerView(
        id=WorkerId(worker),
        model=ModelName(worker.rpartition("-")[0]),
        is_ready=ready,
        is_healthy=healthy,
        may_return=may_return,
        max_inflight=slots,
        incarnation=incarnation,
        is_draining=draining,
        kv_tokens=kv_tokens,
    )
