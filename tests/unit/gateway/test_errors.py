"""Every error has a status, an envelope and a code."""

import msgspec
import pytest

from core import errors
from core.chat import Endpoint
from core.errors import (
    ClientIdle,
    ConnectionLimit,
    ConnectTimeout,
    ContextLengthExceeded,
    Draining,
    FirstTokenTimeout,
    ForebayError,
    InternalError,
    InvalidJson,
    InvalidKey,
    MethodNotAllowed,
    ModelNotAllowed,
    NoHealthyWorker,
    QueueFull,
    QueueTimeout,
    RequestTooLarge,
    TotalTimeout,
    UnknownModel,
    UpstreamBroken,
    UpstreamBusy,
    UpstreamError,
    UpstreamRefused,
    WorkerLost,
    WorkerUnreachable,
)
from gateway.errors import _TABLE, body_of, frame_of, headers_of, outcome_of, status_of


def classes() -> list[type[ForebayError]]:
    found = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, ForebayError)]
    return sorted(found, key=lambda kind: kind.__name__)


def made(kind: type[ForebayError]) -> ForebayError:
    return kind("why", status=418) if issubclass(kind, UpstreamError) else kind("why")


@pytest.mark.parametrize("kind", classes())
def test_every_class_has_a_row_of_its_own_or_of_an_ancestor_below_the_root(kind: type[ForebayError]) -> None:
    rows = [ancestor for ancestor in kind.__mro__ if ancestor in _TABLE]

    assert rows[0] is not ForebayError or kind is ForebayError
    assert outcome_of(made(kind)) is _TABLE[rows[0]]


@pytest.mark.parametrize("kind", classes())
def test_every_class_says_what_it_means_in_its_docstring_and_by_a_status(kind: type[ForebayError]) -> None:
    assert kind.__doc__
    assert 400 <= status_of(made(kind)) < 600


def test_codes_are_words_and_no_two_leaves_share_one() -> None:
    parents = {base for kind in classes() for base in kind.__mro__[1:]}
    leaves = [kind for kind in classes() if kind not in parents]
    shared = {"upstream_error": 2}  # a refusal carries the engine's own code, a failure is the plain case

    codes = [kind.code for kind in leaves]

    assert all(code.isascii() and code.replace("_", "").isalpha() and code.islower() for code in codes)
    assert {code: codes.count(code) for code in codes if codes.count(code) > 1} == shared


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InvalidJson("x"), 400),
        (ContextLengthExceeded("x"), 400),
        (InvalidKey("x"), 401),
        (ModelNotAllowed("x"), 403),
        (UnknownModel("x"), 404),
        (MethodNotAllowed("x"), 405),
        (ClientIdle("x"), 408),
        (RequestTooLarge("x"), 413),
        (ConnectionLimit("x"), 429),
        (InternalError("x"), 500),
        (ConnectTimeout("x"), 502),
        (WorkerLost("x"), 502),
        (WorkerUnreachable("x"), 502),
        (UpstreamBroken("x", status=500), 502),
        (QueueFull("x"), 503),
        (QueueTimeout("x"), 503),
        (NoHealthyWorker("x"), 503),
        (Draining("x"), 503),
        (FirstTokenTimeout("x"), 504),
        (TotalTimeout("x"), 504),
        (UpstreamRefused("x", status=422), 422),
        (UpstreamBusy("x", status=429), 429),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, ForebayError) else str(value),
)
def test_the_status_is_the_one_that_clients_expect(error: ForebayError, status: int) -> None:
    assert status_of(error) == status


@pytest.mark.parametrize("kind", classes())
def test_the_envelope_is_openais(kind: type[ForebayError]) -> None:
    error = made(kind)

    inner = body_of(error, Endpoint.CHAT, "req_1")["error"]

    assert inner == {"message": "why", "type": outcome_of(error).type, "param": None, "code": kind.code}


def test_on_anthropics_route_the_envelope_is_anthropics() -> None:
    body = body_of(NoHealthyWorker("why"), Endpoint.MESSAGES, "req_1")

    assert body["error"] == {"type": "overloaded_error", "message": "why", "code": "no_healthy_worker"}
    assert (body["type"], body["request_id"]) == ("error", "req_1")


def test_an_error_may_carry_a_code_and_a_field_of_its_own() -> None:
    error = UpstreamRefused("why", status=400, param="tools", code="bad_tool")

    assert body_of(error, None, "")["error"]["code"] == "bad_tool"
    assert body_of(error, None, "")["error"]["param"] == "tools"


@pytest.mark.parametrize("endpoint", list(Endpoint))
def test_an_error_in_a_stream_is_one_event(endpoint: Endpoint) -> None:
    frame = frame_of(WorkerLost("two\n\nlines"), endpoint, "req_1")

    assert frame.count(b"\n\n") == 1
    assert frame.startswith(b"event: error\n") == (endpoint in {Endpoint.MESSAGES, Endpoint.RESPONSES})
    payload = frame[frame.index(b"data: ") + 6 :]
    assert msgspec.json.decode(payload)["error"]["code"] == "worker_lost"


@pytest.mark.parametrize("kind", classes())
def test_a_client_is_told_whether_to_come_again(kind: type[ForebayError]) -> None:
    told = dict(headers_of(made(kind)))[b"x-should-retry"]

    assert told in {b"true", b"false"}
    assert told == b"false" or kind.retryable


def test_a_client_is_told_when_to_come_again() -> None:
    headers = dict(headers_of(QueueFull("x", retry_after=0.2)))

    assert (headers[b"retry-after"], headers[b"retry-after-ms"]) == (b"1", b"200")
    assert b"retry-after" not in dict(headers_of(QueueFull("x")))
