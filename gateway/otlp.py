"""Spans of finished requests, by OTLP over HTTP, under the names of OpenTelemetry's conventions for generative AI.

Of a request there are: a server span ``chat MODEL``, below it ``queue`` while it waited for its first worker, and a
client span for each leg, whose id its engine was told. What comes as a span is sent as it is. The library takes 0.2 s
to import, so that only who traces imports this module.
"""

import logging
import random
import secrets
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, TraceFlags
from opentelemetry.trace.status import Status, StatusCode

from core.chat import Endpoint
from core.records import CLIENT_LEFT, CUTS, LegRecord, RequestRecord
from core.spans import span_of_leg
from core.tenancy import PICO_PER_USD
from gateway.tracing import Finished, Span, Trace

_TIMEOUT_S = 1.5  # of one batch: below what a shutdown grants
_PATH = "/v1/traces"
_NS = 1_000_000_000
_SHORTEST_WAIT_S = 0.001  # what passes below it is no queue
_OPERATIONS = {
    Endpoint.CHAT: "chat",
    Endpoint.RESPONSES: "chat",
    Endpoint.MESSAGES: "chat",
    Endpoint.COMPLETIONS: "text_completion",
    Endpoint.EMBEDDINGS: "embeddings",
}
_GOOD_ENDS = frozenset({"done", "aborted"}) | CUTS

_Attributes = dict[str, str | int | float | bool]


