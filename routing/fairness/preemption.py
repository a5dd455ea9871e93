"""Which leg gives up its slot for a tenant that is behind its share, if any (VTC-PC).

A leg is worth cutting if its tenant is ahead of the claimant's by more than Θ and what it costs to go on later. Among
those the one is cut whose tenant is furthest ahead, less half that cost and α·k² for the k times it was cut before: a
penalty and not a limit, because a limit could leave nobody to cut, and then nothing would bound the difference.
"""

from itertools import islice
from typing import Protocol, TypeVar

from routing.fairness.account import MILLI, Account
from routing.fairness.policy import Fairness
from routing.fairness.running import Running

PER_DECISION = 2
"""Legs that one decision may cut; the next comes ``interval`` later."""
PER_WORKER = 2
"""Legs of one worker that are cut and have not ended yet. It has to let go of them before it loses more."""
_LOOKED_AT = 128  # of one tenant's legs, newest first; bounds the cost of a decision
_TENANTS_LOOKED_AT = 4


class Cuttable(Protocol):
    """A running leg whose request may go on later."""

    @property
    def num_cuts(self) -> int:
        """How often the leg's request was cut."""
        ...

    def is_eligible(self, quantum: int) -> bool:
        """Whether it may be cut now: long enough at it, worth it, and its worker has let go of earlier ones."""
        ...

    def resume_tokens(self) -> int:
        """Return how many tokens will probably be computed again."""
        ...


Leg = TypeVar("Leg", bound=Cuttable)


def choose_victim(claimant: Account, running: Running[Leg], fairness: Fairness) -> tuple[Leg, int] | None:
    """Return the leg to cut for the claimant and what that costs in tokens; None if none is worth it.

    Costs a look at a bounded number of legs, newest first, of the few tenants that are furthest ahead.
    """
    least = claimant.counter + fairness.threshold * MILLI
    best: tuple[Leg, int] | None = None
    best_score = 0.0
    price = fairness.prompt_price * MILLI
    for account in running.furthest(least, _TENANTS_LOOKED_AT):
        counter = account.counter
        if best is not None and counter <= best_score:
            break  # no leg of this tenant or of those behind it can score higher
        for leg in islice(reversed(running.of(account).values()), _LOOKED_AT):
            if not leg.is_eligible(fairness.quantum):
                continue
            tokens = leg.resume_tokens()
            cost = price * tokens
            score = counter - cost / 2 - fairness.penalty * MILLI * leg.num_cuts**2
            if counter > least + cost and (best is None or score > best_score):
                best, best_score = (leg, tokens), score
    return best
