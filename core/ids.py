"""Identifiers. Each is text on the wire; the type only keeps one kind from being passed for another."""

import os
from collections.abc import Iterator
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
    """Return an unguessable request id of 128 random bits. For one thread, the event loop's."""
    return RequestId("req_" + next(_HEX))


def _random_hex() -> Iterator[str]:
    """Yield 32 random hex digits, for ever; the system is asked for 256 of them at a time, for 15 µs a call."""
    while True:
        block = os.urandom(16 * 256).hex()
        for start in range(0, len(block), 32):
            yield block[start : start + 32]


_HEX = _random_hex()
