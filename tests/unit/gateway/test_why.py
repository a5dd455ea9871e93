"""The paragraph that tells how a request was served."""

import pytest

from core.chat import Usage
from core.ids import TenantId
from core.records import CLIENT_LEFT, LegRecord, RequestRecord
from gateway.api.admin.why import fell_back, paragraph


def record(status: int = 200, **more: object) -> RequestRecord:
    values: dict[str, object] = {
        "time": 1.0,
        "id": "req_1",
        "endpoint": "/v1/chat/completions",
        "status": status,
        "duration_s": 1.5,
        "tenant": TenantId("acme"),
        "key": "key_1",
        "model": "small",
        "asked_model": "small",
        **more,
    }
    return RequestRecord(**values)  # type: ignore[arg-type]


def leg(worker: str, cause: str = "done", at_s: float = 0.0, *, model: str = "small") -> LegRecord:
    return LegRecord(worker, model, at_s, 0.5, cause)


def test_a_plain_answer_is_told_in_full() -> None:
    text = paragraph(
        record(
            worker="small-0",
            attempts=1,
            stream=True,
            first_byte_s=0.25,
            usage=Usage(10, 20, 4),
            cost=9_000_000,
            legs=(leg("small-0"),),
        )
    )

    assert text == (
        "The tenant 'acme', with the key 'key_1', asked for a chat answer of the model 'small', streamed. "
        "It did not have to wait, and 'small-0' began at once. "
        "The answer, status 200, was complete after 1.5 s, its first byte after 250 ms. "
        "It used 10 tokens of prompt (4 of them from the engine's own prefix cache) and 20 of answer, "
        "for 0.000009 USD."
    )


def test_the_first_byte_of_a_whole_answer_is_nothing_to_tell_of() -> None:
    assert "first byte" not in paragraph(record(first_byte_s=1.5, legs=(leg("small-0"),)))


def test_nothing_is_said_of_what_is_not_built() -> None:
    text = paragraph(record(legs=(leg("small-0"),), usage=Usage(1, 1)))

    assert "cache" not in text
    assert "rout" not in text


def test_the_end_user_an_alias_and_a_stream_are_named() -> None:
    text = paragraph(record(end_user="u-7", asked_model="s", stream=True, legs=(leg("small-0"),)))

    assert text.startswith(
        "The tenant 'acme', with the key 'key_1' and for the end user 'u-7', asked for a chat answer of the model "
        "'s', which is 'small', streamed."
    )


def test_a_wait_in_the_queue_is_told() -> None:
    text = paragraph(record(queue_s=0.8, legs=(leg("small-0", at_s=0.81),)))

    assert "It waited 800 ms for a worker with room, and 'small-0' began 810 ms after its arrival." in text


def test_each_failed_leg_is_told_with_its_worker_and_cause() -> None:
    legs = (leg("small-0", "lost", 0.1), leg("small-1", "busy", 0.7), leg("small-1", "done", 1.4))
    text = paragraph(record(queue_s=0.3, attempts=3, legs=legs))

    assert "waited 300 ms in all" in text
    assert "After 500 ms 'small-0' went away while it worked, so 'small-1' took over at 700 ms." in text
    assert "After 500 ms 'small-1' was too busy, so it tried again at 1.4 s." in text


def resumed(worker: str, cause: str, at_s: float, recomputed: int) -> LegRecord:
    return LegRecord(worker, "small", at_s, 0.5, cause, recomputed)


def test_a_preemption_and_a_move_are_told_with_what_they_cost() -> None:
    legs = (leg("small-0", "preempted"), resumed("small-0", "migrated", 2.0, 30), resumed("small-1", "done", 3.0, 812))
    text = paragraph(record(attempts=3, legs=legs))

    assert (
        "After 500 ms 'small-0' gave its slot to a tenant that was further behind its share, so it went on there at "
        "2.0 s where it was, computing 30 tokens again." in text
    )
    assert "'small-0' had more to do than another worker, so 'small-1' went on with it at 3.0 s where it was" in text


def test_a_lost_worker_in_mid_answer_is_told_and_so_is_a_cut_before_the_first_byte() -> None:
    legs = (leg("small-0", "drained"), leg("small-1", "lost", 0.5), resumed("small-2", "done", 1.5, 9))
    text = paragraph(record(attempts=3, legs=legs))

    assert "After 500 ms 'small-0' was being drained, so 'small-1' began anew at 500 ms." in text
    assert "'small-1' went away while it worked, so 'small-2' went on with it at 1.5 s where it was" in text


def test_a_fallback_is_told() -> None:
    found = record(attempts=2, legs=(leg("small-0", "broken"), leg("tiny-0", at_s=0.6, model="tiny")), model="tiny")

    assert fell_back(found)
    assert "After 500 ms 'small-0' failed, so it fell back to the model 'tiny' on 'tiny-0' at 600 ms." in paragraph(
        found
    )
    assert "of the model 'small'." in paragraph(found)


def test_the_last_attempt_is_told_where_all_have_failed() -> None:
    text = paragraph(record(502, error="worker_lost", attempts=1, legs=(leg("small-0", "lost"),)))

    assert "After 500 ms 'small-0' went away while it worked, and that was the last attempt." in text
    assert (
        "ended after 1.5 s with status 502 and the error 'worker_lost' (the worker went away while it worked)" in text
    )
    assert text.endswith("No tokens were counted, and it cost nothing.")


@pytest.mark.parametrize(
    ("status", "code", "meaning"),
    [
        (429, "rate_limit_exceeded", "a limit on requests, tokens or parallel answers had no room"),
        (429, "insufficient_quota", "a budget was used up"),
        (403, "model_not_allowed", "the key may not use the model"),
        (503, "queue_full", "the model's queue was full"),
    ],
)
def test_a_refusal_is_explained(status: int, code: str, meaning: str) -> None:
    text = paragraph(record(status, error=code))

    assert "It reached no worker." in text
    assert f"with status {status} and the error '{code}' ({meaning})." in text


def test_a_queue_that_took_too_long_is_told_without_a_worker() -> None:
    text = paragraph(record(503, error="queue_timeout", queue_s=30.0))

    assert "It waited 30.0 s in the queue, and no worker had begun." in text
    assert "no worker had room in time" in text


def test_a_client_that_left_is_told() -> None:
    text = paragraph(record(CLIENT_LEFT, legs=(leg("small-0", "aborted"),), usage=Usage(5, 2)))

    assert "The client left after 1.5 s, and what still ran for it was stopped." in text
    assert "last attempt" not in text


def test_a_stream_that_broke_off_is_told() -> None:
    text = paragraph(record(200, stream=True, error="idle_timeout", legs=(leg("small-0", "timed_out"),)))

    assert "The answer had begun, and broke off after 1.5 s with the error 'idle_timeout' (the worker stopped" in text


def test_an_unknown_caller_and_an_unknown_error_are_told() -> None:
    found = record(401, tenant=None, key=None, model=None, asked_model=None, error="brand_new", endpoint="/v1/models")

    assert paragraph(found) == (
        "An unknown caller called /v1/models. It reached no worker. "
        "It ended after 1.5 s with status 401 and the error 'brand_new'. No tokens were counted, and it cost nothing."
    )


def test_a_retry_of_the_client_is_told() -> None:
    assert "the client's own retry, number 2." in paragraph(record(client_retry="2"))
