"""How the core's values look on the admin port's wire. Money is in US dollars, as decimal text; times are RFC 3339."""

from collections.abc import Mapping
from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Literal

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, PlainSerializer, model_validator

from core.chat import Class, Endpoint
from core.tenancy import PICO_PER_USD, Budget, Ceilings, Key, Period, Rate, Role, Tenant

_MAX_COUNT = 10**15
_MAX_USD = 1_000_000  # nine times as much no longer fits 64 bits of picodollars

TENANT_ID = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
ONE_LINE = r"^[^\x00-\x1f\x7f]*$"
"""Text without control characters; databases and terminals are glad of it."""

EndpointName = Literal["chat", "completions", "embeddings", "responses", "messages"]
Source = Literal["file", "database"]
_NAMES: Mapping[Endpoint, EndpointName] = {
    Endpoint.CHAT: "chat",
    Endpoint.COMPLETIONS: "completions",
    Endpoint.EMBEDDINGS: "embeddings",
    Endpoint.RESPONSES: "responses",
    Endpoint.MESSAGES: "messages",
}
Usd = Annotated[
    Decimal,
    Field(gt=0, le=_MAX_USD, max_digits=19, decimal_places=12, description="US dollars."),
    PlainSerializer(lambda amount: format(amount, "f"), return_type=str),
]
Spend = Annotated[str, Field(pattern=r"^-?\d+(\.\d+)?$", description="US dollars, decimal.")]
Line = Annotated[str, Field(max_length=200, pattern=ONE_LINE)]
ModelNames = Annotated[list[Annotated[str, Field(max_length=128, pattern=ONE_LINE)]], Field(max_length=256)]
EndpointNames = Annotated[list[Literal["*"] | EndpointName], Field(max_length=8)]


class Shape(BaseModel):
    """A JSON object with exactly these members."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class RateShape(Shape):
    """Requests and tokens in any 60 seconds, answers open at a time; null: no limit."""

    rpm: int | None = Field(default=None, ge=1, le=_MAX_COUNT)
    tpm: int | None = Field(default=None, ge=1, le=_MAX_COUNT)
    parallel: int | None = Field(default=None, ge=1, le=1_000_000)


class BudgetShape(Shape):
    """What may be used up in one period: either `tokens` or `usd`."""

    tokens: int | None = Field(default=None, ge=1, le=_MAX_COUNT)
    usd: Usd | None = None
    per: Period

    @model_validator(mode="after")
    def _has_one_amount(self) -> "BudgetShape":
        if (self.tokens is None) == (self.usd is None):
            raise ValueError("give either `tokens` or `usd`")
        return self


def _distinct(budgets: list[BudgetShape]) -> list[BudgetShape]:
    """Two budgets of one unit and period would be one count, taken twice."""
    if len({(budget.tokens is None, budget.per) for budget in budgets}) < len(budgets):
        raise ValueError("two budgets have the same unit and period: keep the smaller one")
    return budgets


Budgets = Annotated[list[BudgetShape], Field(max_length=8), AfterValidator(_distinct)]


class CeilingsShape(Shape):
    """The largest request that is taken; sizes in bytes."""

    body: int = Field(default=Ceilings().body, ge=1, le=2**31)
    depth: int = Field(default=Ceilings().depth, ge=8, le=512)
    prompt_tokens: int = Field(default=Ceilings().prompt_tokens, ge=1, le=_MAX_COUNT)
    choices: int = Field(default=Ceilings().choices, ge=1, le=128)
    top_logprobs: int = Field(default=Ceilings().top_logprobs, ge=0, le=100)
    schema_size: int = Field(default=Ceilings().schema, ge=1, le=2**31)
    pattern: int = Field(default=Ceilings().pattern, ge=1, le=2**20)
    grammars: bool = Ceilings().grammars


class EndUsersShape(Shape):
    """Limits of each end user that a tenant names in its requests."""

    limits: RateShape = RateShape()
    budgets: Budgets = []


class TenantTerms(Shape):
    """What a tenant may use, and how much. `limits` and `ceilings` null: the settings' defaults of this moment.
    `weight`: its share of an engine, beside those of the others that want it."""

    suspended: bool = False
    models: ModelNames = ["*"]
    endpoints: EndpointNames = ["*"]
    limits: RateShape | None = None
    budgets: Budgets = []
    end_users: EndUsersShape = EndUsersShape()
    ceilings: CeilingsShape | None = None
    max_class: Class = "interactive"
    weight: float = Field(default=1.0, ge=0.001, le=1000)


class NewTenant(TenantTerms):
    """A tenant to be made."""

    id: str = Field(pattern=TENANT_ID)


class TenantShape(TenantTerms):
    """A tenant. Those of the settings file (`source`) are changed there."""

    id: str
    source: Source


class NewKey(Shape):
    """A key to be made: for a tenant's applications, or, with a `role`, for an operator of the admin port."""

    name: Annotated[str, Field(min_length=1, max_length=200, pattern=ONE_LINE)]
    tenant: str = Field(pattern=TENANT_ID)
    role: Role | None = None
    models: ModelNames = ["*"]
    endpoints: EndpointNames = ["*"]
    limits: RateShape = RateShape()
    budgets: Budgets = []
    max_class: Class = "interactive"
    expires_at: AwareDatetime | None = None


class KeyChange(Shape):
    """What to change of a key; what is not given stays as it is."""

    name: Annotated[str, Field(min_length=1, max_length=200, pattern=ONE_LINE)] = ""
    models: ModelNames = []
    endpoints: EndpointNames = []
    limits: RateShape = RateShape()
    budgets: Budgets = []
    max_class: Class = "interactive"
    expires_at: AwareDatetime | None = None