class Exporter:
    """Sends finished requests to the collector at ``endpoint``, with or without ``/v1/traces``. Headers, as for a
    token, and certificates come from OpenTelemetry's own variables (``OTEL_EXPORTER_OTLP_HEADERS`` …).

    ``engine_of`` returns the engine of a worker, None of an unknown one. Calls block: use a thread.
    """

    def __init__(self, endpoint: str, service_name: str, engine_of: Callable[[str], str | None]) -> None:
        # Whether the collector is there is told once per change, by whoever calls; the library tells it each time.
        logging.getLogger("opentelemetry.exporter").setLevel(logging.CRITICAL)
        self._exporter = OTLPSpanExporter(endpoint=endpoint.rstrip("/").removesuffix(_PATH) + _PATH, timeout=_TIMEOUT_S)
        self._resource = Resource.create(
            {
                "service.name": service_name,
                "service.version": _version(),
                "service.instance.id": secrets.token_hex(8),
            }
        )
        self._scope = InstrumentationScope("forebay", _version())
        self._engine_of = engine_of

    def __call__(self, finished: Sequence[Finished]) -> bool:
        """Send the spans of all this; whether the collector took them. Takes 1.5 s at most."""
        spans: list[ReadableSpan] = []
        for one, trace in finished:
            spans += [self._part(one, trace)] if isinstance(one, Span) else self._spans(one, trace)
        return self._exporter.export(spans) is SpanExportResult.SUCCESS

    def close(self) -> None:
        """Close connections; an export that waits to try again gives up."""
        self._exporter.shutdown()  # type: ignore[no-untyped-call]

    def _part(self, span: Span, trace: Trace) -> ReadableSpan:
        own = _context(trace.trace_id, trace.span_id)
        times = (span.began_at, span.ended_at)
        attributes = dict(span.attributes)
        return self._span(span.name, own, _parent(trace), times, attributes, kind=SpanKind.INTERNAL, error=span.error)

    def _spans(self, record: RequestRecord, trace: Trace) -> list[ReadableSpan]:
        started_at = record.time - record.duration_s
        operation = _OPERATIONS[Endpoint(record.endpoint)]
        parent = _parent(trace)
        own = _context(trace.trace_id, trace.span_id)
        error = "client_disconnect" if record.status == CLIENT_LEFT else record.error
        spans = [
            self._span(
                _name(operation, record.asked_model or record.model),
                own,
                parent,
                (started_at, record.time),
                self._request_attributes(record, operation),
                kind=SpanKind.SERVER,
                error=error,
            )
        ]
        queue_s = record.legs[0].at_s if record.legs else record.queue_s
        if queue_s >= _SHORTEST_WAIT_S:
            waited = (started_at, started_at + queue_s)
            waiting = _context(trace.trace_id, random.getrandbits(64) or 1)
            spans.append(self._span("queue", waiting, own, waited, {}, kind=SpanKind.INTERNAL, error=None))
        for index, leg in enumerate(record.legs):
            began_at = started_at + leg.at_s
            spans.append(
                self._span(
                    _name(operation, leg.model),
                    _context(trace.trace_id, span_of_leg(trace.span_id, index)),
                    own,
                    (began_at, began_at + leg.duration_s),
                    self._leg_attributes(leg, index, operation),
                    kind=SpanKind.CLIENT,
                    error=None if leg.cause in _GOOD_ENDS else leg.cause,
                )
            )
        return spans

    def _request_attributes(self, record: RequestRecord, operation: str) -> _Attributes:
        attributes: _Attributes = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": self._provider(record.worker),
            "gen_ai.request.stream": record.stream,
            "http.request.method": "POST",
            "http.response.status_code": record.status,
            "http.route": record.endpoint,
            "forebay.request.id": record.id,
            "forebay.attempts": record.attempts,
            "forebay.cost_usd": record.cost / PICO_PER_USD,
        }
        optional = {
            "gen_ai.request.model": record.asked_model or record.model,
            "gen_ai.response.model": record.model if record.worker is not None else None,
            "gen_ai.response.time_to_first_chunk": record.first_byte_s if record.stream else None,
            "forebay.tenant": record.tenant,
            "forebay.worker": record.worker,
        }
        attributes |= {name: value for name, value in optional.items() if value is not None}
        if record.usage is not None:
            attributes["gen_ai.usage.input_tokens"] = record.usage.prompt_tokens
            attributes["gen_ai.usage.output_tokens"] = record.usage.completion_tokens
            attributes["gen_ai.usage.cache_read.input_tokens"] = record.usage.cached_tokens
        return attributes

    def _leg_attributes(self, leg: LegRecord, index: int, operation: str) -> _Attributes:
        resumed: _Attributes = {} if leg.recomputed is None else {"forebay.leg.recomputed_tokens": leg.recomputed}
        return resumed | {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": self._provider(leg.worker),
            "gen_ai.request.model": leg.model,
            "forebay.worker": leg.worker,
            "forebay.leg.index": index,
            "forebay.leg.cause": leg.cause,
            "forebay.leg.is_resumed": leg.is_resumed,
        }

    def _provider(self, worker: str | None) -> str:
        return (self._engine_of(worker) if worker is not None else None) or "forebay"

    def _span(
        self,
        name: str,
        context: SpanContext,
        parent: SpanContext | None,
        times: tuple[float, float],
        attributes: _Attributes,
        *,
        kind: SpanKind,
        error: str | None,
    ) -> ReadableSpan:
        if error is not None:
            attributes = {**attributes, "error.type": error}
        return ReadableSpan(
            name=name,
            context=context,
            parent=parent,
            resource=self._resource,
            attributes=attributes,
            kind=kind,
            status=Status(StatusCode.ERROR if error is not None else StatusCode.UNSET),
            start_time=int(times[0] * _NS),
            end_time=int(times[1] * _NS),
            instrumentation_scope=self._scope,
        )


def _name(operation: str, model: str | None) -> str:
    return f"{operation} {model}" if model is not None else operation


def _parent(trace: Trace) -> SpanContext | None:
    return _context(trace.trace_id, trace.parent_id, is_remote=True) if trace.parent_id is not None else None


def _context(trace_id: int, span_id: int, *, is_remote: bool = False) -> SpanContext:
    return SpanContext(trace_id, span_id, is_remote=is_remote, trace_flags=TraceFlags(TraceFlags.SAMPLED))


def _version() -> str:
    try:
        return version("forebay-server")
    except PackageNotFoundError:  # run from its source folder
        return "source"
