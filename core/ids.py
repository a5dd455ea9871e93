"""Identifiers. Each is text on the wire; the type only keeps one kind from being passed for another."""

import secrets
from typing import NewType

RequestId = NewType("RequestId", str)
"""Unique per request; echoed as ``x-request-id``."""

LegId = NewType("LegId", str)
"""One run of a request on one worker: ``<request id>/<leg number>``, the first leg being 0."""

TenantId = NewType("TenantId", str)
"""Who pays and who is isolated from whom. Comes from the key alone, never from the request."""

ModelName = NewType("ModelName", str)
"""A model as the catalog names it; aliases are resolved before one of these exists."""

WorkerId = NewType("WorkerId", str)
"""One engine process or endpoint: ``<model>-<index>``."""


def new_request_id() -> RequestId:
    """Return an unguessable request id of 128 random bits."""
    return RequestId("req_" + secrets.token_hex(16))
