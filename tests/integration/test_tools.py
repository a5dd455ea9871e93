"""S9 for tools: what workflows call over HTTP and MCP, on loopback in the place of the Internet."""

import asyncio
import gzip
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web

from gateway.egress import Egress, Policy, is_public
from gateway.tools import Limits, ToolFailed, Tools
from semantic_vars.calls import Http, Mcp
from tests.fakes.names import LOOPBACK, Names

Answerer = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Site:
    """A server on loopback that keeps what it is sent."""

    def __init__(self) -> None:
        self.port = 0
        self.seen: list[tuple[web.Request, bytes]] = []
        self.answer: Answerer = said({"ok": True})

    @property
    def url(self) -> str:
        return f"http://site.test:{self.port}/tool?a=b"

    async def hear(self, request: web.Request) -> web.StreamResponse:
        self.seen.append((request, await request.read()))
        return await self.answer(request)


def said(value: Any, **more: Any) -> Answerer:
    async def answer(request: web.Request) -> web.StreamResponse:
        return web.json_response(value, **more)

    return answer


def raw(**more: Any) -> Answerer:
    async def answer(request: web.Request) -> web.StreamResponse:
        return web.Response(**more)

    return answer


@pytest_asyncio.fixture
async def site() -> AsyncIterator[Site]:
    one = Site()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", one.hear)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    one.port = runner.addresses[0][1]
    yield one
    await runner.cleanup()


def tools(site: Site, names: Names | None = None, *allow: str, **limits: Any) -> Tools:
    """Tools whose egress takes loopback for a public address, as the site is there."""
    policy = Policy(allow=(f"site.test:{site.port}", *allow))
    names = names or Names(site=[["127.0.0.1"]])
    return Tools(Egress(policy, names, lambda address: address == LOOPBACK or is_public(address)), Limits(**limits))


async def run(site: Site, **limits: Any) -> Any:
    return await tools(site, **limits).run(Http(site.url), {}, key="k")


async def failure(site: Site, **limits: Any) -> ToolFailed:
    with pytest.raises(ToolFailed) as caught:
        await run(site, **limits)
    return caught.value


# HTTP


async def test_arguments_are_posted_as_json_with_the_key_and_the_headers_of_the_tool(site: Site) -> None:
    server = Http(site.url, {"Authorization": "Bearer x", "X-Team": "blue"})

    assert await tools(site).run(server, {"q": ["ä", 1]}, key="run_1.c") == {"ok": True}

    ((request, body),) = site.seen
    assert (request.method, request.path_qs) == ("POST", "/tool?a=b")
    assert json.loads(body) == {"q": ["ä", 1]}
    names = ("authorization", "x-team", "idempotency-key", "content-type", "accept-encoding", "user-agent")
    assert [request.headers[name] for name in names] == [
        "Bearer x", "blue", "run_1.c", "application/json", "identity", "forebay",
    ]  # fmt: skip


async def test_a_tool_may_want_another_media_type(site: Site) -> None:
    server = Http(site.url, {"content-type": "application/vnd.api+json"})

    await tools(site).run(server, {}, key="k")

    assert site.seen[0][0].headers.getall("content-type") == ["application/vnd.api+json"]


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        (said([1, None, "x"]), [1, None, "x"]),
        (said(None), None),
        (said({"a": 1}, content_type="application/problem+json"), {"a": 1}),
        (said({"a": 1}, status=201), {"a": 1}),
        (raw(text="sunny"), "sunny"),
        (raw(body="öl".encode("latin-1"), headers={"content-type": "text/plain; charset=ISO-8859-1"}), "öl"),
        (raw(status=204), None),
    ],
)
async def test_json_is_its_value_and_text_is_text(site: Site, answer: Answerer, value: Any) -> None:
    site.answer = answer

    assert await run(site) == value


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (raw(body=b"{", headers={"content-type": "application/json"}), "is not the application/json"),
        (raw(body=b"\xff", headers={"content-type": "text/plain"}), "is not the text/plain"),
        (raw(body=b"x", headers={"content-type": "text/plain; charset=punycode"}), "JSON and text"),
        (raw(body=b"\x89PNG", headers={"content-type": "image/png"}), "answered image/png"),
        (raw(body=b"[" * 65 + b"]" * 65, headers={"content-type": "application/json"}), "deeper than 64"),
        (raw(body=b"[" * 9999 + b"]" * 9999, headers={"content-type": "application/json"}), "is not the"),
        (raw(body=gzip.compress(b"1"), headers={"content-type": "text/plain", "content-encoding": "gzip"}), "compress"),
    ],
)
async def test_an_answer_of_another_kind_is_a_failure_that_trying_again_does_not_mend(
    site: Site, answer: Answerer, told: str
) -> None:
    site.answer = answer

    error = await failure(site)

    assert told in error.message
    assert not error.can_retry


