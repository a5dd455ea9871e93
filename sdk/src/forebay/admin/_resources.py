"""Every request of the admin API, by what it is about."""

from collections.abc import Callable, Mapping, Sequence
from datetime import date, datetime
from typing import Any, Literal, TypeVar, Unpack

import httpx
from pydantic import BaseModel, ValidationError
from pydantic_core import to_jsonable_python

from forebay._errors import MalformedAnswer
from forebay.admin._asks import Ask, Resource, RunnerT, listing, operation, path
from forebay.admin._values import (
    AuditEntry,
    BudgetState,
    Changes,
    Config,
    Decision,
    Dimension,
    Erased,
    Fairness,
    Health,
    InForce,
    Key,
    KeyChanges,
    KeyTerms,
    KeyWithSecret,
    Model,
    Page,
    Policy,
    PolicyKind,
    Reloaded,
    Request,
    Revision,
    Role,
    Tenant,
    TenantTerms,
    UsageRow,
    Verdict,
    Version,
    Worker,
)

_AnswerT = TypeVar("_AnswerT", bound=BaseModel)

_PAGE = 200


def _typed(kind: type[_AnswerT]) -> Callable[[httpx.Response], _AnswerT]:
    """Return what reads an answer of this kind, and keeps its ``ETag`` where the kind has one."""

    def read(response: httpx.Response) -> _AnswerT:
        try:
            answer = kind.model_validate_json(response.content)
        except ValidationError as error:
            raise MalformedAnswer(f"{response.url} did not answer with a {kind.__name__}: {error}") from error
        tagged = answer.key if isinstance(answer, KeyWithSecret) else answer
        if isinstance(tagged, Tenant | Key):
            tagged._etag = response.headers.get("etag")
        return answer

    return read


def _nothing(response: httpx.Response) -> None:
    """Read an answer that says nothing but that it is done."""


def _text(response: httpx.Response) -> str:
    return response.text


def _get(kind: type[_AnswerT], at: str) -> Ask[_AnswerT]:
    return Ask("GET", at, _typed(kind))


def _post(kind: type[_AnswerT], at: str, body: object = None, *, if_match: str | None = None) -> Ask[_AnswerT]:
    return Ask("POST", at, _typed(kind), body=to_jsonable_python(body), if_match=if_match)


def _replacing(expect: int | Literal["any"] | None) -> str:
    return "*" if expect == "any" else f'"{expect or 0}"'


def _list(kind: type[_AnswerT], at: str, **params: object) -> Ask[Page[_AnswerT]]:
    return Ask("GET", at, _typed(Page[kind]), params={**_wire(params), "limit": _PAGE})  # type: ignore[valid-type]


def _wire(params: Mapping[str, object]) -> Mapping[str, Any]:
    return {name: to_jsonable_python(value) for name, value in params.items()}


class Tenants(Resource[RunnerT]):
    """Tenants. Changes hold everywhere within a second."""

    @listing
    def list(self) -> Ask[Page[Tenant]]:
        """Go through all tenants, by id."""
        return _list(Tenant, "tenants")

    @operation
    def show(self, tenant_id: str) -> Ask[Tenant]:
        """Return one; raises ``NotFound``."""
        return _get(Tenant, path("tenants", tenant_id))

    @operation
    def create(self, tenant_id: str, **terms: Unpack[TenantTerms]) -> Ask[Tenant]:
        """Make a tenant; raises ``Conflict`` if there is one."""
        return _post(Tenant, "tenants", {"id": tenant_id, **terms})

    @operation
    def replace(self, tenant: Tenant) -> Ask[Tenant]:
        """Store a tenant that was read and changed; raises ``PreconditionFailed`` if another change was faster."""
        terms = tenant.model_dump(mode="json", exclude={"id", "source"})
        return Ask("PUT", path("tenants", tenant.id), _typed(Tenant), body=terms, if_match=tenant.etag)

    @operation
    def delete(self, tenant: Tenant) -> Ask[None]:
        """Delete a tenant that was read, and its keys; raises ``PreconditionFailed`` if it was changed since."""
        return Ask("DELETE", path("tenants", tenant.id), _nothing, if_match=tenant.etag)

    @operation
    def erase(self, tenant_id: str, *, end_user: str | None = None) -> Ask[Erased]:
        """Forget the request records of a tenant, or of one of its end users; what was spent stays in the ledger."""
        return _post(Erased, path("tenants", tenant_id) + ":erase", {"end_user": end_user})


