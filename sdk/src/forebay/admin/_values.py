"""What the admin API tells, typed. Times are aware, money is in US dollars; fields not named here are kept."""

from datetime import date, datetime
from decimal import Decimal
from typing import Any, Generic, Literal, TypedDict, TypeVar

from pydantic import Field, PrivateAttr, SerializerFunctionWrapHandler, model_serializer

from forebay._types import _Wire

Role = Literal["viewer", "operator", "policy", "admin"]
Period = Literal["day", "week", "month", "total"]
Dimension = Literal["day", "tenant", "key", "end_user", "model"]
PolicyKind = Literal["cache", "examples", "routing", "fairness", "kv"]

Item = TypeVar("Item")


class Page(_Wire, Generic[Item]):
    """Some of a list; ``next`` leads to more."""

    data: list[Item]
    next: str | None = None


class _Tagged(_Wire):
    _etag: str | None = PrivateAttr(default=None)

    @property
    def etag(self) -> str | None:
        """Names the state that was read; a change is refused if there is a newer one. None where it came in a list."""
        return self._etag


class Limits(_Wire):
    """Requests and tokens in any 60 seconds, answers open at a time; None: no limit."""

    rpm: int | None = None
    tpm: int | None = None
    parallel: int | None = None


class Budget(_Wire):
    """What may be used up in one period: either ``tokens`` or ``usd``."""

    tokens: int | None = None
    usd: Decimal | None = None
    per: Period


class Ceilings(_Wire):
    """The largest request that is taken; sizes in bytes. What is not given is the gateway's default."""

    body: int | None = None
    depth: int | None = None
    prompt_tokens: int | None = None
    choices: int | None = None
    top_logprobs: int | None = None
    schema_size: int | None = None
    pattern: int | None = None
    grammars: bool | None = None

    @model_serializer(mode="wrap")
    def _given(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if value is not None}


class EndUsers(_Wire):
    """Limits of each end user that a tenant names in its requests."""

    limits: Limits = Limits()
    budgets: list[Budget] = Field(default_factory=list)


class Tenant(_Tagged):
    """A tenant. One from ``show``, ``create`` or ``replace`` may be changed and given to ``replace``.

    ``source``: ``file`` or ``database``; those of the settings file are changed there. ``models``, ``endpoints``:
    ``["*"]`` for all. ``weight``: its share of an engine, beside those of the others that want it.
    """

    id: str
    source: str
    suspended: bool = False
    models: list[str]
    endpoints: list[str]
    limits: Limits | None = None
    budgets: list[Budget]
    end_users: EndUsers
    ceilings: Ceilings | None = None
    max_class: str = "interactive"
    weight: float = 1.0


class TenantTerms(TypedDict, total=False):
    """What a tenant may use, and how much."""

    suspended: bool
    models: list[str]
    endpoints: list[str]
    limits: Limits | None
    budgets: list[Budget]
    end_users: EndUsers
    ceilings: Ceilings | None
    max_class: str
    weight: float


class Key(_Tagged):
    """A key without its secret. ``state``: ``active``, ``expired`` or ``revoked``; ``prefix``: how it begins."""

    id: str
    name: str
    tenant: str
    source: str
    state: str
    prefix: str = ""
    role: str | None = None
    models: list[str]
    endpoints: list[str]
    limits: Limits
    budgets: list[Budget]
    max_class: str = "interactive"
    expires_at: datetime | None = None
    revoked_at: datetime | None = None
    created_at: datetime | None = None


class KeyTerms(TypedDict, total=False):
    """What a key may use, and how much."""

    models: list[str]
    endpoints: list[str]
    limits: Limits
    budgets: list[Budget]
    max_class: str
    expires_at: datetime | None


class KeyChanges(KeyTerms, total=False):
    """What to change of a key."""

    name: str


class KeyWithSecret(_Wire):
    """A key that was just made. ``secret`` is told this once; it is left out where this is printed."""

    key: Key
    secret: str = Field(repr=False)


class Amount(_Wire):
    """Tokens or US dollars; the other is None."""

    tokens: int | None = None
    usd: Decimal | None = None


