"""How the gateway is at this moment, put together for whoever looks at the metrics."""

from engines.dispatcher import Dispatcher
from engines.supervisor import Supervisor
from engines.worker import State, WorkerStatus
from gateway.books import Books
from gateway.directory import Directory
from gateway.metrics import Vitals, WorkerVitals
from gateway.tracing import Tracing
from routing.catalog import Catalog
from storage.redis.connection import RedisConnection


def vitals_of(
    *,
    supervisor: Supervisor,
    dispatcher: Dispatcher,
    catalog: Catalog,
    books: Books,
    directory: Directory,
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
    )


def _worker(status: WorkerStatus, dispatcher: Dispatcher) -> WorkerVitals:
    return WorkerVitals(
        id=status.id,
        states={state.value: status.state is state for state in State},
        is_healthy=status.healthy,
        is_tripped=dispatcher.is_tripped(status.id),
        num_running=dispatcher.num_running(status.id),
        num_restarts=status.restarts,
    )
