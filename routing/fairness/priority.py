"""Strict classes: the most urgent of all tenants first, fair by counters inside a class.

A flood of urgent requests would keep the others waiting for ever; ``rescue.py`` takes those out that have waited long.
"""

from routing.fairness.account import Account
from routing.fairness.ordered import Key
from routing.fairness.policy import Fairness
from routing.fairness.vtc import Vtc


class Priority(Vtc):
    """Classes before counters. Virtual time is kept by class: the counter of the tenant that was served last in it."""

    def __init__(self, fairness: Fairness) -> None:
        super().__init__(fairness)
        self._by_rank: dict[int, int] = {}

    def key(self, account: Account) -> Key:
        """Return the class of the tenant's first request, then its counter."""
        head = account.programs.first()
        assert head is not None
        return (head.rank, account.counter)

    def served(self, account: Account, rank: int) -> None:
        """As in ``Vtc``; also what the class has come to."""
        super().served(account, rank)
        self._by_rank[rank] = max(self._by_rank.get(rank, 0), account.counter)

    def lift(self, account: Account, rank: int) -> None:
        """As in ``Vtc``, by what the request's class has come to."""
        account.lift(self._by_rank.get(rank, self.virtual))  # of another policy's time, or another scheduler's
