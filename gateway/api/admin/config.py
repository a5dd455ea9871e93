"""The settings: what holds and who says so, reloading the file, and overlays over it."""

from typing import Any, Literal

from fastapi import APIRouter, Response

from core.errors import Conflict
from gateway import revisions
from gateway.api.admin.changes import (
    Changes,
    ChangeShape,
    FaultShape,
    InForce,
    NewRevision,
    Number,
    Proposal,
    RevisionShape,
    Verdict,
    check_number,
    expected_by,
    history,
    in_force,
    shown_changes,
    shown_faults,
    shown_revision,
    tag,
    verdict,
)
from gateway.api.admin.document import errors, tagged
from gateway.api.admin.etags import IfMatch
from gateway.api.admin.guard import Acting, guarded
from gateway.api.admin.pages import After, Limit, Page
from gateway.api.admin.shapes import Shape
from gateway.services import Services
from gateway.settings import SettingsError


class ValueShape(Shape):
    """One value that holds; secrets are masked."""

    path: str
    value: Any
    source: Literal["default", "file", "environment", "overlay"]


class ConfigShape(Shape):
    """What holds. `digest` is equal for equal settings, `revision` that of the overlay in force. `needs_restart` names
    what the file has changed and the next start will take, `dropped` entries of overlays that the file has no room for
    any more. `last_error` says why the newest state of the file is not in use."""

    digest: str
    revision: int | None
    values: list[ValueShape]
    needs_restart: list[str]
    dropped: list[FaultShape]
    last_error: str | None


class Reloaded(Shape):
    """What a reload did."""

    digest: str
    changes: list[ChangeShape]
    needs_restart: list[str]
    dropped: list[FaultShape]


def config_routes(services: Services) -> APIRouter:
    """Return the routes of the settings."""
    router = APIRouter(prefix="/admin/v1", tags=["config"], route_class=guarded(services))
    live, overlays = services.live, services.overlays

    @router.get("/config", responses=tagged(200) | errors())
    async def show_config(response: Response) -> ConfigShape:
        """Show every value that holds, and who says it: default, file, environment or overlay.

        Its `ETag` is what a change has to name.
        """
        current = overlays.get(revisions.CONFIG)
        tag(response, current)
        return ConfigShape(
            digest=live.digest,
            revision=None if current is None else current.number,
            values=[
                ValueShape(path=value.path, value=value.value, source=value.source)
                for value in revisions.values(live.effective)
            ],
            needs_restart=list(live.needs_restart),
            dropped=shown_faults(live.dropped),
            last_error=live.last_error,
        )

    @router.get("/config/diff", responses=errors())
    async def diff_config() -> Changes:
        """Show how what holds differs from what file and environment say."""
        declared = revisions.effective(live.declared, {})
        return Changes(changes=shown_changes(revisions.diff(declared, live.effective)))

    @router.post("/config:validate", responses=errors())
    async def validate_config(body: Proposal) -> Verdict:
        """Tell whether an overlay could be applied. Changes nothing."""
        return verdict(overlays.validate(revisions.CONFIG, body.overlay))

    @router.post("/config:reload", responses=errors(409))
    async def reload_config() -> Reloaded:
        """Read the file and the environment again. If they cannot be used, all stays as it was: 409."""
        try:
            applied = await live.reload()
        except SettingsError as error:
            raise Conflict(f"the settings from before hold: {error}", code="settings_refused") from error
        return Reloaded(
            digest=live.digest,
            changes=shown_changes(applied.changes),
            needs_restart=list(applied.needs_restart),
            dropped=shown_faults(applied.dropped),
        )

    @router.get("/config/revisions", responses=errors())
    async def list_config_revisions(limit: Limit = 50, after: After = None) -> Page[RevisionShape]:
        """List the overlays that were applied, newest first."""
        return await history(services, revisions.CONFIG, limit, after)

    @router.post("/config/revisions", status_code=201, responses=tagged(201) | errors(409, 412, 428))
    async def apply_config(
        body: NewRevision, response: Response, act: Acting, if_match: IfMatch = None
    ) -> RevisionShape:
        """Put an overlay in force, on every gateway within a second. It may hold only what is marked overridable.

        Needs `If-Match`; `*` is whatever holds.
        """
        act.detail["paths"] = sorted(body.overlay)
        revision = await overlays.apply(
            revisions.CONFIG,
            body.overlay,
            author=act.operator.name,
            expected=expected_by(if_match, services, revisions.CONFIG),
            note=body.note,
        )
        act.target = str(revision.number)
        tag(response, revision)
        return shown_revision(revision)

    @router.post("/config/revisions/{number}:rollback", responses=errors(404, 409))
    async def roll_back_config(number: Number, act: Acting) -> InForce:
        """Put what an older revision held in force again, as a new one."""
        await check_number(services, revisions.CONFIG, number)
        return in_force(await overlays.rollback(revisions.CONFIG, number, author=act.operator.name))

    return router
