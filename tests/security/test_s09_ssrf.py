"""S9: what a request names by address is fetched by us from where it may be, or refused; no engine gets an address."""

import base64
import ipaddress
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from core.errors import InvalidRequest
from gateway.egress import Egress, Policy, is_public, may_name_addresses
from tests.fakes.names import LOOPBACK, Names

PNG = b"\x89PNG not really"


class Site:
    """A web site on loopback that counts who comes."""

    def __init__(self) -> None:
        self.port = 0
        self.seen: list[web.Request] = []
        self.headers: dict[str, str] = {"content-type": "image/png"}
        self.status = 200
        self.body = PNG

    async def answer(self, request: web.Request) -> web.Response:
        self.seen.append(request)
        return web.Response(status=self.status, body=self.body, headers=self.headers)


@pytest_asyncio.fixture
async def site() -> AsyncIterator[Site]:
    one = Site()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", one.answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    one.port = runner.addresses[0][1]
    yield one
    await runner.cleanup()


def chat(url: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}


def open_to(site: Site, names: Names | None = None, *allow: str, **more: Any) -> Egress:
    """An egress that takes loopback for a public address, as the site is there."""
    policy = Policy(allow=(f"site.test:{site.port}", *allow), **more)
    return Egress(
        policy, names or Names(site=[["127.0.0.1"]]), lambda address: address == LOOPBACK or is_public(address)
    )


async def refusal(egress: Egress, body: dict[str, Any]) -> str:
    with pytest.raises(InvalidRequest) as caught:
        await egress.fill(body)
    assert caught.value.param is not None
    return caught.value.message


def user(part: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [part]}]}


HTTP = "http://169.254.169.254/latest/meta-data"
PLACES = [
    user({"type": "image_url", "image_url": {"url": HTTP}}),
    user({"type": "image_url", "image_url": HTTP}),
    user({"type": "audio_url", "audio_url": {"url": HTTP}}),
    user({"type": "video_url", "video_url": {"url": HTTP}}),
    user({"type": "file", "file": {"file_url": HTTP}}),
    user({"type": "image", "source": {"type": "url", "url": HTTP}}),
    user({"type": "tool_result", "content": [{"type": "image", "source": {"type": "url", "url": HTTP}}]}),
    user({"type": "image", "image": HTTP}),
    {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": HTTP}]}]},
    {"input": [{"role": "user", "content": [{"type": "input_file", "file_url": HTTP}]}]},
    {"system": [{"type": "image", "source": {"type": "url", "url": HTTP}}]},
    {"input": "x", "tools": [{"type": "mcp", "server_url": HTTP}]},
]


@pytest.mark.parametrize("body", PLACES, ids=lambda body: str(body)[:70])
async def test_without_a_list_every_address_is_refused_wherever_it_stands(body: dict[str, Any]) -> None:
    names = Names()

    await refusal(Egress(Policy(), names), body)

    assert names.asked == []


@pytest.mark.parametrize(
    "url",
    ["HTTP://h/x", "https://h/x", " http://h/x", "//h/x", "/etc/passwd", "file:///etc/passwd", "ftp://h/x", "h/x.png",
     "", "gopher://h", "http:\\\\h\\x", "blob:http://h"],
)  # fmt: skip
async def test_whatever_is_not_data_is_an_address(url: str) -> None:
    assert "send the content itself" in await refusal(Egress(Policy()), chat(url))


@pytest.mark.parametrize("url", ["data:image/png;base64,AAAA", "DATA:image/png;base64,AAAA"])
async def test_data_passes_untouched_and_so_does_text_that_looks_like_an_address(url: str) -> None:
    body = chat(url)
    body["messages"] += [
        {"role": "user", "content": HTTP},
        {"role": "assistant", "content": [{"type": "text", "text": HTTP}]},
        {"role": "assistant", "annotations": [{"type": "url_citation", "url": HTTP}]},
    ]
    before = repr(body)

    await Egress(Policy()).fill(body)

    assert repr(body) == before


async def test_an_address_on_the_list_is_fetched_by_us_and_becomes_data(site: Site) -> None:
    body = chat(f"http://site.test:{site.port}/a.png?b")

    await open_to(site).fill(body)

    encoded = base64.b64encode(PNG).decode()
    assert body == chat(f"data:image/png;base64,{encoded}")
    (request,) = site.seen
    assert not {"authorization", "cookie", "x-api-key"} & {name.lower() for name in request.headers}


async def test_an_anthropic_source_becomes_one_of_base64(site: Site) -> None:
    source = {"type": "url", "url": f"http://site.test:{site.port}/a.png"}

    await open_to(site).fill(user({"type": "image", "source": source}))

    assert source == {"type": "base64", "media_type": "image/png", "data": base64.b64encode(PNG).decode()}


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "127.9.9.9", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0",
     "224.0.0.1", "255.255.255.255", "240.0.0.1", "192.0.0.8", "198.18.0.1", "192.88.99.1", "::1", "::", "fe80::1",
     "fd00::1", "fd00:ec2::254", "ff02::1", "fec0::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::127.0.0.1",
     "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "2002:7f00:1::", "2001::1", "2001:db8::1"],
)  # fmt: skip
async def test_a_name_that_leads_inside_is_refused(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))
    egress = Egress(Policy(allow=("site.test",)), Names(site=[["93.184.216.34", address]]))

    assert "not a public one" in await refusal(egress, chat("http://site.test/"))


