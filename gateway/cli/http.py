"""One blocking HTTP request, for verbs that ask a server something."""

import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import msgspec

from gateway.cli.common import SettingsFault

_LOOPBACK = {"127.0.0.1", "localhost", "::1"}
_MAX_ANSWER = 16 * 2**20


class Unreachable(Exception):
    """Nobody answered; the message says why."""


class Answer(msgspec.Struct, frozen=True):
    """Status, body and ``ETag`` of an answer, whatever the status is."""

    status: int
    text: str
    etag: str | None = None

    def json(self) -> Any:
        """Return the body's value; None if it is not JSON."""
        try:
            return json.loads(self.text)
        except ValueError:
            return None

    def error_message(self) -> str:
        """Return what an error body says, or its beginning."""
        body = self.json()
        error = body.get("error") if isinstance(body, dict) else None
        message = error.get("message") if isinstance(error, dict) else error
        return printable(str(message) if message else self.text.strip()[:200] or "no message")


def printable(text: str) -> str:
    """Return text that a terminal only prints: clients choose names, and an escape sequence in one is not obeyed."""
    return "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in text)


def ask(
    method: str,
    url: str,
    key: str | None,
    *,
    timeout_s: float = 10.0,
    body: object = None,
    headers: Mapping[str, str] | None = None,
) -> Answer:
    """Send a request, with ``body`` as JSON if there is one. Loopback is asked directly, others by way of the
    environment's proxy.

    Raises ``Unreachable``, and ``Fault`` for what is not an http URL.
    """
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise SettingsFault(f"{url!r} is not an http:// or https:// address")
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, method=method)  # noqa: S310  (the scheme is checked above)
    request.add_header("accept", "application/json, text/plain")
    if key:
        request.add_header("authorization", f"Bearer {key}")
    if data is not None:
        request.add_header("content-type", "application/json")
    for name, value in (headers or {}).items():
        request.add_header(name, value)
    proxies = urllib.request.ProxyHandler({}) if parts.hostname in _LOOPBACK else urllib.request.ProxyHandler()
    try:
        with urllib.request.build_opener(proxies).open(request, timeout=timeout_s) as response:
            text = response.read(_MAX_ANSWER).decode(errors="replace")
            return Answer(status=response.status, text=text, etag=response.headers.get("etag"))
    except urllib.error.HTTPError as error:
        with error:
            return Answer(status=error.code, text=error.read(_MAX_ANSWER).decode(errors="replace"))
    except urllib.error.URLError as error:
        raise Unreachable(str(error.reason)) from error
    except (OSError, ValueError) as error:  # time-outs while reading, broken answers
        raise Unreachable(str(error) or type(error).__name__) from error
