"""What can go wrong on purpose: one value names every fault, and a box says which requests it hits."""

from typing import Any

import msgspec


class Faults(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Faults of a request; counts are SSE frames already sent, and 0 means before the first.

    A plain answer counts as one frame: `cut_after`/`die_after` of 1 or more send half of its body first.
    """

    times: int | None = None
    """Hit only this many matching requests, then behave."""
    contains: str = ""
    """Hit only requests whose raw body contains this text."""
    refuse_status: int | None = None
    retry_after: float | None = None
    """Seconds in the Retry-After header of a refusal."""
    silent: bool = False
    """Accept the request and never answer, not even headers."""
    stall_after: int | None = None
    trickle_ms: float | None = None
    """Wait this long before every frame."""
    die_after: int | None = None
    """os._exit(70); 0 = before the headers."""
    error_first: bool = False
    """200, then an error as the first frame."""
    error_after: int | None = None
    cut_after: int | None = None
    """Close the connection; 0 = before the headers."""
    malformed_after: int | None = None
    """Spoil that one frame's JSON and go on."""
    usage_with_choices: bool = False
    """Usage on the last chunk that has choices, in place of a chunk of its own."""
    ping_ms: float | None = None
    """Send `: ping` comments this often while a stream has nothing to say."""
    duplicate_done: bool = False
    no_done: bool = False
    unhealthy: bool = False
    """/health says 500 while everything else works."""


NO_FAULTS = Faults()


class FaultBox:
    """Holds the faults in force and hands them to the requests they are meant for."""

    def __init__(self, faults: Faults) -> None:
        self.put(faults)

    def put(self, faults: Faults) -> None:
        """Replace the faults in force, and start counting `times` anew."""
        self.current = faults
        self._left = faults.times

    def take(self, raw_body: bytes) -> Faults:
        """Return the faults that hit a request with this body."""
        if self.current is NO_FAULTS or self.current.contains.encode() not in raw_body:
            return NO_FAULTS
        if self._left is None:
            return self.current
        if self._left <= 0:
            return NO_FAULTS
        self._left -= 1
        return self.current


def parse_faults(fields: dict[str, Any]) -> Faults:
    """Return the faults of a JSON object or of command line flags; raises msgspec.ValidationError."""
    return msgspec.convert(fields, Faults)
