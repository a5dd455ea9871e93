"""Which of a tenant's own requests is next: runs of workflows in the order of their age, other programs by attained
service (PLAS, Autellix, arXiv 2502.13965, §4.2).

A program's level is the logarithm of the service that its finished calls have had, in units that are calibrated by the
calls seen (the paper gives none; a ladder that is too high orders nothing). Where we differ: levels do not order
strictly. A class weighs a minute of waiting and a level five seconds, so whoever waits long enough is first: nobody
starves, and no promotion has to be watched for. What is ordered here never changes what the tenant as a whole gets.

Of a *run* the graph is known, and with it what is to be done: attained service says less. A call that has just become
ready does not queue behind those of runs that began later (Parrot's "app-level FIFO", section 5.4): the calls of all
runs of a class are one row, in the order in which their runs would end if nobody else were there; within a run the call
with the longest path behind it is first. That finishes runs one after another, short ones sooner, in place of all of
them at the end. Beside other programs the row counts as its call that waits longest: only among runs turns change.
"""

import heapq
import math
from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

from core.chat import Role
from core.ids import RequestId
from routing.fairness.ordered import Key, Ordered

RANK_S = 60.0
"""How many seconds of waiting one class is worth."""
LEVEL_S = 5.0
"""How many seconds of waiting one level is worth."""
LEVELS = 6
LOOK_AHEAD = 8
"""So many calls of one row may stand back before all of it does."""
HALF_LIFE_S = 60.0
"""After how long without a call half of a program's service is forgotten."""
REMEMBERED = 512
"""Programs of one tenant that are remembered while they do nothing; the ones used longest ago are forgotten first."""


class Waiting(Protocol):
    """A request as its tenant's order sees it. ``number`` counts arrivals; no field ever changes."""

    id: RequestId
    rank: int
    program: str
    number: int
    arrived_at: float
    role: Role | None


Call = TypeVar("Call", bound=Waiting)


