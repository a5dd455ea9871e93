"""How the gateway is at this moment, put together for whoever looks at the metrics."""

from core.clock import Clock
from engines.dispatcher import Dispatcher
from engines.supervisor import Supervisor
from engines.worker import State, WorkerStatus
from gateway.auth import Keyring
from gateway.books import Books
from gateway.directory import Directory
from gateway.metrics import Vitals, WorkerVitals
from gateway.replicas import Replicas
from gateway.spending import Spending
from gateway.tracing import Tracing
from routing.budgets import Spent
from routing.catalog import Catalog
from routing.scheduler import Scheduler
from storage.redis.connection import RedisConnection

_LOW = 0.8  # the part of a budget after which little is left


def vitals_of(
    *,
    supervisor: Supervisor,
    dispatcher: Dispatcher,
    catalog: Catalog,
    books: Books,
    directory: Directory,
    spending: Spending,
    scheduler: Scheduler | Replicas,
    clock: Clock,
    tracing: Tracing | None,
    redis: RedisConnection | None,
    revision: str,
) -> Vitals:
    """Return the state of all parts, from what they know already: nothing is asked over a network."""
    return Vitals(
        workers=tuple(_worker(status, dispatcher) for status in supervisor.statuses()),
        queues={model.name: dispatcher.num_waiting(model.name) for model in catalog.models()},
        num_inflight=dispatcher.num_open,
        is_database_up=not (books.is_away or directory.is_away),
        num_records_waiting=books.num_waiting,
        is_redis_up=redis.is_up if redis is not None else None,
        redis_errors=redis.num_errors if redis is not None else {},
        revision=revision,
        num_traces_exported=tracing.num_exported if tracing is not None else 0,
        num_traces_dropped=tracing.num_dropped if tracing is not None else 0,
        budgets=_budgets(directory.keyring, spending.spent, clock.wall()),
        num_replicas=scheduler.num_replicas if isinstance(scheduler, Replicas) else None,
        roles={status.model: status.role for status in scheduler.statuses} if isinstance(scheduler, Replicas) else {},
        waste_left={
            model.name: left for model in catalog.models() if (left := scheduler.waste_left(model.name)) is not None
        },
    )


def _budgets(keyring: Keyring, spent: Spent, now: float) -> dict[str, int]:
    """Return how many budgets are `free` (less than 80 % used), `low` and `used_up`."""
    counts = {"free": 0, "low": 0, "used_up": 0}
    for owned in keyring.budgets():
        amount = owned.budget.amount
        used = spent.used((owned.subject, owned.id), owned.budget, now)
        counts["used_up" if used >= amount else "low" if used >= _LOW * amount else "free"] += 1
    return counts


def _worker(status: WorkerStatus, dispatcher: Dispatcher) -> WorkerVitals:
    return WorkerVitals(
        id=status.id,
        states={state.value: status.state is state for state in State},
        is_healthy=status.healthy,
        is_tripped=dispatcher.is_tripped(status.id),
        num_running=dispatcher.num_running(status.id),
        num_restarts=status.restarts,
    )