class BudgetState(_Wire):
    """A budget of a tenant or a key (``subject``), and what is used of it. ``ends_at`` None: it never begins anew."""

    subject: str
    id: str
    tenant: str
    per: str
    limit: Amount
    used: Amount
    left: Amount
    ends_at: datetime | None = None


class Erased(_Wire):
    """What an erasure has done. ``records``: how many are gone from the request log."""

    records: int


class UsageRow(_Wire):
    """What was used. A dimension that was not asked for is None; ``end_user`` is empty where none was named."""

    day: date | None = None
    tenant: str | None = None
    key: str | None = None
    end_user: str | None = None
    model: str | None = None
    requests: int
    errors: int
    input_tokens: int
    output_tokens: int
    cached_tokens: int
    usd: Decimal


class TokensUsed(_Wire):
    """Tokens that the engine says it processed."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


class Leg(_Wire):
    """One run of a request on one worker. ``at_s``: when it began, in seconds from the request's arrival.
    ``recomputed``: tokens that it computed again to go on where an earlier one was cut; None: it began anew."""

    worker: str
    model: str
    at_s: float
    duration_s: float
    cause: str
    recomputed: int | None = None


class Request(_Wire):
    """One request of the log. ``status`` 499: the client left. ``key``: the key's id. Never its content."""

    id: str
    time: datetime
    endpoint: str
    status: int
    error: str | None = None
    tenant: str | None = None
    key: str | None = None
    end_user: str | None = None
    model: str | None = None
    urgency: str = "standard"
    asked_model: str | None = None
    worker: str | None = None
    stream: bool = False
    attempts: int = 0
    duration_s: float
    queue_s: float = 0.0
    first_byte_s: float | None = None
    overhead_s: float | None = None
    usage: TokensUsed | None = None
    usd: Decimal
    session: str | None = None
    program: str | None = None
    run: str | None = None
    stage: str | None = None
    client_retry: str | None = None
    traceparent: str | None = None
    legs: list[Leg]


class Step(_Wire):
    """One thing that was decided about a request, or for it at another's expense; ``text``: in plain words."""

    time: datetime
    kind: str
    text: str


class Decision(_Wire):
    """How a request was served; ``summary`` tells it in a paragraph, ``steps`` are the decisions that the gateway still
    remembers. ``resumes``: how often it went on where it was cut, ``recomputed``: tokens that this took. ``status``
    None: it has not ended."""

    id: str
    summary: str
    status: int | None = None
    error: str | None = None
    asked_model: str | None = None
    model: str | None = None
    worker: str | None = None
    fell_back: bool = False
    queue_s: float = 0.0
    attempts: int = 0
    retries: int = 0
    resumes: int = 0
    recomputed: int = 0
    legs: list[Leg]
    steps: list[Step] = Field(default_factory=list)
    usd: Decimal


class TenantShare(_Wire):
    """What a tenant has had of a model, in weighted tokens; ``counter``: divided by the ``weight``, the lowest is
    served next; ``credit``: by how much it may begin behind the others if it comes back now."""

    tenant: str
    weight: float = 1.0
    queued: int = 0
    running: int = 0
    attained: float = 0.0
    counter: float = 0.0
    credit: float = 0.0


class Fairness(_Wire):
    """How a model is shared. ``waste_left``: tokens that preemption may still have computed again; ``wasted_tokens``:
    those that were, ``lost_tokens``: likewise after failures; ``reserved``: slots kept for requests on their way.
    ``shares``: the tenants that wait, then those that had most; empty in a list. ``holder``: the gateway that decides,
    if several do so together; ``age_s``: how long ago it told."""

    model: str
    policy: str
    queued: int = 0
    tenants: int = 0
    reserved: int = 0
    preemptions: int = 0
    migrations: int = 0
    drained: int = 0
    recovered: int = 0
    useful_tokens: int = 0
    wasted_tokens: int = 0
    lost_tokens: int = 0
    waste_left: float = 0.0
    holder: str | None = None
    age_s: float = 0.0
    shares: list[TenantShare] = Field(default_factory=list)


