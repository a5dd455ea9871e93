"""OpenAI's Batch API on the data port. The wire is docs/reference/batches.md."""

from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Query, Request, Response
from msgspec import Meta

from core.batches import BatchRecord
from core.errors import InvalidJson, InvalidRequest
from gateway.api.common import read_body
from gateway.api.files import page_of
from gateway.auth import Principal
from gateway.batches.rows import ENDPOINTS
from gateway.ceilings import check_depth
from gateway.services import Services

_LARGEST = 64 << 10  # of the body: sixteen pairs of metadata, and little else
_DEPTH = 8
_WINDOW = "24h"
_Key = Annotated[str, Meta(min_length=1, max_length=64)]
_Text = Annotated[str, Meta(max_length=512)]


class _New(msgspec.Struct, forbid_unknown_fields=True):
    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: Annotated[dict[_Key, _Text], Meta(max_length=16)] | None = None


class _Batches:
    """The handlers. Each needs a tenant's key, and another tenant's ids are unknown to it."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._batches = services.batches

    def _identify(self, request: Request) -> Principal:
        return self._services.directory.keyring.identify(dict(request.scope["headers"]), self._services.clock.wall())

    async def submit(self, request: Request) -> Response:
        """Submit a batch: 200 once it is durable. Its rows are read afterwards."""
        principal = self._identify(request)
        new = _new(await read_body(request, _LARGEST))
        endpoint = next((one for one in ENDPOINTS if one.value == new.endpoint), None)
        if endpoint is None:
            known = ", ".join(one.value for one in ENDPOINTS)
            raise InvalidRequest(f"`endpoint` has to be one of {known}", param="endpoint")
        if new.completion_window != _WINDOW:
            raise InvalidRequest(f"`completion_window` has to be {_WINDOW}", param="completion_window")
        record = await self._batches.submit(
            principal,
            new.input_file_id,
            endpoint,
            metadata=new.metadata or {},
            end_user=request.headers.get("x-forebay-end-user"),
            idempotency=request.headers.get("idempotency-key"),
        )
        return _json(_shown(record))

    async def search(
        self, request: Request, limit: Annotated[int, Query(ge=1, le=100)] = 20, after: str | None = None
    ) -> Response:
        """List the tenant's batches, newest first."""
        principal = self._identify(request)
        last = None
        if after is not None:
            found = await self._batches.find(principal, after)
            last = (found.created_at, found.id)
        page = await self._batches.search(principal, after=last, limit=limit + 1)
        return _json(page_of([_shown(record) for record in page], limit))

    async def show(self, batch: str, request: Request) -> Response:
        """Return how far a batch is."""
        return _json(_shown(await self._batches.find(self._identify(request), batch)))

    async def cancel(self, batch: str, request: Request) -> Response:
        """Cancel a batch: rows that are done stay so."""
        return _json(_shown(await self._batches.cancel(self._identify(request), batch)))


def batch_routes(services: Services) -> APIRouter:
    """Return the routes."""
    router = APIRouter(tags=["batches"])
    handlers = _Batches(services)
    router.add_api_route("/v1/batches", handlers.submit, methods=["POST"])
    router.add_api_route("/v1/batches", handlers.search, methods=["GET"])
    router.add_api_route("/v1/batches/{batch}", handlers.show, methods=["GET"])
    router.add_api_route("/v1/batches/{batch}/cancel", handlers.cancel, methods=["POST"])
    return router


def _new(raw: bytes) -> _New:
    check_depth(raw, _DEPTH)
    try:
        return msgspec.json.decode(raw, type=_New)
    except msgspec.ValidationError as error:
        raise InvalidRequest(str(error)) from None
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise InvalidJson(f"the body is not valid JSON: {str(error)[:200]}") from None


def _shown(record: BatchRecord) -> dict[str, Any]:
    def ended(*states: str) -> int | None:
        return _seconds(record.ended_at) if record.state in states else None

    errors = [msgspec.to_builtins(error) for error in record.errors]
    return {
        "id": record.id,
        "object": "batch",
        "endpoint": record.endpoint,
        "errors": {"object": "list", "data": errors} if errors else None,
        "input_file_id": record.input_file,
        "completion_window": _WINDOW,
        "status": record.state,
        "output_file_id": record.output_file,
        "error_file_id": record.error_file,
        "created_at": int(record.created_at),
        "in_progress_at": _seconds(record.in_progress_at),
        "expires_at": int(record.expires_at),
        "finalizing_at": _seconds(record.finalizing_at),
        "completed_at": ended("completed"),
        "failed_at": ended("failed"),
        "expired_at": ended("expired"),
        "cancelling_at": _seconds(record.cancelling_at),
        "cancelled_at": ended("cancelled"),
        "request_counts": {"total": record.total, "completed": record.completed, "failed": record.failed},
        "metadata": record.metadata or None,
        "workflow": record.run,
    }


def _seconds(at: float | None) -> int | None:
    return int(at) if at is not None else None


def _json(body: Any) -> Response:
    return Response(msgspec.json.encode(body), media_type="application/json")
