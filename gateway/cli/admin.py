"""The admin API of a running gateway, for verbs: where it is, which key opens it, and what its errors ask one to do."""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, TypeVar
from urllib.parse import quote, urlencode

import click

from gateway.cli.common import ADMIN_KEY, ADMIN_PORT, Fault, state_dir, table
from gateway.cli.http import Answer, Unreachable, ask, printable
from gateway.settings import environment
from gateway.units import seconds

R = TypeVar("R")

KEY_VARIABLE = "FOREBAY_ADMIN_KEY"
_DRAIN_TIMEOUT_S = 900.0  # a drain answers when it is done; the gateway bounds it
_PAGE = 200


class Admin:
    """The admin API of one gateway. Every failure becomes a ``Fault`` that says what to do.

    The key is the file's, else ``$FOREBAY_ADMIN_KEY``, else the one kept in the state folder.
    """

    def __init__(self, url: str, key_file: Path | None) -> None:
        self._url = url.rstrip("/")
        self._key_file = key_file

    def get(self, path: str, **params: object) -> Answer:
        """Return the answer to a GET; parameters that are None are left out."""
        given = [(name, value) for name, value in params.items() if value is not None]
        query = urlencode([(name, _written(value)) for name, value in given], doseq=True)
        return self._ask("GET", f"{path}?{query}" if query else path, timeout_s=10.0)

    def post(self, path: str, body: object = None, *, if_match: str | None = None) -> Answer:
        """Return the answer to a POST, which is refused unless what it changes is still in this state."""
        return self._ask("POST", path, body=body, if_match=if_match, timeout_s=_DRAIN_TIMEOUT_S)

    def change(self, method: str, path: str, read: Answer, body: object = None) -> Answer:
        """Return the answer to a change of what ``read`` has shown; it is refused if that was changed since."""
        return self._ask(method, path, body=body, if_match=read.etag, timeout_s=10.0)

    def items(self, path: str, *, most: int | None = None, **params: object) -> list[dict[str, Any]]:
        """Return what a list holds, page after page, or its first ``most``."""
        found: list[dict[str, Any]] = []
        after: str | None = None
        while True:
            limit = _PAGE if most is None else min(_PAGE, most - len(found))
            page = self.value(self.get(path, **params, limit=limit, after=after))
            found += page.get("data", [])
            after = page.get("next")
            if after is None or (most is not None and len(found) >= most):
                return found

    def value(self, answer: Answer) -> dict[str, Any]:
        """Return the object that an answer holds."""
        value = answer.json()
        if not isinstance(value, dict):
            raise Fault(f"what answers at {self._url} is not a Forebay admin API; give its address with --admin-url")
        return value

    def _ask(
        self, method: str, path: str, *, timeout_s: float, body: object = None, if_match: str | None = None
    ) -> Answer:
        headers = {} if if_match is None else {"if-match": if_match}
        key, origin = self._key()
        try:
            answer = ask(method, self._url + path, key, timeout_s=timeout_s, body=body, headers=headers)
        except Unreachable as error:
            raise Fault(
                f"no gateway answers at {self._url} ({error}). Is it running? "
                "Start it with `forebay run`, or give its address with --admin-url."
            ) from error
        if answer.status < 400:
            return answer
        message = answer.error_message()
        if answer.status == 401:
            raise Fault(
                f"the gateway at {self._url} refuses the key in {origin} ({message}). "
                "Give the file with the right one by --admin-key-file."
            )
        if answer.status == 403:
            raise Fault(f"the key in {origin} may not do this: {message}. Give another one by --admin-key-file.")
        if answer.status == 412:
            raise Fault(f"{message}: somebody else was faster. Look at it and run this again. (status 412)")
        raise Fault(f"{message} (status {answer.status})")

    def _key(self) -> tuple[str, str]:
        """Return the key and where it comes from."""
        env = environment()
        if self._key_file is None and (given := env.get(KEY_VARIABLE)):
            return given.strip(), KEY_VARIABLE
        path = self._key_file or state_dir(env) / ADMIN_KEY
        try:
            return path.read_text(encoding="utf-8").strip(), str(path)
        except OSError as error:
            raise Fault(
                f"cannot read the admin key in {path}: {error.strerror}. Run this in the folder that `forebay run` "
                f"was started in, give --admin-key-file, or set {KEY_VARIABLE}."
            ) from error