class Price(_Wire):
    """US dollars per million tokens. ``cached_input_usd`` None: like any input."""

    input_usd: Decimal
    output_usd: Decimal
    cached_input_usd: Decimal | None = None


class Model(_Wire):
    """A model on offer. ``ready`` and ``healthy`` count workers, ``running`` and ``waiting`` requests."""

    name: str
    aliases: list[str]
    fallbacks: list[str]
    price: Price
    context_tokens: int | None = None
    workers: list[str]
    ready: int = 0
    healthy: int = 0
    running: int = 0
    waiting: int = 0
    slots: int = 0


class Load(_Wire):
    """What an engine says of itself; ``kv_used`` is a part of 1."""

    running: int
    waiting: int
    kv_used: float | None = None


class Worker(_Wire):
    """A worker. ``since`` and ``next_start_at`` are Unix seconds, ``running`` counts the slots taken."""

    id: str
    model: str
    engine: str
    state: str
    healthy: bool
    max_inflight: int
    since: float
    restarts: int
    running: int
    is_wanted: bool = True
    context_tokens: int | None = None
    last_error: str | None = None
    next_start_at: float | None = None
    pid: int | None = None
    url: str | None = None
    load: Load | None = None
    capabilities: dict[str, Any]


class AuditEntry(_Wire):
    """One act of an operator. ``actor``: the key's name, empty where nobody knows it; ``outcome``: the HTTP status."""

    id: str
    time: datetime
    actor: str
    role: str
    action: str
    target: str
    outcome: int
    detail: dict[str, Any]


class Version(_Wire):
    """What runs. ``config`` is equal for equal settings."""

    version: str
    config: str


class Health(_Wire):
    """How the gateway's parts are; ``status``: ``ready``, ``starting`` or ``draining``. ``replicas``: gateways that
    schedule as one, this one among them; ``scheduling``: what this one is to each model that they share."""

    status: str
    uptime_s: float
    open_requests: int
    workers: int
    workers_ready: int
    keys_are_fresh: bool
    database: str
    records_waiting: int
    replicas: int = 1
    scheduling: dict[str, str] = Field(default_factory=dict)
    reload_error: str | None = None


class Value(_Wire):
    """One setting in force, secrets masked. ``source``: ``default``, ``file``, ``environment`` or ``overlay``."""

    path: str
    value: Any = None
    source: str


class Fault(_Wire):
    """One entry of an overlay that cannot be used."""

    path: str
    message: str


class Verdict(_Wire):
    """Whether an overlay can be applied, and if not, why."""

    valid: bool
    faults: list[Fault]


class Change(_Wire):
    """One value that differs, secrets masked. ``source``: who says ``after``."""

    path: str
    before: Any = None
    after: Any = None
    source: str


class Changes(_Wire):
    """All values that differ."""

    changes: list[Change]


class Revision(_Wire):
    """One state of ``config`` or of a kind of policy. ``overlay`` lies over what the settings file says.

    ``state``: ``applied``, ``canary`` (until ``expires_at``), ``replaced`` or ``rolled_back``.
    """

    resource: str
    number: int
    state: str
    overlay: dict[str, Any]
    author: str
    created_at: datetime
    note: str = ""
    expires_at: datetime | None = None


class InForce(_Wire):
    """The revision in force; None while the settings file alone says what holds."""

    revision: Revision | None = None


class Config(_Wire):
    """The settings in force. ``digest`` is equal for equal settings; ``needs_restart`` names what waits for the next
    start, ``dropped`` what the file has no room for any more, ``last_error`` why its newest state is not in use."""

    digest: str
    revision: int | None = None
    values: list[Value]
    needs_restart: list[str]
    dropped: list[Fault]
    last_error: str | None = None


class Reloaded(_Wire):
    """What a reload did."""

    digest: str
    changes: list[Change]
    needs_restart: list[str]
    dropped: list[Fault]


class Policy(_Wire):
    """A policy: its revision in force, if any, and every value that holds."""

    kind: str
    revision: Revision | None = None
    values: list[Value]
