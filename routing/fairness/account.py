"""What one tenant has had of one model, and the requests that it is charged for."""

from collections.abc import Callable
from enum import Enum

from core.chat import Role
from core.ids import RequestId, TenantId
from routing.fairness.programs import Ladder, Programs

MILLI = 1000
UNBOUNDED = 2**62
"""Above every counter."""


class Place(Enum):
    """Where a request waits. ``CLAIMING``: a slot is being freed for it. ``RETURNED``: it had its turn and lost its
    worker. ``ASIDE``: the same, and it may not begin yet. ``FOLLOWING``: it had its turn, and what another computes is
    of use to it. ``NOWHERE``: it does not wait."""

    NOWHERE = "nowhere"
    TURN = "turn"
    CLAIMING = "claiming"
    RETURNED = "returned"
    ASIDE = "aside"
    FOLLOWING = "following"


class Account:
    """One tenant's counter, its waiting requests, and how many run.

    ``counter``: milli weighted tokens, divided by the weight; what tenants are compared by. ``attained``: milli
    weighted tokens, plain. ``virtual``: the model's virtual time when the tenant last came; None before. ``weight``:
    in thousandths. ``on_rise`` is called when the counter has come to the ``ceiling``.
    """

    __slots__ = (
        "attained",
        "ceiling",
        "counter",
        "num_running",
        "num_waiting",
        "on_rise",
        "programs",
        "tenant",
        "virtual",
        "weight",
    )

    def __init__(self, tenant: TenantId, ladder: Ladder, *, is_flat: bool, knows_runs: bool = True) -> None:
        self.tenant = tenant
        self.weight = MILLI
        self.counter = 0
        self.attained = 0
        self.virtual: int | None = None
        self.num_waiting = 0
        self.num_running = 0
        self.ceiling = UNBOUNDED
        self.on_rise: Callable[[Account], None] = _ignore
        self.programs: Programs[Request] = Programs(ladder, is_flat=is_flat, knows_runs=knows_runs)

    def charge(self, amount: int) -> None:
        """Add what was served, in milli weighted tokens; less than 0 if too much was charged before."""
        self.attained += amount
        self.counter += amount * MILLI // self.weight
        if self.counter >= self.ceiling:
            self.on_rise(self)

    def lift(self, counter: int) -> None:
        """Bring the counter up to this; never down."""
        if counter > self.counter:
            self.counter = counter
            if counter >= self.ceiling:
                self.on_rise(self)

    @property
    def is_backlogged(self) -> bool:
        """Whether its queue is not empty; what runs, or is about to, does not count."""
        return bool(self.programs)


def _ignore(account: Account) -> None:
    """Nobody orders the tenant by its counter now."""


class Request:
    """A request, who pays for it, and where it waits. ``number`` counts arrivals; it and ``arrived_at`` never change.
    ``not_before``: until when its last worker has asked it to stay away. ``deadline_s``: within how long after its
    arrival its answer is wanted."""

    __slots__ = (
        "account", "arrived_at", "deadline_s", "id", "not_before", "number", "place", "program", "rank", "role",
    )  # fmt: skip

    def __init__(
        self,
        request: RequestId,
        account: Account,
        *,
        rank: int,
        program: str,
        number: int,
        arrived_at: float,
        role: Role | None = None,
        deadline_s: float | None = None,
    ) -> None:
        self.id = request
        self.account = account
        self.rank = rank
        self.program = program
        self.number = number
        self.arrived_at = arrived_at
        self.role = role
        self.deadline_s = deadline_s
        self.not_before = 0.0
        self.place = Place.NOWHERE
