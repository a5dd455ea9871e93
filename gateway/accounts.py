"""What is booked of a call to a model when it is over, whoever made it."""

from core.chat import Call, Endpoint, Usage
from core.completer import Served
from core.errors import ForebayError
from core.ids import RequestId
from core.records import RequestRecord
from engines.run import Run
from gateway.auth import Principal


def record_of(
    *,
    time: float,
    id: RequestId,
    endpoint: Endpoint,
    status: int,
    duration_s: float,
    first_byte_s: float | None,
    principal: Principal | None,
    call: Call | None,
    run: Run | None,
    served: Served | None,
    usage: Usage | None,
    cost: int,
    error: ForebayError | None,
    client_retry: str | None = None,
) -> RequestRecord:
    """Return the record of a call that has ended, however far it came. ``time`` is Unix time, ``cost`` picodollars."""
    context = call.context if call is not None else None
    return RequestRecord(
        time=time,
        id=id,
        endpoint=endpoint.value,
        status=status,
        duration_s=duration_s,
        tenant=principal.tenant if principal is not None else None,
        key=principal.key.id if principal is not None else None,
        model=served.model if served is not None else call.model if call is not None else None,
        urgency=context.urgency if context is not None else "standard",
        asked_model=call.model if call is not None else None,
        worker=served.worker if served is not None else None,
        stream=call.stream if call is not None else False,
        attempts=run.attempts if run is not None else 0,
        queue_s=run.queue_s if run is not None else 0.0,
        first_byte_s=first_byte_s,
        overhead_s=first_byte_s - served.queue_s - served.engine_s
        if served is not None and first_byte_s is not None
        else None,
        usage=usage,
        cost=cost,
        error=error.specific_code if error is not None else None,
        end_user=context.end_user if context is not None else None,
        session=context.session if context is not None else None,
        program=context.program if context is not None else None,
        run=context.run if context is not None else None,
        stage=context.stage if context is not None else None,
        client_retry=client_retry,
        traceparent=call.traceparent if call is not None else None,
        legs=tuple(run.legs) if run is not None else (),
    )
