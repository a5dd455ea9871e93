"""Which worker gets the next request: the one score of the house.

A request of whose prompt nothing may lie in a cache goes where the fewest tokens are outstanding. One that shares its
beginning with others goes where it is done soonest: what its worker need not compute against how many others it has
beside it there (Parrot's ``FindEngine``, section 5.4, which puts a whole group on one engine; here each of its calls is
placed when it starts, and a worker that fills up is slower for the next: so a group spreads as water does). A request
that somebody reads goes where the fewest places are lost to others by it, as in the paper.
"""

from collections.abc import Iterable

import msgspec

from core.ids import WorkerId


class Candidate(msgspec.Struct, frozen=True):
    """A worker with room. ``was_tried``: a leg of this very request has failed on it. ``fresh_tokens``: of the prompt
    that are not in its cache; ``seconds``: that the request will take there, None if that cannot be told.
    ``legs_lost``: how many fewer legs it is given while this one runs."""

    worker: WorkerId
    outstanding_tokens: int
    is_healthy: bool
    was_tried: bool
    legs_lost: int = 0
    fresh_tokens: int = 0
    seconds: float | None = None


def choose(candidates: Iterable[Candidate]) -> WorkerId | None:
    """Return the candidate where the request is done soonest, or None if there is no candidate; where one cannot tell
    that, the one with the fewest tokens to compute, those for this request included.

    Healthy workers come first, and workers this request has not failed on before the others. If every candidate's
    probes fail, one of them is chosen all the same: a probe can be wrong, an unused worker is surely useless.
    """
    able = tuple(candidates)
    can_tell = all(candidate.seconds is not None for candidate in able)

    def key(candidate: Candidate) -> tuple[bool, bool, int, float, int, WorkerId]:
        tokens = candidate.outstanding_tokens + candidate.fresh_tokens
        seconds = candidate.seconds if can_tell and candidate.seconds is not None else 0.0
        return (
            not candidate.is_healthy, candidate.was_tried, candidate.legs_lost, seconds, tokens, candidate.worker
        )  # fmt: skip

    best = min(able, key=key, default=None)
    return best.worker if best is not None else None
