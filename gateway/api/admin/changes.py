"""What configuration and policies share on the wire: overlays, their revisions, and what they change."""

from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import Path, Response
from pydantic import Field

from core.errors import PreconditionRequired, UnknownId
from core.records import Revision
from gateway.api.admin.etags import ANY, etag_of, version_in
from gateway.api.admin.pages import Page, page_found, place_of
from gateway.api.admin.shapes import ONE_LINE, Line, Shape, shown_moment, shown_time
from gateway.overlays import in_words, number_of
from gateway.revisions import Change, Fault
from gateway.services import Services

Overlay = Annotated[
    dict[Annotated[str, Field(min_length=1, max_length=256, pattern=ONE_LINE)], Any],
    Field(
        max_length=256,
        description="Values by dotted path, as in the settings file; what it does not name is the file's.",
    ),
]
Number = Annotated[int, Path(ge=1, le=2**31 - 1)]


class Proposal(Shape):
    """An overlay to be looked at. Changes nothing."""

    overlay: Overlay


class NewRevision(Shape):
    """An overlay to be put in force, in the place of the one before."""

    overlay: Overlay
    note: Line = ""


class NewCanary(NewRevision):
    """An overlay to be tried. Unless it is kept within `lasts_s` seconds, what held before holds again."""

    lasts_s: float = Field(default=600, ge=1, le=7 * 86_400)


class FaultShape(Shape):
    """One entry of an overlay that cannot be used."""

    path: str
    message: str


class Verdict(Shape):
    """Whether an overlay can be applied, and if not, why."""

    valid: bool
    faults: list[FaultShape]


class ChangeShape(Shape):
    """One value that differs; secrets are masked. `source`: who says `after`."""

    path: str
    before: Any
    after: Any
    source: Literal["default", "file", "environment", "overlay"]


class Changes(Shape):
    """All values that differ."""

    changes: list[ChangeShape]


class RevisionShape(Shape):
    """One state of a resource. The overlay of the one in force lies over what the settings file says."""

    resource: str
    number: int
    state: Literal["applied", "canary", "replaced", "rolled_back"]
    overlay: dict[str, Any]
    author: str
    created_at: datetime
    note: str
    expires_at: datetime | None


class InForce(Shape):
    """The revision in force; null while the settings file alone says what holds."""

    revision: RevisionShape | None


async def history(services: Services, resource: str, limit: int, after: str | None) -> Page[RevisionShape]:
    """Return a page of a resource's revisions, newest first."""
    found = await services.overlays.history(resource, place_of(after, int), limit + 1)
    return page_found(found, limit, lambda revision: revision.number, shown_revision)


async def check_number(services: Services, resource: str, number: int) -> None:
    """Raise ``UnknownId`` unless the resource has a revision of this number."""
    if await services.store.revisions.revision(resource, number) is None:
        raise UnknownId(f"{resource!r} has no revision {number}", code="unknown_revision")


def expected_by(if_match: str | None, services: Services, resource: str) -> int | None:
    """Return the number of the revision that a change is to replace, 0 for the file alone, None for whichever holds.

    Raises ``PreconditionRequired``, which names what is in force, and ``PreconditionFailed``.
    """
    if if_match is None:
        held = number_of(services.overlays.get(resource))
        raise PreconditionRequired(
            f"{in_words(held)} is in force for {resource!r}: say that you replace it, by the header "
            f"`If-Match: {etag_of(held)}`, or replace whatever is in force, by `If-Match: {ANY}`",
            param="If-Match",
        )
    return None if if_match.strip() == ANY else version_in(if_match)


def tag(response: Response, revision: Revision | None) -> None:
    """Have an answer carry the ``ETag`` of the revision in force; "0" is that of the file alone."""
    response.headers["etag"] = etag_of(number_of(revision))


def shown_revision(revision: Revision) -> RevisionShape:
    """Return a revision as the wire shows it."""
    return RevisionShape(
        resource=revision.resource,
        number=revision.number,
        state=revision.state,
        overlay=revision.overlay,
        author=revision.author,
        created_at=shown_time(revision.created_at),
        note=revision.note,
        expires_at=shown_moment(revision.expires_at),
    )


def in_force(revision: Revision | None) -> InForce:
    """Return what holds as the wire shows it."""
    return InForce(revision=None if revision is None else shown_revision(revision))


def verdict(faults: tuple[Fault, ...]) -> Verdict:
    """Return what is wrong with an overlay as the wire shows it."""
    return Verdict(valid=not faults, faults=shown_faults(faults))


def shown_faults(faults: tuple[Fault, ...]) -> list[FaultShape]:
    """Return faults as the wire shows them."""
    return [FaultShape(path=fault.path, message=fault.message) for fault in faults]


def shown_changes(changes: tuple[Change, ...]) -> list[ChangeShape]:
    """Return changes as the wire shows them."""
    return [
        ChangeShape(path=change.path, before=change.before, after=change.after, source=change.source)
        for change in changes
    ]
