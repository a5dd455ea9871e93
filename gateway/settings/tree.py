"""The tree: every section, what may stand in it, and what it is without a word from the operator."""

from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from core.chat import Class
from core.tenancy import Period, Role
from gateway.settings.faults import hint
from gateway.strength import weakness_of
from gateway.units import Bytes, Count, CountOrZero, Seconds, SecondsOrZero
from routing.fairness.policy import Policy

OVERRIDABLE = Field(json_schema_extra={"overridable": True})
"""A value, or all of a section, that the admin API may change while the server runs."""

BUILT_IN_KEY = "admin"
"""What the key of ``admin_key`` is called."""

AT_START = Field(json_schema_extra={"at_start": True})
"""A value that is read when the server starts: a change of it waits for the next start."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ServerSettings(_Section):
    """The data port. ``max_stream_bytes`` bounds what one answer may hold undelivered, ``max_tenant_streams`` how many
    answers one tenant may have open."""

    host: Annotated[str, AT_START] = "127.0.0.1"
    port: Annotated[int, AT_START] = Field(default=8411, ge=0, le=65535)
    max_body: Bytes = 32 * 2**20
    body_timeout: Seconds = 30.0
    header_timeout: Seconds = 20.0
    keep_alive: Annotated[Seconds, AT_START] = 75.0
    max_stream_bytes: Bytes = 4 * 2**20
    max_tenant_streams: int = Field(default=4096, ge=1)
    client_idle: Seconds = 60.0
    drain_timeout: Seconds = 60.0


class AdminSettings(_Section):
    """The admin port: health, workers, metrics. Loopback unless an address is given. ``allowed_hosts``: names that it
    may be called by besides loopback's and the bound address, such as the one that Prometheus uses."""

    host: Annotated[str, AT_START] = "127.0.0.1"
    port: Annotated[int, AT_START] = Field(default=8412, ge=0, le=65535)
    allowed_hosts: Annotated[tuple[str, ...], AT_START] = ()


class RateSettings(_Section):
    """Requests and tokens in any 60 seconds, and answers open at a time; what is not given is not limited."""

    rpm: int | None = Field(default=None, ge=1)
    tpm: Count | None = None
    parallel: int | None = Field(default=None, ge=1)


class BudgetSettings(_Section):
    """What may be used up in one period: ``tokens`` or ``usd``."""

    tokens: Count | None = None
    usd: float | None = Field(default=None, gt=0)
    per: Period

    @model_validator(mode="after")
    def _has_one_amount(self) -> "BudgetSettings":
        if (self.tokens is None) == (self.usd is None):
            raise ValueError("give either `tokens` or `usd`")
        return self


def _distinct(budgets: tuple[BudgetSettings, ...]) -> tuple[BudgetSettings, ...]:
    """Two budgets of one unit and period would be one count, taken twice."""
    kinds = [(budget.tokens is None, budget.per) for budget in budgets]
    if len(set(kinds)) < len(kinds):
        raise ValueError("two budgets have the same unit and period: keep the smaller one")
    return budgets


Budgets = Annotated[tuple[BudgetSettings, ...], AfterValidator(_distinct)]


class CeilingSettings(_Section):
    """The largest request that is taken; see ``core.tenancy.Ceilings``."""

    body: Bytes = 32 * 2**20
    depth: int = Field(default=64, ge=8, le=512)
    prompt_tokens: Count = 16_000_000
    choices: int = Field(default=16, ge=1, le=128)
    top_logprobs: int = Field(default=20, ge=0, le=100)
    schema_size: Bytes = 64 * 2**10
    pattern: Bytes = 512
    grammars: bool = False


class EndUserSettings(_Section):
    """Limits of each end user that a tenant names in its requests (``safety_identifier``, ``user``)."""

    limits: RateSettings = RateSettings()
    budgets: Budgets = ()


class TenantSettings(_Section):
    """A tenant that the file declares; keys of the file may name tenants without declaring them. ``weight``: its share
    of an engine, beside those of the others that want it."""

    suspended: bool = False
    models: tuple[str, ...] = ("*",)
    endpoints: tuple[str, ...] = ("*",)
    limits: Annotated[RateSettings | None, OVERRIDABLE] = None
    budgets: Annotated[Budgets, OVERRIDABLE] = ()
    end_users: Annotated[EndUserSettings, OVERRIDABLE] = EndUserSettings()
    ceilings: CeilingSettings | None = None
    max_class: Class = "interactive"
    weight: Annotated[float, OVERRIDABLE] = Field(default=1.0, ge=0.001, le=1000)