async def test_an_answer_may_be_as_deep_as_a_request(site: Site) -> None:
    site.answer = raw(body=b"[" * 64 + b"1" + b"]" * 64, headers={"content-type": "application/json"})

    assert str(await run(site)) == "[" * 64 + "1" + "]" * 64


@pytest.mark.parametrize(
    ("status", "can_retry"),
    [(400, False), (401, False), (404, False), (409, False), (422, False), (408, True), (429, True), (500, True),
     (501, True), (502, True), (503, True), (599, True)],
)  # fmt: skip
async def test_an_error_is_told_by_its_status_and_its_beginning(site: Site, status: int, can_retry: bool) -> None:
    site.answer = raw(status=status, text="no\n such  \x00city " + "z" * 10_000)

    error = await failure(site)

    assert error.message.startswith(f"the tool answered {status}: no such city zzz")
    assert len(error.message) == len(f"the tool answered {status}: ") + 200
    assert (error.code, error.cause, error.can_retry) == ("tool_failed", "tool", can_retry)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirects_are_not_followed(site: Site, status: int) -> None:
    site.answer = raw(status=status, headers={"location": "/elsewhere"})

    error = await failure(site)

    assert "redirects are not followed" in error.message
    assert not error.can_retry
    assert len(site.seen) == 1


async def test_an_answer_is_taken_up_to_its_bound(site: Site) -> None:
    site.answer = raw(text="x" * 1000)

    assert await run(site, max_size=1000) == "x" * 1000
    error = await failure(site, max_size=999)

    assert "more than may be taken" in error.message
    assert not error.can_retry


async def test_a_tool_that_does_not_answer_has_a_deadline(site: Site) -> None:
    held = asyncio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        await held.wait()
        return web.Response()

    site.answer = answer
    with pytest.raises(ToolFailed, match=r"within 0\.05 s") as caught:
        await tools(site).run(Http(site.url), {}, key="k", timeout=0.05)
    ceiling = await failure(site, timeout=0.05)
    held.set()

    assert (caught.value.cause, caught.value.can_retry) == ("timeout", True)
    assert ceiling.cause == "timeout"


async def test_a_connection_that_fails_may_go_better_another_time(site: Site) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/plain", "content-length": "100"})
        await response.prepare(request)
        await response.write(b"half")
        assert request.transport is not None
        request.transport.abort()
        return response

    site.answer = answer

    assert (await failure(site)).can_retry
    nobody = Http("http://site.test:1/")
    with pytest.raises(ToolFailed, match="could not be reached") as caught:
        await tools(site, None, "site.test:1").run(nobody, {}, key="k")
    assert caught.value.can_retry


# Where tools may be


@pytest.mark.parametrize(
    "url",
    ["http://169.254.169.254/latest/meta-data", "http://10.0.0.1/", "http://localhost:{port}/", "http://[::1]:{port}/",
     "http://127.0.0.1:{port}/", "http://0x7f.1:{port}/", "http://2130706433:{port}/", "http://evil.test:{port}/",
     "http://site.test/", "https://site.test/", "http://user:pw@site.test:{port}/", "file:///etc/passwd",
     "//site.test/", "ftp://site.test:{port}/", "http://site.test@evil.test:{port}/", "http://:{port}/", "",
     "gopher://site.test:{port}/"],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["http", "mcp"])
async def test_only_a_listed_address_is_asked(site: Site, url: str, kind: str) -> None:
    url = url.format(port=site.port)
    names = Names(site=[["127.0.0.1"]], evil=[["127.0.0.1"]], localhost=[["127.0.0.1"]])

    with pytest.raises(ToolFailed) as caught:
        await tools(site, names).run(Http(url) if kind == "http" else Mcp(url, "t"), {}, key="k")

    assert not caught.value.can_retry
    assert site.seen == []


@pytest.mark.parametrize("address", ["10.0.0.1", "169.254.169.254", "::1", "fd00::1", "::ffff:10.0.0.1", "100.64.0.1"])
async def test_a_listed_name_that_leads_inside_is_refused(site: Site, address: str) -> None:
    names = Names(site=[["127.0.0.1", address]])

    with pytest.raises(ToolFailed, match="not a public one"):
        await tools(site, names).run(Http(site.url), {}, key="k")

    assert site.seen == []


