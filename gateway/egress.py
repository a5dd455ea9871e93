"""What a request asks to be fetched: data passes, addresses are fetched by us or refused, none reaches an engine."""

import asyncio
import base64
import ipaddress
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import aiohttp
import msgspec
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from core.errors import InvalidRequest

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_PLACES = ("messages", "input", "prompt", "system")
_URL_KEYS = frozenset({"image_url", "audio_url", "video_url", "file_url", "url", "image", "audio", "video"})
_NEVER_FETCHED = frozenset({"url_citation"})
_MAX_URLS = 16
_MAX_REDIRECTS = 3
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_PORTS = {"http": 80, "https": 443}
_MEDIA = ("image/", "audio/")
_NOT_MEDIA = frozenset({"image/svg+xml"})  # a document that names further addresses

_GLOBAL_V6 = ipaddress.IPv6Network("2000::/3")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_SPECIAL: tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...] = (
    *map(ipaddress.IPv4Network, ("192.0.0.0/24", "192.88.99.0/24")),
    *map(ipaddress.IPv6Network, ("2001::/23", "2002::/16")),  # Teredo, ORCHID, 6to4: IPv4 addresses inside
)


_SIGN = re.compile(rb"url|image|audio|video|\\u")  # every name above holds one of these, unless it is escaped
_LONG = 2048  # bytes of a body in which the search costs more than it saves


def may_name_addresses(raw: bytes) -> bool:
    """Whether a JSON text may hold an address that ``Egress.fill`` would find; False is certain, and costs 1 µs."""
    return len(raw) > _LONG or _SIGN.search(raw) is not None


class Resolver(Protocol):
    """Turns a name into addresses."""

    async def resolve(self, host: str, port: int) -> Sequence[str]:
        """Return all addresses of a host. Raises ``OSError``."""


class SystemResolver:
    """The machine's own."""

    async def resolve(self, host: str, port: int) -> Sequence[str]:
        """Ask ``getaddrinfo`` in a thread."""
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return [str(entry[4][0]) for entry in found]


class Policy(msgspec.Struct, frozen=True):
    """What may be fetched. ``allow``: hosts, as ``images.example.com``, ``*.example.com`` or with a ``:port``; none
    means that nothing is. ``max_size``: bytes of all that one request names; ``timeout``: seconds for each."""

    allow: tuple[str, ...] = ()
    max_size: int = 10 * 2**20
    timeout: float = 10.0


def is_public(address: Address) -> bool:
    """Whether an address belongs to the public Internet, whatever form it is written in."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        if address in _NAT64:
            return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        if address not in _GLOBAL_V6:
            return False
    if any(address in network for network in _SPECIAL if network.version == address.version):
        return False
    return address.is_global and not (address.is_multicast or address.is_reserved)


class Egress:
    """Fetches what requests name by address, within the policy. ``is_allowed`` judges each resolved address."""

    def __init__(
        self, policy: Policy, resolver: Resolver | None = None, is_allowed: Callable[[Address], bool] = is_public
    ) -> None:
        self._policy = policy
        self._resolver = resolver or SystemResolver()
        self._is_allowed = is_allowed

    async def fill(self, body: dict[str, Any]) -> None:
        """Put the content in the place of every address in the body, as ``data:``.

        Raises ``InvalidRequest`` for an address that may not be fetched, or could not be; the body is spoilt then.
        """
        room = self._policy.max_size
        for index, place in enumerate(list(_remote(body))):
            if index == _MAX_URLS:
                raise InvalidRequest(f"the request names more than {_MAX_URLS} addresses", param=place.name)
            room -= await self._fill(place, room)

    async def session(self, url: URL) -> aiohttp.ClientSession:
        """Return a session that leads to this address and to no other, for the caller to close; it unpacks nothing.

        Raises ``InvalidRequest`` for an address that may not be asked, ``OSError`` for one that cannot be found.
        """
        try:
            return _session(await self._pinned(url))
        except _NotAllowedError as error:
            raise InvalidRequest(f"the address {error}") from None
        except ValueError:
            raise InvalidRequest("the address makes no sense") from None

    async def _fill(self, place: "_Place", room: int) -> int:
        if not self._policy.allow:
            raise InvalidRequest(
                f"`{place.name}` is an address, and this gateway fetches none: send the content itself, as "
                "'data:image/png;base64,…'",
                param=place.name,
            )
        try:
            async with asyncio.timeout(self._policy.timeout):
                media_type, content = await self._fetch(place.url, room)
        except TimeoutError:
            raise _refused(place, f"did not answer within {self._policy.timeout:g} s") from None
        except (aiohttp.ClientError, OSError, ValueError):
            raise _refused(place, "could not be fetched") from None
        except _NotAllowedError as error:
            raise _refused(place, str(error)) from None
        place.put(media_type, base64.b64encode(content).decode("ascii"))
        return len(content)

    async def _fetch(self, text: str, room: int) -> tuple[str, bytes]:
        url = URL(text)
        for _ in range(_MAX_REDIRECTS + 1):
            async with (
                _session(await self._pinned(url)) as session,
                session.get(
                    url,
                    allow_redirects=False,
                    headers={"accept": "image/*, audio/*", "accept-encoding": "identity", "user-agent": "forebay"},
                ) as response,
            ):
                if response.status not in _REDIRECTS:
                    return await _content(response, room)
                url = url.join(URL(response.headers.get("location", "")))
        raise _NotAllowedError(f"redirects more than {_MAX_REDIRECTS} times")

    async def _pinned(self, url: URL) -> "_Pinned":
        """Check where an address leads, and return a resolver that leads nowhere else."""
        host = (url.raw_host or "").rstrip(".").lower()
        if url.scheme not in _PORTS or not host:
            raise _NotAllowedError("is no http or https address")
        if url.user is not None or url.password is not None:
            raise _NotAllowedError("holds a user name or password")
        if not self._is_listed(host, url.port or 0, _PORTS[url.scheme]):
            raise _NotAllowedError("names a host that this gateway may not fetch from; its operator can allow it")
        addresses = tuple(await self._resolver.resolve(host, url.port or 0))
        # One bad address is enough: which of them a connection would take is not ours to say.
        if not addresses or not all(self._is_allowed(ipaddress.ip_address(address)) for address in addresses):
            raise _NotAllowedError("leads to an address that is not a public one")
        if _is_literal(host) and host not in addresses:
            raise _NotAllowedError("leads to an address that is not a public one")
        return _Pinned(addresses)

    def _is_listed(self, host: str, port: int, usual_port: int) -> bool:
        for entry in self._policy.allow:
            name, _, listed_port = entry.lower().partition(":")
            if port != (int(listed_port) if listed_port else usual_port):
                continue
            if host == name or (name.startswith("*.") and host.endswith(name[1:])):
                return True
        return False


class _NotAllowedError(Exception):
    """The message continues a sentence about the address."""


class _Pinned(AbstractResolver):
    """Answers every name by the addresses that were checked."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._addresses = addresses

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=0,
                flags=socket.AI_NUMERICHOST,
            )
            for address in self._addresses
        ]

    async def close(self) -> None:
        """Nothing is open."""


