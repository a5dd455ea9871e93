"""The gateway itself: its version, its health with reasons, and its metrics."""

from importlib.metadata import version
from typing import Literal

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from engines.worker import State
from gateway.api.admin.document import errors
from gateway.api.admin.guard import guarded
from gateway.api.admin.shapes import Shape
from gateway.services import Services


class VersionShape(Shape):
    """What runs here, and which state of the settings it goes by; `config` is equal for equal settings."""

    version: str
    config: str


class HealthShape(Shape):
    """How the parts are. `keys_are_fresh`: the database has told all it knows of tenants and keys within a second;
    `reload_error`: why the settings file's newest state is not in use. `replicas`: gateways that schedule as one, this
    one among them; `scheduling`: what this one is to each model that they share, such as `leading` or `alone`."""

    status: Literal["ready", "starting", "draining"]
    uptime_s: float
    open_requests: int
    workers: int
    workers_ready: int
    keys_are_fresh: bool
    database: Literal["up", "away"]
    records_waiting: int
    reload_error: str | None
    replicas: int
    scheduling: dict[str, str]


def system_routes(services: Services) -> APIRouter:
    """Return the routes of the gateway itself."""
    router = APIRouter(tags=["system"], route_class=guarded(services))
    started_at = services.clock.monotonic()

    @router.get("/admin/v1/version", responses=errors())
    async def show_version() -> VersionShape:
        """Show the version, and which settings are in force."""
        return VersionShape(version=version("forebay-server"), config=services.live.digest)

    @router.get("/admin/v1/health", responses=errors())
    async def show_health() -> HealthShape:
        """Show how every part is, always with 200."""
        statuses = services.supervisor.statuses()
        ready = sum(status.state is State.READY for status in statuses)
        replicas = services.replicas
        return HealthShape(
            status="draining" if services.chat.is_draining else "ready" if ready else "starting",
            uptime_s=services.clock.monotonic() - started_at,
            open_requests=services.chat.num_open,
            workers=len(statuses),
            workers_ready=ready,
            keys_are_fresh=not services.directory.is_away,
            database="away" if services.books.is_away or services.directory.is_away else "up",
            records_waiting=services.books.num_waiting,
            reload_error=services.live.last_error,
            replicas=replicas.num_replicas if replicas is not None else 1,
            scheduling={status.model: status.role for status in replicas.statuses} if replicas is not None else {},
        )

    @router.get("/metrics", response_class=Response, responses=_TEXT | errors())
    async def metrics() -> Response:
        """Return Prometheus metrics."""
        return Response(generate_latest(services.metrics.registry), headers={"content-type": CONTENT_TYPE_LATEST})

    return router


_TEXT: dict[int | str, dict[str, object]] = {
    200: {"description": "Prometheus' text.", "content": {"text/plain": {"schema": {"type": "string"}}}}
}
