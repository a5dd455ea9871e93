"""The admin port: workers and metrics. Always with the admin key, on loopback too."""

import hashlib
import hmac
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Depends, Query, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from core.errors import InvalidKey, InvalidRequest, UnknownUrl
from core.ids import WorkerId
from engines.worker import State, WorkerStatus
from gateway.services import Services

_VERBS = ("start", "stop", "drain", "restart")


def admin_routes(services: Services) -> APIRouter:
    """Return the routes of the admin port, each behind the admin key."""

    def check_key(request: Request) -> None:
        headers = dict(request.scope["headers"])
        secret = headers.get(b"authorization", b"").removeprefix(b"Bearer ").strip()
        if not hmac.compare_digest(hashlib.sha256(secret).digest(), services.admin_digest):
            raise InvalidKey("the admin key is missing or wrong; it lies in `admin.key` of the state folder")

    router = APIRouter(dependencies=[Depends(check_key)], tags=["admin"])

    @router.get("/admin/v1/workers")
    async def list_workers() -> dict[str, Any]:
        """List every declared worker with its state."""
        return {"data": [_shown(status, services) for status in services.supervisor.statuses()]}

    @router.get("/admin/v1/workers/{worker_id}")
    async def show_worker(worker_id: str) -> dict[str, Any]:
        """Show one worker."""
        return _shown(_known(worker_id, services), services)

    @router.post("/admin/v1/workers/{worker_id}/{verb}")
    async def act(worker_id: str, verb: str) -> dict[str, Any]:
        """Start, stop, drain (finish what runs, then stop) or restart (drain, then start) a worker."""
        worker = _known(worker_id, services).id
        supervisor = services.supervisor
        match verb:
            case "start":
                supervisor.start(worker)
            case "stop":
                await supervisor.stop(worker)
            case "drain":
                await supervisor.drain(worker)
            case "restart":
                await supervisor.restart(worker)
            case _:
                raise InvalidRequest(f"{verb!r} is not one of {', '.join(_VERBS)}", param="verb")
        return _shown(supervisor.status(worker), services)

    @router.get("/admin/v1/workers/{worker_id}/logs")
    async def logs(worker_id: str, lines: Annotated[int, Query(ge=1, le=10_000)] = 100) -> Response:
        """Return the newest lines of a worker's log, as text."""
        worker = _known(worker_id, services).id
        text = "\n".join(await services.supervisor.logs(worker, lines))
        return Response(text + "\n" if text else "", media_type="text/plain; charset=utf-8")

    @router.get("/metrics")
    async def metrics() -> Response:
        """Return Prometheus metrics."""
        _refresh_gauges(services)
        return Response(generate_latest(services.metrics.registry), headers={"content-type": CONTENT_TYPE_LATEST})

    return router


def _known(worker_id: str, services: Services) -> WorkerStatus:
    try:
        return services.supervisor.status(WorkerId(worker_id))
    except KeyError:
        known = ", ".join(status.id for status in services.supervisor.statuses())
        raise UnknownUrl(f"there is no worker {worker_id[:128]!r}; there are {known}", code="unknown_worker") from None


def _shown(status: WorkerStatus, services: Services) -> dict[str, Any]:
    running = services.dispatcher.num_running(status.id)
    return {**msgspec.to_builtins(status), "running": running}


def _refresh_gauges(services: Services) -> None:
    metrics = services.metrics
    for status in services.supervisor.statuses():
        for state in State:
            metrics.worker_state.labels(status.id, state.value).set(status.state is state)
        metrics.worker_running.labels(status.id).set(services.dispatcher.num_running(status.id))
        metrics.worker_restarts.labels(status.id).set(status.restarts)
    for model in services.catalog.models():
        metrics.queue_depth.labels(model.name).set(services.dispatcher.num_waiting(model.name))
