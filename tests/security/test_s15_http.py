"""S15: one request is one request to everybody, and no header of a client reaches an engine or another answer."""

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.e2e.asking import ask, connected
from tests.fakes.engine import FakeEngine
from tests.fakes.gateway import GatewayProcess, attached

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT = "/v1/chat/completions"
BODY = {"model": "fake", "messages": [{"role": "user", "content": "Hello."}]}
RAW = json.dumps(BODY).encode()
INNER = b"GET /v1/models HTTP/1.1\r\nhost: smuggled\r\n\r\n"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[FakeEngine]:
    async with FakeEngine(model="fake", tokens=4) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def front(engine: FakeEngine) -> AsyncIterator[GatewayProcess]:
    async with GatewayProcess(
        {"fake": attached(engine.url)}, server={"header_timeout": 2, "body_timeout": 2}
    ) as gateway:
        yield gateway


async def said(front: GatewayProcess, head: bytes, body: bytes) -> bytes:
    """Send a head and a body, our key between them, and return all that is answered until the end."""
    async with connected(front) as client:
        key = b"authorization: Bearer " + front.key.encode() + b"\r\n"
        client.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n" + key + head + b"\r\n" + body)
        async with asyncio.timeout(15):
            return await client.reader.read(-1)


LENGTH = b"content-length: %d\r\n" % len(RAW)
AMBIGUOUS = {
    "length_and_chunked": (b"content-length: 5\r\ntransfer-encoding: chunked\r\n", b"0\r\n\r\n" + INNER),
    "chunked_and_length": (b"transfer-encoding: chunked\r\ncontent-length: 5\r\n", b"0\r\n\r\n" + INNER),
    "two_lengths": (b"content-length: 5\r\n" + LENGTH, RAW + INNER),
    "list_of_lengths": (b"content-length: 5, 6\r\n", RAW + INNER),
    "signed_length": (b"content-length: +5\r\n", b"hello" + INNER),
    "hex_length": (b"content-length: 0x5\r\n", b"hello" + INNER),
    "endless_length": (b"content-length: 99999999999999999999999\r\n", b"hello" + INNER),
    "chunked_not_last": (b"transfer-encoding: chunked, identity\r\n", b"0\r\n\r\n" + INNER),
    "unknown_coding": (b"transfer-encoding: xchunked\r\n", b"0\r\n\r\n" + INNER),
    "space_before_colon": (b"content-length : 5\r\n" + LENGTH, RAW + INNER),
    "space_in_name": (b"transfer encoding: chunked\r\n", b"0\r\n\r\n" + INNER),
    "folded_header": (b"x-a: b\r\n transfer-encoding: chunked\r\n" + LENGTH, RAW + INNER),
    "folded_coding": (b"transfer-encoding:\r\n chunked\r\n" + LENGTH, RAW + INNER),
    "bare_cr": (b"x-a: b\rtransfer-encoding: chunked\r\n" + LENGTH, RAW + INNER),
    "nul_in_value": (b"x-a: b\0c\r\n" + LENGTH, RAW + INNER),
    "chunk_size_sign": (b"transfer-encoding: chunked\r\n", b"+5\r\nhello\r\n0\r\n\r\n" + INNER),
    "chunk_size_hex": (b"transfer-encoding: chunked\r\n", b"0x5\r\nhello\r\n0\r\n\r\n" + INNER),
    "chunk_size_huge": (b"transfer-encoding: chunked\r\n", b"fffffffffffffffff\r\nhello\r\n0\r\n\r\n" + INNER),
    "chunk_too_long": (b"transfer-encoding: chunked\r\n", b"3\r\nhello\r\n0\r\n\r\n" + INNER),
    "chunk_bare_lf": (b"transfer-encoding: chunked\r\n", b"5\nhello\n0\n\n" + INNER),
}


@pytest.mark.parametrize("name", AMBIGUOUS)
async def test_a_request_that_could_be_read_in_two_ways_is_refused_and_nothing_behind_it_is_answered(
    front: GatewayProcess, engine: FakeEngine, name: str
) -> None:
    before = len((await engine.stats())["requests"])

    answer = await said(front, *AMBIGUOUS[name])

    assert (answer.count(b"HTTP/1.1 "), answer[:13], b"invalid_http" in answer) == (1, b"HTTP/1.1 400 ", True), answer
    assert len((await engine.stats())["requests"]) == before


async def test_an_ordinary_request_of_either_framing_is_answered(front: GatewayProcess) -> None:
    chunked = b"%x\r\n%b\r\n0\r\n\r\n" % (len(RAW), RAW)

    for framing, body in ((LENGTH, RAW), (b"transfer-encoding: chunked\r\n", chunked)):
        assert (await said(front, framing + b"connection: close\r\n", body)).startswith(b"HTTP/1.1 200 ")


async def test_headers_of_a_hop_and_of_identity_stay_here(front: GatewayProcess, engine: FakeEngine) -> None:
    sent = {
        "x-api-key": "k", "api-key": "k", "cookie": "a=b", "proxy-authorization": "Basic eA==",
        "x-forwarded-for": "10.0.0.1", "x-forwarded-host": "evil", "x-real-ip": "10.0.0.1", "forwarded": "for=10.0.0.1",
        "te": "trailers", "keep-alive": "5", "trailer": "x", "upgrade": "h2c", "connection": "keep-alive, x-hop",
        "x-hop": "1", "x-forebay-session": "s",
        "x-user-id": "root", "baggage": "user=root", "origin": "http://evil", "referer": "http://evil",
    }  # fmt: skip
    assert (await ask(front, CHAT, BODY, headers=sent)).status == 200

    seen = {name.lower(): value for name, value in (await engine.stats())["requests"][-1]["headers"].items()}
    assert set(seen) <= {
        "x-request-id", "traceparent", "host", "accept", "accept-encoding", "content-type", "content-length",
        "user-agent",
    }  # fmt: skip
    assert front.key not in str(seen)


@pytest.mark.parametrize("text", ["a\r\nx-injected: 1", "a\nx-injected: 1", "\r\n\r\nHTTP/1.1 200 OK\r\n\r\n"])
async def test_what_a_client_names_never_becomes_a_header(front: GatewayProcess, text: str) -> None:
    own = {"forebay": {"session": text, "end_user": text}}
    for body in (
        {**BODY, "model": text},
        {**BODY, text: 1},
        {**BODY, "user": text, **own},
        {**BODY, "forebay": {text: 1}},
    ):
        answer = await ask(front, CHAT, body)
        assert "x-injected" not in answer.headers
        assert text not in str(answer.headers)
        json.loads(answer.body)


async def test_an_id_with_a_line_break_is_two_headers_and_neither_is_echoed(front: GatewayProcess) -> None:
    answer = await ask(front, CHAT, BODY, headers={"x-request-id": "a\r\nx-injected: 1"})

    assert (answer.status, answer.headers["x-request-id"]) == (200, "a")
    assert "x-injected" not in answer.headers
