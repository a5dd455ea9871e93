"""Run the server in this process until it is told to stop, and say readably what is in the way."""

import asyncio
from collections.abc import Callable

import uvloop

from gateway.app import Ready
from gateway.app import serve as serve_gateway
from gateway.cli import ports
from gateway.cli.common import Fault, SettingsFault
from gateway.settings import Settings, SettingsError


def serve_settings(settings: Settings, *, on_ready: Callable[[Ready], None]) -> None:
    """Serve until SIGTERM or SIGINT. Raises ``Fault`` for what the operator has to put right."""
    ensure_ports_free(settings)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve_gateway(settings, on_ready=on_ready))
    except SettingsError as error:
        raise SettingsFault(str(error)) from error
    except OSError as error:
        ensure_ports_free(settings)  # somebody was faster than we
        raise Fault(f"the gateway cannot run: {error}") from error


def ensure_ports_free(settings: Settings) -> None:
    """Raise ``Fault`` if a port that the settings name is taken, saying how to choose another."""
    for section, option, host, port in (
        ("server", "--port", settings.server.host, settings.server.port),
        ("admin", "--admin-port", settings.admin.host, settings.admin.port),
    ):
        if problem := ports.problem_with(host, port):
            raise Fault(f"{problem}. Choose another: `forebay run {option} N`, or `{section}.port` in forebay.yaml.")
