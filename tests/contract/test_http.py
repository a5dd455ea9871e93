"""Answers as a peer may send them, cut anywhere, and what becomes of the connection: of both HTTP clients."""

import asyncio
import socket
from contextlib import suppress

import pytest
from yarl import URL

from core.errors import ConnectTimeout, WorkerLost, WorkerUnreachable
from engines.drivers.http1 import Http1
from engines.drivers.http_remote import RemoteHttp
from tests.fakes.http import WHOLE, Farewell, Kind, Talk, asked, hang_up, hold, post, saying, serving

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2;x=y\r\nlo\r\n0\r\nx-trailer: z\r\n\r\n"
BEGUN = CHUNKED[: CHUNKED.index(b"2;x")]
LARGE = 33 * 2**20

pytestmark = pytest.mark.parametrize("kind", [Http1, RemoteHttp])


@pytest.mark.parametrize("answer", [WHOLE, CHUNKED], ids=["length", "chunks"])
async def test_an_answer_is_the_same_however_it_is_cut(kind: Kind, answer: bytes) -> None:
    cut = 0

    async def peer(talk: Talk) -> None:
        nonlocal cut
        while True:
            await talk.heard()
            cut += 1
            for part in (answer[:cut], answer[cut:]):
                talk.writer.write(part)
                await asyncio.sleep(0)
                await asyncio.sleep(0)

    async with serving(peer, kind) as (http, talks):
        for _ in range(len(answer)):
            assert await asked(http) == (200, b"hello")
        assert len(talks) == 1


async def test_a_request_says_where_it_goes_and_what_it_brings(kind: Kind) -> None:
    async with serving(saying(WHOLE), kind) as (http, talks):
        await asked(http)
        response = await http.send("GET", "/slots/1?action=save", {}, None, connect_timeout=5)
        assert await response.read() == b"hello"
        response.release()
        posted, got = ([line.lower() for line in head.splitlines()] for head in talks[0].heads)
        assert (posted[0], got[0]) == (b"post /base/v1/x http/1.1", b"get /base/slots/1?action=save http/1.1")
        assert {b"accept: */*", b"x-request-id: r", b"content-length: 2"} <= set(posted)
        assert posted[1].startswith(b"host: 127.0.0.1:")
        assert not any(line.startswith(b"content-length") for line in got)
        assert talks[0].bodies == [b"{}", b""]


@pytest.mark.parametrize("value", ["x\r\nx-other: y", "x\nx-other: y", "x\ry"])
async def test_a_header_cannot_bring_another(kind: Kind, value: str) -> None:
    async with serving(saying(WHOLE), kind) as (http, talks):
        with pytest.raises(ValueError, match=r"line break|[Nn]ewline|control"):
            await http.send("POST", "/", {"x-request-id": value}, b"", connect_timeout=5)
        assert not any(talk.heads for talk in talks)


async def test_pieces_are_read_as_they_come_and_nothing_is_their_end(kind: Kind) -> None:
    go_on = asyncio.Event()

    async def peer(talk: Talk) -> None:
        await talk.heard()
        talk.writer.write(BEGUN)
        await go_on.wait()
        talk.writer.write(CHUNKED[len(BEGUN) :])
        await hold(talk)

    async with serving(peer, kind) as (http, _):
        response = await post(http)
        assert await response.readany() == b"hel"
        was_complete = response.is_complete
        go_on.set()
        assert [await response.readany(), await response.readany()] == [b"lo", b""]
        assert (was_complete, response.is_complete) == (False, True)
        response.release()


async def test_many_requests_at_a_time_have_a_connection_each_and_keep_them(kind: Kind) -> None:
    async with serving(saying(CHUNKED), kind) as (http, talks):
        for _ in range(2):
            assert await asyncio.gather(*(asked(http) for _ in range(20))) == [(200, b"hello")] * 20
        assert len(talks) == 20


async def test_an_answer_without_a_length_ends_with_its_connection(kind: Kind) -> None:
    async with serving(saying(b"HTTP/1.1 200 OK\r\n\r\nhel", b"lo", then=hang_up), kind) as (http, talks):
        assert [await asked(http), await asked(http)] == [(200, b"hello")] * 2
        assert len(talks) == 2


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200",
        b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhel",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhel",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nhel\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\nhel\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\ncontent-length: five\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\n" + b"x: " + b"y" * 70_000,
    ],
    ids=["nothing", "half a head", "half a body", "half after 100", "half of chunks", "a chunk of no size", "100 alone",
         "no HTTP", "two lengths", "no number", "endless head"],
)  # fmt: skip
async def test_what_is_cut_short_or_is_no_answer_is_a_lost_worker(kind: Kind, answer: bytes) -> None:
    async with serving(saying(answer, then=hang_up), kind) as (http, _):
        with pytest.raises(WorkerLost):
            await asked(http)


async def test_what_came_before_the_cut_can_be_read(kind: Kind) -> None:
    async with serving(saying(BEGUN, then=hang_up), kind) as (http, _):
        response = await post(http)
        assert await response.readany() == b"hel"
        with pytest.raises(WorkerLost):
            await response.readany()
        response.release()


