"""The server's own log: one format for all, with the request's id, without secrets."""

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from gateway.logs import REQUEST, set_up_logging
from gateway.settings import LogSettings
from gateway.tracing import Trace

SECRET = "fbk_0123456789abcdefghijABCDEFGHIJ"


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """A log in JSON; what logs by the standard library is as before afterwards."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    stream = io.StringIO()
    set_up_logging(LogSettings(format="json"), stream)
    yield stream
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


@pytest.fixture
def in_a_request() -> Iterator[Trace]:
    trace = Trace(0xABC, 1, None, b"")
    token = REQUEST.set(("req_1", trace))
    yield trace
    REQUEST.reset(token)


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_is_json_with_level_and_time(stream: io.StringIO) -> None:
    structlog.get_logger("x").info("worker_ready", worker="big-0")

    (line,) = lines(stream)
    assert (line["event"], line["level"], line["worker"]) == ("worker_ready", "info", "big-0")
    assert line["timestamp"].endswith("Z")
    assert "request_id" not in line


def test_a_line_of_a_request_has_its_id_and_its_traces(stream: io.StringIO, in_a_request: Trace) -> None:
    structlog.get_logger().warning("leg_failed")
    logging.getLogger("asyncio").warning("slow callback")

    for line in lines(stream):
        assert (line["request_id"], line["trace_id"]) == ("req_1", in_a_request.hex_id)


@pytest.mark.parametrize("name", ["uvicorn.error", "asyncio", "alembic.runtime", "sqlalchemy.pool"])
def test_libraries_log_in_the_same_format_from_warnings_on(stream: io.StringIO, name: str) -> None:
    logging.getLogger(name).info("chatter")
    logging.getLogger(name).error("broken: %s", 7)

    (line,) = lines(stream)
    assert (line["event"], line["level"], line["logger"]) == ("broken: 7", "error", name)


def test_a_traceback_is_one_line_and_shows_no_variables(stream: io.StringIO) -> None:
    def fail(prompt: str) -> None:
        assert prompt
        raise ValueError("no good")

    for log in (structlog.get_logger(), logging.getLogger("asyncio")):
        try:
            fail("canary")
        except ValueError:
            log.exception("request_failed")

    told = lines(stream)
    assert all("ValueError: no good" in line["exception"] for line in told)
    assert '"canary"' in told[0]["exception"]  # the source's line, which is ours
    assert "prompt = " not in stream.getvalue()


def test_the_text_for_people_shows_no_variables_either(stream: io.StringIO) -> None:
    set_up_logging(LogSettings(format="console"), stream)
    canary = "".join(("can", "ary"))
    try:
        raise ValueError("no good")
    except ValueError:
        structlog.get_logger().exception("request_failed")
        logging.getLogger("asyncio").exception("task failed")

    assert stream.getvalue().count("ValueError: no good") == 2
    assert canary not in stream.getvalue()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"key {SECRET} is bad", "key *** is bad"),
        ("Authorization: Bearer abc.def-123", "Authorization: Bearer ***"),
        ("cannot reach postgresql://forebay:hunter2@db/forebay", "cannot reach postgresql://***@db/forebay"),
        ("cannot reach redis://:hunter2@cache:6379/0", "cannot reach redis://***@cache:6379/0"),
        ("see https://example.org/a@b", "see https://example.org/a@b"),
    ],
    ids=["key", "bearer", "postgres", "redis", "plain"],
)
def test_secrets_are_masked_wherever_they_stand(stream: io.StringIO, text: str, shown: str) -> None:
    structlog.get_logger().error("failed", error=text)
    logging.getLogger("sqlalchemy").error("%s", text)
    try:
        raise ValueError(text)
    except ValueError:
        structlog.get_logger().exception("failed")

    told = lines(stream)
    assert (told[0]["error"], told[1]["event"]) == (shown, shown)
    assert f"ValueError: {shown}" in told[2]["exception"]


def test_a_new_level_holds_at_once_and_lines_are_not_doubled(stream: io.StringIO) -> None:
    set_up_logging(LogSettings(format="json", level="error"), stream)
    structlog.get_logger().warning("quiet")
    logging.getLogger("asyncio").warning("quiet")
    logging.getLogger("asyncio").error("loud")

    assert [line["event"] for line in lines(stream)] == ["loud"]
