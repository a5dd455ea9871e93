"""The virtual token counter (VTC, arXiv 2401.00588, Algorithm 2): the tenant that has had least is next.

What the lift does is what the bound hangs on. A tenant whose *queue* was empty comes back at the least counter of the
tenants whose queue is not, whatever it may have running; when nobody queues, at that of the tenant that was the last to
leave the queue. Lifting to the least of those that *run* looks alike and is not bounded.
"""

from collections.abc import Iterable

from routing.fairness.account import Account
from routing.fairness.ordered import Key, Ordered
from routing.fairness.policy import Fairness

_REBASE_AT = 2**50  # keeps counters exact where they travel as JSON numbers


class Vtc:
    """Whose turn it is among the tenants that wait. Other policies differ in ``key`` and ``lift``.

    ``first`` costs O(log n), amortised over the charges since; a charge costs nothing here (``Account.charge``).
    """

    is_flat = False

    def __init__(self, fairness: Fairness) -> None:
        self.fairness = fairness
        self.virtual = 0
        """Virtual time when a tenant came last; see ``virtual_now``."""
        self._backlogged: Ordered[Account] = Ordered(self.key)
        self._last_left: Account | None = None

    def __len__(self) -> int:
        return len(self._backlogged)

    def first(self) -> Account | None:
        """Return the tenant whose turn it is; None if none waits."""
        return self._backlogged.first()

    def arrive(self, account: Account, rank: int) -> None:
        """A request has come. Call it before the request waits or starts."""
        if not account.is_backlogged:
            self.lift(account, rank)

    def changed(self, account: Account) -> None:
        """The tenant's queue, or its counter other than upwards, has changed."""
        if account.programs.first() is not None:
            self._backlogged.put(account)
        else:
            self._backlogged.discard(account)

    def served(self, account: Account, rank: int) -> None:
        """A request of the tenant starts, or is promised a slot; call it before the request is charged."""
        if not account.is_backlogged:
            self._last_left = account

    def key(self, account: Account) -> Key:
        """Return what tenants are ordered by: the smallest is next."""
        return (account.counter, 0)

    def lift(self, account: Account, rank: int) -> None:
        """Take from a tenant that was away what it did not use meanwhile. Never lowers a counter."""
        account.lift(self.base())

    def base(self) -> int:
        """Return the counter that a returning tenant is measured by, which is virtual time, and keep it."""
        self.virtual = self.virtual_now()
        return self.virtual

    def virtual_now(self) -> int:
        """Return virtual time; looking changes nothing."""
        first = self._backlogged.first() or self._last_left
        return first.counter if first is not None else self.virtual

    def rebase(self, accounts: Iterable[Account]) -> None:
        """Subtract the same from all counters once they are large; orders nothing anew."""
        if self.virtual < _REBASE_AT:
            return
        shift, self.virtual = self.virtual, 0
        for account in accounts:
            account.counter -= shift
            if account.virtual is not None:
                account.virtual -= shift
        waiting = list(self._backlogged)
        self._backlogged = Ordered(self.key)
        for account in waiting:
            self._backlogged.put(account)