admin_url = click.option(
    "--admin-url",
    "--url",
    "admin_url",
    default=f"http://127.0.0.1:{ADMIN_PORT}",
    show_default=True,
    help="The gateway's admin address.",
)
admin_key_file = click.option(
    "--admin-key-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help=f"A file with the admin key.  [default: ${KEY_VARIABLE}, else admin.key in the state folder]",
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
tenant = click.option("--tenant", help="Only this tenant's.")


def asks(command: Callable[Concatenate[Admin, ...], R]) -> Callable[..., R]:
    """Give a verb the options that find a gateway, and that gateway's ``Admin`` as its first argument."""

    @admin_url
    @admin_key_file
    @wraps(command)
    def run(*, admin_url: str, admin_key_file: Path | None, **options: Any) -> R:
        return command(Admin(admin_url, admin_key_file), **options)

    return run


class Moment(click.ParamType[datetime]):
    """A date or time (UTC unless it says otherwise), or a duration from now: ``2026-11-22``, ``24h``."""

    name = "when"

    def __init__(self, direction: int) -> None:
        self._direction = direction

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        """Return the moment; fails for text that is none."""
        if isinstance(value, datetime):
            return value
        try:
            moment = datetime.fromisoformat(value)
            return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
        except ValueError:
            pass
        try:
            return datetime.now(UTC) + self._direction * timedelta(seconds=duration(value))
        except (ValueError, OverflowError):
            self.fail(f"{value!r} is neither a date such as 2026-11-22 nor a duration such as 24h or 7d", param, ctx)


def duration(text: str) -> float:
    """Return the seconds of a duration with its unit. Raises ``ValueError``."""
    given = seconds(text)
    if not isinstance(given, float):
        raise ValueError(f"{text!r} is not a duration")
    return given


PAST = Moment(-1)
FUTURE = Moment(1)


def at(*parts: str) -> str:
    """Return the path of a resource, whatever signs are in its names."""
    return "/admin/v1/" + "/".join(quote(part, safe="") for part in parts)


def report(value: object, *, as_json: bool, text: Callable[[], str]) -> None:
    """Print JSON, or the text."""
    if as_json:
        click.echo(json.dumps(value, indent=2))
        return
    try:
        click.echo(text())
    except KeyError as error:
        raise Fault(
            f"the gateway's answer has no {error}: the two are of different versions; --json prints it as it is."
        ) from error


def listed(
    heading: Sequence[str],
    found: Sequence[dict[str, Any]],
    row: Callable[[dict[str, Any]], Sequence[object]],
    *,
    none: str,
) -> str:
    """Return what a list holds as a table that is safe to print; ``none`` where it is empty."""
    return table([list(heading), *([cell(value) for value in row(one)] for one in found)]) if found else none


def fields(values: Mapping[str, object]) -> str:
    """Return names and values below each other, those that are empty left out."""
    return table([[name, cell(value)] for name, value in values.items() if value not in (None, "", [], "-")])


def cell(value: object) -> str:
    """Return a value as it stands in a table."""
    match value:
        case None | "" | []:
            return "-"
        case bool():
            return "yes" if value else "no"
        case list():
            return ", ".join(printable(str(item)) for item in value)
        case _:
            return printable(str(value))


def clock(moment: str | None) -> str:
    """Return a moment of the API in UTC, to the second; ``-`` for None."""
    if moment is None:
        return "-"
    return datetime.fromisoformat(moment).astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")


def money(usd: str | None) -> str:
    """Return an amount of dollars to the millionth; ``-`` for None."""
    if usd is None:
        return "-"
    amount = Decimal(usd)
    if 0 < amount < Decimal("0.000001"):
        return "<0.000001"
    whole, _, rest = f"{amount:.6f}".partition(".")
    return f"{whole}.{rest.rstrip('0').ljust(2, '0')}"


def span(duration_s: float | None) -> str:
    """Return a duration as people read it: ``12 ms``, ``3.4 s``; ``-`` for None."""
    if duration_s is None:
        return "-"
    return f"{duration_s * 1000:.0f} ms" if duration_s < 1 else f"{duration_s:.1f} s"


def _written(value: object) -> Any:
    if isinstance(value, date):  # and datetime, which is one
        return value.isoformat()
    return value