@pytest.mark.parametrize("server", ["http", "mcp"])
async def test_a_name_is_resolved_once_for_a_call_so_that_rebinding_gains_nothing(site: Site, server: str) -> None:
    names = Names(site=[["127.0.0.1"], ["10.0.0.1"]])
    speaking = McpServer()
    site.answer = speaking.answer if server == "mcp" else site.answer

    await tools(site, names).run(Mcp(site.url, "t") if server == "mcp" else Http(site.url), {}, key="k")

    assert names.asked == ["site.test"]


# MCP


class McpServer:
    """An MCP server of one tool, which answers as JSON or as a stream of events."""

    def __init__(self, *, streams: bool = False, session: str | None = "s-1", status: int = 200) -> None:
        self.log: list[tuple[str, str | None]] = []
        self._streams = streams
        self._session = session
        self._status = status

    async def answer(self, request: web.Request) -> web.StreamResponse:
        session = request.headers.get("mcp-session-id")
        if request.method == "DELETE":
            self.log.append(("DELETE", session))
            return web.Response(status=405)
        message = await request.json()
        self.log.append((message["method"], session))
        if message["method"] == "initialize":
            hello = {"protocolVersion": "2025-06-18", "capabilities": {"tools": {}}, "serverInfo": {"name": "x"}}
            return await self._say(request, message["id"], hello, {"mcp-session-id": self._session or ""})
        if session != self._session or request.headers["mcp-protocol-version"] != "2025-06-18":
            return web.Response(status=400, text="no such session")
        if message["method"] != "tools/call":
            return web.Response(status=202)
        if self._status != 200:
            return web.Response(status=self._status, text="busy")
        told = {"content": [{"type": "text", "text": json.dumps(message["params"])}]}
        return await self._say(request, message["id"], told, {})

    async def _say(self, request: web.Request, number: int, result: Any, headers: Any) -> web.StreamResponse:
        headers = {name: value for name, value in headers.items() if value}
        message = {"jsonrpc": "2.0", "id": number, "result": result}
        if not self._streams:
            return web.json_response(message, headers=headers)
        response = web.StreamResponse(headers={**headers, "content-type": "text/event-stream"})
        await response.prepare(request)
        progress = {"jsonrpc": "2.0", "method": "notifications/progress", "params": {}}
        for one in (progress, message):
            await response.write(f"event: message\ndata: {json.dumps(one)}\n\n".encode())
        return response


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("session", ["s-1", None])
async def test_a_tool_of_an_mcp_server_is_called_in_a_session(site: Site, streams: bool, session: str | None) -> None:
    server = McpServer(streams=streams, session=session)
    site.answer = server.answer

    value = await tools(site).run(Mcp(site.url, "find", {"authorization": "Bearer x"}), {"q": 1}, key="k")

    assert json.loads(value) == {"name": "find", "arguments": {"q": 1}}
    steps = [("initialize", None), ("notifications/initialized", session), ("tools/call", session)]
    assert server.log == [*steps, ("DELETE", session)] if session else server.log == steps
    assert {request.headers["authorization"] for request, _ in site.seen} == {"Bearer x"}


@pytest.mark.parametrize(("status", "can_retry"), [(503, True), (404, False)])
async def test_an_mcp_server_that_refuses_is_told_by_its_status(site: Site, status: int, can_retry: bool) -> None:
    site.answer = McpServer(status=status).answer

    with pytest.raises(ToolFailed, match=f"answered {status}: busy") as caught:
        await tools(site).run(Mcp(site.url, "t"), {}, key="k")

    assert caught.value.can_retry is can_retry


async def test_all_that_an_mcp_server_says_is_bounded(site: Site) -> None:
    site.answer = McpServer(streams=True).answer

    with pytest.raises(ToolFailed, match="more than may be taken"):
        await tools(site, max_size=300).run(Mcp(site.url, "t"), {"q": "x" * 100}, key="k")


async def test_a_call_that_is_given_up_ends_its_session_too(site: Site) -> None:
    reached, held = asyncio.Event(), asyncio.Event()
    server = McpServer()

    async def answer(request: web.Request) -> web.StreamResponse:
        if b"tools/call" in await request.read():
            reached.set()
            await held.wait()
        return await server.answer(request)

    site.answer = answer
    task = asyncio.create_task(tools(site).run(Mcp(site.url, "t"), {}, key="k"))
    await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    held.set()

    assert ("DELETE", "s-1") in server.log
