"""The data port of a running gateway, as a tenant sees it: where it is, which key opens it, and what its errors ask one
to do."""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Container, Iterable, Iterator
from functools import wraps
from http.client import HTTPException
from pathlib import Path
from typing import Any, Concatenate, NamedTuple, TypeVar
from urllib.parse import quote, urlencode, urlsplit

import click

from gateway.cli.common import DATA_PORT, LOCAL_KEY, Fault, SettingsFault, state_dir
from gateway.cli.http import Answer, Unreachable, ask
from gateway.settings import environment

R = TypeVar("R")

KEY_VARIABLE = "FOREBAY_API_KEY"
_SILENCE_S = 60.0  # the gateway says something every 15 s
_ATTEMPTS = 5
_PAUSE_S = 1.0
_LOOPBACK = {"127.0.0.1", "localhost", "::1"}


class Told(NamedTuple):
    """A server-sent event. ``number`` None: it is not kept, and so not told again."""

    number: int | None
    event: str
    data: dict[str, Any]


class Tenant:
    """The data port of one gateway, and a tenant's key. Every failure becomes a ``Fault`` that says what to do.

    The key is the file's, else ``$FOREBAY_API_KEY``, else the local one that is kept in the state folder.
    """

    def __init__(self, url: str, key_file: Path | None) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        self._key_file = key_file

    def get(self, path: str, **params: object) -> Answer:
        """Return the answer to a GET; parameters that are None are left out."""
        given = {name: value for name, value in params.items() if value is not None}
        return self._ask("GET", f"{path}?{urlencode(given)}" if given else path)

    def post(self, path: str, body: object) -> Answer:
        """Return the answer to a POST."""
        return self._ask("POST", path, body)

    def value(self, answer: Answer) -> dict[str, Any]:
        """Return the object that an answer holds."""
        value = answer.json()
        if not isinstance(value, dict):
            raise Fault(f"what answers at {self._url} is not Forebay's data port; give its address with --url")
        return value

    def events(self, path: str, ends: Container[str]) -> Iterator[Told]:
        """Yield the events of a stream until it is over, the last event being one of ``ends``. A connection that breaks
        is made anew, behind the last event."""
        after, event, failures = 0, "", 0
        while True:
            why = "the stream ended before its time"
            try:
                for told in self._stream(path, after):
                    event, failures = told.event, 0
                    after = told.number if told.number is not None else after
                    yield told
                if event in ends:
                    return
            except (OSError, HTTPException) as error:
                why = str(error) or type(error).__name__
            except ValueError as error:
                raise Fault(f"{self._url} answers what is no stream of events: {error}") from error
            failures += 1
            if failures == _ATTEMPTS:
                raise self._away(why)
            time.sleep(_PAUSE_S)

    def _stream(self, path: str, after: int) -> Iterator[Told]:
        url, (key, origin) = self._url + path, self._key()
        request = urllib.request.Request(_checked(url))  # noqa: S310  (the scheme is checked)
        request.add_header("accept", "text/event-stream")
        request.add_header("authorization", f"Bearer {key}")
        request.add_header("last-event-id", str(after))
        own = urlsplit(url).hostname in _LOOPBACK
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}) if own else urllib.request.ProxyHandler())
        try:
            response = opener.open(request, timeout=_SILENCE_S)
        except urllib.error.HTTPError as error:
            with error:
                answer = Answer(status=error.code, text=error.read().decode(errors="replace"))
            raise self._refused(answer, origin) from error
        with response:
            yield from _events(response)

    def _ask(self, method: str, path: str, body: object = None) -> Answer:
        key, origin = self._key()
        try:
            answer = ask(method, self._url + path, key, body=body, timeout_s=30.0)
        except Unreachable as error:
            raise self._away(str(error)) from error
        if answer.status < 400:
            return answer
        raise self._refused(answer, origin)

    def _away(self, why: str) -> Fault:
        return Fault(
            f"no gateway answers at {self._url} ({why}). Is it running? "
            "Start it with `forebay run`, or give its address with --url."
        )

    def _refused(self, answer: Answer, origin: str) -> Fault:
        message = answer.error_message()
        if answer.status in {401, 403}:
            return Fault(
                f"the gateway at {self._url} refuses the key in {origin} ({message}). "
                "Give the file with the right one by --key-file."
            )
        return Fault(f"{message} (status {answer.status})")

    def _key(self) -> tuple[str, str]:
        """Return the key and where it comes from."""
        env = environment()
        if self._key_file is None and (given := env.get(KEY_VARIABLE)):
            return given.strip(), KEY_VARIABLE
        path = self._key_file or state_dir(env) / LOCAL_KEY
        try:
            return path.read_text(encoding="utf-8").strip(), str(path)
        except OSError as error:
            raise Fault(
                f"cannot read the key in {path}: {error.strerror}. Run this in the folder that `forebay run` was "
                f"started in, give --key-file, or set {KEY_VARIABLE}."
            ) from error


def _checked(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise SettingsFault(f"{url!r} is not an http:// or https:// address")
    return url


def _events(lines: Iterable[bytes]) -> Iterator[Told]:
    """Yield the events of a stream; those without data are comments."""
    number: int | None = None
    event = ""
    for raw in lines:
        name, _, value = raw.decode(errors="replace").rstrip("\r\n").partition(": ")
        match name:
            case "id":
                number = int(value)
            case "event":
                event = value
            case "data":
                yield Told(number, event, json.loads(value))
                number = None
            case _:
                pass


def path_of(*parts: str) -> str:
    """Return the path of a resource, whatever signs are in its names."""
    return "/v1/" + "/".join(quote(part, safe="") for part in parts)


_url = click.option(
    "--url",
    default=f"http://127.0.0.1:{DATA_PORT}",
    show_default=True,
    help="The gateway's address, as clients have it.",
)
_key_file = click.option(
    "--key-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help=f"A file with the tenant's key.  [default: ${KEY_VARIABLE}, else {LOCAL_KEY} in the state folder]",
)


def asks_as_tenant(command: Callable[Concatenate[Tenant, ...], R]) -> Callable[..., R]:
    """Give a verb the options that find a gateway and a key, and their ``Tenant`` as its first argument."""

    @_url
    @_key_file
    @wraps(command)
    def run(*, url: str, key_file: Path | None, **options: Any) -> R:
        return command(Tenant(url, key_file), **options)

    return run
