"""The verbs over the admin API, as far as no gateway is needed: what options mean, and what is printed."""

import json
import re
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from gateway.cli import main
from gateway.cli.admin import FUTURE, PAST, cell, clock, money, span
from gateway.cli.common import Fault, SettingsFault
from gateway.cli.overlays import overlay_from
from gateway.cli.terms import budgets_text, limits_text, terms_from
from gateway.cli.why import paragraph

KEY = "fba_the-right-one"
CONTEXT = click.Context(main)


class _Gateway(BaseHTTPRequestHandler):
    """Answers as the server's script says, and keeps what was asked."""

    def do_GET(self) -> None:
        self._route()

    def do_POST(self) -> None:
        self._route()

    def do_DELETE(self) -> None:
        self._route()

    def _route(self) -> None:
        script: dict[str, tuple[int, Any]] = self.server.script  # type: ignore[attr-defined]
        asked: list[Any] = self.server.asked  # type: ignore[attr-defined]
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        asked.append((self.command, self.path, json.loads(body) if body else None, dict(self.headers)))
        status, value = script.get(f"{self.command} {self.path}", (404, {"error": {"message": "there is no such"}}))
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("etag", '"7"')
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


class Gateway:
    """A scripted admin API: `script` maps `METHOD path?query` to status and body."""

    def __init__(self, server: ThreadingHTTPServer, folder: Path) -> None:
        self._url = f"http://127.0.0.1:{server.server_address[1]}"
        self._folder = folder
        self.script: dict[str, tuple[int, Any]] = {}
        self.asked: list[tuple[str, str, Any, dict[str, str]]] = []
        server.script = self.script  # type: ignore[attr-defined]
        server.asked = self.asked  # type: ignore[attr-defined]

    def run(self, *arguments: str, env: dict[str, str] | None = None, **options: Any) -> Result:
        given = {"FOREBAY_ADMIN_KEY": KEY, "FOREBAY_STATE": str(self._folder), **(env or {})}
        return CliRunner(env=given).invoke(main, [*arguments, "--admin-url", self._url], **options)


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Gateway) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield Gateway(server, tmp_path)
        server.shutdown()
        thread.join()


def verb(*names: str) -> click.Command:
    """Return the command of a name, or of a name within a group's."""
    command: click.Command | None = main
    for name in names:
        assert isinstance(command, click.Group)
        command = command.get_command(CONTEXT, name)
    assert command is not None
    return command


def test_the_reference_names_every_verb() -> None:
    text = (Path(__file__).parents[3] / "docs" / "reference" / "cli.md").read_text()
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    words = set(re.findall(r"[a-z-]+", " ".join(re.findall(r"`([^`]+)`", prose))))
    for name in main.list_commands(CONTEXT):
        command = verb(name)
        verbs = command.commands if isinstance(command, click.Group) else {}
        missing = {name, *verbs} - words - {"downgrade"}
        assert not missing, f"{name}: {missing}"


# --- errors say what to do


def test_the_key_of_the_environment_is_used_and_a_file_comes_before_it(gateway: Gateway, tmp_path: Path) -> None:
    gateway.script["GET /admin/v1/models?limit=200"] = (200, {"data": [], "next": None})
    path = tmp_path / "other.key"
    path.write_text("fba_of-the-file\n")

    assert gateway.run("models", "ls").output == "no models\n"
    gateway.run("models", "ls", "--admin-key-file", str(path))

    assert [headers["Authorization"] for *_, headers in gateway.asked] == [f"Bearer {KEY}", "Bearer fba_of-the-file"]


@pytest.mark.parametrize(
    ("status", "message", "hint"),
    [
        (401, "not a known key", "--admin-key-file"),
        (403, "this needs the role 'admin'", "--admin-key-file"),
        (409, "there is one already", "status 409"),
        (412, "it has been changed since", "run this again"),
        (503, "the database cannot be reached", "status 503"),
    ],
)
def test_a_refusal_is_told_with_what_to_do(gateway: Gateway, status: int, message: str, hint: str) -> None:
    gateway.script["GET /admin/v1/tenants/acme"] = (status, {"error": {"message": message}})

    result = gateway.run("tenants", "show", "acme")

    assert result.exit_code == 1
    assert message in result.output
    assert hint in result.output
    assert KEY not in result.output


def test_a_gateway_that_does_not_run_is_told_with_what_to_do() -> None:
    result = CliRunner(env={"FOREBAY_ADMIN_KEY": KEY}).invoke(main, ["why", "req_1", "--url", "http://127.0.0.1:1"])

    assert result.exit_code == 1
    assert "forebay run" in result.output


