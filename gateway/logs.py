"""The server's own log: one line per event, Forebay's and its libraries' alike. Never content, never a secret."""

import logging
import re
import sys
from collections.abc import MutableMapping
from contextvars import ContextVar
from typing import Any, TextIO

import structlog

from gateway.settings import LogSettings
from gateway.tracing import Trace

REQUEST: ContextVar[tuple[str, Trace | None] | None] = ContextVar("forebay_request", default=None)
"""Id of the request that this task serves, and its trace. Every line that is logged meanwhile carries their ids."""

# Keys of ours, whatever follows "Bearer", and passwords in addresses. Lines are few: each is searched.
_SECRET = re.compile(
    r"fb[ka]_[A-Za-z0-9_-]{8,}|(?<=bearer )[^\s\"',]+|(?<=://)[^/\s\"'@]*:[^/\s\"'@]*(?=@)", re.IGNORECASE
)

_Event = MutableMapping[str, Any]


def set_up_logging(settings: LogSettings, stream: TextIO = sys.stderr) -> None:
    """Send the log to the stream, as text for people or as JSON for machines. May be called again with other settings.

    Libraries that log by the standard library's ``logging`` are heard from warnings on, in the same format.
    """
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        _with_request,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    rendering: list[structlog.typing.Processor] = (
        [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
        if settings.format == "json"
        # Not the default's tracebacks: they show local variables, and those hold content.
        else [
            structlog.dev.ConsoleRenderer(
                colors=stream.isatty(), pad_event_to=0, exception_formatter=structlog.dev.plain_traceback
            )
        ]
    )
    rendering.append(_without_secrets)
    level = getattr(logging, settings.level.upper())
    structlog.reset_defaults()
    structlog.configure(
        processors=[*shared, *rendering],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(stream),
    )
    handler = _Libraries(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendering],
        )
    )
    root = logging.getLogger()
    for old in [old for old in root.handlers if isinstance(old, _Libraries)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(max(level, logging.WARNING))


class _Libraries(logging.StreamHandler[TextIO]):
    """Our handler of what libraries log, to be known again."""


def _with_request(_logger: object, _method: str, event: _Event) -> _Event:
    request = REQUEST.get()
    if request is not None:
        event.setdefault("request_id", request[0])
        if request[1] is not None:
            event.setdefault("trace_id", request[1].hex_id)
    return event


def _without_secrets(_logger: object, _method: str, line: Any) -> str:
    return _SECRET.sub("***", line)
