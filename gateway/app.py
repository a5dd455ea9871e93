"""The two ports: the applications that listen on them, and the life of the process around them."""

import asyncio
import gc
import resource
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from typing import Any

import msgspec
import structlog
import uvicorn
from fastapi import FastAPI

from gateway.api.admin import admin_app
from gateway.api.batches import batch_routes
from gateway.api.common import WithRequestId, speak_our_errors
from gateway.api.data import AsgiApp, DataPlane
from gateway.api.document import describe
from gateway.api.files import file_routes
from gateway.api.health import health_routes
from gateway.api.models import model_routes
from gateway.api.responses import response_routes
from gateway.api.workflows import workflow_routes
from gateway.connection import Connection, close_late
from gateway.fleet import Localize
from gateway.live import Live
from gateway.logs import set_up_logging
from gateway.metrics import Metrics
from gateway.responses.service import Responses
from gateway.services import Services, open_services
from gateway.settings import Settings, environment

_log = structlog.get_logger(__name__)

_BACKLOG = 2048
_SWEEP_INTERVAL_S = 1.0
_WANTED_FILES = 65_536
_COLLECT_AFTER = 5_000  # new objects; Python's own choice is 700, and what lies about until then is memory
_GRACE_S = 0.2  # what is written last is given this long to leave the machine


class Ready(msgspec.Struct, frozen=True):
    """The gateway listens, and every worker has been told to start."""

    data_url: str
    admin_url: str
    services: Services


async def serve(
    live: Live, *, on_ready: Callable[[Ready], Any], localize: Localize = lambda settings: settings
) -> None:
    """Run the gateway until SIGTERM or SIGINT, then drain: no new requests, the running ones to their end.

    ``on_ready`` is called once both ports listen. Raises ``SettingsError`` or ``OSError`` (a port in use).
    """
    settings = live.settings
    set_up_logging(settings.log)
    live.on_change(lambda: set_up_logging(live.settings.log))
    _raise_file_limit()
    with (
        _listening(settings.server.host, settings.server.port) as data_socket,
        _listening(settings.admin.host, settings.admin.port) as admin_socket,
    ):
        async with open_services(live, environment(), localize) as services, live, responses_of(services) as responses:
            data = _Port(data_app(services, responses), settings)
            admin = _Port(admin_app(services), settings)
            stop = _stop_signal()
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(data.serve(data_socket))
                tasks.create_task(admin.serve(admin_socket))
                sweeper = tasks.create_task(_sweep((data, admin), live, services.metrics))
                _spare_the_collector()
                on_ready(Ready(_url(data_socket), _url(admin_socket), services))
                await stop.wait()
                await _drain(services, live.settings)
                data.stop()
                admin.stop()
                sweeper.cancel()
    _log.info("gateway_stopped")


def responses_of(services: Services) -> Responses:
    """Return the background responses of a gateway, to be opened."""
    return Responses(services.runs, lambda: services.runs.alive)


def data_app(services: Services, responses: Responses | None = None) -> DataPlane:
    """Return the application of the data port. Without open ``responses``, none that were left are taken up again."""
    app = FastAPI(title="Forebay", version=version("forebay-server"), redoc_url=None)
    app.include_router(health_routes(services))
    app.include_router(model_routes(services))
    app.include_router(workflow_routes(services))
    app.include_router(response_routes(services, responses or responses_of(services)))
    app.include_router(file_routes(services))
    app.include_router(batch_routes(services))
    speak_our_errors(app)
    app.openapi = lambda: describe(app)  # type: ignore[method-assign]
    return DataPlane(
        live=services.live,
        directory=services.directory,
        admission=services.admission,
        chat=services.chat,
        egress=services.egress,
        clock=services.clock,
        metrics=services.metrics,
        tracing=services.tracing,
        books=services.books,
        others=WithRequestId(app),
    )


class _Port:
    """One listening uvicorn, started and stopped by us rather than by signals."""

    def __init__(self, app: AsgiApp, settings: Settings) -> None:
        config = uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,
            proxy_headers=False,
            timeout_keep_alive=int(settings.server.keep_alive),
            timeout_graceful_shutdown=1,
            backlog=_BACKLOG,
        )
        self.server = uvicorn.Server(config)

    async def serve(self, listener: socket.socket) -> None:
        # Not serve(): that takes the process's signals, which two servers cannot share.
        await self.server._serve([listener])

    def stop(self) -> None:
        self.server.should_exit = True

    @property
    def connections(self) -> set[Any]:
        return self.server.server_state.connections


async def _sweep(ports: tuple[_Port, ...], live: Live, metrics: Metrics) -> None:
    """Close connections whose request does not arrive, and note how late we are at it."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + _SWEEP_INTERVAL_S
        await asyncio.sleep(_SWEEP_INTERVAL_S)
        metrics.observe_lag(loop.time() - due)
        for port in ports:
            close_late(
                port.connections,
                loop.time(),
                header_timeout=live.settings.server.header_timeout,
                body_timeout=live.settings.server.body_timeout,
            )


async def _drain(services: Services, settings: Settings) -> None:
    """Refuse new requests, then wait for those under way."""
    services.chat.drain()
    _log.info("gateway_draining", num_open=services.chat.num_open, at_most_s=settings.server.drain_timeout)
    with suppress(TimeoutError):
        async with asyncio.timeout(settings.server.drain_timeout):
            await services.dispatcher.emptied()
    await asyncio.sleep(_GRACE_S)


def _stop_signal() -> asyncio.Event:
    """Return the event that SIGTERM and SIGINT set. A second signal ends the process as it usually would."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        stop.set()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    return stop


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """Bind before anything is started, so that a port in use costs nothing."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.set_inheritable(False)
        yield listener
    finally:
        listener.close()


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port}"


def _spare_the_collector() -> None:
    """Take what start-up has made out of the garbage collector's sight, and let it look less often.

    Requests make few cycles, and a pass over all modules' objects costs more than a hundred requests (measured: a
    quarter of the CPU at 64 connections).
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_COLLECT_AFTER, 20, 50)


def _raise_file_limit() -> None:
    """Ten thousand clients need ten thousand files; the usual soft limit is 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _WANTED_FILES if hard == resource.RLIM_INFINITY else min(_WANTED_FILES, hard)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
