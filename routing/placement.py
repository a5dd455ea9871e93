"""Which worker gets the next request. The one score of the house; for now it is the load alone."""

from collections.abc import Iterable

import msgspec

from core.ids import WorkerId


class Candidate(msgspec.Struct, frozen=True):
    """A worker with room. ``was_tried``: a leg of this very request has failed on it."""

    worker: WorkerId
    outstanding_tokens: int
    is_healthy: bool
    was_tried: bool


def choose(candidates: Iterable[Candidate]) -> WorkerId | None:
    """Return the candidate with the fewest outstanding tokens, or None if there is no candidate.

    Healthy workers come first, and workers this request has not failed on before the others. If every candidate's
    probes fail, one of them is chosen all the same: a probe can be wrong, an unused worker is surely useless.
    """
    best = min(
        candidates,
        key=lambda c: (not c.is_healthy, c.was_tried, c.outstanding_tokens, c.worker),
        default=None,
    )
    return best.worker if best is not None else None
