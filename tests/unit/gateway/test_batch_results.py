"""The lines that a batch's results are."""

import json
from typing import Any

from core.batches import BatchRecord, BatchRow
from core.ids import TenantId
from gateway.batches.results import line_of
from gateway.runs.history import Made, Settled, Used
from semantic_vars.variable import CANCELLED, Failure, Outcome, State, done

ROWS = {"a": BatchRow("a", "m"), "_row_2": BatchRow("request-2", "m")}


def line(settled: Settled, endpoint: str = "/v1/chat/completions") -> Any:
    batch = BatchRecord(
        id="batch_1", tenant=TenantId("t"), key="k", input_file="file-1", endpoint=endpoint, created_at=1.0,
        expires_at=2.0, run="run_1", finalizing_at=9.5,
    )  # fmt: skip
    raw = line_of(batch, ROWS, settled)
    assert raw.endswith(b"}\n")
    return json.loads(raw)


def failed(code: str, message: str, call: str) -> Outcome:
    return Outcome(State.FAILED, failure=Failure(code, message, call))


def test_an_answer_holds_what_is_known_and_null_for_what_is_not() -> None:
    told = line(Settled("_row_2", "_row_2", done("Hello."), at=7.9, made=Made(1.0, used=Used(1, 5, 2, 3))))
    assert (told["custom_id"], told["error"], told["response"]["status_code"]) == ("request-2", None, 200)
    body = told["response"]["body"]
    assert (body["object"], body["model"], body["created"]) == ("chat.completion", "m", 7)
    assert body["choices"] == [
        {"index": 0, "message": {"role": "assistant", "content": "Hello."}, "logprobs": None, "finish_reason": None}
    ]
    assert body["usage"] == {
        "prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8, "prompt_tokens_details": {"cached_tokens": 2},
    }  # fmt: skip
    assert told["id"] == told["response"]["request_id"] == body["id"] == "run_1._row_2"


def test_what_an_engine_has_not_told_is_null() -> None:
    for made in (None, Made(1.0, used=Used(1))):
        body = line(Settled("a", "a", done(""), made=made), "/v1/completions")["response"]["body"]
        assert (body["object"], body["usage"], body["created"]) == ("text_completion", None, 9)
        assert body["choices"] == [{"index": 0, "text": "", "logprobs": None, "finish_reason": None}]


def test_one_vector_or_several() -> None:
    made = Made(1.0, used=Used(1, 5))
    for value in ([0.5, 1.0], [[0.5, 1.0]]):
        body = line(Settled("a", "a", done(value), made=made), "/v1/embeddings")["response"]["body"]
        assert body["data"] == [{"object": "embedding", "index": 0, "embedding": [0.5, 1.0]}]
        assert body["usage"] == {"prompt_tokens": 5, "total_tokens": 5}
    many = line(Settled("a", "a", done([[1.0], [2.0]])), "/v1/embeddings")["response"]["body"]["data"]
    assert [one["index"] for one in many] == [0, 1]


def test_a_row_that_failed_is_an_error_with_its_code() -> None:
    told = line(Settled("a", "a", failed("model_not_found", "no such model", "a")))
    assert (told["response"], told["error"]) == (None, {"code": "model_not_found", "message": "no such model"})


def test_a_row_that_failed_with_another_names_that_as_the_tenant_does() -> None:
    told = line(Settled("a", "a", failed("upstream_failed", "_row_2 has failed (x): _row_2 broke", "_row_2")))
    assert told["error"] == {"code": "upstream_failed", "message": "the row 'request-2' has failed (x): _row_2 broke"}


def test_rows_whose_time_was_over_or_that_were_cancelled_say_so() -> None:
    assert line(Settled("a", "a", failed("deadline", "late", "a")))["error"]["code"] == "batch_expired"
    assert line(Settled("a", "a", CANCELLED))["error"]["code"] == "batch_cancelled"
