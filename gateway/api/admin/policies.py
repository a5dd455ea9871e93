"""Policies: settings that steer decisions, each kind changed by revisions of its own, with the same verbs."""

from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Response
from pydantic import Field

from core.errors import UnknownId
from gateway.api.admin.changes import (
    Changes,
    InForce,
    NewCanary,
    NewRevision,
    Proposal,
    RevisionShape,
    Verdict,
    check_number,
    expected_by,
    history,
    in_force,
    shown_changes,
    shown_revision,
    tag,
    verdict,
)
from gateway.api.admin.config import ValueShape
from gateway.api.admin.document import errors, tagged
from gateway.api.admin.etags import IfMatch
from gateway.api.admin.guard import Acting, guarded
from gateway.api.admin.pages import After, Limit, Page
from gateway.api.admin.shapes import Shape
from gateway.revisions import POLICIES, values
from gateway.services import Services

Kind = Literal["cache", "examples", "routing", "fairness", "kv"]


class PolicyShape(Shape):
    """A policy: its revision in force, if any, and every value that holds."""

    kind: Kind
    revision: RevisionShape | None
    values: list[ValueShape]


class Target(Shape):
    """Where to return to; null: to what held before the revision in force."""

    number: int | None = Field(default=None, ge=1, le=2**31 - 1)


def _available(kind: Kind) -> Kind:
    if kind not in POLICIES:
        raise UnknownId(
            f"this version has no {kind} policy; there is {', '.join(sorted(POLICIES))}", code="policy_not_available"
        )
    return kind


Available = Annotated[Kind, Depends(_available)]
_BEFORE = Target()


def policy_routes(services: Services) -> APIRouter:
    """Return the routes of policies."""
    router = APIRouter(prefix="/admin/v1/policies", tags=["policies"], route_class=guarded(services))
    live, overlays = services.live, services.overlays

    @router.get("/{kind}", responses=tagged(200) | errors(404))
    async def show_policy(kind: Available, response: Response) -> PolicyShape:
        """Show a policy: its revision, and every value that holds, with who says it.

        Its `ETag` is what a change has to name.
        """
        revision = overlays.get(kind)
        tag(response, revision)
        return PolicyShape(
            kind=kind,
            revision=in_force(revision).revision,
            values=[
                ValueShape(path=value.path, value=value.value, source=value.source)
                for value in values(live.effective, kind)
            ],
        )

    @router.get("/{kind}/revisions", responses=errors(404))
    async def list_policy_revisions(kind: Available, limit: Limit = 50, after: After = None) -> Page[RevisionShape]:
        """List a policy's revisions, newest first."""
        return await history(services, kind, limit, after)

    @router.post("/{kind}:validate", responses=errors(404))
    async def validate_policy(kind: Available, body: Proposal) -> Verdict:
        """Tell whether an overlay could be applied. Changes nothing."""
        return verdict(overlays.validate(kind, body.overlay))

    @router.post("/{kind}:diff", responses=errors(404))
    async def diff_policy(kind: Available, body: Proposal) -> Changes:
        """Tell what an overlay would change. Changes nothing."""
        return Changes(changes=shown_changes(overlays.diff(kind, body.overlay)))

    @router.post("/{kind}:apply", status_code=201, responses=tagged(201) | errors(404, 409, 412, 428))
    async def apply_policy(
        kind: Available, body: NewRevision, response: Response, act: Acting, if_match: IfMatch = None
    ) -> RevisionShape:
        """Put an overlay in force for good, on every gateway within a second.

        Needs `If-Match`; `*` is whatever holds.
        """
        act.detail["paths"] = sorted(body.overlay)
        revision = await overlays.apply(
            kind,
            body.overlay,
            author=act.operator.name,
            expected=expected_by(if_match, services, kind),
            note=body.note,
        )
        tag(response, revision)
        return shown_revision(revision)

    @router.post("/{kind}:canary", status_code=201, responses=tagged(201) | errors(404, 409, 412, 428))
    async def canary_policy(
        kind: Available, body: NewCanary, response: Response, act: Acting, if_match: IfMatch = None
    ) -> RevisionShape:
        """Put an overlay in force for a time: unless it is kept, what held before holds again.

        Needs `If-Match`; `*` is whatever holds.
        """
        act.detail["paths"] = sorted(body.overlay)
        revision = await overlays.canary(
            kind,
            body.overlay,
            author=act.operator.name,
            expected=expected_by(if_match, services, kind),
            lasts_s=body.lasts_s,
            note=body.note,
        )
        tag(response, revision)
        return shown_revision(revision)

    @router.post("/{kind}:keep", responses=errors(404, 409))
    async def keep_policy(kind: Available) -> RevisionShape:
        """Have the canary in force stay for good."""
        return shown_revision(await overlays.keep(kind))

    @router.post("/{kind}:rollback", responses=errors(404, 409))
    async def roll_back_policy(kind: Available, act: Acting, body: Target = _BEFORE) -> InForce:
        """Return to an older revision, or to what held before the one in force; a canary ends at once."""
        if body.number is not None:
            await check_number(services, kind, body.number)
        return in_force(await overlays.rollback(kind, body.number, author=act.operator.name))

    return router
