"""The composition root: the only place that knows every part, and puts them together."""

import math
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext

import msgspec

from core.chat import CLASSES, Usage
from core.clock import Clock, SystemClock
from core.ids import ModelName, TenantId, WorkerId
from core.tenancy import Key, Price, Stored
from engines.dispatcher import Bounds, Dispatcher
from engines.drivers.llamacpp import LlamaCppEngine
from engines.drivers.openai import OpenAIEngine
from engines.drivers.vllm import VllmEngine
from engines.engine import Engine
from engines.supervisor import Supervisor
from engines.worker import State, WorkerStatus
from gateway.admission import Admission
from gateway.auth import EmptyKeyFile, Principal, digest_of, keep_key, new_admin_key
from gateway.batches.files import FileService
from gateway.batches.service import BatchService
from gateway.books import Books
from gateway.chat import ChatService
from gateway.directory import Directory
from gateway.egress import Egress, Policy
from gateway.fleet import Localize, fleet_of, prepare
from gateway.limits import open_limiter
from gateway.live import Live
from gateway.metrics import Metrics
from gateway.overlays import Overlays
from gateway.replicas import Replicas, is_shared, replicas_of
from gateway.runs.calls import Caller
from gateway.runs.service import Runs
from gateway.runs.telling import Telling
from gateway.runs.work import Worker
from gateway.settings import BUILT_IN_KEY, FairnessSettings, Settings, SettingsError
from gateway.spending import Spending
from gateway.tenants import declared_keys, declared_tenants, price_of
from gateway.tools import Limits as ToolLimits
from gateway.tools import Tools
from gateway.tracing import Tracing
from gateway.upkeep import Upkeep
from gateway.vitals import vitals_of
from routing.catalog import Catalog
from routing.fairness.policy import Fairness
from routing.scheduler import Effect, Limits, Scheduler, WorkerView
from storage.sql.audit import Audit
from storage.sql.batches import Batches
from storage.sql.database import FILE_NAME, Database, sqlite_url
from storage.sql.files import Files
from storage.sql.ledger import Ledger
from storage.sql.requests import Requests
from storage.sql.revisions import Revisions
from storage.sql.tenants import Tenants
from storage.sql.workflows import Workflows

ENGINES: Mapping[str, Engine] = {
    "llamacpp": LlamaCppEngine(),
    "openai": OpenAIEngine(),
    "vllm": VllmEngine(),
}


class Store(msgspec.Struct, frozen=True):
    """What is kept in the database, one repository for each kind."""

    tenants: Tenants
    ledger: Ledger
    requests: Requests
    audit: Audit
    revisions: Revisions
    workflows: Workflows
    files: Files
    batches: Batches

    @classmethod
    def of(cls, database: Database, clock: Clock) -> "Store":
        """Return the repositories of one database."""
        return cls(
            Tenants(database),
            Ledger(database, clock),
            Requests(database),
            Audit(database),
            Revisions(database),
            Workflows(database),
            Files(database),
            Batches(database),
        )


class Services(msgspec.Struct, frozen=True):
    """Everything that handlers use."""

    live: Live
    overlays: Overlays
    clock: Clock
    database: Database
    store: Store
    directory: Directory
    spending: Spending
    admission: Admission
    books: Books
    supervisor: Supervisor
    scheduler: Scheduler | Replicas
    replicas: Replicas | None
    dispatcher: Dispatcher
    chat: ChatService
    egress: Egress
    runs: Runs
    files: FileService
    batches: BatchService
    metrics: Metrics
    tracing: Tracing | None

    @property
    def settings(self) -> Settings:
        """The settings in force at this moment."""
        return self.live.settings

    @property
    def catalog(self) -> Catalog:
        """The models on offer at this moment."""
        return self.live.catalog


