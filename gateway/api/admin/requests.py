"""Requests that were served, and why they were served as they were. Never their content."""

from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Path, Query
from pydantic import AwareDatetime

from core.chat import Class
from core.errors import UnknownId
from core.ids import RequestId
from core.records import LegRecord, RequestRecord
from gateway.api.admin.document import errors
from gateway.api.admin.guard import guarded
from gateway.api.admin.pages import After, Limit, Page, page_found, place_of
from gateway.api.admin.shapes import ONE_LINE, TENANT_ID, Shape, Spend, shown_time, shown_usd
from gateway.api.admin.why import fell_back, num_retries, paragraph
from gateway.services import Services
from routing.scheduler.decisions import Kind

Id = Annotated[str, Path(min_length=1, max_length=128, pattern=ONE_LINE)]
Text = Annotated[str | None, Query(max_length=210, pattern=ONE_LINE)]
Status = Annotated[int | None, Query(ge=100, le=599)]
Moment = Annotated[AwareDatetime | None, Query()]


class UsageShape(Shape):
    """Tokens that the engine says it processed."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class LegShape(Shape):
    """One run of a request on one worker. `at_s`: when it began, counted from the request's arrival. `recomputed`:
    tokens that it computed again to go on where an earlier one was cut; null: it began anew."""

    worker: str
    model: str
    at_s: float
    duration_s: float
    cause: str
    recomputed: int | None


class RequestShape(Shape):
    """A request. Status 499: the client left. `key` is the key's id; `usd` what it cost."""

    id: str
    time: datetime
    endpoint: str
    status: int
    error: str | None
    tenant: str | None
    key: str | None
    end_user: str | None
    model: str | None
    urgency: Class
    asked_model: str | None
    worker: str | None
    stream: bool
    attempts: int
    duration_s: float
    queue_s: float
    first_byte_s: float | None
    overhead_s: float | None
    usage: UsageShape | None
    usd: Spend
    session: str | None
    program: str | None
    run: str | None
    stage: str | None
    client_retry: str | None
    traceparent: str | None
    legs: list[LegShape]


class StepShape(Shape):
    """One thing that was decided about a request, or for it at another's expense; `text`: in plain words."""

    time: datetime
    kind: Kind
    text: str


class DecisionShape(Shape):
    """How a request was served. `summary`: in a paragraph; `fell_back`: another model answered than was asked;
    `resumes`: how often it went on where it was cut, `recomputed`: tokens that this took; `steps`: what was decided,
    as far as this gateway still remembers. `status` null: it has not ended."""

    id: str
    summary: str
    status: int | None
    error: str | None
    asked_model: str | None
    model: str | None
    worker: str | None
    fell_back: bool
    queue_s: float
    attempts: int
    retries: int
    resumes: int
    recomputed: int
    legs: list[LegShape]
    steps: list[StepShape]
    usd: Spend


def request_routes(services: Services) -> APIRouter:
    """Return the routes of requests and decisions."""
    router = APIRouter(prefix="/admin/v1", tags=["requests"], route_class=guarded(services))

    @router.get("/requests", responses=errors())
    async def list_requests(
        *,
        tenant: Annotated[str | None, Query(pattern=TENANT_ID)] = None,
        key: Text = None,
        model: Text = None,
        error: Text = None,
        min_status: Status = None,
        max_status: Status = None,
        since: Moment = None,
        until: Moment = None,
        limit: Limit = 50,
        after: After = None,
    ) -> Page[RequestShape]:
        """Search the request log, newest first. It holds a request about half a second after its end."""
        rows = await services.store.requests.search(
            tenant=tenant,
            key=key,
            model=model,
            error=error,
            min_status=min_status,
            max_status=max_status,
            since=since.timestamp() if since else None,
            until=until.timestamp() if until else None,
            after=place_of(after, tuple[float, str]),
            limit=limit + 1,
        )
        return page_found(rows, limit, lambda record: (record.time, record.id), _shown)

    @router.get("/requests/{request_id}", responses=errors(404))
    async def show_request(request_id: Id) -> RequestShape:
        """Show one request of the log, by the id that its answer had in `x-request-id`."""
        return _shown(await _known(request_id, services))

    @router.get("/decisions/{request_id}", responses=errors(404))
    async def show_decision(request_id: Id) -> DecisionShape:
        """Tell how a request was served: where it waited, what was tried, what was decided, what it cost."""
        steps = _steps(request_id, services)
        if services.scheduler.knows(RequestId(request_id)):
            return _unended(request_id, steps)
        record = await _known(request_id, services)
        resumed = [leg.recomputed for leg in record.legs if leg.recomputed is not None]
        return DecisionShape(
            id=record.id,
            summary=paragraph(record),
            status=record.status,
            error=record.error,
            asked_model=record.asked_model or record.model,
            model=record.model,
            worker=record.worker,
            fell_back=fell_back(record),
            queue_s=record.queue_s,
            attempts=record.attempts,
            retries=num_retries(record),
            resumes=len(resumed),
            recomputed=sum(resumed),
            legs=[_shown_leg(leg) for leg in record.legs],
            steps=steps,
            usd=shown_usd(record.cost),
        )

    return router


async def _known(request_id: str, services: Services) -> RequestRecord:
    record = await services.store.requests.request(request_id)
    if record is None:
        raise UnknownId(
            f"the log has no request {request_id[:128]!r}; it comes there half a second after its end, and goes after "
            "`request_log.retention`",
            code="unknown_request",
        )
    return record


def _steps(request_id: str, services: Services) -> list[StepShape]:
    now, wall = services.clock.monotonic(), services.clock.wall()
    return [
        StepShape(time=shown_time(wall - (now - step.at)), kind=step.kind, text=step.text)
        for step in services.scheduler.explain(RequestId(request_id))
    ]


def _unended(request_id: str, steps: list[StepShape]) -> DecisionShape:
    """Return what is known of a request that has not ended."""
    return DecisionShape(
        id=request_id,
        summary="It has not ended.",
        status=None,
        error=None,
        asked_model=None,
        model=None,
        worker=None,
        fell_back=False,
        queue_s=0.0,
        attempts=0,
        retries=0,
        resumes=0,
        recomputed=0,
        legs=[],
        steps=steps,
        usd="0",
    )


def _shown(record: RequestRecord) -> RequestShape:
    usage = record.usage
    return RequestShape(
        id=record.id,
        time=shown_time(record.time),
        endpoint=record.endpoint,
        status=record.status,
        error=record.error,
        tenant=record.tenant,
        key=record.key,
        end_user=record.end_user,
        model=record.model,
        urgency=record.urgency,
        asked_model=record.asked_model,
        worker=record.worker,
        stream=record.stream,
        attempts=record.attempts,
        duration_s=record.duration_s,
        queue_s=record.queue_s,
        first_byte_s=record.first_byte_s,
        overhead_s=record.overhead_s,
        usage=None
        if usage is None
        else UsageShape(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            cached_tokens=usage.cached_tokens,
        ),
        usd=shown_usd(record.cost),
        session=record.session,
        program=record.program,
        run=record.run,
        stage=record.stage,
        client_retry=record.client_retry,
        traceparent=record.traceparent,
        legs=[_shown_leg(leg) for leg in record.legs],
    )


def _shown_leg(leg: LegRecord) -> LegShape:
    return LegShape(
        worker=leg.worker,
        model=leg.model,
        at_s=leg.at_s,
        duration_s=leg.duration_s,
        cause=leg.cause,
        recomputed=leg.recomputed,
    )
