"""Run the server in this process until it is told to stop, and say readably what is in the way."""

import asyncio
from collections.abc import Callable

import uvloop

from gateway.app import Ready
from gateway.app import serve as serve_gateway
from gateway.cli import ports
from gateway.cli.common import Fault, SettingsFault
from gateway.cli.fetching import with_local_sources
from gateway.live import Live
from gateway.settings import Settings, SettingsError, environment


def serve_settings(live: Live, *, on_ready: Callable[[Ready], None]) -> None:
    """Serve until SIGTERM or SIGINT. Raises ``Fault`` for what the operator has to put right."""
    ensure_ports_free(live.settings)
    with_local_sources(live.settings, environment())  # now, while somebody looks at what is fetched
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve_gateway(live, on_ready=on_ready, localize=_localized))
    except SettingsError as error:
        raise SettingsFault(str(error)) from error
    except OSError as error:
        ensure_ports_free(live.settings)  # somebody was faster than we
        raise Fault(f"the gateway cannot run: {error}") from error


def _localized(settings: Settings) -> Settings:
    try:
        return with_local_sources(settings, environment())
    except Fault as fault:
        raise SettingsError(fault.message) from fault


def ensure_ports_free(settings: Settings) -> None:
    """Raise ``Fault`` if a port that the settings name is taken, saying how to choose another."""
    for section, option, host, port in (
        ("server", "--port", settings.server.host, settings.server.port),
        ("admin", "--admin-port", settings.admin.host, settings.admin.port),
    ):
        if problem := ports.problem_with(host, port):
            raise Fault(f"{problem}. Choose another: `forebay run {option} N`, or `{section}.port` in forebay.yaml.")