@asynccontextmanager
async def open_services(
    live: Live, env: Mapping[str, str], localize: Localize = lambda settings: settings
) -> AsyncIterator[Services]:
    """Start everything that runs beside HTTP; leaving the context stops it, workers last.

    What is read from ``settings`` here holds until the next start; what may change is read from ``live`` each time.

    Raises ``SettingsError`` for what the file asks and this machine cannot give.
    """
    clock = SystemClock()
    settings = live.settings
    fleet = await fleet_of(settings, localize)
    own = Scheduler(_limits(settings), fairness_by_model(settings))

    def carry_out(effects: Sequence[Effect]) -> None:
        dispatcher.carry_out(effects)

    replicas = replicas_of(
        settings.redis,
        clock,
        own,
        lambda: Scheduler(_limits(live.settings), fairness_by_model(live.settings)),
        is_shared=lambda model: is_shared(live.settings, model),
        carry_out=carry_out,
    )
    scheduler = replicas or own
    metrics = Metrics()

    def on_change(status: WorkerStatus) -> None:
        dispatcher.on_worker(view_of(status))

    supervisor = Supervisor(
        fleet.specs,
        ENGINES,
        clock,
        settings.state_dir / "logs",
        on_change,
        num_running=replicas.num_running_here if replicas is not None else own.num_running,
        env=env,
        visible_devices=fleet.visible_devices,
    )
    dispatcher = Dispatcher(scheduler, clock, supervisor.driver_of, _bounds(settings))
    settings.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    database = Database(
        settings.database.url.get_secret_value()
        if settings.database.url
        else sqlite_url(settings.state_dir / FILE_NAME),
        pool=settings.database.pool,
        timeout_s=settings.database.timeout,
    )
    upkeep = Upkeep(
        database,
        clock,
        migrate=settings.database.migrate,
        retention_s=lambda: live.settings.request_log.retention,
        runs_retention_s=lambda: live.settings.workflows.retention,
    )
    prepared = database.once(lambda: upkeep.is_ready)
    store = Store.of(prepared, clock)
    directory = Directory(lambda: declared(live.settings, live.catalog), store.tenants.version, store.tenants.snapshot)
    spending = Spending(store.ledger.sums, clock, lambda: directory.keyring.has_budgets)
    prices = _prices(settings)
    books = Books(
        store.ledger.book,
        settings.state_dir / "ledger.pending",
        sample=lambda: live.settings.request_log.sample if live.settings.request_log.enabled else 0.0,
        on_dropped=metrics.records_dropped.inc,
    )
    async with (
        _tracing(live, supervisor) as tracing,
        open_limiter(settings.redis, clock) as counting,
        replicas or nullcontext(),
        database,
        upkeep,
        directory,
        spending,
        books,
        supervisor,
        dispatcher,
        AsyncExitStack() as stack,
    ):
        metrics.watch(
            lambda: vitals_of(
                supervisor=supervisor,
                dispatcher=dispatcher,
                catalog=live.catalog,
                books=books,
                directory=directory,
                spending=spending,
                scheduler=scheduler,
                clock=clock,
                tracing=tracing,
                redis=counting.redis,
                revision=live.digest,
            )
        )
        for status in supervisor.statuses():
            on_change(status)

        def follow() -> None:
            nonlocal prices
            prices = _prices(live.settings)
            for one in replicas.schedulers() if replicas is not None else (own,):
                one.limits = _limits(live.settings)
                one.fairness = fairness_by_model(live.settings)
            dispatcher.bounds = _bounds(live.settings)
            directory.redeclare()

        live.before_change(lambda wanted: prepare(wanted, localize, supervisor))
        live.on_change(follow)
        live.on_change(lambda: metrics.count_reload(is_applied=True))
        live.on_refused(lambda: metrics.count_reload(is_applied=False))
        overlays = await stack.enter_async_context(Overlays(store.revisions, live, clock))
        admission = Admission(counting.limiter, clock, lambda: spending.spent, lambda: prices)
        chat = ChatService(dispatcher)
        egress = Egress(Policy(**settings.egress.model_dump()))
        caller = Caller(
            live=live, admission=admission, chat=chat, egress=egress, clock=clock, metrics=metrics, tracing=tracing,
            books=books,
        )  # fmt: skip

        def cost_of(name: str, usage: Usage) -> int:
            model = live.catalog.find(name)
            return admission.price(model.name).cost(usage) if model is not None else 0

        def principal_of(key: str) -> Principal:
            return directory.keyring.principal(key, clock.wall())

        worker = Worker(
            caller,
            Tools(egress, ToolLimits()),
            principal_of,
            cost_of,
            clock,
            deduces=lambda: live.settings.workflows.objectives,
            prefills=lambda: live.settings.workflows.eager_prefill,
        )
        owner = keep_key(settings.state_dir / "gateway.id", lambda: secrets.token_hex(8))
        runs = await stack.enter_async_context(
            Runs(store.workflows, worker, clock, owner=owner, telling=Telling(metrics.runs, tracing))
        )
        batches = await stack.enter_async_context(
            BatchService(store.batches, store.files, runs, principal_of, clock, owner=owner)
        )
        yield Services(
            live=live,
            overlays=overlays,
            clock=clock,
            database=prepared,
            store=store,
            directory=directory,
            spending=spending,
            admission=admission,
            books=books,
            supervisor=supervisor,
            scheduler=scheduler,
            replicas=replicas,
            dispatcher=dispatcher,
            chat=chat,
            egress=egress,
            runs=runs,
            files=FileService(store.files, clock),
            batches=batches,
            metrics=metrics,
            tracing=tracing,
        )


