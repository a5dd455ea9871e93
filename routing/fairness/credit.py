"""Bounded credit: VTC-PC's lift. A tenant that was away comes back at most K behind the others, not level with them.

With the plain lift a light tenant never has anything to its credit, and preemption has nobody to preempt for. Credit is
a token bucket of K that is filled by the fair share that passes by while the tenant does not use it (virtual time,
times ``credit_refill``): in any interval a tenant gets at most K more than if it had waited all along, however often it
leaves and comes back.
"""

from routing.fairness.account import MILLI, Account
from routing.fairness.policy import Fairness
from routing.fairness.vtc import Vtc


def allowance(account: Account, virtual: int, fairness: Fairness) -> int:
    """Return how far behind ``virtual`` the tenant may begin, in the units of its counter."""
    most = fairness.credit * MILLI * MILLI // account.weight
    if account.virtual is None:
        return most
    kept = max(0, account.virtual - account.counter)
    refilled = (virtual - account.virtual) * int(fairness.credit_refill * MILLI) // MILLI
    return min(most, kept + refilled)


class VtcPc(Vtc):
    """VTC with bounded credit; the other half, preemption, is in ``preemption.py``."""

    def lift(self, account: Account, rank: int) -> None:
        """As in ``Vtc``, less the tenant's credit."""
        virtual = self.base()
        account.lift(virtual - allowance(account, virtual, self.fairness))
        account.virtual = virtual

    def virtual_now(self) -> int:
        """Return virtual time, which never goes back: else credit would be given on top of another's credit."""
        return max(self.virtual, super().virtual_now())