@pytest.mark.parametrize("address", ["93.184.216.34", "2606:4700::1111", "::ffff:93.184.216.34", "64:ff9b::5db8:d822"])
def test_addresses_of_the_internet_are_public(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "host",
    [
        "2130706433",
        "0x7f000001",
        "0x7f.1",
        "0177.0.0.1",
        "127.1",
        "127.0.0.1",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "localhost",
    ],
)
@pytest.mark.parametrize("is_listed", [False, True])
async def test_no_spelling_of_loopback_leads_there(site: Site, host: str, is_listed: bool) -> None:
    allow = (host.strip("[]"), f"{host.strip('[]')}:{site.port}") if is_listed and ":" not in host else ("site.test",)

    await refusal(Egress(Policy(allow=allow)), chat(f"http://{host}:{site.port}/"))

    assert site.seen == []


@pytest.mark.parametrize(
    "url",
    ["http://site.test@evil.test:{port}/", "http://user:pw@site.test:{port}/", "http://evil.test#@site.test:{port}/",
     "http://evil.test\\@site.test:{port}/", "http://site.test.evil.test:{port}/", "http://evilsite.test:{port}/",
     "http://site.test:22/", "http://site.test/", "https://site.test/", "http://site.test:99999/", "http://:{port}/",
     "file://site.test:{port}/etc/passwd"],
)  # fmt: skip
async def test_only_the_listed_host_and_port_are_asked(site: Site, url: str) -> None:
    await refusal(open_to(site, Names(site=[["127.0.0.1"]], evil=[["127.0.0.1"]])), chat(url.format(port=site.port)))

    assert site.seen == []


async def test_a_star_stands_for_names_below_a_host_and_not_for_the_host(site: Site) -> None:
    names = Names(a=[["127.0.0.1"]], site=[["127.0.0.1"]])
    egress = Egress(Policy(allow=(f"*.site.test:{site.port}",)), names, lambda address: True)

    await egress.fill(chat(f"http://A.site.test.:{site.port}/"))

    await refusal(egress, chat(f"http://site.test:{site.port}/"))
    assert len(site.seen) == 1


async def test_a_name_is_resolved_once_so_that_rebinding_gains_nothing(site: Site) -> None:
    nobody = ipaddress.ip_address("127.0.0.9")  # stands for a public address; nothing listens there
    names = Names(site=[["127.0.0.9"], ["127.0.0.1"]])
    egress = Egress(Policy(allow=(f"site.test:{site.port}",)), names, lambda address: address == nobody)

    await refusal(egress, chat(f"http://site.test:{site.port}/"))

    assert (names.asked, site.seen) == (["site.test"], [])


