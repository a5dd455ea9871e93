"""Which rule shares a model's workers between tenants, and its figures."""

from typing import Literal

import msgspec

Policy = Literal["fcfs", "drr", "vtc", "vtc-pc", "priority"]


class Fairness(msgspec.Struct, frozen=True):
    """The rule of one model. What is counted is the weighted token: one of a prompt counts ``prompt_price``, one of an
    answer ``output_price``; divided by its tenant's weight it is what tenants are compared by.

    ``fcfs``: first come, first served. ``drr``: deficit round robin. ``vtc``: the virtual token counter. ``vtc-pc``:
    the same with preemption and bounded credit. ``priority``: the most urgent class of all tenants first, fair inside
    it. The figures of one policy say nothing to the others, unless said so.
    """

    policy: Policy = "vtc-pc"
    prompt_price: float = 1.0
    output_price: float = 2.0
    threshold: int = 1000
    """Θ, in weighted tokens: how far a tenant must be behind another before it takes a slot from it. ``drr``: what a
    tenant is given in a round."""
    credit: int = 2000
    """K, in weighted tokens: how far behind the others a tenant that was away may begin. 0: as in ``vtc``."""
    credit_refill: float = 1.0
    """How much of its fair share that passes by while a tenant is away comes back as credit, from 0 to 1, up to K."""
    quantum: int = 8
    """q_min, in tokens of an answer: a leg that has delivered fewer is not cut for another tenant."""
    penalty: int = 50
    """α, in weighted tokens: what α·k² makes a request that was cut k times the worse a choice to be cut again."""
    waste_share: float = 0.08
    """β: the tokens computed again because of our own choice, as a share of the useful ones."""
    waste_burst: int = 2000
    """How many tokens of that share may be saved up."""
    interval: float = 0.05
    """Δ, in seconds: the least time between two decisions to preempt."""
    targets: tuple[float, ...] = ()
    """Seconds to the first byte by rank, the most urgent first. A request that would miss its own goes before the turns
    of others, if its tenant is not ahead of its share. Empty: no targets."""
    rescue_share: float = 0.2
    """How many of all starts may go before their turn: for a target, or (``priority``) because they waited so long."""
    ageing: float = 60.0
    """``priority``: seconds after which a request of rank 1 goes before its turn; twice as many for rank 2."""
    step_target: float = 0.0
    """Seconds that a token of an urgent answer may take: while one runs, its worker is given no more legs than that
    allows by what was measured of it. 0: as many as it takes."""
    run_order: bool = True
    """Among calls of workflows those go first whose run would end first; else by what it has had, as calls of other
    programs do."""
    focus: bool = True
    """A run's calls are not put beside those of the tenant's earlier runs where the worker gains too little by that."""
    affinity: bool = True
    """A request may go to a busier worker for what that one's cache holds of its prompt, if it is done sooner there."""
    waves: bool = True
    """Requests wait while a long beginning of their prompt is computed by another, where slots share one cache."""

    def problem(self) -> str | None:
        """Return what is wrong with the figures and what to do, or None."""
        if self.policy not in ("fcfs", "drr", "vtc", "vtc-pc", "priority"):
            return f"policy is {self.policy!r}; choose fcfs, drr, vtc, vtc-pc or priority"
        for name, least, most in _BOUNDS:
            value = getattr(self, name)
            if not least <= value <= most:
                return f"{name} is {value}; choose from {least:g} to {most:g}"
        if not all(target > 0 for target in self.targets):
            return "targets must all be longer than 0 seconds"
        return None


_BOUNDS: tuple[tuple[str, float, float], ...] = (
    ("prompt_price", 0.001, 1000),
    ("output_price", 0.001, 1000),
    ("threshold", 1, 10**9),
    ("credit", 0, 10**9),
    ("credit_refill", 0, 1),
    ("quantum", 1, 10**6),
    ("penalty", 0, 10**9),
    ("waste_share", 0, 1),
    ("waste_burst", 1, 10**9),
    ("interval", 0, 60),
    ("rescue_share", 0, 1),
    ("ageing", 0.001, 10**6),
    ("step_target", 0, 60),
)
