"""OpenAI's Files on the data port, for batches. The wire is docs/reference/batches.md."""

from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse

from core.batches import FileRecord, Purpose
from core.errors import InvalidRequest, UnsupportedParameter
from gateway.api.common import read_body
from gateway.api.multipart import fields_of
from gateway.auth import Principal
from gateway.services import Services
from storage.sql.paging import MAX_PAGE

_INERT = {"x-content-type-options": "nosniff", "content-disposition": "attachment"}


class _Files:
    """The handlers. Each needs a tenant's key, and another tenant's ids are unknown to it."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._files = services.files

    def _identify(self, request: Request) -> Principal:
        return self._services.directory.keyring.identify(dict(request.scope["headers"]), self._services.clock.wall())

    async def upload(self, request: Request) -> Response:
        """Upload a file: 200 once it is durable."""
        principal = self._identify(request)
        limit = min(self._services.settings.server.max_body, principal.tenant_spec.ceilings.body)
        fields = fields_of(request.headers.get("content-type", ""), await read_body(request, limit))
        given = {field.name: field for field in fields}
        if unknown := sorted(given.keys() - {"file", "purpose"}):
            raise UnsupportedParameter(
                f"the form's field {unknown[0][:64]!r} is not known; known are file and purpose", param=unknown[0][:64]
            )
        if "file" not in given:
            raise InvalidRequest("the form has no field `file`", param="file")
        if "purpose" not in given or given["purpose"].content.strip() != b"batch":
            raise InvalidRequest("`purpose` has to be batch: files are for batches only", param="purpose")
        file = given["file"]
        record = await self._files.keep(
            principal,
            file.filename or "file.jsonl",
            "batch",
            file.content,
            end_user=request.headers.get("x-forebay-end-user"),
        )
        return _json(_shown(record))

    async def search(
        self,
        request: Request,
        purpose: Purpose | None = None,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 100,
        after: str | None = None,
        order: Literal["asc", "desc"] = "desc",
    ) -> Response:
        """List the tenant's files."""
        principal = self._identify(request)
        last = None
        if after is not None:
            found = await self._files.find(principal, after)
            last = (found.created_at, found.id)
        most = min(limit, MAX_PAGE - 1)
        page = await self._files.search(
            principal, purpose=purpose, after=last, limit=most + 1, oldest_first=order == "asc"
        )
        return _json(page_of([_shown(record) for record in page], most))

    async def show(self, file: str, request: Request) -> Response:
        """Return what is known of a file."""
        return _json(_shown(await self._files.find(self._identify(request), file)))

    async def content(self, file: str, request: Request) -> Response:
        """Return a file's bytes."""
        record = await self._files.find(self._identify(request), file)
        headers = {**_INERT, "content-length": str(record.size)}
        return StreamingResponse(self._files.content(record), headers=headers, media_type="application/octet-stream")

    async def delete(self, file: str, request: Request) -> Response:
        """Forget a file. A batch that has begun goes on without it."""
        await self._files.delete(self._identify(request), file)
        return _json({"id": file, "object": "file", "deleted": True})


def file_routes(services: Services) -> APIRouter:
    """Return the routes."""
    router = APIRouter(tags=["files"])
    handlers = _Files(services)
    router.add_api_route("/v1/files", handlers.upload, methods=["POST"])
    router.add_api_route("/v1/files", handlers.search, methods=["GET"])
    router.add_api_route("/v1/files/{file}", handlers.show, methods=["GET"])
    router.add_api_route("/v1/files/{file}", handlers.delete, methods=["DELETE"])
    router.add_api_route("/v1/files/{file}/content", handlers.content, methods=["GET"])
    return router


def page_of(shown: list[dict[str, Any]], most: int) -> dict[str, Any]:
    """Return a list as OpenAI's clients page through it; of ``most`` and one more, which tells that there are more."""
    data = shown[:most]
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
    return {"object": "list", "data": data, **ends, "has_more": len(shown) > most}


def _shown(record: FileRecord) -> dict[str, Any]:
    return {
        "id": record.id,
        "object": "file",
        "bytes": record.size,
        "created_at": int(record.created_at),
        "filename": record.name,
        "purpose": record.purpose,
        "status": "processed",
    }


def _json(body: Any) -> Response:
    return Response(msgspec.json.encode(body), media_type="application/json")
