"""Is it alive, may it be given work, and how are its parts: from what is known already, never by asking an engine."""

from typing import Any

from fastapi import APIRouter, Response

from engines.worker import State
from gateway.services import Services


def health_routes(services: Services) -> APIRouter:
    """Return the health routes, the same on both ports. None needs a key, and none tells more than counts."""
    router = APIRouter(tags=["health"])

    async def live() -> dict[str, str]:
        """Answer 200 while the process runs."""
        return {"status": "alive"}

    async def ready(response: Response) -> dict[str, Any]:
        """Answer 200 if requests are welcome: not draining, and every model has a worker that is ready."""
        body = _summary(services)
        response.status_code = 200 if body["status"] == "ready" else 503
        return body

    async def health() -> dict[str, Any]:
        """Return the same summary, always with 200."""
        return _summary(services)

    for path in ("/health/liveness", "/health/liveliness", "/livez"):
        router.get(path, summary="Liveness")(live)
    for path in ("/health/readiness", "/readyz"):
        router.get(path, summary="Readiness")(ready)
    router.get("/health", summary="Summary")(health)
    return router


def _summary(services: Services) -> dict[str, Any]:
    models: dict[str, dict[str, int]] = {
        model.name: {"workers": 0, "ready": 0, "healthy": 0} for model in services.catalog.models()
    }
    for status in services.supervisor.statuses():
        counts = models[status.model]
        counts["workers"] += 1
        counts["ready"] += status.state is State.READY
        counts["healthy"] += status.state is State.READY and status.healthy
    if services.chat.is_draining:
        state = "draining"
    elif all(counts["ready"] for counts in models.values()):
        state = "ready"
    elif any(counts["ready"] for counts in models.values()):
        state = "ready"  # one model's trouble must not take the others out of a load balancer
    else:
        state = "starting"
    body: dict[str, Any] = {"status": state, "models": models}
    if (replicas := services.replicas) is not None:
        body["scheduling"] = {
            "replicas": replicas.num_replicas,
            "models": {status.model: status.role for status in replicas.statuses},
        }
    return body
