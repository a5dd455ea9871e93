"""Changes that name the state they were made from: ``ETag`` and ``If-Match``."""

import re
from typing import Annotated

from fastapi import Header

from core.errors import PreconditionFailed, PreconditionRequired

IfMatch = Annotated[str | None, Header(alias="If-Match", max_length=64, description="The `ETag` that you have read.")]

ANY = "*"
"""The header's word for whatever state there is."""

_TAG = re.compile(r'(?:W/)?"(\d{1,9})"')


def etag_of(version: int) -> str:
    """Return the tag of a row's version."""
    return f'"{version}"'


def version_in(if_match: str | None) -> int:
    """Return the version that a change was made from. Raises ``PreconditionRequired`` and ``PreconditionFailed``."""
    if if_match is None:
        raise PreconditionRequired("read it first, and send its `ETag` in the header `If-Match`", param="If-Match")
    match = _TAG.fullmatch(if_match.strip())
    if match is None:
        raise PreconditionFailed(f"{if_match[:64]!r} is no `ETag` of this gateway; read it again", param="If-Match")
    return int(match[1])
