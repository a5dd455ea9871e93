"""Spans of legs follow from the request's, so that an engine can be told before there is a record."""

from core.spans import span_of_leg, traceparent_of_leg

REQUEST = 0x00F067AA0BA902B7


def test_every_leg_has_a_span_of_its_own() -> None:
    spans = [span_of_leg(REQUEST, index) for index in range(1000)]

    assert len({REQUEST, *spans}) == 1001
    assert all(0 < span < 2**64 for span in spans)


def test_no_span_is_the_one_that_means_none() -> None:
    minus_one_stride = -0x9E3779B97F4A7C15 % 2**64

    assert span_of_leg(minus_one_stride, 0) != 0


def test_a_leg_is_told_of_in_the_requests_trace() -> None:
    told = traceparent_of_leg(f"00-{'a' * 32}-{REQUEST:016x}-01", 3)

    assert told == f"00-{'a' * 32}-{span_of_leg(REQUEST, 3):016x}-01"
