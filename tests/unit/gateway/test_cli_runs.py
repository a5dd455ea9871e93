"""`forebay runs` as far as no gateway is needed: what is asked with which key, and what is printed."""

import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from gateway.cli import data_port, main
from gateway.cli.data_port import Told
from gateway.cli.runs import Watched, _draw, line_of

KEY = "fbk_the-right-one"
PARTS = {"client_s": 0.0, "held_s": 0.0, "queue_s": 0.25, "engine_s": 1.5, "other_s": 0.25}
RUN = {
    "id": "run_1", "object": "workflow", "state": "done", "created_at": 1790000000.0, "updated_at": 1790000002.0,
    "app": "summary", "waiting": [{"call": "t", "variable": "t", "tool": "tests", "arguments": None}],
    "variables": {
        "a": {"id": "run_1.a", "object": "variable", "state": "done", "missing": 1, "total": 3},
        "b": {"id": "run_1.b", "object": "variable", "state": "failed",
              "error": {"code": "broken", "message": "it \x1b[31mbroke", "call": "b"}},
    },
    "calls": {"running": 0, "done": 4, "failed": 1, "skipped": 0, "cancelled": 0},
    "usage": {"tokens": 26, "cost": 0.5, "requests": 4, "prompt_tokens": 20, "cached_tokens": 8,
              "completion_tokens": 6},
    "critical_path": {
        "calls": [{"call": "a[2]", "kind": "llm", "state": "done", "attempts": 1, "started_at": 1790000000.0,
                   "ended_at": 1790000002.0, "cached_tokens": 8, **PARTS}],
        "seconds": 2.0, **PARTS, "round_trips_saved": 1, "prefill_saved": 8,
    },
}  # fmt: skip
USAGE = {"tokens": 7, "cost": 0.25}
EVENTS: list[tuple[int | None, str, Any]] = [
    (1, "run.started", {"run": "run_1", "calls": ["m", "t", "z"]}),
    (None, "call.started", {"call": "m[0]", "attempt": 1, "criteria": "latency", "group": None}),
    (None, "variable.delta", {"variable": "m[0]", "attempt": 1, "text": "canary"}),
    (2, "variable.done", {"variable": "m[0]", "call": "m[0]", "usage": USAGE, "value": "canary"}),
    (3, "call.waiting", {"call": "t", "variable": "t", "tool": "tests", "arguments": "canary"}),
    (4, "variable.done", {"variable": "m", "call": "m", "usage": USAGE, "value": ["canary"]}),
    (5, "variable.failed", {"variable": "z", "call": "z", "usage": USAGE,
                            "error": {"code": "broken", "message": "it broke", "call": "z"}}),
    (6, "run.failed", {"run": "run_1", "usage": USAGE}),
]  # fmt: skip


def frames(events: list[tuple[int | None, str, Any]]) -> str:
    return ": hello\n\n" + "".join(
        (f"id: {number}\n" if number is not None else "") + f"event: {event}\ndata: {json.dumps(data)}\n\n"
        for number, event, data in events
    )


class _Gateway(BaseHTTPRequestHandler):
    """Answers as the server's script says, one answer after the other, and keeps what was asked."""

    def do_GET(self) -> None:
        self._route()

    def do_POST(self) -> None:
        self._route()

    def _route(self) -> None:
        script: dict[str, list[tuple[int, Any]]] = self.server.script  # type: ignore[attr-defined]
        asked: list[Any] = self.server.asked  # type: ignore[attr-defined]
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        asked.append((f"{self.command} {self.path}", json.loads(body) if body else None, dict(self.headers)))
        answers = script.get(f"{self.command} {self.path}", [(404, {"error": {"message": "there is no run"}})])
        status, value = answers.pop(0) if len(answers) > 1 else answers[0]
        data = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


class Gateway:
    """A scripted data port: `script` maps `METHOD path?query` to answers, of which the last is given again."""

    def __init__(self, server: ThreadingHTTPServer, folder: Path) -> None:
        self.url = f"http://127.0.0.1:{server.server_address[1]}"
        self.folder = folder
        self.script: dict[str, list[tuple[int, Any]]] = {}
        self.asked: list[tuple[str, Any, dict[str, str]]] = []
        server.script = self.script  # type: ignore[attr-defined]
        server.asked = self.asked  # type: ignore[attr-defined]

    def run(self, *arguments: str, env: dict[str, str] | None = None) -> Result:
        given = {"FOREBAY_API_KEY": KEY, "FOREBAY_STATE": str(self.folder), "COLUMNS": "120", **(env or {})}
        return CliRunner(env=given).invoke(main, ["runs", *arguments, "--url", self.url])