class Keys(Resource[RunnerT]):
    """Keys: those of applications, and, with a role, those of operators. Changes hold everywhere within a second."""

    @listing
    def list(self, *, tenant: str | None = None) -> Ask[Page[Key]]:
        """Go through the keys, by id, of one tenant or of all."""
        return _list(Key, "keys", tenant=tenant)

    @operation
    def show(self, key_id: str) -> Ask[Key]:
        """Return one, without its secret; raises ``NotFound``."""
        return _get(Key, path("keys", key_id))

    @operation
    def create(
        self, name: str, *, tenant: str, role: Role | None = None, **terms: Unpack[KeyTerms]
    ) -> Ask[KeyWithSecret]:
        """Make a key. Its secret is told this once."""
        return _post(KeyWithSecret, "keys", {"name": name, "tenant": tenant, "role": role, **terms})

    @operation
    def change(self, key: Key, **changes: Unpack[KeyChanges]) -> Ask[Key]:
        """Change a key that was read; raises ``PreconditionFailed`` if another change was faster."""
        body = to_jsonable_python(changes)
        return Ask("PATCH", path("keys", key.id), _typed(Key), body=body, if_match=key.etag)

    @operation
    def rotate(self, key_id: str, *, overlap_s: float = 86_400) -> Ask[KeyWithSecret]:
        """Make a key of the same terms; the old one holds for ``overlap_s`` more seconds."""
        return _post(KeyWithSecret, path("keys", key_id) + ":rotate", {"overlap_s": overlap_s})

    @operation
    def revoke(self, key_id: str) -> Ask[Key]:
        """Refuse a key from now on."""
        return _post(Key, path("keys", key_id) + ":revoke")


class Budgets(Resource[RunnerT]):
    """Budgets of tenants and keys."""

    @listing
    def list(self, *, tenant: str | None = None) -> Ask[Page[BudgetState]]:
        """Go through the budgets of one tenant or of all, with what is used of each."""
        return _list(BudgetState, "budgets", tenant=tenant)


class Usage(Resource[RunnerT]):
    """What was used and what it cost."""

    @listing
    def list(
        self,
        *,
        by: Sequence[Dimension] = ("day",),
        since: date | None = None,
        until: date | None = None,
        tenant: str | None = None,
        key: str | None = None,
        end_user: str | None = None,
        model: str | None = None,
    ) -> Ask[Page[UsageRow]]:
        """Go through the sums by the dimensions of ``by``; days are UTC and included, by default the last 30."""
        return _list(
            UsageRow,
            "usage",
            by=by,
            since=since,
            until=until,
            tenant=tenant,
            key=key,
            end_user=end_user,
            model=model,
        )

    @operation
    def csv(
        self,
        *,
        by: Sequence[Dimension] = ("day",),
        since: date | None = None,
        until: date | None = None,
        tenant: str | None = None,
        key: str | None = None,
        end_user: str | None = None,
        model: str | None = None,
    ) -> Ask[str]:
        """Return the same as one CSV text with a heading."""
        asked = {"by": by, "since": since, "until": until}
        filters = {"tenant": tenant, "key": key, "end_user": end_user, "model": model}
        return Ask("GET", "usage", _text, params=_wire({**asked, **filters, "format": "csv"}))