def test_something_else_that_answers_is_told(gateway: Gateway) -> None:
    gateway.script["GET /admin/v1/tenants?limit=200"] = (200, ["no", "object"])

    assert "is not a Forebay admin API" in gateway.run("tenants", "ls").output


# --- what is asked


def test_a_list_is_read_to_its_end(gateway: Gateway) -> None:
    model = {
        "name": "a", "aliases": [], "fallbacks": [], "workers": ["a-0"], "ready": 1, "running": 0, "slots": 4,
        "waiting": 0, "context_tokens": None, "price": {"input_usd": "0.1", "output_usd": "0.4"},
    }  # fmt: skip
    gateway.script["GET /admin/v1/models?limit=200"] = (200, {"data": [model], "next": "x y"})
    gateway.script["GET /admin/v1/models?limit=200&after=x+y"] = (200, {"data": [{**model, "name": "b"}], "next": None})

    assert [one["name"] for one in json.loads(gateway.run("models", "ls", "--json").output)] == ["a", "b"]
    assert gateway.run("models", "ls").output.splitlines()[2].split()[0] == "b"


def test_a_long_list_is_read_as_far_as_is_wanted(gateway: Gateway) -> None:
    gateway.script["GET /admin/v1/audit?limit=2"] = (200, {"data": [{}, {}], "next": "more"})

    assert json.loads(gateway.run("audit", "ls", "--limit", "2", "--json").output) == [{}, {}]


def test_an_answer_of_another_version_is_told_so(gateway: Gateway) -> None:
    gateway.script["GET /admin/v1/audit?limit=50"] = (200, {"data": [{}], "next": None})

    result = gateway.run("audit", "ls")

    assert result.exit_code == 1
    assert "different versions" in result.output


def test_a_tenant_is_deleted_only_after_a_yes_and_as_it_was_read(gateway: Gateway) -> None:
    gateway.script["GET /admin/v1/tenants/acme"] = (200, {"id": "acme"})
    gateway.script["DELETE /admin/v1/tenants/acme"] = (204, None)

    assert gateway.run("tenants", "rm", "acme", input="n\n").exit_code == 1
    assert [method for method, *_ in gateway.asked] == ["GET"]
    assert gateway.run("tenants", "rm", "acme", input="y\n").exit_code == 0
    assert gateway.asked[-1][0] == "DELETE"
    assert gateway.asked[-1][3]["If-Match"] == '"7"'


def test_why_is_told_in_lines_and_controls_of_a_terminal_are_not_obeyed(gateway: Gateway) -> None:
    summary = "The tenant 'acme' asked for \x1b[31mred\x1b[0m. " + "It waited. " * 30
    gateway.script["GET /admin/v1/decisions/req_1"] = (200, {"id": "req_1", "summary": summary})

    output = gateway.run("why", "req_1").output

    assert "\x1b" not in output
    assert max(map(len, output.splitlines())) <= 100
    assert json.loads(gateway.run("why", "req_1", "--json").output)["summary"] == summary


def test_why_ends_with_what_was_decided(gateway: Gateway) -> None:
    steps = [{"time": "2026-11-22T21:00:00Z", "kind": "preempted", "text": "preempted req_1 of tenant acme on w0"}]
    gateway.script["GET /admin/v1/decisions/req_1"] = (200, {"summary": "It has not ended.", "steps": steps})

    assert gateway.run("why", "req_1").output.splitlines() == [
        "It has not ended.", "", "2026-11-22 21:00:00  preempted req_1 of tenant acme on w0",
    ]  # fmt: skip


SHARING = {
    "model": "org/m", "policy": "vtc-pc", "queued": 4, "tenants": 3, "reserved": 1, "preemptions": 7, "migrations": 2,
    "drained": 1, "recovered": 5, "useful_tokens": 1000, "wasted_tokens": 30, "lost_tokens": 9, "waste_left": 12.7,
    "holder": "c0ffee", "age_s": 0.31,
}  # fmt: skip


def test_how_models_are_shared_is_listed(gateway: Gateway) -> None:
    gateway.script["GET /admin/v1/fairness?limit=200"] = (200, {"data": [SHARING], "next": None})

    row = gateway.run("fairness").output.splitlines()[1].split()

    assert row == ["org/m", "vtc-pc", "4", "3", "7", "2", "1", "5", "30", "13"]


def test_who_shares_a_model_is_told(gateway: Gateway) -> None:
    share = {"tenant": "acme", "weight": 2.0, "queued": 4, "running": 1, "attained": 10.4, "counter": 5.2, "credit": 0}
    gateway.script["GET /admin/v1/fairness/org/m?limit=50"] = (200, {**SHARING, "shares": [share]})

    output = gateway.run("fairness", "org/m").output

    assert "gateway c0ffee, 0.3 s ago" in output
    assert "30 (3.0% of 1000 useful ones)" in output
    assert "acme    2       4        1        10      5        0" in output
    assert "and 2 more" in output


