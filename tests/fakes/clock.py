"""A clock that moves only when told to."""


class ManualClock:
    """Starts at ``now``; both readings advance together."""

    def __init__(self, now: float = 1000.0) -> None:
        self._now = now

    def monotonic(self) -> float:
        """Return the seconds that have been turned so far."""
        return self._now

    def wall(self) -> float:
        """Return the same, as if it were Unix time."""
        return self._now

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self._now += seconds