class KeyShape(Shape):
    """A key, without its secret. Those of the settings file (`source`) are changed there."""

    id: str
    name: str
    tenant: str
    source: Source
    state: Literal["active", "expired", "revoked"]
    prefix: str
    role: Role | None
    models: list[str]
    endpoints: list[str]
    limits: RateShape
    budgets: Budgets
    max_class: Class
    expires_at: datetime | None
    revoked_at: datetime | None
    created_at: datetime | None


class KeyWithSecret(Shape):
    """A key that was just made. `secret` is shown this once and kept nowhere."""

    key: KeyShape
    secret: str


# From the core's values to shapes, and back


def shown_time(seconds: float) -> datetime:
    """Return a Unix time as a moment of UTC."""
    return datetime.fromtimestamp(seconds, UTC)


def shown_moment(seconds: float | None) -> datetime | None:
    """Return a Unix time as a moment of UTC; None for None and for what was never noted or never comes (0)."""
    return datetime.fromtimestamp(seconds, UTC) if seconds else None


def shown_usd(picodollars: int) -> str:
    """Return an amount of money as decimal dollars, exactly."""
    text = format(Decimal(picodollars) / PICO_PER_USD, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def shown_tenant(tenant: Tenant, source: Source) -> TenantShape:
    """Return a tenant as the wire shows it."""
    return TenantShape(
        id=tenant.id,
        source=source,
        suspended=tenant.is_suspended,
        models=shown_names(tenant.models),
        endpoints=_shown_endpoints(tenant.endpoints),
        limits=shown_rate(tenant.rate),
        budgets=shown_budgets(tenant.budgets),
        end_users=EndUsersShape(limits=shown_rate(tenant.end_user), budgets=shown_budgets(tenant.end_user_budgets)),
        ceilings=_shown_ceilings(tenant.ceilings),
        max_class=tenant.max_class,
        weight=tenant.weight,
    )


def shown_key(key: Key, now: float) -> KeyShape:
    """Return a key as the wire shows it; ``now``: Unix time."""
    return KeyShape(
        id=key.id,
        name=key.name,
        tenant=key.tenant,
        source="file" if is_of_file(key) else "database",
        state=_state_of(key, now),
        prefix=key.prefix,
        role=key.role,
        models=shown_names(key.models),
        endpoints=list(_shown_endpoints(key.endpoints)),
        limits=shown_rate(key.rate),
        budgets=shown_budgets(key.budgets),
        max_class=key.max_class,
        expires_at=shown_moment(key.expires_at),
        revoked_at=shown_moment(key.revoked_at),
        created_at=shown_moment(key.created_at),
    )


def is_of_file(key: Key) -> bool:
    """Whether the settings file declares the key."""
    return key.id.startswith("file:")


def shown_names(names: frozenset[str] | None) -> list[str]:
    """Return an allow-list; ``*`` for all."""
    return ["*"] if names is None else sorted(names)


def shown_rate(rate: Rate) -> RateShape:
    """Return limits as the wire shows them."""
    return RateShape.model_construct(rpm=rate.rpm, tpm=rate.tpm, parallel=rate.parallel)


def shown_budgets(budgets: tuple[Budget, ...]) -> list[BudgetShape]:
    """Return budgets as the wire shows them."""
    return [
        BudgetShape.model_construct(tokens=budget.amount, usd=None, per=budget.period)
        if budget.unit == "tokens"
        else BudgetShape.model_construct(tokens=None, usd=Decimal(shown_usd(budget.amount)), per=budget.period)
        for budget in budgets
    ]


def rate_in(shape: RateShape) -> Rate:
    """Return limits as decisions know them."""
    return Rate(rpm=shape.rpm, tpm=shape.tpm, parallel=shape.parallel)


def budgets_in(shapes: list[BudgetShape]) -> tuple[Budget, ...]:
    """Return budgets in tokens and picodollars, exactly."""
    return tuple(
        Budget(amount=shape.tokens, unit="tokens", period=shape.per)
        if shape.tokens is not None
        else Budget(amount=int((shape.usd or Decimal()) * PICO_PER_USD), unit="usd", period=shape.per)
        for shape in shapes
    )


def ceilings_in(shape: CeilingsShape) -> Ceilings:
    """Return the largest request as decisions know it."""
    return Ceilings(
        body=shape.body,
        depth=shape.depth,
        prompt_tokens=shape.prompt_tokens,
        choices=shape.choices,
        top_logprobs=shape.top_logprobs,
        schema=shape.schema_size,
        pattern=shape.pattern,
        grammars=shape.grammars,
    )


def _shown_ceilings(ceilings: Ceilings) -> CeilingsShape:
    return CeilingsShape.model_construct(
        body=ceilings.body,
        depth=ceilings.depth,
        prompt_tokens=ceilings.prompt_tokens,
        choices=ceilings.choices,
        top_logprobs=ceilings.top_logprobs,
        schema_size=ceilings.schema,
        pattern=ceilings.pattern,
        grammars=ceilings.grammars,
    )


def _shown_endpoints(endpoints: frozenset[Endpoint] | None) -> list[Literal["*"] | EndpointName]:
    return ["*"] if endpoints is None else sorted(_NAMES[endpoint] for endpoint in endpoints)


def _state_of(key: Key, now: float) -> Literal["active", "expired", "revoked"]:
    if key.revoked_at is not None and key.revoked_at <= now:
        return "revoked"
    return "expired" if key.expires_at is not None and key.expires_at <= now else "active"
