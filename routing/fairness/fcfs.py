"""First come, first served, whoever it is. What to compare the others with."""

from routing.fairness.account import Account
from routing.fairness.ordered import Key
from routing.fairness.vtc import Vtc


class Fcfs(Vtc):
    """Order of arrival over all tenants; classes and programs count for nothing. Counters are kept, to be looked at."""

    is_flat = True

    def key(self, account: Account) -> Key:
        """Return the arrival of the tenant's first request."""
        head = account.programs.first()
        assert head is not None
        return (head.number, 0)

    def lift(self, account: Account, rank: int) -> None:
        """Nothing is made up for, so nothing is taken."""