@asynccontextmanager
async def _tracing(live: Live, supervisor: Supervisor) -> AsyncIterator[Tracing | None]:
    """Export traces while inside, if the settings name a collector."""
    settings = live.settings.tracing
    if settings.endpoint is None:
        yield None
        return
    from gateway.otlp import Exporter  # noqa: PLC0415 - takes 0.2 s: only for who traces

    def engine_of(worker: str) -> str | None:
        try:
            return supervisor.status(WorkerId(worker)).engine
        except KeyError:
            return None

    exporter = Exporter(settings.endpoint, settings.service_name, engine_of)
    try:
        async with Tracing(exporter, lambda: live.settings.tracing.sample) as tracing:
            yield tracing
    finally:
        exporter.close()


def declared(settings: Settings, catalog: Catalog) -> Stored:
    """Return the tenants and keys of the settings, the admin key among them."""
    admin = Key(
        id=f"file:{BUILT_IN_KEY}", name=BUILT_IN_KEY, tenant=TenantId(""), digest=_admin_digest(settings), role="admin"
    )
    return Stored(0, declared_tenants(settings, catalog), (admin, *declared_keys(settings, catalog)))


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
        is_draining=status.state is State.DRAINING,
        kv_tokens=status.capabilities.kv_tokens,
        num_prefixes=status.capabilities.num_prefixes,
    )


def _prices(settings: Settings) -> Mapping[ModelName, Price]:
    return {ModelName(name): price_of(model.price) for name, model in settings.models.items()}


def _limits(settings: Settings) -> Limits:
    return Limits(
        queue=settings.queue.size,
        queue_per_tenant=settings.queue.per_tenant,
        attempts=settings.retry.attempts,
        max_retry_after=settings.retry.max_retry_after,
    )


def fairness_by_model(settings: Settings) -> Mapping[ModelName, Fairness]:
    """Return the rule of each model: its own, or that of all."""
    return {
        ModelName(name): fairness_of(model.fairness or settings.fairness) for name, model in settings.models.items()
    }


def fairness_of(settings: FairnessSettings) -> Fairness:
    """Return a rule as decisions know it; ranks are places in ``core.chat.CLASSES``."""
    wanted = [getattr(settings.targets, name) for name in CLASSES]
    targets = tuple(math.inf if target is None else target for target in wanted) if any(wanted) else ()
    return Fairness(**settings.model_dump(exclude={"targets"}), targets=targets)


def _bounds(settings: Settings) -> Bounds:
    return Bounds(undelivered_bytes=settings.server.max_stream_bytes, client_idle=settings.server.client_idle)


def _admin_digest(settings: Settings) -> bytes:
    """Return the hash of the admin key: the file's, or one kept in the state folder for the CLI on this machine."""
    if settings.admin_key is not None:
        return digest_of(settings.admin_key.get_secret_value().encode())
    try:
        return digest_of(keep_key(settings.state_dir / "admin.key", new_admin_key).encode())
    except EmptyKeyFile as error:
        raise SettingsError(str(error)) from error
