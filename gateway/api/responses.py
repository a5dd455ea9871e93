"""Background responses on the data port, as OpenAI's clients know them. The wire is docs/reference/responses.md.

Those that are asked for without ``background`` never come here: they are the engine's own (``gateway/api/data.py``).
"""

from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Query, Request, Response

from core.chat import Endpoint
from core.errors import RequestTooLarge
from core.ids import new_request_id
from gateway.api.common import read_body
from gateway.api.streaming import event_stream
from gateway.auth import Principal
from gateway.requests import find_model, own_options, parse_body, read_call
from gateway.responses.background import Background
from gateway.responses.question import read_question
from gateway.responses.service import Responses
from gateway.responses.shapes import response_of
from gateway.responses.stream import BEFORE_ALL
from gateway.services import Services
from gateway.tracing import SUBMITTER

_LONGEST_END_USER = 128


class _Handlers:
    """The handlers. Each needs a tenant's key, and another tenant's ids are unknown to it."""

    def __init__(self, services: Services, responses: Responses) -> None:
        self._services = services
        self._responses = responses

    def _identify(self, request: Request) -> Principal:
        headers = dict(request.scope["headers"])
        principal = self._services.directory.keyring.identify(headers, self._services.clock.wall())
        principal.check_endpoint(Endpoint.RESPONSES)
        return principal

    async def create(self, request: Request) -> Response:
        """Ask for a response in the background; it is durable before the answer."""
        principal = self._identify(request)
        ceilings = principal.tenant_spec.ceilings
        most = min(self._services.settings.server.max_body, ceilings.body)
        raw = await read_body(request, most)
        body = parse_body(raw, ceilings.depth)
        find_model(body, self._services.catalog, principal)
        headers = dict(request.scope["headers"])
        options = own_options(body, headers)
        previous = body.get("previous_response_id")
        before = await self._responses.conversation(principal, previous if isinstance(previous, str) else None)
        question = read_question(body, options, before)
        # what a chat may not ask for is told now, and not when its turn comes
        chat = msgspec.json.encode(question.chat)
        if len(chat) > most:
            raise RequestTooLarge(f"with what was said before it has {len(chat)} bytes; {most} are accepted")
        read_call(
            Endpoint.CHAT, chat, {}, request_id=new_request_id(), principal=principal, catalog=self._services.catalog
        )
        SUBMITTER.set(headers.get(b"traceparent"))
        asked = question.asked
        end_user = options.get("end_user") or asked.safety_identifier or asked.user
        background = await self._responses.submit(
            principal,
            question,
            end_user=end_user[:_LONGEST_END_USER] if end_user else None,
            idempotency=request.headers.get("idempotency-key"),
        )
        if asked.stream:
            return self._stream(principal, background, BEFORE_ALL)
        return _json(response_of(background, before="queued"))

    async def show(
        self,
        response: str,
        request: Request,
        stream: bool = False,
        starting_after: Annotated[int, Query(ge=BEFORE_ALL)] = BEFORE_ALL,
    ) -> Response:
        """Return a response, or with `stream` its events behind number `starting_after`."""
        principal = self._identify(request)
        background = await self._responses.find(principal, response)
        if stream:
            return self._stream(principal, background, starting_after)
        return _json(response_of(background))

    async def cancel(self, response: str, request: Request) -> Response:
        """Cancel a response; one that has ended stays as it is."""
        return _json(response_of(await self._responses.cancel(self._identify(request), response)))

    def _stream(self, principal: Principal, background: Background, after: int) -> Response:
        return event_stream(self._responses.follow(principal, background, after))


def response_routes(services: Services, responses: Responses) -> APIRouter:
    """Return the routes."""
    router = APIRouter(tags=["responses"])
    handlers = _Handlers(services, responses)
    # `gateway/api/document.py` describes this one, together with what is no background response
    router.add_api_route("/v1/responses", handlers.create, methods=["POST"], include_in_schema=False)
    for prefix in ("/v1", ""):  # some clients leave it out, as for the engines' own
        path, is_told = f"{prefix}/responses/{{response}}", bool(prefix)
        router.add_api_route(path, handlers.show, methods=["GET"], include_in_schema=is_told)
        router.add_api_route(f"{path}/cancel", handlers.cancel, methods=["POST"], include_in_schema=is_told)
    return router


def _json(body: Any) -> Response:
    return Response(msgspec.json.encode(body), media_type="application/json")
