"""The composition root: the only place that knows every part, and puts them together."""

import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import msgspec

from core.chat import Timeouts
from core.clock import Clock, SystemClock
from core.ids import ModelName, WorkerId
from engines import devices
from engines.dispatcher import Bounds, Dispatcher
from engines.drivers.llamacpp import LlamaCppEngine
from engines.drivers.openai import OpenAIEngine
from engines.drivers.vllm import VllmEngine
from engines.engine import Engine
from engines.spec import Launch, Lifecycle, WorkerSpec
from engines.supervisor import Supervisor
from engines.worker import State, WorkerStatus
from gateway.auth import EmptyKeyFile, Keys, digest_of, keep_key, new_admin_key
from gateway.chat import ChatService
from gateway.metrics import Metrics
from gateway.settings import Settings, SettingsError, TimeoutSettings, WorkerSettings
from gateway.telemetry import RequestLog
from routing.catalog import Catalog, Model
from routing.scheduler import Limits, Scheduler, WorkerView

ENGINES: Mapping[str, Engine] = {
    "llamacpp": LlamaCppEngine(),
    "openai": OpenAIEngine(),
    "vllm": VllmEngine(),
}


class Services(msgspec.Struct, frozen=True):
    """Everything that handlers use. ``admin_digest`` is the SHA-256 of the admin key."""

    settings: Settings
    clock: Clock
    catalog: Catalog
    keys: Keys
    admin_digest: bytes
    supervisor: Supervisor
    dispatcher: Dispatcher
    chat: ChatService
    metrics: Metrics
    request_log: RequestLog | None


@asynccontextmanager
async def open_services(settings: Settings, env: Mapping[str, str]) -> AsyncIterator[Services]:
    """Start everything that runs beside HTTP; leaving the context stops it, workers last.

    Raises ``SettingsError`` for what the file asks and this machine cannot give.
    """
    clock = SystemClock()
    catalog = catalog_of(settings)
    specs = specs_of(settings)
    try:
        visible_devices = devices.assign(specs, await devices.inventory() if _wants_gpus(specs) else ())
    except devices.DeviceError as error:
        raise SettingsError(str(error)) from error
    scheduler = Scheduler(
        Limits(
            queue=settings.queue.size,
            queue_per_tenant=settings.queue.per_tenant,
            attempts=settings.retry.attempts,
            max_retry_after=settings.retry.max_retry_after,
        )
    )
    bounds = Bounds(undelivered_bytes=settings.server.max_stream_bytes, client_idle=settings.server.client_idle)
    metrics = Metrics()
    log = RequestLog(settings.state_dir / "requests.jsonl", settings.request_log.max_size, metrics.log_dropped)

    def on_change(status: WorkerStatus) -> None:
        dispatcher.on_worker(view_of(status))

    supervisor = Supervisor(
        specs,
        ENGINES,
        clock,
        settings.state_dir / "logs",
        on_change,
        num_running=scheduler.num_running,
        env=env,
        visible_devices=visible_devices,
    )
    dispatcher = Dispatcher(scheduler, clock, supervisor.driver_of, bounds)
    settings.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    async with supervisor, dispatcher, log:
        for status in supervisor.statuses():
            on_change(status)
        yield Services(
            settings=settings,
            clock=clock,
            catalog=catalog,
            keys=Keys.from_settings(settings.keys, catalog),
            admin_digest=_admin_digest(settings),
            supervisor=supervisor,
            dispatcher=dispatcher,
            chat=ChatService(dispatcher),
            metrics=metrics,
            request_log=log if settings.request_log.enabled else None,
        )


def view_of(status: WorkerStatus) -> WorkerView:
    """Return what decisions see of a worker."""
    return WorkerView(
        id=status.id,
        model=status.model,
        is_ready=status.state is State.READY,
        is_healthy=status.healthy,
        may_return=status.is_wanted,
        max_inflight=status.max_inflight,
        incarnation=status.restarts,
    )


def catalog_of(settings: Settings) -> Catalog:
    """Return the models that the settings declare."""
    created = int(time.time())
    return Catalog(
        tuple(
            Model(
                name=ModelName(name),
                aliases=model.aliases,
                fallbacks=tuple(ModelName(fallback) for fallback in model.fallbacks),
                timeouts=_timeouts(model.timeouts or settings.timeouts),
                created=created,
            )
            for name, model in settings.models.items()
        )
    )


def specs_of(settings: Settings) -> tuple[WorkerSpec, ...]:
    """Return every declared worker; those of one model are numbered from 0."""
    specs: list[WorkerSpec] = []
    for name, model in settings.models.items():
        workers = [worker for worker in model.workers for _ in range(worker.replicas)]
        stem = name.replace("/", "_").replace(":", "_")
        specs += (_spec(WorkerId(f"{stem}-{index}"), ModelName(name), worker) for index, worker in enumerate(workers))
    return tuple(specs)


def _spec(worker: WorkerId, model: ModelName, settings: WorkerSettings) -> WorkerSpec:
    launch = settings.launch
    default_inflight = launch.slots if launch is not None else 64
    return WorkerSpec(
        id=worker,
        model=model,
        engine=settings.engine,
        url=settings.url.rstrip("/").removesuffix("/v1") if settings.url is not None else None,
        launch=Launch(
            source=launch.source,
            context=launch.context,
            slots=launch.slots,
            threads=launch.threads,
            gpus=launch.gpus,
            tp=launch.tp,
            memory_gib=launch.memory / 2**30 if launch.memory is not None else None,
            args=launch.args,
            env=launch.env,
            program=launch.program,
            command=launch.command,
        )
        if launch is not None
        else None,
        served_name=settings.served_name,
        api_key=settings.key.get_secret_value() if settings.key is not None else None,
        max_inflight=settings.max_inflight or default_inflight,
        lifecycle=Lifecycle(**settings.lifecycle.model_dump()),
    )


def _timeouts(settings: TimeoutSettings) -> Timeouts:
    return Timeouts(**settings.model_dump())


def _wants_gpus(specs: tuple[WorkerSpec, ...]) -> bool:
    return any(spec.launch is not None and spec.launch.gpus for spec in specs)


def _admin_digest(settings: Settings) -> bytes:
    """Return the hash of the admin key: the file's, or one kept in the state folder for the CLI on this machine."""
    if settings.admin_key is not None:
        return digest_of(settings.admin_key.get_secret_value().encode())
    try:
        return digest_of(keep_key(settings.state_dir / "admin.key", new_admin_key).encode())
    except EmptyKeyFile as error:
        raise SettingsError(str(error)) from error