@pytest.fixture
def gateway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateway]:
    monkeypatch.setattr(data_port, "_PAUSE_S", 0.0)
    with ThreadingHTTPServer(("127.0.0.1", 0), _Gateway) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield Gateway(server, tmp_path)
        server.shutdown()
        thread.join()


# --- the key, and errors that say what to do


def test_the_key_is_the_files_or_the_environments_or_the_local_one(gateway: Gateway, tmp_path: Path) -> None:
    gateway.script["GET /v1/workflows/run_1/graph?format=mermaid"] = [(200, "flowchart LR\n")]
    (tmp_path / "local.key").write_text("fbk_local\n")
    other = tmp_path / "other.key"
    other.write_text("fbk_of-the-file\n")

    assert gateway.run("graph", "run_1").output == "flowchart LR\n"
    gateway.run("graph", "run_1", "--key-file", str(other))
    gateway.run("graph", "run_1", env={"FOREBAY_API_KEY": ""})

    keys = [headers["Authorization"].removeprefix("Bearer ") for *_, headers in gateway.asked]
    assert keys == [KEY, "fbk_of-the-file", "fbk_local"]


@pytest.mark.parametrize(
    ("status", "message", "hint"),
    [(401, "not a known key", "--key-file"), (404, "there is no run", "status 404"), (503, "away", "status 503")],
)
@pytest.mark.parametrize("verb", ["show", "watch"])
def test_a_refusal_is_told_with_what_to_do(gateway: Gateway, verb: str, status: int, message: str, hint: str) -> None:
    refusal = [(status, {"error": {"message": message}})]
    gateway.script["GET /v1/workflows/run_1?critical_path=true"] = refusal
    gateway.script["GET /v1/workflows/run_1/events"] = refusal

    result = gateway.run(verb, "run_1")

    assert result.exit_code == 1
    assert message in result.output
    assert hint in result.output
    assert KEY not in result.output


@pytest.mark.parametrize("verb", ["show", "watch"])
def test_a_gateway_that_does_not_run_is_told_with_what_to_do(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_port, "_PAUSE_S", 0.0)
    result = CliRunner(env={"FOREBAY_API_KEY": KEY}).invoke(
        main, ["runs", verb, "run_1", "--url", "http://127.0.0.1:1"]
    )

    assert result.exit_code == 1
    assert "forebay run" in result.output
    assert "--url" in result.output


def test_without_a_key_one_is_told_where_it_is_looked_for(gateway: Gateway) -> None:
    result = gateway.run("ls", env={"FOREBAY_API_KEY": ""})

    assert result.exit_code == 1
    assert "local.key" in result.output
    assert "FOREBAY_API_KEY" in result.output


def test_who_answers_something_else_is_told_to_be_no_gateway(gateway: Gateway) -> None:
    gateway.script["GET /v1/workflows/run_1?critical_path=true"] = [(200, "<html>")]
    gateway.script["GET /v1/workflows/run_1/events"] = [(200, "data: <html>\n\n")]

    assert "not Forebay's data port" in gateway.run("show", "run_1").output
    assert "no stream of events" in gateway.run("watch", "run_1").output


# --- what is asked and printed


def test_a_list_is_read_page_by_page_up_to_its_limit(gateway: Gateway) -> None:
    runs = [{**RUN, "id": f"run_{number}"} for number in range(150)]
    gateway.script["GET /v1/workflows?state=done&limit=100"] = [(200, {"data": runs[:100], "has_more": True})]
    gateway.script["GET /v1/workflows?state=done&after=run_99&limit=20"] = [
        (200, {"data": runs[100:120], "has_more": True})
    ]

    result = gateway.run("ls", "--state", "done", "--limit", "120")

    lines = result.output.splitlines()
    assert len(lines) == 121
    assert lines[0].split() == ["BEGUN", "(UTC)", "RUN", "STATE", "LASTED", "APP"]
    assert lines[1].split() == ["2026-09-21", "14:13:20", "run_0", "done", "2.0", "s", "summary"]


def test_a_run_is_shown_with_what_it_used_and_what_took_its_time(gateway: Gateway) -> None:
    gateway.script["GET /v1/workflows/run_1?critical_path=true"] = [(200, RUN)]

    shown = gateway.run("show", "run_1").output

    text = " ".join(shown.split())
    assert "calls 4 done, 1 failed" in text
    assert "input tokens 20 of them cached 8 output tokens 6 tokens 26 USD 0.50" in text
    assert "waits for tests (t)" in text
    assert "a done 1 of 3 missing" in text
    assert "b: it �[31mbroke (broken)" in text
    assert "It took 2.0 s" in text
    assert "a[2] llm done - - 250 ms 1.5 s 250 ms 1 8" in text
    assert "1 round trips of a client were saved, and 8 tokens of prompt" in text
    assert json.loads(gateway.run("show", "run_1", "--json").output) == RUN


