"""Workers: what they do, and the verbs that steer them."""

from typing import Annotated, Literal

import msgspec
from fastapi import APIRouter, Path, Query, Response

from core.errors import UnknownId
from core.ids import WorkerId
from engines.worker import WorkerStatus
from gateway.api.admin.document import errors
from gateway.api.admin.guard import guarded
from gateway.api.admin.pages import After, Limit, Page, page_of
from gateway.api.admin.shapes import Shape
from gateway.services import Services

Verb = Literal["start", "stop", "drain", "restart"]
Id = Annotated[str, Path(max_length=160)]


class LoadShape(Shape):
    """What an engine says of itself; `kv_used` is a part of 1."""

    running: int
    waiting: int
    kv_used: float | None


class CapabilitiesShape(Shape):
    """What the start-up probe has proven of an engine."""

    endpoints: list[str]
    context_tokens: int | None
    kv_tokens: int | None
    num_prefixes: int | None
    token_ids: bool
    token_prompts: bool
    continuation: bool
    cache_salt: bool
    slot_save: bool
    metrics: bool
    models: list[str]
    version: str | None


class WorkerShape(Shape):
    """A worker. `since` and `next_start_at` are Unix seconds, `running` counts the slots taken."""

    id: str
    model: str
    engine: str
    state: Literal["starting", "ready", "draining", "stopped", "failed"]
    healthy: bool
    is_wanted: bool
    max_inflight: int
    since: float
    restarts: int
    context_tokens: int | None
    last_error: str | None
    next_start_at: float | None
    pid: int | None
    url: str | None
    load: LoadShape | None
    capabilities: CapabilitiesShape
    running: int


def worker_routes(services: Services) -> APIRouter:
    """Return the routes of workers."""
    router = APIRouter(prefix="/admin/v1/workers", tags=["workers"], route_class=guarded(services))

    @router.get("", responses=errors())
    async def list_workers(limit: Limit = 200, after: After = None) -> Page[WorkerShape]:
        """List every declared worker with its state."""
        page, following = page_of(services.supervisor.statuses(), lambda status: status.id, after, limit)
        return Page(data=[shown_worker(status, services) for status in page], next=following)

    @router.get("/{worker_id}", responses=errors(404))
    async def show_worker(worker_id: Id) -> WorkerShape:
        """Show one worker."""
        return shown_worker(_known(worker_id, services), services)

    @router.post("/{worker_id}/{verb}", responses=errors(404))
    async def act_on_worker(worker_id: Id, verb: Verb) -> WorkerShape:
        """Start, stop, drain (move what runs to other workers, finish the rest, then stop) or restart (drain, then
        start) a worker."""
        worker = _known(worker_id, services).id
        match verb:
            case "start":
                services.supervisor.start(worker)
            case "stop":
                await services.supervisor.stop(worker)
            case "drain":
                await services.supervisor.drain(worker)
            case "restart":
                await services.supervisor.restart(worker)
        return shown_worker(_known(worker_id, services), services)

    @router.get("/{worker_id}/logs", response_class=Response, responses=_LOG | errors(404))
    async def read_worker_log(worker_id: Id, lines: Annotated[int, Query(ge=1, le=10_000)] = 100) -> Response:
        """Return the newest lines of a worker's log, as text."""
        worker = _known(worker_id, services).id
        text = "\n".join(await services.supervisor.logs(worker, lines))
        return Response(text + "\n" if text else "", media_type="text/plain; charset=utf-8")

    return router


_LOG: dict[int | str, dict[str, object]] = {
    200: {"description": "The lines.", "content": {"text/plain": {"schema": {"type": "string"}}}}
}


def shown_worker(status: WorkerStatus, services: Services) -> WorkerShape:
    """Return a worker's status as the wire shows it."""
    return WorkerShape(**msgspec.to_builtins(status), running=services.dispatcher.num_running(status.id))


def _known(worker_id: str, services: Services) -> WorkerStatus:
    try:
        return services.supervisor.status(WorkerId(worker_id))
    except KeyError:
        known = ", ".join(status.id for status in services.supervisor.statuses())
        raise UnknownId(f"there is no worker {worker_id[:128]!r}; there are {known}", code="unknown_worker") from None