class Ladder:
    """The levels of one model: the first one ends at the 25th percentile of the service of recent calls."""

    SKIPPED = 32  # calls before the first calibration; until then all programs are equal
    WINDOW = 256

    def __init__(self) -> None:
        self._recent: deque[int] = deque(maxlen=self.WINDOW)
        self._num_seen = 0
        self.first_rung: int | None = None

    def observe(self, service: int) -> None:
        """A call has ended that was served so much."""
        self._recent.append(service)
        self._num_seen += 1
        if self._num_seen % self.SKIPPED == 0:
            self.first_rung = max(1, sorted(self._recent)[len(self._recent) // 4])

    def level(self, service: int) -> int:
        """Return the level of a program whose calls have had so much; each is twice as high as the one below."""
        if self.first_rung is None:
            return 0
        return min(LEVELS - 1, (service // self.first_rung).bit_length())


class Program:
    """What one program of a tenant has had. ``service``: milli weighted tokens, less what is forgotten; ``is_run``:
    that one of its open calls is of a run."""

    __slots__ = ("idle_since", "is_run", "num_open", "service")

    def __init__(self) -> None:
        self.service = 0
        self.is_run = False
        self.num_open = 0
        self.idle_since = 0.0


_Name = tuple[str | None, int]
_CallKey = tuple[float, float, int]


def run_ends_at(call: Waiting, role: Role) -> float:
    """Return when the run of a call would end if it were alone."""
    return call.arrived_at - role.age_s + role.run_s


class _Row(Generic[Call]):
    """The waiting calls of one program and class, or of all runs of a class: those first that have run already."""

    __slots__ = ("_arrivals", "_aside", "_heap", "_keys", "_num_front", "calls", "name", "program", "rank")

    def __init__(self, name: _Name, program: Program | None) -> None:
        self.name = name
        self.rank = name[1]
        self.program = program
        self.calls: dict[RequestId, Call] = {}
        self._keys: dict[RequestId, _CallKey] = {}
        # Those that have gone too, until they come to the top.
        self._heap: list[tuple[_CallKey, RequestId]] = []
        self._arrivals: list[tuple[float, RequestId]] = []
        self._aside: list[tuple[_CallKey, RequestId]] = []
        self._num_front = 0

    def add(self, call: Call, role: Role | None, *, front: bool) -> None:
        key = (run_ends_at(call, role), -role.remaining_s, call.number) if role is not None else (0.0, 0.0, call.number)
        if front:
            self._num_front += 1
            key = (-math.inf, 0.0, -self._num_front)
        self.calls[call.id] = call
        self._keys[call.id] = key
        heapq.heappush(self._heap, (key, call.id))
        heapq.heappush(self._arrivals, (call.arrived_at, call.id))

    def stand_back(self, call: Call) -> bool:
        """Let the others of the row be first; return whether there are any, and few have done so."""
        assert self.head is call
        heapq.heappop(self._heap)
        self._aside.append((self._keys.pop(call.id), call.id))
        return self.has_head and len(self._aside) < LOOK_AHEAD

    def come_forward(self) -> None:
        for key, call in self._aside:
            if call in self.calls and call not in self._keys:
                self._keys[call] = key
                heapq.heappush(self._heap, (key, call))
        self._aside.clear()

    def discard(self, call: Call) -> None:
        del self.calls[call.id]
        self._keys.pop(call.id, None)
        if max(len(self._heap), len(self._arrivals)) > 2 * len(self.calls) + 16:
            self._heap = [(key, name) for name, key in self._keys.items()]
            self._arrivals = [(call.arrived_at, call.id) for call in self.calls.values()]
            heapq.heapify(self._heap)
            heapq.heapify(self._arrivals)

    @property
    def has_head(self) -> bool:
        """Whether one waits that does not stand back."""
        return bool(self._keys)

    @property
    def head(self) -> Call:
        heap = self._heap
        while self._keys.get(heap[0][1]) != heap[0][0]:
            heapq.heappop(heap)
        return self.calls[heap[0][1]]

    @property
    def since(self) -> float:
        """When the call came that waits longest."""
        arrivals = self._arrivals
        while arrivals[0][1] not in self.calls:
            heapq.heappop(arrivals)
        return arrivals[0][0]


class Programs(Generic[Call]):
    """One tenant's waiting requests in order. ``is_flat``: by arrival alone; ``knows_runs``: by what runs are known to
    have before them. Both are to be changed only while none waits."""

    def __init__(self, ladder: Ladder, *, is_flat: bool, knows_runs: bool = True) -> None:
        self._ladder = ladder
        self.is_flat = is_flat
        self.knows_runs = knows_runs
        self.num_runs = 0
        """How many runs have calls that wait or run."""
        self._known: dict[str, Program] = {}
        self._idle: OrderedDict[str, None] = OrderedDict()  # those with no call open, the longest idle first
        self._rows: dict[_Name, _Row[Call]] = {}
        self._standing_back: list[_Row[Call]] = []
        self._order: Ordered[_Row[Call]] = Ordered(self._key)

    def __bool__(self) -> bool:
        return bool(self._rows)

    def __iter__(self) -> Iterator[Call]:
        return (call for row in self._rows.values() for call in row.calls.values())

    def open(self, name: str, now: float, *, is_run: bool = False) -> None:
        """A call of the program has come. Calls without a program's name are programs of their own."""
        if not name:
            return
        program = self._known.get(name)
        if program is None:
            program = self._known[name] = Program()
        elif not program.num_open:
            idle_s = max(0.0, now - program.idle_since)  # a call may have come elsewhere before then
            program.service = int(program.service * 0.5 ** (idle_s / HALF_LIFE_S))
        self._idle.pop(name, None)
        program.num_open += 1
        if is_run and not program.is_run:
            program.is_run = True
            self.num_runs += 1
        self._forget_idle()

    def close(self, name: str, service: int, now: float) -> None:
        """A call of the program is over; it was served so much."""
        if service:
            self._ladder.observe(service)
        program = self._known.get(name)
        if program is not None:
            program.num_open -= 1
            program.service += service
            program.idle_since = now
            if not program.num_open:
                self._idle[name] = None
                self.num_runs -= program.is_run
                program.is_run = False

    def push(self, request: Call, *, front: bool = False) -> None:
        """Add a request behind those of its program and class, or before them if it has run already."""
        name, role = self._name(request), self._role(request)
        row = self._rows.get(name)
        if row is None:
            is_one = not self.is_flat and role is None
            row = self._rows[name] = _Row(name, self._known.get(request.program) if is_one else None)
        row.add(request, role, front=front)
        self._order.put(row)

    def remove(self, request: Call) -> None:
        """Take out a request that waits here."""
        row = self._rows[self._name(request)]
        row.discard(request)
        if not row.calls:
            del self._rows[row.name]
        if not row.has_head:
            self._order.discard(row)

    def stand_back(self, request: Call) -> None:
        """Let others be next than this one, which is, until ``come_forward``; and than all that are in its row, when
        ``LOOK_AHEAD`` of them have stood back."""
        row = self._rows[self._name(request)]
        self._standing_back.append(row)
        if row.stand_back(request):
            self._order.put(row)
        else:
            self._order.discard(row)

    def come_forward(self) -> None:
        """Let all be next again."""
        for row in self._standing_back:
            row.come_forward()
            if row.calls:
                self._order.put(row)
        self._standing_back.clear()

    def first(self) -> Call | None:
        """Return the request that is next; None if nobody waits, or all stand back."""
        row = self._order.first()
        return row.head if row is not None else None

    def _key(self, row: _Row[Call]) -> Key:
        head = row.head
        if self.is_flat:
            return (head.number, 0)
        if row.name[0] is None:
            return (row.since + RANK_S * row.rank, head.number)
        level = self._ladder.level(row.program.service) if row.program is not None else 0
        return (head.arrived_at + RANK_S * row.rank + LEVEL_S * level, head.number)

    def _name(self, request: Call) -> _Name:
        if self.is_flat:
            return ("", 0)
        return (None if self._role(request) is not None else request.program, request.rank)

    def _role(self, request: Call) -> Role | None:
        return request.role if self.knows_runs and not self.is_flat else None

    def _forget_idle(self) -> None:
        if len(self._known) > REMEMBERED and self._idle:
            del self._known[self._idle.popitem(last=False)[0]]