class KeySettings(_Section):
    """A key, by itself or as the SHA-256 of it (hex), and the tenant it stands for; what it may use and how much,
    within what its tenant may. With a ``role`` it opens the admin port instead."""

    name: str
    tenant: str
    key: SecretStr | None = None
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    role: Role | None = None
    models: tuple[str, ...] = ("*",)
    endpoints: tuple[str, ...] = ("*",)
    limits: RateSettings = RateSettings()
    budgets: Budgets = ()
    max_class: Class = "interactive"
    expires_at: AwareDatetime | None = None

    @model_validator(mode="after")
    def _has_one_secret(self) -> "KeySettings":
        if (self.key is None) == (self.sha256 is None):
            raise ValueError("give either `key` or `sha256`")
        if self.key is not None and (fault := weakness_of(self.key.get_secret_value())) is not None:
            raise ValueError(f"`key` {fault}; `forebay keys new` makes a good one")
        return self


class TimeoutSettings(_Section):
    """The five named deadlines; a request may shorten them with ``forebay.timeouts``, never lengthen ``total``."""

    connect: Seconds = 2.0
    queue: Seconds = 30.0
    first_token: Seconds = 120.0
    idle: Seconds = 60.0
    total: Seconds = 600.0


class RetrySettings(_Section):
    """How often a request is tried before its first byte, and the longest ``Retry-After`` we wait for an engine."""

    attempts: int = Field(default=3, ge=1, le=10)
    max_retry_after: Seconds = 10.0


class QueueSettings(_Section):
    """How many requests may wait: for one model, and of one tenant for one model."""

    size: int = Field(default=2048, ge=1)
    per_tenant: int = Field(default=1024, ge=1)


class TargetSettings(_Section):
    """How soon a request of each class is to begin, if its tenant is not ahead of its share; without one there is no
    hurry."""

    interactive: Seconds | None = None
    standard: Seconds | None = None
    batch: Seconds | None = None


class FairnessSettings(_Section):
    """Which rule shares a model's workers between tenants, and its figures: see ``routing.fairness.policy.Fairness``.

    Tokens are weighted: one of a prompt counts ``prompt_price``, one of an answer ``output_price``. ``threshold``,
    ``credit``, ``penalty``: weighted tokens; ``quantum``: tokens of an answer; ``waste_burst``: tokens computed again.
    """

    policy: Policy = "vtc-pc"
    prompt_price: float = Field(default=1.0, ge=0.001, le=1000)
    output_price: float = Field(default=2.0, ge=0.001, le=1000)
    threshold: Count = Field(default=1000, le=10**9)
    credit: CountOrZero = Field(default=2000, le=10**9)
    credit_refill: float = Field(default=1.0, ge=0, le=1)
    quantum: Count = Field(default=8, le=10**6)
    penalty: CountOrZero = Field(default=50, le=10**9)
    waste_share: float = Field(default=0.08, ge=0, le=1)
    waste_burst: Count = Field(default=2000, le=10**9)
    interval: Seconds = Field(default=0.05, le=60)
    targets: TargetSettings = TargetSettings()
    rescue_share: float = Field(default=0.2, ge=0, le=1)
    ageing: Seconds = Field(default=60.0, ge=0.001, le=10**6)
    step_target: SecondsOrZero = Field(default=0.0, le=60)
    run_order: bool = True
    focus: bool = True
    affinity: bool = True
    waves: bool = True


class LaunchSettings(_Section):
    """How to start an engine of ours; see ``engines.spec.Launch``. ``source``: a path, ``pypi:…``, or a hub id."""

    source: str = ""
    revision: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][\w.-]*$")
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    trust_remote_code: bool = False
    context: int = Field(default=2048, ge=64)
    slots: int = Field(default=4, ge=1)
    threads: int | None = Field(default=None, ge=1)
    gpus: tuple[int, ...] = ()
    tp: int = Field(default=1, ge=1)
    memory: Bytes | None = None
    args: tuple[str, ...] = ()
    env: dict[str, str] = {}
    program: str | None = None
    command: tuple[str, ...] = ()


class LifecycleSettings(_Section):
    """Times and counts of a worker's life; see ``engines.spec.Lifecycle``."""

    start_timeout: Seconds = 600.0
    drain_timeout: Seconds = 60.0
    stop_timeout: Seconds = 30.0
    probe_interval: Seconds = 2.0
    fall: int = Field(default=3, ge=1)
    rise: int = Field(default=2, ge=1)
    backoff_base: Seconds = 0.5
    backoff_max: Seconds = 60.0
    backoff_reset: Seconds = 60.0