@pytest.mark.parametrize(
    "location",
    [
        "http://10.0.0.1/",
        "http://[::1]/",
        "http://inside.test/",
        "file:///etc/passwd",
        "//evil.test/",
        "http://x@site.test",
    ],
)
async def test_a_redirect_is_checked_like_the_first_address(site: Site, location: str) -> None:
    site.status, site.headers = 302, {"location": location}
    names = Names(site=[["127.0.0.1"]], inside=[["10.0.0.1"]], evil=[["127.0.0.1"]])

    await refusal(open_to(site, names, "inside.test", "10.0.0.1"), chat(f"http://site.test:{site.port}/"))

    assert len(site.seen) == 1


async def test_a_redirect_to_the_same_name_is_resolved_and_checked_anew(site: Site) -> None:
    site.status, site.headers = 302, {"location": "/again"}
    names = Names(site=[["127.0.0.1"], ["192.168.0.1"]])

    message = await refusal(open_to(site, names), chat(f"http://site.test:{site.port}/"))

    assert "not a public one" in message
    assert len(site.seen) == 1


async def test_redirects_end(site: Site) -> None:
    site.status, site.headers = 302, {"location": "/again"}

    assert "redirects more than" in await refusal(open_to(site), chat(f"http://site.test:{site.port}/"))
    assert len(site.seen) == 4


@pytest.mark.parametrize("kind", ["text/html", "application/json", "image/svg+xml", "application/octet-stream"])
async def test_only_images_and_audio_are_taken(site: Site, kind: str) -> None:
    site.headers = {"content-type": kind}

    message = await refusal(open_to(site), chat(f"http://site.test:{site.port}/"))

    assert "neither an image nor audio" in message
    assert PNG.decode("latin-1") not in message


async def test_what_one_request_fetches_is_bounded(site: Site) -> None:
    egress = open_to(site, max_size=2 * len(PNG))
    part = chat(f"http://site.test:{site.port}/")["messages"][0]["content"][0]

    def body(count: int) -> dict[str, Any]:
        return user({"type": "x", "content": [{**part, "image_url": dict(part["image_url"])} for _ in range(count)]})

    await egress.fill(body(2))
    assert "more bytes" in await refusal(egress, body(3))
    assert "more than 16" in await refusal(open_to(site), body(17))


async def test_an_answer_that_is_an_error_or_does_not_come_is_told(site: Site) -> None:
    site.status = 404
    assert "answered 404" in await refusal(open_to(site), chat(f"http://site.test:{site.port}/"))

    unknown = Egress(Policy(allow=("nobody.test",)), Names())
    assert "could not be fetched" in await refusal(unknown, chat("http://nobody.test/"))


def _spelled(text: str, escape: bool) -> str:
    return "".join(f"\\u{ord(char):04x}" for char in text) if escape else text


@given(
    key=st.sampled_from(["image_url", "audio_url", "video_url", "file_url", "url", "image", "audio", "video"]),
    escaped=st.booleans(),
    text=st.text(),
)
async def test_no_body_that_names_an_address_is_taken_for_one_that_cannot(key: str, escaped: bool, text: str) -> None:
    part = f'{{"{_spelled(key, escaped)}": "http://127.0.0.1/"}}'
    raw = f'{{"messages": [{{"role": "user", "content": [{part}]}}], "user": {json.dumps(text)}}}'.encode()
    with pytest.raises(InvalidRequest, match="is an address"):
        await Egress(Policy()).fill(json.loads(raw))
    assert may_name_addresses(raw)


def test_a_plain_body_is_seen_to_name_no_address() -> None:
    assert not may_name_addresses(b'{"messages": [{"role": "user", "content": "Hello\\n"}]}')
