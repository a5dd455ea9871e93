"""All that wait for one model, and whose turn it is."""

import heapq
import itertools
from collections import OrderedDict

from core.ids import RequestId, TenantId
from routing.fairness.account import MILLI, Account, Place, Request
from routing.fairness.credit import VtcPc
from routing.fairness.drr import Drr
from routing.fairness.fcfs import Fcfs
from routing.fairness.policy import Fairness, Policy
from routing.fairness.priority import Priority
from routing.fairness.programs import Ladder
from routing.fairness.rescue import Rescue
from routing.fairness.vtc import Vtc
from routing.fairness.waste import Waste

_TURNS: dict[Policy, type[Vtc]] = {"fcfs": Fcfs, "drr": Drr, "vtc": Vtc, "vtc-pc": VtcPc, "priority": Priority}


class Line:
    """Waiting requests of one model, their tenants' accounts, and the budget for waste.

    Who goes first: whoever a slot is being freed for; then those that had their turn and lost their worker, in the
    order in which they came back; then, tenant by tenant, as the policy says. All operations cost O(log n), amortised.
    """

    def __init__(self, fairness: Fairness) -> None:
        self.accounts: dict[TenantId, Account] = {}
        self.waste = Waste(fairness)
        self.num_preempted = 0
        self.num_leaving = 0  # legs that were cancelled and hold their slots still
        self.may_preempt_at = 0.0
        self.may_move_at = 0.0
        self._ladder = Ladder()
        self._claiming: OrderedDict[RequestId, Request] = OrderedDict()
        self._returned: OrderedDict[RequestId, Request] = OrderedDict()
        self._aside: list[tuple[float, int, Request, Account]] = []
        self._num_aside = 0
        self._following: dict[RequestId, Request] = {}
        self._standing_back: list[Account] = []
        self._order = itertools.count()  # keeps heaps from comparing what has no order
        self._num_in_turn = 0
        self._adopt(fairness)

    def __len__(self) -> int:
        return self._num_in_turn + len(self._claiming) + len(self._returned) + self._num_aside + len(self._following)

    @property
    def num_in_turn(self) -> int:
        """How many requests wait for their tenant's turn."""
        return self._num_in_turn

    @property
    def num_claiming(self) -> int:
        """How many requests wait for a slot that is being freed for them."""
        return len(self._claiming)

    @property
    def num_had_turn(self) -> int:
        """How many requests have had their turn and wait for a slot alone."""
        return len(self._claiming) + len(self._returned)

    @property
    def fairness(self) -> Fairness:
        """The policy. What waits already is ordered anew when it is replaced; counters stay."""
        return self._fairness

    @fairness.setter
    def fairness(self, fairness: Fairness) -> None:
        if fairness == self._fairness:
            return
        waiting = sorted(self._in_turn(), key=lambda request: request.number)
        for request in waiting:
            self.remove(request)
        virtual = self.turns.virtual_now()
        self._adopt(fairness)
        self.turns.virtual = virtual
        for account in self.accounts.values():
            account.programs.is_flat = self.turns.is_flat
            account.programs.knows_runs = fairness.run_order
        for request in waiting:
            self.push(request)

    def _adopt(self, fairness: Fairness) -> None:
        self._fairness = fairness
        self.turns = _TURNS[fairness.policy](fairness)
        self._rescue = Rescue(fairness)
        self.prompt_price = round(fairness.prompt_price * MILLI)
        self.output_price = round(fairness.output_price * MILLI)

    def account(self, tenant: TenantId, weight: float) -> Account:
        """Return the tenant's account, which is opened if there is none."""
        account = self.accounts.get(tenant)
        if account is None:
            account = self.accounts[tenant] = Account(
                tenant, self._ladder, is_flat=self.turns.is_flat, knows_runs=self._fairness.run_order
            )
        account.weight = max(1, round(weight * MILLI))
        return account

    def num_waiting(self, tenant: TenantId) -> int:
        """Return how many requests of the tenant wait."""
        account = self.accounts.get(tenant)
        return account.num_waiting if account is not None else 0

    # Coming and going

    def arrive(self, request: Request) -> None:
        """A request has come; it starts or waits next."""
        self.turns.arrive(request.account, request.rank)
        self.turns.rebase(self.accounts.values())
        self._open(request)

    def rejoin(self, request: Request) -> None:
        """A request is here that has come before, to another scheduler: its tenant had its lift then."""
        self._open(request)

    def _open(self, request: Request) -> None:
        is_run = request.role is not None
        request.account.programs.open(request.program, request.arrived_at, is_run=is_run)

    def depart(self, request: Request, service: int, now: float) -> None:
        """The request is over, served so much, in milli weighted tokens; it does not wait any more."""
        request.account.programs.close(request.program, service, now)

    def push(self, request: Request, *, front: bool = False) -> None:
        """The request waits for its tenant's turn; before those of its program if it has run already."""
        self._enter(request, Place.TURN)
        self._num_in_turn += 1
        request.account.programs.push(request, front=front)
        self.turns.changed(request.account)
        if not front:
            self._rescue.put(request)

    def push_returned(self, request: Request, now: float) -> None:
        """The request had its turn: it goes before all whose turn is not yet, but not before its time."""
        if request.not_before > now:
            self._enter(request, Place.ASIDE)
            self._num_aside += 1
            heapq.heappush(self._aside, (request.not_before, next(self._order), request, request.account))
        else:
            self._enter(request, Place.RETURNED)
            self._returned[request.id] = request

    def claim(self, request: Request) -> None:
        """A slot is being freed for the request, whose turn it is: it goes before all others."""
        self.remove(request)
        self.turns.served(request.account, request.rank)
        self._enter(request, Place.CLAIMING)
        self._claiming[request.id] = request

    def follow(self, request: Request) -> None:
        """The request has its turn and lets another go before it, until it is pushed as returned."""
        has_turn = request.place is Place.TURN
        self.remove(request)
        if has_turn:
            self.turns.served(request.account, request.rank)
        self._enter(request, Place.FOLLOWING)
        self._following[request.id] = request

    def remove(self, request: Request) -> None:
        """Take the request out, wherever it waits; one that does not is left alone."""
        match request.place:
            case Place.NOWHERE:
                return
            case Place.TURN:
                self._num_in_turn -= 1
                request.account.programs.remove(request)
                self.turns.changed(request.account)
            case Place.CLAIMING:
                del self._claiming[request.id]
            case Place.RETURNED:
                del self._returned[request.id]
            case Place.ASIDE:
                self._num_aside -= 1
            case Place.FOLLOWING:
                del self._following[request.id]
        request.account.num_waiting -= 1
        request.place = Place.NOWHERE

    def _enter(self, request: Request, place: Place) -> None:
        request.place = place
        request.account.num_waiting += 1

    def stand_back(self, request: Request) -> None:
        """The request, whose turn it is, lets others go first, until ``come_forward``."""
        request.account.programs.stand_back(request)
        self.turns.changed(request.account)
        self._standing_back.append(request.account)

    def come_forward(self) -> None:
        """Who stood back waits for its turn again. Costs O(tenants that did, log n)."""
        for account in self._standing_back:
            account.programs.come_forward()
            self.turns.changed(account)
        self._standing_back.clear()

    # Turns

    def first(self, now: float) -> Request | None:
        """Return whose turn it is; None if nobody waits who may begin."""
        if self._aside:
            self._release(now)
        if self._claiming:
            return next(iter(self._claiming.values()))
        if self._returned:
            return next(iter(self._returned.values()))
        return self.first_in_turn(now)

    def first_in_turn(self, now: float) -> Request | None:
        """Return whose turn it is by the policy alone."""
        if not self._num_in_turn:
            return None
        if self._rescue and (rescued := self._rescue.first(now, self.turns.virtual_now())) is not None:
            return rescued
        account = self.turns.first()
        return account.programs.first() if account is not None else None

    def serve(self, request: Request) -> None:
        """The request starts: it leaves its place. Call before it is charged."""
        if request.place is Place.TURN:
            if self._rescue:
                account = self.turns.first()
                self._rescue.started(was_rescued=account is not None and account.programs.first() is not request)
            self.remove(request)
            self.turns.served(request.account, request.rank)
        elif request.place is not Place.NOWHERE:
            self.remove(request)
        else:
            self.turns.served(request.account, request.rank)

    def returned(self) -> tuple[Request, ...]:
        """Return those that had their turn and came back, in that order."""
        return tuple(self._returned.values())

    def waiting(self) -> list[Request]:
        """Return all that wait, in the order of arrival. Costs O(n log n)."""
        aside = {entry[2] for entry in self._aside if self._is_aside(entry)}
        had_turn = (*self._claiming.values(), *self._returned.values(), *self._following.values())
        everyone = (*self._in_turn(), *had_turn, *aside)
        return sorted(everyone, key=lambda request: request.number)

    def _in_turn(self) -> list[Request]:
        return [request for account in self.accounts.values() for request in account.programs]

    def _release(self, now: float) -> None:
        while self._aside and (self._aside[0][0] <= now or not self._is_aside(self._aside[0])):
            entry = heapq.heappop(self._aside)
            request = entry[2]
            if self._is_aside(entry):
                self._num_aside -= 1
                request.place = Place.RETURNED
                self._returned[request.id] = request

    @staticmethod
    def _is_aside(entry: tuple[float, int, Request, Account]) -> bool:
        """Whether the request stands aside here and now, and not for another reason or another model."""
        due, _, request, account = entry
        return request.place is Place.ASIDE and request.account is account and request.not_before == due
