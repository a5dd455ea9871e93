"""Requests that go before their turn: those about to miss their class's target, those whose deadline leaves no slack
behind what is still to be done, and under ``priority`` the aged ones.

Earliest deadline first, and at most ``rescue_share`` of all starts, so that it bends the order and never replaces it. A
tenant that is ahead of its share is not rescued: else a flood of late requests would pay.
"""

import heapq
import itertools
import math

from routing.fairness.account import MILLI, Account, Place, Request
from routing.fairness.policy import Fairness

_SAVED_STARTS = 4  # rescues in a row, at most
_ROOM = 64
_ENGINE_PART = 0.5  # of a target: a request is rescued while there is still that much time for the engine

_Entry = tuple[float, int, Request, Account]


def _waits(entry: _Entry) -> bool:
    """Whether the request still waits for its turn here; it may have gone to wait for another model."""
    return entry[2].place is Place.TURN and entry[2].account is entry[3]


class Rescue:
    """Deadlines of the waiting requests of one model. All operations cost O(log n), amortised."""

    def __init__(self, fairness: Fairness) -> None:
        self._fairness = fairness
        self._heap: list[_Entry] = []
        self._most = _ROOM
        self._budget = 0
        self._order = itertools.count()

    def __bool__(self) -> bool:
        return bool(self._heap)

    def put(self, request: Request) -> None:
        """A request waits for its turn."""
        due = self._due(request)
        if due is None:
            return
        if len(self._heap) >= self._most:  # those that have gone stay until their deadlines, which callers choose
            self._heap = [entry for entry in self._heap if _waits(entry)]
            heapq.heapify(self._heap)
            self._most = 2 * len(self._heap) + _ROOM
        heapq.heappush(self._heap, (due, next(self._order), request, request.account))

    def first(self, now: float, virtual: int) -> Request | None:
        """Return the request that must not wait for its turn; None if there is none, or too many were rescued."""
        heap = self._heap
        while heap and not _waits(heap[0]):
            heapq.heappop(heap)
        if not heap or heap[0][0] > now or self._budget < MILLI:
            return None
        request = heap[0][2]
        if self._fairness.policy != "priority" and request.account.counter > virtual + self._fairness.threshold * MILLI:
            heapq.heappop(heap)  # it waits for its turn, as it should
            return None
        return request

    def started(self, *, was_rescued: bool) -> None:
        """A request that waited starts."""
        self._budget += int(self._fairness.rescue_share * MILLI) - (MILLI if was_rescued else 0)
        self._budget = min(self._budget, _SAVED_STARTS * MILLI)

    def _due(self, request: Request) -> float | None:
        if self._fairness.policy == "priority":
            return request.arrived_at + self._fairness.ageing * request.rank if request.rank else None
        if self._fairness.policy == "fcfs":
            return None
        due = math.inf
        if request.rank < len(self._fairness.targets):
            due = self._fairness.targets[request.rank] * _ENGINE_PART
        if request.deadline_s is not None:
            took_s = request.role.remaining_s if request.role is not None else request.deadline_s * (1 - _ENGINE_PART)
            due = min(due, request.deadline_s - took_s)
        return request.arrived_at + due if due < math.inf else None
