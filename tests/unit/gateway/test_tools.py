"""What is refused of a tool before anything is asked: addresses, and headers that would say what is not theirs."""

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from core.errors import InvalidRequest
from gateway.tools import Limits, ToolFailed, Tools
from semantic_vars.calls import Http, Mcp


class Shut:
    """A gate that lets nothing through."""

    def __init__(self, error: Exception | None = None) -> None:
        self.asked: list[URL] = []
        self._error = error or InvalidRequest("the address leads inside")

    async def session(self, url: URL) -> aiohttp.ClientSession:
        self.asked.append(url)
        raise self._error


async def failure(gate: Shut, server: Http | Mcp) -> ToolFailed:
    with pytest.raises(ToolFailed) as caught:
        await Tools(gate, Limits()).run(server, {}, key="k")
    assert caught.value.code == "tool_failed"
    assert caught.value.cause == "tool"
    return caught.value


@pytest.mark.parametrize("server", [Http("http://10.0.0.1/x"), Mcp("http://10.0.0.1/x", "t")])
async def test_the_gate_is_asked_before_anything_else_and_its_no_is_final(server: Http | Mcp) -> None:
    gate = Shut()

    error = await failure(gate, server)

    assert gate.asked == [URL("http://10.0.0.1/x")]
    assert error.message == "the tool may not be asked: the address leads inside"
    assert not error.can_retry


async def test_a_name_that_is_not_found_may_be_found_another_time() -> None:
    assert (await failure(Shut(OSError("no such name")), Http("http://h/"))).can_retry


@pytest.mark.parametrize("url", ["http://[::1", "http://h:x/", "http://h:99999/"])
async def test_what_is_no_url_is_not_asked(url: str) -> None:
    gate = Shut()

    error = await failure(gate, Http(url))

    assert (gate.asked, error.can_retry) == ([], False)


@pytest.mark.parametrize(
    "name",
    ["Host", "hOsT", "Connection", "Keep-Alive", "TE", "Trailer", "Transfer-Encoding", "Upgrade", "Proxy-Authorization",
     "Proxy-Connection", "Content-Length", "Content-Encoding", "Accept-Encoding", "Expect", "Idempotency-Key",
     "Mcp-Session-Id", "MCP-Protocol-Version", "", "a b", "a:", "a\r\nb", "ä", "x" * 257],
)  # fmt: skip
async def test_headers_that_are_not_the_tools_are_refused(name: str) -> None:
    gate = Shut()

    error = await failure(gate, Http("http://h/", {name: "x"}))

    assert "header" in error.message
    assert (gate.asked, error.can_retry) == ([], False)


@given(before=st.text(max_size=5), letter=st.characters(max_codepoint=31, exclude_characters="\t"), after=st.text())
async def test_no_value_of_a_header_begins_another(before: str, letter: str, after: str) -> None:
    gate = Shut()

    error = await failure(gate, Mcp("http://h/", "t", {"x": before + letter + after}))

    assert "'x' holds" in error.message
    assert gate.asked == []


async def test_headers_are_bounded_all_together() -> None:
    gate = Shut()

    error = await failure(gate, Http("http://h/", {f"x{number}": "y" * 1000 for number in range(20)}))

    assert "more than 16384" in error.message
    assert gate.asked == []


async def test_no_secret_of_a_header_is_told() -> None:
    error = await failure(Shut(), Http("http://h/", {"authorization": "Bearer secret\n"}))

    assert "secret" not in error.message
