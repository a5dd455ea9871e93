"""A trace collector: what a real one understands of OTLP over HTTP."""

import asyncio
from types import TracebackType
from typing import Any, NamedTuple, Self

from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

_KINDS = {1: "internal", 2: "server", 3: "client"}


class Span(NamedTuple):
    """One span as it arrived; ids in hex, times in seconds."""

    name: str
    kind: str
    trace_id: str
    id: str
    parent_id: str
    attributes: dict[str, Any]
    is_error: bool
    started_at: float
    ended_at: float
    service: str


class Collector:
    """An HTTP server on a free loopback port that keeps the spans it is sent; answers `status`."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.raw = b""
        self.status = 200
        self.num_requests = 0
        self.port = 0
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        app = web.Application(client_max_size=2**26)
        app.router.add_post("/v1/traces", self._take)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.port = self._runner.addresses[0][1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    async def trace(self, trace_id: str) -> list[Span]:
        """Wait for a trace and return its spans, which come together; fails after five seconds."""
        for _ in range(500):
            if found := [span for span in self.spans if span.trace_id == trace_id]:
                return found
            await asyncio.sleep(0.01)
        raise AssertionError(f"no trace {trace_id} among {len(self.spans)} spans")

    async def _take(self, request: web.Request) -> web.Response:
        raw = await request.read()
        self.num_requests += 1
        if self.status == 200:
            self.raw += raw
            self.spans += _spans(ExportTraceServiceRequest.FromString(raw))
        return web.Response(status=self.status, content_type="application/x-protobuf")


def _spans(message: Any) -> list[Span]:
    return [
        Span(
            name=span.name,
            kind=_KINDS[span.kind],
            trace_id=span.trace_id.hex(),
            id=span.span_id.hex(),
            parent_id=span.parent_span_id.hex(),
            attributes=_attributes(span.attributes),
            is_error=span.status.code == 2,
            started_at=span.start_time_unix_nano / 1e9,
            ended_at=span.end_time_unix_nano / 1e9,
            service=_attributes(resource.resource.attributes)["service.name"],
        )
        for resource in message.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}
