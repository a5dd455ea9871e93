"""Time as a dependency, so that tests turn the clock by hand."""

import time
from typing import Protocol


class Clock(Protocol):
    """Where every timestamp and every deadline of Forebay comes from."""

    def monotonic(self) -> float:
        """Return seconds that never go back; only differences mean something."""

    def wall(self) -> float:
        """Return seconds since the Unix epoch, for logs and ``created`` fields."""


class SystemClock:
    """The machine's clock."""

    monotonic = staticmethod(time.monotonic)
    wall = staticmethod(time.time)