def _session(pinned: _Pinned) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(resolver=pinned, use_dns_cache=False, force_close=True),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,  # what is small on the wire may not grow here
        trust_env=False,  # a proxy would resolve the name a second time
    )


class _Place(NamedTuple):
    """An address in a body, and where it stands."""

    name: str
    url: str
    holder: dict[str, Any]
    key: str

    def put(self, media_type: str, encoded: str) -> None:
        if self.holder.get("type") == "url":  # Anthropic's source
            del self.holder[self.key]
            self.holder.update(type="base64", media_type=media_type, data=encoded)
        else:
            self.holder[self.key] = f"data:{media_type};base64,{encoded}"


def _refused(place: _Place, why: str) -> InvalidRequest:
    return InvalidRequest(f"the address in `{place.name}` {why}", param=place.name)


def _remote(body: dict[str, Any]) -> Iterator[_Place]:
    """Yield every address that an engine might fetch: all that is no ``data:``, of any scheme or of none."""
    for field in _PLACES:
        value = body.get(field)
        if isinstance(value, list | dict):
            yield from _walk(value, field)
    tools = body.get("tools")
    for index, tool in enumerate(tools if isinstance(tools, list) else ()):
        if isinstance(tool, dict) and tool.get("server_url") is not None:
            name = f"tools[{index}].server_url"
            raise InvalidRequest(f"`{name}`: this gateway lets no engine call other servers; leave it out", param=name)


def _walk(root: Any, field: str) -> Iterator[_Place]:
    rest: list[tuple[_Steps, Any]] = [((None, field), root)]
    while rest:
        steps, node = rest.pop()
        if isinstance(node, list):
            rest.extend(((steps, at), item) for at, item in enumerate(node) if isinstance(item, dict | list))
        elif node.get("type") not in _NEVER_FETCHED:
            for key, value in node.items():
                if isinstance(value, dict | list):
                    rest.append(((steps, key), value))
                elif key in _URL_KEYS and isinstance(value, str) and value[:5].lower() != "data:":
                    yield _Place(_name_of((steps, key)), value, node, key)


_Steps = tuple[Any, str | int]
"""A place in a body: the steps to what holds it, or None, and the last step. A name is made only of what is found."""


def _name_of(steps: _Steps | None) -> str:
    parts: list[str] = []
    while steps is not None:
        steps, step = steps
        parts.append(f"[{step}]" if isinstance(step, int) else f".{step[:64]}")
    return "".join(reversed(parts))[1:]


async def _content(response: aiohttp.ClientResponse, room: int) -> tuple[str, bytes]:
    if response.status != 200:
        raise _NotAllowedError(f"answered {response.status}")
    media_type = response.content_type
    if not media_type.startswith(_MEDIA) or media_type in _NOT_MEDIA:
        raise _NotAllowedError("is neither an image nor audio")
    content = bytearray()
    async for piece in response.content.iter_any():
        content += piece
        if len(content) > room:
            raise _NotAllowedError("leads to more bytes than one request may fetch")
    return media_type, bytes(content)


def _is_literal(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
