"""Deficit round robin (Shreedhar and Varghese, 1996) on weighted tokens.

A tenant's deficit is what is left of its round: it is next while it has some left, then the others are. The length of
an answer is not known when it starts, so a tenant may overdraw, and then sits out as many rounds as it owes. That is
the order of counters in whole rounds, which is how it is written here.
"""

from routing.fairness.account import MILLI, Account
from routing.fairness.ordered import Key
from routing.fairness.vtc import Vtc


class Drr(Vtc):
    """Rounds of ``threshold`` weighted tokens; inside a round the order of coming."""

    def key(self, account: Account) -> Key:
        """Return the round in which the tenant has something left."""
        return (account.counter // self._round, 0)

    def lift(self, account: Account, rank: int) -> None:
        """A tenant that was away begins with the round that runs: what was left of earlier ones is forfeit."""
        account.lift(self.base() // self._round * self._round)

    @property
    def _round(self) -> int:
        return self.fairness.threshold * MILLI