class WorkerSettings(_Section):
    """One engine: ``launch`` (started and stopped by us) or ``url`` (attached, never killed), ``replicas`` times.

    ``probe_continuation``: of an engine ``openai``, try at its start whether it can go on with an answer by its text;
    then its answers can be cut and moved. Costs it up to ten short answers, and each later leg its prompt again.
    ``slot_files``: with how many ``--slot-files`` an attached llama.cpp was started that is Forebay's own server for
    it; one that we launch has five for each slot.
    """

    engine: Literal["llamacpp", "vllm", "openai"]
    launch: LaunchSettings | None = None
    url: str | None = Field(default=None, pattern=r"^https?://")
    key: SecretStr | None = None
    served_name: str | None = None
    max_inflight: int | None = Field(default=None, ge=1)
    replicas: int = Field(default=1, ge=1)
    probe_continuation: bool = True
    slot_files: int = Field(default=0, ge=0, le=512)
    lifecycle: LifecycleSettings = LifecycleSettings()

    @model_validator(mode="after")
    def _is_launched_or_attached(self) -> "WorkerSettings":
        if (self.launch is None) == (self.url is None):
            raise ValueError("give either `launch` (start it) or `url` (attach to it)")
        if self.launch is not None and self.engine == "openai" and not self.launch.command:
            raise ValueError("engine `openai` has no program of its own: give `url`, or `launch.command`")
        if self.slot_files and (self.url is None or self.engine != "llamacpp"):
            raise ValueError("`slot_files` is told of an attached engine `llamacpp` alone: leave it out here")
        return self


class PriceSettings(_Section):
    """US dollars per million tokens. ``cached_input``: for the part of a prompt that the engine had cached."""

    input: float = Field(default=0, ge=0)
    output: float = Field(default=0, ge=0)
    cached_input: float | None = Field(default=None, ge=0)


class ModelSettings(_Section):
    """A model on offer, under its name and aliases. ``timeouts``, ``fairness``: in the place of those of all models."""

    price: Annotated[PriceSettings, OVERRIDABLE] = PriceSettings()
    aliases: tuple[str, ...] = ()
    fallbacks: Annotated[tuple[str, ...], OVERRIDABLE] = ()
    timeouts: Annotated[TimeoutSettings | None, OVERRIDABLE] = None
    fairness: Annotated[FairnessSettings | None, OVERRIDABLE] = None
    workers: tuple[WorkerSettings, ...] = Field(min_length=1)


class RequestLogSettings(_Section):
    """One row per request in the database: who, what, how long, never the content. ``sample``: which part of the good
    ones is kept; failed ones always are. What is spent is booked whatever is kept."""

    enabled: bool = True
    sample: Annotated[float, OVERRIDABLE] = Field(default=1.0, ge=0, le=1)
    retention: Annotated[Seconds, OVERRIDABLE] = 30 * 86400.0


class WorkflowSettings(_Section):
    """Runs of workflows: ``retention``, how long one that has ended is kept, with all its values. ``objectives``: the
    scheduler is told what the graph says of a call; without, it is one of many of the same program.
    ``eager_prefill``: what a prompt begins with is computed while the last of its variables are being made."""

    retention: Annotated[Seconds, OVERRIDABLE] = 7 * 86400.0
    objectives: Annotated[bool, OVERRIDABLE] = True
    eager_prefill: Annotated[bool, OVERRIDABLE] = True


class DatabaseSettings(_Section):
    """Where tenants, keys, the ledger, the request log and revisions are kept: SQLite in the state folder, or
    ``postgresql://…``. ``migrate``: bring its tables up to date at start, or refuse to start with old ones."""

    url: SecretStr | None = None
    pool: int = Field(default=5, ge=1, le=100)
    timeout: Seconds = 5.0
    migrate: bool = True


class RedisSettings(_Section):
    """What several gateways share. ``on_failure``: what limits do while it is away; ``replicas``: how many gateways
    there are, for each one's part of a limit meanwhile. ``scheduling``: whether they schedule the attached workers as
    one, or each for itself."""

    url: SecretStr | None = None
    connect_timeout: Seconds = 0.5
    command_timeout: Seconds = 0.2
    breaker_failures: int = Field(default=3, ge=1)
    breaker_open: Seconds = 5.0
    on_failure: Literal["local", "deny"] = "local"
    replicas: int = Field(default=1, ge=1)
    scheduling: Literal["shared", "own"] = "own"


class LimitSettings(_Section):
    """What holds for every tenant that says nothing else."""

    limits: Annotated[RateSettings, OVERRIDABLE] = RateSettings()
    ceilings: Annotated[CeilingSettings, OVERRIDABLE] = CeilingSettings()


class EgressSettings(_Section):
    """What requests may name by address, such as images: fetched by us from hosts in ``allow`` (``images.example.com``,
    ``*.example.com``, ``host:8443``), refused from all others. ``max_size`` bounds what one request may fetch."""

    allow: tuple[Annotated[str, Field(pattern=r"^(\*\.)?[A-Za-z0-9.-]+(:[0-9]{1,5})?$")], ...] = ()
    max_size: Bytes = 10 * 2**20
    timeout: Seconds = 10.0