def test_a_dimension_that_there_is_not_is_told(gateway: Gateway) -> None:
    result = gateway.run("usage", "--by", "day,colour")

    assert result.exit_code == 2
    assert "'colour' is not one of day, tenant, key, end_user, model" in result.output


# --- options


def given(**options: Any) -> dict[str, Any]:
    """Return what click makes of the options of `keys create`."""
    found: dict[str, Any] = {}
    command = verb("keys", "create")
    arguments = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    with command.make_context("create", ["app", "--tenant", "t", *arguments]) as context:
        found |= context.params
    return terms_from(found, {"limits": {"rpm": 5, "tpm": 6, "parallel": None}})


def test_options_that_are_not_given_change_nothing() -> None:
    assert given() == {}


def test_limits_are_changed_one_by_one() -> None:
    assert given(rpm="1.5k", tpm="none")["limits"] == {"rpm": 1500, "tpm": None, "parallel": None}


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("5usd/day", {"usd": "5", "per": "day"}),
        ("0.000001 usd/total", {"usd": "0.000001", "per": "total"}),
        ("2Mtokens/month", {"tokens": 2_000_000, "per": "month"}),
        ("2 M tokens/week", {"tokens": 2_000_000, "per": "week"}),
        ("100tokens/week", {"tokens": 100, "per": "week"}),
    ],
)
def test_a_budget_is_an_amount_and_a_period(text: str, budget: dict[str, object]) -> None:
    assert given(budget=text)["budgets"] == [budget]


