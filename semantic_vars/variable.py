"""What becomes of semantic variables, which are set once (Parrot, section 4.1)."""

from enum import StrEnum

import msgspec

from semantic_vars.values import Value


class State(StrEnum):
    """Where a variable is. All but the first are ends."""

    PENDING = "pending"
    DONE = "done"
    FAILED = "failed"
    SKIPPED = "skipped"
    CANCELLED = "cancelled"


class Failure(msgspec.Struct, frozen=True):
    """Why a variable will never have a value. ``call`` is where it began; ``code`` says what it was there."""

    code: str
    message: str
    call: str


class Outcome(msgspec.Struct, frozen=True):
    """What became of a variable. ``missing`` of ``total``: elements of a list that failed or were skipped."""

    state: State
    value: Value = None
    failure: Failure | None = None
    missing: int = 0
    total: int = 0


PENDING = Outcome(State.PENDING)
SKIPPED = Outcome(State.SKIPPED)
CANCELLED = Outcome(State.CANCELLED)


def done(value: Value) -> Outcome:
    """Return the outcome of what went well."""
    return Outcome(State.DONE, value)