class TracingSettings(_Section):
    """OpenTelemetry traces by OTLP over HTTP, to ``endpoint``; none without one."""

    endpoint: Annotated[str | None, AT_START] = Field(default=None, pattern=r"^https?://")
    sample: Annotated[float, OVERRIDABLE] = Field(default=1.0, ge=0, le=1)
    service_name: Annotated[str, AT_START] = "forebay"


class LogSettings(_Section):
    """The server's own log on standard error."""

    level: Annotated[Literal["debug", "info", "warning", "error"], OVERRIDABLE] = "info"
    format: Annotated[Literal["console", "json"], AT_START] = "console"


class Settings(BaseSettings):
    """Everything an operator can set."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    version: Literal[1] = 1
    state_dir: Annotated[Path, AT_START] = Path(".forebay")
    server: ServerSettings = ServerSettings()
    admin: AdminSettings = AdminSettings()
    database: Annotated[DatabaseSettings, AT_START] = DatabaseSettings()
    redis: Annotated[RedisSettings, AT_START] = RedisSettings()
    defaults: LimitSettings = LimitSettings()
    tenants: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")], TenantSettings] = {}
    keys: tuple[KeySettings, ...] = ()
    admin_key: SecretStr | None = None
    timeouts: Annotated[TimeoutSettings, OVERRIDABLE] = TimeoutSettings()
    retry: Annotated[RetrySettings, OVERRIDABLE] = RetrySettings()
    queue: Annotated[QueueSettings, OVERRIDABLE] = QueueSettings()
    fairness: Annotated[FairnessSettings, OVERRIDABLE] = FairnessSettings()
    request_log: RequestLogSettings = RequestLogSettings()
    workflows: WorkflowSettings = WorkflowSettings()
    egress: EgressSettings = EgressSettings()
    tracing: TracingSettings = TracingSettings()
    log: LogSettings = LogSettings()
    models: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}$")], ModelSettings] = Field(
        min_length=1
    )

    @field_validator("admin_key")
    @classmethod
    def _is_hard_to_guess(cls, admin_key: SecretStr | None) -> SecretStr | None:
        if admin_key is not None and (fault := weakness_of(admin_key.get_secret_value())) is not None:
            raise ValueError(f"it {fault}; leave it out, and a good one is made and kept in the state folder")
        return admin_key

    @model_validator(mode="after")
    def _names_are_known_and_unique(self) -> "Settings":
        names = [name for model, spec in self.models.items() for name in (model, *spec.aliases)]
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise ValueError(f"model names and aliases have to be unique; {doubled[0]!r} is given more than once")
        for model, spec in self.models.items():
            for fallback in spec.fallbacks:
                if fallback not in self.models:
                    raise ValueError(
                        f"models.{model}.fallbacks: no model is called {fallback!r}{hint(fallback, names)}"
                    )
        for key in self.keys:
            for name in key.models:
                if name != "*" and name not in names:
                    raise ValueError(f"keys.{key.name}.models: no model is called {name!r}{hint(name, names)}")
        return self

    @model_validator(mode="after")
    def _keys_have_names_of_their_own(self) -> "Settings":
        names = [key.name for key in self.keys]
        if BUILT_IN_KEY in names:
            raise ValueError(
                f"keys: {BUILT_IN_KEY!r} is what the key of `admin_key` is called; give this one another name"
            )
        doubled = next((name for name in names if names.count(name) > 1), None)
        if doubled is not None:
            raise ValueError(f"keys: {doubled!r} is the name of more than one; they would share budgets and records")
        return self

    @model_validator(mode="after")
    def _open_ports_have_keys(self) -> "Settings":
        """A port that others than this machine reach needs a key that somebody has set, and weak ones cannot be."""
        has_admin = self.admin_key is not None or any(key.role is not None for key in self.keys)
        if not _is_loopback(self.admin.host) and not has_admin:
            raise ValueError(
                f"admin.host: {self.admin.host} can be reached from other machines, which needs an `admin_key`, or a "
                "key in `keys` with a `role`; `forebay keys new` makes one"
            )
        if not _is_loopback(self.server.host) and not has_admin and not self.keys:
            raise ValueError(
                f"server.host: {self.server.host} can be reached from other machines, which needs a key in `keys`, or "
                "an `admin_key` to make some with; `forebay keys new` makes one"
            )
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take what is handed over and nothing else: ``sources.py`` has read the environment, and knows what it set."""
        return (init_settings,)


def _is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address. A name other than ``localhost`` may mean anything."""
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"