def of_tenant(*words: str, old: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return what click makes of the options of `tenants set`."""
    command = verb("tenants", "set")
    with command.make_context("set", ["acme", *words]) as context:
        return terms_from(context.params, old or {})


def test_a_tenant_has_a_weight_and_ceilings_which_are_changed_one_by_one() -> None:
    assert of_tenant("--weight", "2.5") == {"weight": 2.5}
    words = ("--ceiling", "body=8MiB", "--ceiling", "prompt_tokens=200k", "--ceiling", "grammars=yes")
    assert of_tenant(*words, old={"ceilings": {"body": 5, "depth": 9}})["ceilings"] == {
        "body": 8 * 2**20, "depth": 9, "prompt_tokens": 200_000, "grammars": True,
    }  # fmt: skip
    assert of_tenant("--ceiling", "none", old={"ceilings": {"body": 5}}) == {"ceilings": None}


@pytest.mark.parametrize(
    ("option", "hint"),
    [
        ("--ceiling=bodi=5", "did you mean body?"),
        ("--ceiling=x=5", "there are body, "),
        ("--ceiling=body=much", "such as body=8MiB"),
        ("--ceiling=grammars=maybe", "such as grammars=yes"),
        ("--weight=0", "0.001<=x<=1000"),
    ],
)
def test_a_ceiling_or_weight_that_there_is_not_is_told_with_what_there_is(
    gateway: Gateway, option: str, hint: str
) -> None:
    result = gateway.run("tenants", "set", "acme", option)

    assert result.exit_code == 2
    assert hint in result.output
    assert gateway.asked == []


def test_all_budgets_are_taken_away_with_none() -> None:
    assert given(budget="none")["budgets"] == []


@pytest.mark.parametrize("option", ["--budget=5/day", "--budget=5kusd/day", "--rpm=many", "--expires=soon"])
def test_an_option_that_makes_no_sense_is_told_with_an_example(gateway: Gateway, option: str) -> None:
    result = gateway.run("keys", "create", "app", "--tenant", "t", option)

    assert result.exit_code == 2
    assert "such as" in result.output
    assert gateway.asked == []


def test_a_moment_is_a_date_or_a_duration_from_now() -> None:
    assert PAST.convert("2026-11-22", None, None) == datetime(2026, 11, 22, tzinfo=UTC)
    assert PAST.convert("2026-11-22T10:00:00+02:00", None, None) == datetime(2026, 11, 22, 8, tzinfo=UTC)
    assert abs(datetime.now(UTC) - timedelta(days=7) - PAST.convert("7d", None, None)) < timedelta(minutes=1)
    assert abs(datetime.now(UTC) + timedelta(days=90) - FUTURE.convert("90d", None, None)) < timedelta(minutes=1)


# --- overlays


def test_a_file_is_compared_with_what_the_running_gateway_goes_by(gateway: Gateway, tmp_path: Path) -> None:
    path = tmp_path / "forebay.yaml"
    path.write_text("models: {m: {workers: [{engine: openai, url: 'http://h'}]}}\nqueue: {size: 5, per_tenant: 6}\n")
    env = {"FOREBAY_ADMIN_KEY": "fba_0123456789-of-the-admin"}
    shown = CliRunner(env=env).invoke(main, ["config", "show", "-c", str(path), "--effective", "--json"])
    held = {value["path"]: value for value in json.loads(shown.output)}
    held["queue.size"] |= {"value": 7, "source": "overlay"}
    script = gateway.script["GET /admin/v1/config"] = (200, {"values": list(held.values())})

    same = gateway.run("config", "diff", "-c", str(path), env=env)
    held["queue.per_tenant"]["value"] = 9
    script[1]["values"].append({"path": "tenants.gone.weight", "value": 2.0, "source": "file"})
    other = gateway.run("config", "diff", "-c", str(path), "--json", env=env)

    assert (same.exit_code, same.output) == (0, "Nothing differs.\n")
    assert other.exit_code == 1
    assert json.loads(other.output) == [
        {"path": "queue.per_tenant", "before": 9, "after": 6, "source": "file"},
        {"path": "tenants.gone.weight", "before": 2.0, "after": None, "source": "default"},
    ]


def test_a_file_is_a_whole_overlay_and_may_be_nested(tmp_path: Path) -> None:
    path = tmp_path / "overlay.yaml"
    path.write_text("queue: {size: 5}\nretry.attempts: 2\ndefaults: {limits: {rpm: 60}}\n")

    found = overlay_from(path, ["queue.per_tenant=3"], ["retry.attempts"], dict)

    assert found == {"queue.size": 5, "defaults.limits.rpm": 60, "queue.per_tenant": 3}


def test_options_alone_change_the_overlay_in_force() -> None:
    assert overlay_from(None, ["a.b=[1, x]"], ["c"], lambda: {"c": 1, "d": 2}) == {"a.b": [1, "x"], "d": 2}


def test_an_overlay_that_says_nothing_or_nonsense_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "overlay.yaml"
    path.write_text("just text")
    with pytest.raises(click.UsageError, match="--set PATH=VALUE"):
        overlay_from(None, [], [], dict)
    with pytest.raises(click.BadParameter, match="has no `=`"):
        overlay_from(None, ["a"], [], dict)
    with pytest.raises(Fault, match="'c' is not in the overlay"):
        overlay_from(None, [], ["c"], dict)
    with pytest.raises(SettingsFault, match="settings file"):
        overlay_from(path, [], [], dict)
    with pytest.raises(Fault, match="cannot read"):
        overlay_from(tmp_path / "missing", [], [], dict)
    with pytest.raises(SettingsFault, match="--set a"):
        overlay_from(None, ["a={"], [], dict)


# --- text


@pytest.mark.parametrize(
    ("usd", "text"),
    [
        ("0", "0.00"), ("5", "5.00"), ("0.000009", "0.000009"), ("1.2345678", "1.234568"), ("1.5", "1.50"),
        ("0.0000001", "<0.000001"), (None, "-"),
    ],
)  # fmt: skip
def test_money_is_shown_to_the_millionth(usd: str | None, text: str) -> None:
    assert money(usd) == text


def test_times_are_shown_in_utc_and_spans_with_their_unit() -> None:
    assert clock("2026-11-22T21:00:00.123+01:00") == "2026-11-22 20:00:00"
    assert (clock(None), span(None), span(0.0124), span(2.04)) == ("-", "-", "12 ms", "2.0 s")


def test_a_cell_is_safe_to_print() -> None:
    assert cell("a\x1b[2Jb\n") == "a\N{REPLACEMENT CHARACTER}[2Jb\N{REPLACEMENT CHARACTER}"
    assert [cell(value) for value in (None, "", [], True, False, 0, ["a", "b"])] == [
        "-", "-", "-", "yes", "no", "0", "a, b",
    ]  # fmt: skip


def test_limits_and_budgets_are_shown_in_a_line() -> None:
    assert limits_text({"rpm": 5, "tpm": None, "parallel": 2}) == "5 rpm, 2 parallel"
    assert budgets_text([{"usd": "5", "tokens": None, "per": "day"}, {"tokens": 9, "per": "total"}]) == (
        "5.00 USD/day, 9 tokens/total"
    )


def test_a_paragraph_keeps_ids_whole() -> None:
    assert paragraph("the key 'key_0123456789-abcdef' it is", 12).splitlines()[1] == "'key_0123456789-abcdef'"