async def test_an_interim_answer_is_passed_over(kind: Kind) -> None:
    early = b"HTTP/1.1 103 Early Hints\r\nretry-after: 9\r\n\r\n"
    late = b"HTTP/1.1 503 Busy\r\nRetry-After:  7 \r\ncontent-length: 0\r\n\r\n"
    async with serving(saying(early, late), kind) as (http, talks):
        for _ in range(2):
            response = await post(http)
            assert (await response.read(), response.status, response.header("retry-after")) == (b"", 503, "7")
            assert response.header("x-other") is None
            response.release()
        assert len(talks) == 1


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 5\r\n\r\nhello",
        b"HTTP/1.0 200 OK\r\ncontent-length: 5\r\n\r\nhello",
        WHOLE + WHOLE,
    ],
    ids=["close", "HTTP/1.0", "two answers"],
)
async def test_a_connection_that_cannot_be_trusted_is_not_used_again(kind: Kind, answer: bytes) -> None:
    async with serving(saying(answer, then=hold), kind) as (http, talks):
        assert [await asked(http), await asked(http)] == [(200, b"hello")] * 2
        assert len(talks) == 2


async def test_a_connection_that_its_server_closed_while_idle_is_not_used(kind: Kind) -> None:
    async with serving(saying(WHOLE, then=hang_up), kind) as (http, talks):
        assert await asked(http) == (200, b"hello")
        await talks[0].writer.wait_closed()
        for _ in range(10):
            await asyncio.sleep(0)
        assert await asked(http) == (200, b"hello")
        assert len(talks) == 2


async def test_no_connection_is_kept_where_none_may_be(kind: Kind) -> None:
    async with serving(saying(WHOLE), kind, reuses_connections=False) as (http, talks):
        assert [await asked(http), await asked(http)] == [(200, b"hello")] * 2
        assert len(talks) == 2
        assert b"connection: close\r\n" in talks[0].heads[0].lower()


async def test_an_answer_that_is_let_go_of_early_closes_its_connection(kind: Kind) -> None:
    farewell = Farewell()
    async with serving(saying(BEGUN, then=farewell), kind) as (http, _):
        response = await post(http)
        await response.readany()
        response.release()
        await farewell.has_come.wait()


@pytest.mark.parametrize("begun", [b"", b"HTTP/1.1 200 OK\r\n", BEGUN], ids=["nothing", "half a head", "half a body"])
@pytest.mark.parametrize("num_steps", [1, 3, 30])
async def test_a_request_that_is_cancelled_closes_its_connection(kind: Kind, begun: bytes, num_steps: int) -> None:
    farewell = Farewell()
    async with serving(saying(begun, then=farewell), kind) as (http, talks):
        task = asyncio.create_task(asked(http))
        for _ in range(num_steps):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        if talks and talks[0].heads:
            await farewell.has_come.wait()


@pytest.mark.filterwarnings("ignore:Sending a large body directly:ResourceWarning")
async def test_a_request_that_is_cancelled_while_it_is_sent_closes_its_connection(kind: Kind) -> None:
    farewell = Farewell()

    async def peer(talk: Talk) -> None:
        await talk.reader.readexactly(2**16)  # and no more, until the client has gone
        begun.set()
        await farewell(talk)

    begun = asyncio.Event()
    async with serving(peer, kind) as (http, _):
        task = asyncio.create_task(asked(http, bytes(LARGE)))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await farewell.has_come.wait()


@pytest.mark.filterwarnings("ignore:Sending a large body directly:ResourceWarning")
async def test_a_large_body_arrives_whole(kind: Kind) -> None:
    body = bytes(range(256)) * (LARGE // 256)
    async with serving(saying(WHOLE), kind) as (http, talks):
        assert await asked(http, body) == (200, b"hello")
        assert talks[0].bodies == [body]


async def test_a_large_answer_arrives_whole_and_an_engine_that_is_not_read_has_to_wait(kind: Kind) -> None:
    size = 2 * LARGE
    sent = 0

    async def peer(talk: Talk) -> None:
        nonlocal sent
        await talk.heard()
        talk.writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size)
        while sent < size:
            talk.writer.write(bytes(2**20))
            await talk.writer.drain()
            sent += 2**20
        await hold(talk)

    async with serving(peer, kind) as (http, _):
        response = await post(http)
        first = await response.readany()
        for _ in range(500):
            await asyncio.sleep(0)
        assert sent < size
        assert len(first + await response.read()) == size
        response.release()


@pytest.mark.parametrize("begun", [BEGUN, b"HTTP/1.1 200 OK\r\n\r\nhel"], ids=["length", "no length"])
async def test_close_wakes_who_waits_and_makes_no_whole_answer_of_a_part(begun: bytes, kind: Kind) -> None:
    async with serving(saying(begun, then=hold), kind) as (http, _):
        response = await post(http)
        waiting = asyncio.create_task(response.read())
        await asyncio.sleep(0)
        await http.close()
        with pytest.raises(WorkerLost):
            await waiting
        response.release()


async def test_a_port_where_nobody_listens_is_unreachable(kind: Kind) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    http = kind(URL(f"http://127.0.0.1:{port}"), {}, reuses_connections=True)
    with pytest.raises(WorkerUnreachable):
        await post(http)
    await http.close()


async def test_a_connection_that_is_not_accepted_in_time_is_given_up(kind: Kind) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        port = listener.getsockname()[1]
        waiting = [socket.socket() for _ in range(4)]  # they fill the backlog: nobody accepts
        for each in waiting:
            each.setblocking(False)
            with suppress(BlockingIOError):
                each.connect(("127.0.0.1", port))
        http = kind(URL(f"http://127.0.0.1:{port}"), {}, reuses_connections=True)
        with pytest.raises(ConnectTimeout):
            await http.send("POST", "/", {}, b"", connect_timeout=0.01)
        await http.close()
        for each in waiting:
            each.close()
