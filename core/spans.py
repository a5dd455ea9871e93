"""Ids of spans that an engine is told of before there is anything to export."""

_STRIDE = 0x9E3779B97F4A7C15  # odd, so that no two legs of a request meet; 2^64 over the golden ratio, as in SplitMix64
_MASK = 2**64 - 1
_SPAN = slice(36, 52)  # of a traceparent: version-trace-span-flags


def span_of_leg(span_id: int, index: int) -> int:
    """Return the span id of a request's leg, counted from 0, from that of the request's own span.

    It follows from the two, so that nothing has to be kept until the spans are made.
    """
    return (span_id + (index + 1) * _STRIDE) & _MASK or _STRIDE


def traceparent_of_leg(traceparent: str, index: int) -> str:
    """Return the ``traceparent`` that a leg's engine is told, from that of the request's own span."""
    span = span_of_leg(int(traceparent[_SPAN], 16), index)
    return f"{traceparent[: _SPAN.start]}{span:016x}{traceparent[_SPAN.stop :]}"
