"""The tenants whose legs may be cut, those that are furthest ahead first."""

import heapq
import itertools
from typing import Generic, TypeVar

from core.ids import LegId
from routing.fairness.account import MILLI, UNBOUNDED, Account

STRIDE = 64 * MILLI
"""By how much a counter may grow before the order is told, in its units: 32 tokens of an answer at the usual price."""

Leg = TypeVar("Leg")
_Entry = tuple[int, int, Account]  # less the ceiling, the account's number


class Running(Generic[Leg]):
    """Legs by tenant, in the order of their start, and the tenants by how much they have had.

    Counters grow with every token, and what is first here grows fastest: so tenants are ordered by a ceiling above
    their counter, which is raised once in a ``STRIDE``. A charge costs a comparison, ``furthest`` O(log n) for each
    tenant that it returns or that is within a stride of them.
    """

    def __init__(self) -> None:
        self._legs: dict[Account, dict[LegId, Leg]] = {}
        self._entries: dict[Account, _Entry] = {}
        self._heap: list[_Entry] = []  # those that have been replaced too, until they come to the top
        self._count = itertools.count()

    def __len__(self) -> int:
        return len(self._legs)

    def of(self, account: Account) -> dict[LegId, Leg]:
        """Return the tenant's legs, the one that has run longest first."""
        return self._legs[account]

    def add(self, account: Account, name: LegId, leg: Leg) -> None:
        """A leg has started."""
        legs = self._legs.get(account)
        if legs is None:
            legs = self._legs[account] = {}
            account.on_rise = self._rise
            self._push(account, next(self._count))
        legs[name] = leg

    def remove(self, account: Account, name: LegId) -> None:
        """A leg has ended."""
        legs = self._legs[account]
        del legs[name]
        if not legs:
            del self._legs[account], self._entries[account]
            account.ceiling = UNBOUNDED

    def furthest(self, above: int, num: int) -> list[Account]:
        """Return the tenants with the largest counters, those above ``above`` and at most so many, the largest first.

        Of equal ones those come first that have been running longer.
        """
        heap, entries = self._heap, self._entries
        looked_at: list[_Entry] = []
        best: list[int] = []  # the largest counters so far, as a heap
        while heap:
            entry = heap[0]
            account = entry[2]
            if entries.get(account) is not entry:
                heapq.heappop(heap)
                continue
            if account.ceiling <= (best[0] if len(best) == num else above):
                break  # its counter is less than that, and so are those of all behind it
            looked_at.append(heapq.heappop(heap))
            if account.counter > above:
                (heapq.heappush if len(best) < num else heapq.heappushpop)(best, account.counter)
        for _, number, account in looked_at:
            self._push(account, number)
        ahead = [(-account.counter, number, account) for _, number, account in looked_at if account.counter > above]
        return [account for _, _, account in heapq.nsmallest(num, ahead)]

    def _rise(self, account: Account) -> None:
        self._push(account, self._entries[account][1])

    def _push(self, account: Account, number: int) -> None:
        account.ceiling = account.counter + STRIDE
        entry = self._entries[account] = (-account.ceiling, number, account)
        heapq.heappush(self._heap, entry)
        if len(self._heap) > 2 * len(self._entries) + 16:
            self._heap = list(self._entries.values())
            heapq.heapify(self._heap)