def test_a_run_of_which_less_is_known_is_shown_as_far_as_it_is(gateway: Gateway) -> None:
    old = {**RUN, "usage": {"tokens": 26, "cost": 0.0}, "critical_path": None, "variables": {}, "waiting": []}
    gateway.script["GET /v1/workflows/run_1?critical_path=true"] = [(200, old)]

    shown = gateway.run("show", "run_1").output

    assert "cached" not in shown
    assert "It took" not in shown


def test_a_run_is_cancelled_or_some_of_its_calls(gateway: Gateway) -> None:
    gateway.script["POST /v1/workflows/run_1/cancel"] = [(200, {**RUN, "state": "cancelled"})]

    assert gateway.run("cancel", "run_1").output == "run_1 is cancelled\n"
    gateway.run("cancel", "run_1", "--call", "a", "--call", "b")

    assert [body for _, body, _ in gateway.asked] == [{}, {"calls": ["a", "b"]}]


def test_a_drawing_is_printed_as_it_came(gateway: Gateway) -> None:
    gateway.script["GET /v1/workflows/run_1/graph?format=svg"] = [(200, "<svg/>\n")]

    assert gateway.run("graph", "run_1", "--format", "svg").output == "<svg/>\n"


def test_what_is_watched_through_a_pipe_is_a_line_for_each_event_without_values(gateway: Gateway) -> None:
    gateway.script["GET /v1/workflows/run_1/events"] = [(200, frames(EVENTS))]

    result = gateway.run("watch", "run_1")

    assert result.exit_code == 1, "it has failed"
    assert [line.split() for line in result.output.splitlines()] == [
        ["run.started", "run_1"],
        ["call.started", "m[0]"],
        ["variable.done", "m[0]"],
        ["call.waiting", "t"],
        ["variable.done", "m"],
        ["variable.failed", "z", "z:", "it", "broke", "(broken)"],
        ["run.failed", "run_1"],
    ]


def test_a_stream_that_breaks_is_gone_on_with_behind_the_last_event(gateway: Gateway) -> None:
    done = [*EVENTS[4:6], (7, "run.done", {"run": "run_1", "usage": USAGE})]
    gateway.script["GET /v1/workflows/run_1/events"] = [(200, frames(EVENTS[:4])), (200, frames(done))]

    result = gateway.run("watch", "run_1")

    assert result.exit_code == 0
    assert [headers["Last-Event-Id"] for *_, headers in gateway.asked] == ["0", "2"]
    assert result.output.count("m[0]") == 2


def screen(watched: Watched) -> list[list[str]]:
    out = io.StringIO()
    Console(file=out, width=100, color_system=None).print(watched.screen())
    return [line.split() for line in out.getvalue().splitlines()]


def test_a_screen_has_a_row_for_each_call_and_counts_what_is_within() -> None:
    watched = Watched("run_1")
    for number, event, data in EVENTS[:5]:
        watched.on(Told(number, event, data))
    watched.on(Told(None, "call.started", {"call": "m[1]", "attempt": 1}))
    head, _, _, *rows = screen(watched)
    assert head == ["run_1", "running", "7", "tokens", "$0.25"]
    assert rows == [["m", "running", "1", "running,", "1", "done"], ["t", "waiting"], ["z", "pending"]]
    for number, event, data in EVENTS[5:]:
        watched.on(Told(number, event, data))
    assert screen(watched)[0][1] == "failed"
    assert screen(watched)[5] == ["z", "failed"]
    watched.on(Told(9, "run.appended", {"run": "run_1", "calls": ["y"]}))
    assert screen(watched)[0][1] == "running"
    assert screen(watched)[6] == ["y", "pending"]


def test_on_a_terminal_the_screen_is_drawn_anew_until_the_run_has_ended() -> None:
    out = io.StringIO()
    console = Console(file=out, width=100, force_terminal=True, color_system=None)
    _draw(console, Watched("run_1"), iter([Told(*event) for event in EVENTS]))

    drawn = out.getvalue()
    assert "run_1  running" in drawn
    assert drawn.rindex("run_1  failed") > drawn.rindex("run_1  running")
    assert "canary" not in drawn


def test_a_line_tells_no_text_and_obeys_no_escape() -> None:
    assert line_of(Told(None, "variable.delta", {"variable": "a", "text": "x"})) is None
    error = {"code": "c", "message": "\x1b[2J", "call": "a"}
    assert (
        line_of(Told(1, "variable.failed", {"variable": "a", "error": error})) == "variable.failed     a  a: �[2J (c)"
    )
