import asyncio
import time

import forebay
import httpx
import pytest

from tests.unit.sdk.gateway import MESSAGES, ScriptedGateway, completion, error


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Waiting takes no time and is written down."""
    told: list[float] = []

    async def asleep(seconds: float) -> None:
        told.append(seconds)

    monkeypatch.setattr(time, "sleep", told.append)
    monkeypatch.setattr(asyncio, "sleep", asleep)
    return told


def ask(gateway: ScriptedGateway, *, max_retries: int = 2) -> forebay.ChatCompletion:
    with forebay.Client("http://gw:1", transport=gateway.transport, max_retries=max_retries) as client:
        return client.chat.create(model="m", messages=MESSAGES)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, forebay.BadRequest),
        (401, forebay.AuthenticationError),
        (403, forebay.PermissionDenied),
        (404, forebay.NotFound),
        (408, forebay.TimedOut),
        (413, forebay.BadRequest),
        (418, forebay.APIStatusError),
        (429, forebay.RateLimited),
        (500, forebay.ServerError),
        (502, forebay.ServerError),
        (503, forebay.Unavailable),
        (504, forebay.TimedOut),
    ],
)
def test_a_status_has_its_class(status: int, kind: type[forebay.APIStatusError]) -> None:
    with pytest.raises(forebay.APIStatusError) as caught:
        ask(ScriptedGateway(error(status, "its_code")), max_retries=0)

    told = caught.value
    assert type(told) is kind
    assert (told.status, told.code, told.type, told.param) == (status, "its_code", "some_error", "model")
    assert (told.message, told.request_id) == ("it went wrong", "req_9")
    assert str(told) == f"it went wrong (status {status}, code its_code, request req_9)"


def test_the_drawn_tree_is_the_tree() -> None:
    drawn = forebay.ForebayError.__doc__ or ""
    kinds = [kind for kind in vars(forebay).values() if isinstance(kind, type) and issubclass(kind, Exception)]

    for kind in kinds:
        (line,) = (text for text in drawn.splitlines() if text.strip("│├└─ ").split(" ")[0] == kind.__name__)
        assert (line.index(kind.__name__) - 8) // 4 == len(kind.__mro__) - len(forebay.ForebayError.__mro__)


@pytest.mark.parametrize("body", ["", "Bad gateway", "[]", '{"error": "text"}', '{"detail": []}'])
def test_an_error_without_the_envelope_is_still_told(body: str) -> None:
    with pytest.raises(forebay.ServerError) as caught:
        ask(ScriptedGateway(httpx.Response(502, text=body)), max_retries=0)

    assert caught.value.code is None
    assert caught.value.message == (body or "Bad Gateway")


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 504])
def test_what_may_pass_is_tried_again(waits: list[float], status: int) -> None:
    gateway = ScriptedGateway(error(status), error(status), completion("yes"))

    assert ask(gateway).text == "yes"
    assert len(gateway.requests) == 3
    assert 0.3 < waits[0] <= 0.5 < waits[1] <= 1.0


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413])
def test_what_will_not_pass_is_not_tried_again(waits: list[float], status: int) -> None:
    gateway = ScriptedGateway(error(status))

    with pytest.raises(forebay.APIStatusError):
        ask(gateway)

    assert len(gateway.requests) == 1
    assert waits == []


def test_after_two_retries_the_error_is_told(waits: list[float]) -> None:
    gateway = ScriptedGateway(error(503, "queue_full"))

    with pytest.raises(forebay.Unavailable) as caught:
        ask(gateway)

    assert caught.value.code == "queue_full"
    assert len(gateway.requests) == 3


def test_should_retry_false_ends_it(waits: list[float]) -> None:
    gateway = ScriptedGateway(error(503, **{"x-should-retry": "false"}))

    with pytest.raises(forebay.Unavailable):
        ask(gateway)

    assert len(gateway.requests) == 1


def test_should_retry_true_outweighs_the_status(waits: list[float]) -> None:
    gateway = ScriptedGateway(error(400, **{"x-should-retry": "true"}), completion("yes"))

    assert ask(gateway).text == "yes"


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [({"retry-after": "3"}, 3.0), ({"retry-after": "0.5"}, 0.5), ({"retry-after": "9", "retry-after-ms": "250"}, 0.25)],
)
def test_the_advice_of_the_server_is_followed(waits: list[float], headers: dict[str, str], seconds: float) -> None:
    ask(ScriptedGateway(error(429, **headers), completion()))

    assert waits == [seconds]


def test_a_date_is_advice_too(waits: list[float]) -> None:
    past = "Wed, 21 Oct 2015 07:28:00 GMT"

    ask(ScriptedGateway(error(503, **{"retry-after": past}), completion()))

    assert waits == [0.0]


def test_advice_that_makes_no_sense_is_no_advice(waits: list[float]) -> None:
    ask(ScriptedGateway(error(503, **{"retry-after": "soon"}), completion()))

    assert 0.3 < waits[0] <= 0.5


def test_advice_to_wait_for_long_is_told_at_once(waits: list[float]) -> None:
    gateway = ScriptedGateway(error(429, **{"retry-after": "3600"}))

    with pytest.raises(forebay.RateLimited) as caught:
        ask(gateway)

    assert caught.value.retry_after == 3600
    assert len(gateway.requests) == 1


def test_a_refused_connection_is_tried_again(waits: list[float]) -> None:
    gateway = ScriptedGateway(httpx.ConnectError("refused"), completion("yes"))

    assert ask(gateway).text == "yes"


def test_a_connection_that_keeps_failing_is_told(waits: list[float]) -> None:
    gateway = ScriptedGateway(httpx.ConnectError("refused"))

    with pytest.raises(forebay.ConnectionFailed, match="refused") as caught:
        ask(gateway)

    assert not isinstance(caught.value, forebay.ClientTimeout)
    assert len(gateway.requests) == 3


def test_a_read_timeout_is_not_tried_again(waits: list[float]) -> None:
    gateway = ScriptedGateway(httpx.ReadTimeout("silent"))

    with pytest.raises(forebay.ClientTimeout):
        ask(gateway)

    assert len(gateway.requests) == 1


async def test_the_async_client_tries_again_alike(waits: list[float]) -> None:
    gateway = ScriptedGateway(httpx.ConnectError("refused"), error(503, **{"retry-after": "2"}), completion("yes"))

    async with forebay.AsyncClient("http://gw:1", transport=gateway.transport) as client:
        answer = await client.chat.create(model="m", messages=MESSAGES)

    assert answer.text == "yes"
    assert waits[1:] == [2.0]