class Requests(Resource[RunnerT]):
    """The request log, which holds no content. A request is in it about half a second after its end."""

    @listing
    def list(
        self,
        *,
        tenant: str | None = None,
        key: str | None = None,
        model: str | None = None,
        error: str | None = None,
        min_status: int | None = None,
        max_status: int | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> Ask[Page[Request]]:
        """Go through the log, newest first. Times have to be aware."""
        return _list(
            Request,
            "requests",
            tenant=tenant,
            key=key,
            model=model,
            error=error,
            min_status=min_status,
            max_status=max_status,
            since=since,
            until=until,
        )

    @operation
    def show(self, request_id: str) -> Ask[Request]:
        """Return one, by the id that its answer had in ``x-request-id``; raises ``NotFound``."""
        return _get(Request, path("requests", request_id))


class Decisions(Resource[RunnerT]):
    """How requests were served, and why so."""

    @operation
    def show(self, request_id: str) -> Ask[Decision]:
        """Return what was decided about one request; raises ``NotFound``."""
        return _get(Decision, path("decisions", request_id))


class Models(Resource[RunnerT]):
    """Models on offer."""

    @listing
    def list(self) -> Ask[Page[Model]]:
        """Go through all of them, by name."""
        return _list(Model, "models")

    @operation
    def show(self, model: str) -> Ask[Model]:
        """Return one, by its name or an alias; raises ``NotFound``."""
        return _get(Model, path("models", *model.split("/")))  # names may hold slashes


class FairnessOfModels(Resource[RunnerT]):
    """How models are shared between tenants at this moment. The rules are a policy: ``policies.show("fairness")``."""

    @listing
    def list(self) -> Ask[Page[Fairness]]:
        """Go through all models, by name, without their tenants."""
        return _list(Fairness, "fairness")

    @operation
    def show(self, model: str, *, limit: int = 50) -> Ask[Fairness]:
        """Return one model's sharing with at most ``limit`` of its tenants; raises ``NotFound``."""
        return Ask("GET", path("fairness", *model.split("/")), _typed(Fairness), params={"limit": limit})


class Workers(Resource[RunnerT]):
    """Workers, and the verbs that steer them."""

    @listing
    def list(self) -> Ask[Page[Worker]]:
        """Go through all of them, by id."""
        return _list(Worker, "workers")

    @operation
    def show(self, worker_id: str) -> Ask[Worker]:
        """Return one; raises ``NotFound``."""
        return _get(Worker, path("workers", worker_id))

    @operation
    def start(self, worker_id: str) -> Ask[Worker]:
        """Start one that is stopped or failed."""
        return _post(Worker, path("workers", worker_id, "start"))

    @operation
    def stop(self, worker_id: str) -> Ask[Worker]:
        """Stop one at once; what it runs is tried elsewhere, or ends with an error."""
        return _post(Worker, path("workers", worker_id, "stop"))

    @operation
    def drain(self, worker_id: str) -> Ask[Worker]:
        """Have what one runs go on elsewhere, let it finish the rest, then stop it; answers when that is done."""
        return _post(Worker, path("workers", worker_id, "drain"))

    @operation
    def restart(self, worker_id: str) -> Ask[Worker]:
        """Drain one and start it again."""
        return _post(Worker, path("workers", worker_id, "restart"))

    @operation
    def logs(self, worker_id: str, *, lines: int = 100) -> Ask[str]:
        """Return the newest lines of a worker's log."""
        return Ask("GET", path("workers", worker_id, "logs"), _text, params={"lines": lines})


class Configuration(Resource[RunnerT]):
    """The settings: what holds, and overlays over the file. An overlay maps dotted paths to values.

    ``expect`` names what a change replaces: the number of the revision in force, as ``show().revision`` tells it, None
    if there is none, or "any". Where another one is in force, ``PreconditionFailed`` is raised and nothing is changed.
    """

    @operation
    def show(self) -> Ask[Config]:
        """Return every value that holds, and who says it."""
        return _get(Config, "config")

    @operation
    def diff(self) -> Ask[Changes]:
        """Return how what holds differs from what file and environment say."""
        return _get(Changes, "config/diff")

    @operation
    def validate(self, overlay: Mapping[str, Any]) -> Ask[Verdict]:
        """Tell whether an overlay could be applied."""
        return _post(Verdict, "config:validate", {"overlay": overlay})

    @operation
    def reload(self) -> Ask[Reloaded]:
        """Have the file read again; raises ``Conflict`` if it cannot be used, and all stays as it was."""
        return _post(Reloaded, "config:reload")

    @listing
    def revisions(self) -> Ask[Page[Revision]]:
        """Go through the overlays that were applied, newest first."""
        return _list(Revision, "config/revisions")

    @operation
    def apply(
        self, overlay: Mapping[str, Any], *, expect: int | Literal["any"] | None, note: str = ""
    ) -> Ask[Revision]:
        """Put an overlay in force in the place of the one before; raises ``BadRequest`` if it cannot be."""
        body = {"overlay": overlay, "note": note}
        return _post(Revision, "config/revisions", body, if_match=_replacing(expect))

    @operation
    def rollback(self, number: int) -> Ask[InForce]:
        """Put what an older revision held in force again, as a new one."""
        return _post(InForce, f"config/revisions/{number}:rollback")


class Policies(Resource[RunnerT]):
    """Policies, by kind. A kind that the gateway does not have raises ``NotFound``, code ``policy_not_available``.

    ``expect`` names what a change replaces: the number of the revision in force, as ``show(kind).revision`` tells it,
    None if there is none, or "any". Where another one is in force, ``PreconditionFailed`` is raised and nothing is
    changed.
    """

    @operation
    def show(self, kind: PolicyKind) -> Ask[Policy]:
        """Return a policy's revision and every value that holds."""
        return _get(Policy, path("policies", kind))

    @listing
    def revisions(self, kind: PolicyKind) -> Ask[Page[Revision]]:
        """Go through a policy's revisions, newest first."""
        return _list(Revision, path("policies", kind, "revisions"))

    @operation
    def validate(self, kind: PolicyKind, overlay: Mapping[str, Any]) -> Ask[Verdict]:
        """Tell whether an overlay could be applied."""
        return _post(Verdict, path("policies", kind) + ":validate", {"overlay": overlay})

    @operation
    def diff(self, kind: PolicyKind, overlay: Mapping[str, Any]) -> Ask[Changes]:
        """Tell what an overlay would change."""
        return _post(Changes, path("policies", kind) + ":diff", {"overlay": overlay})

    @operation
    def apply(
        self, kind: PolicyKind, overlay: Mapping[str, Any], *, expect: int | Literal["any"] | None, note: str = ""
    ) -> Ask[Revision]:
        """Put an overlay in force for good; raises ``BadRequest`` if it cannot be."""
        body = {"overlay": overlay, "note": note}
        return _post(Revision, path("policies", kind) + ":apply", body, if_match=_replacing(expect))

    @operation
    def canary(
        self,
        kind: PolicyKind,
        overlay: Mapping[str, Any],
        *,
        expect: int | Literal["any"] | None,
        lasts_s: float = 600,
        note: str = "",
    ) -> Ask[Revision]:
        """Put an overlay in force for a time; then what held before holds again, unless it is kept."""
        body = {"overlay": overlay, "lasts_s": lasts_s, "note": note}
        return _post(Revision, path("policies", kind) + ":canary", body, if_match=_replacing(expect))

    @operation
    def keep(self, kind: PolicyKind) -> Ask[Revision]:
        """Have the canary in force stay for good."""
        return _post(Revision, path("policies", kind) + ":keep")

    @operation
    def rollback(self, kind: PolicyKind, number: int | None = None) -> Ask[InForce]:
        """Return to a revision, or to what held before the one in force; a canary ends at once."""
        return _post(InForce, path("policies", kind) + ":rollback", {"number": number})


class Audit(Resource[RunnerT]):
    """The record of what operators changed, and tried to change."""

    @listing
    def list(
        self,
        *,
        actor: str | None = None,
        action: str | None = None,
        target: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> Ask[Page[AuditEntry]]:
        """Go through the record, newest first. Times have to be aware."""
        return _list(AuditEntry, "audit", actor=actor, action=action, target=target, since=since, until=until)


class System(Resource[RunnerT]):
    """The gateway itself."""

    @operation
    def version(self) -> Ask[Version]:
        """Return what runs."""
        return _get(Version, "version")

    @operation
    def health(self) -> Ask[Health]:
        """Return how every part is."""
        return _get(Health, "health")
