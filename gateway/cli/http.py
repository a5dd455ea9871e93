"""One blocking HTTP request, for verbs that ask a server something."""

import json
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlsplit

import msgspec

from gateway.cli.common import SettingsFault

_LOOPBACK = {"127.0.0.1", "localhost", "::1"}
_MAX_ANSWER = 16 * 2**20


class Unreachable(Exception):
    """Nobody answered; the message says why."""


class Answer(msgspec.Struct, frozen=True):
    """Status and body of an answer, whatever the status is."""

    status: int
    text: str

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
        return str(message) if message else self.text.strip()[:200] or "no message"


def ask(method: str, url: str, key: str | None, *, timeout_s: float = 10.0) -> Answer:
    """Send a request without a body. Loopback is asked directly, others by way of the environment's proxy.

    Raises ``Unreachable``, and ``Fault`` for what is not an http URL.
    """
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise SettingsFault(f"{url!r} is not an http:// or https:// address")
    request = urllib.request.Request(url, method=method)  # noqa: S310  (the scheme is checked above)
    request.add_header("accept", "application/json, text/plain")
    if key:
        request.add_header("authorization", f"Bearer {key}")
    proxies = urllib.request.ProxyHandler({}) if parts.hostname in _LOOPBACK else urllib.request.ProxyHandler()
    try:
        with urllib.request.build_opener(proxies).open(request, timeout=timeout_s) as response:
            return Answer(status=response.status, text=response.read(_MAX_ANSWER).decode(errors="replace"))
    except urllib.error.HTTPError as error:
        with error:
            return Answer(status=error.code, text=error.read(_MAX_ANSWER).decode(errors="replace"))
    except urllib.error.URLError as error:
        raise Unreachable(str(error.reason)) from error
    except (OSError, ValueError) as error:  # time-outs while reading, broken answers
        raise Unreachable(str(error) or type(error).__name__) from error
