"""The budget for work that is done twice because we chose to cut a leg: a token bucket filled by useful work (β)."""

from routing.fairness.policy import Fairness

_MILLI = 1000


class Waste:
    """Counts useful tokens, those computed again by our choice, and those ``lost`` to failures, which nobody chose.

    The bucket pays when a request goes on: what had to be computed again if that is known by then, else what is
    expected, and the difference later. Until then the estimate is only ``held``, and a burst's worth of that is always
    allowed: paying it at the cut locks up, because while others keep the slots that were taken nobody goes on, so
    nothing would be learned or given back. So waste stays within β of the useful tokens, beside a burst and the error
    of the estimates. Starts with half a burst.
    """

    __slots__ = ("_level", "held", "lost", "useful", "wasted")

    def __init__(self, fairness: Fairness) -> None:
        self.useful = 0
        self.wasted = 0
        self.lost = 0
        self.held = 0
        self._level = fairness.waste_burst * _MILLI // 2

    def earn(self, tokens: int, fairness: Fairness) -> None:
        """So many tokens were of use; fewer than 0 if too many were said to be."""
        self.useful += tokens
        self._level = min(fairness.waste_burst * _MILLI, self._level + int(tokens * fairness.waste_share * _MILLI))

    def spend(self, tokens: int) -> None:
        """So many were computed again because a leg had been cut."""
        self.wasted += tokens
        self._level -= tokens * _MILLI

    def recall(self, left: float, fairness: Fairness) -> None:
        """Go on with so many tokens that may be wasted."""
        self._level = min(fairness.waste_burst * _MILLI, round(left * _MILLI))

    def has_budget(self, fairness: Fairness) -> bool:
        """Whether a leg may be cut by choice."""
        return self._level > 0 and self.held * _MILLI <= max(self._level, fairness.waste_burst * _MILLI)

    @property
    def left(self) -> float:
        """Tokens that may be wasted now; less than 0 while more has been than should."""
        return self._level / _MILLI
