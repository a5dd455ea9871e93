"""How fast a worker is, as its legs have shown: seconds per token by the number of legs, and per token of a prompt."""


class Pace:
    """A line fitted to the time per token over the number of legs that ran (least squares, the past fading), and a
    moving average of the time per prompt token. Says nothing before it has seen a few legs."""

    FADE = 0.95
    ENOUGH = 8
    TELLING = 64

    __slots__ = ("_num", "_prefill", "_sum", "_sum_x", "_sum_xx", "_sum_xy", "_sum_y")

    def __init__(self) -> None:
        self._num = 0
        self._sum = self._sum_x = self._sum_y = self._sum_xx = self._sum_xy = 0.0
        self._prefill: float | None = None

    def observe_step(self, num_legs: float, seconds: float) -> None:
        """A leg had one token every so many seconds, beside that many legs, itself included."""
        fade = self.FADE
        self._num += 1
        self._sum = fade * self._sum + 1
        self._sum_x = fade * self._sum_x + num_legs
        self._sum_y = fade * self._sum_y + seconds
        self._sum_xx = fade * self._sum_xx + num_legs * num_legs
        self._sum_xy = fade * self._sum_xy + num_legs * seconds

    def observe_prefill(self, tokens: int, seconds: float) -> None:
        """A leg's first token came after so many seconds, in which so many tokens of its prompt were computed. Of few
        tokens nothing is learned: what was measured then is the wait for the step of the others."""
        if tokens >= self.TELLING:
            sample = seconds / tokens
            self._prefill = sample if self._prefill is None else self._prefill + 0.2 * (sample - self._prefill)

    @property
    def can_tell(self) -> bool:
        """Whether both are known."""
        return self._num >= self.ENOUGH and self._prefill is not None

    def step(self, num_legs: int) -> float | None:
        """Return the seconds per token of a leg among that many; None if not known."""
        if self._num < self.ENOUGH:
            return None
        base, slope = self._line()
        return max(0.0, base + slope * num_legs)

    def most_legs(self, seconds: float) -> int | None:
        """Return among how many legs a token takes no longer than so many seconds, 1 at least; None if not known, or
        if more legs cost nothing, as far as that is known."""
        if self._num < self.ENOUGH:
            return None
        base, slope = self._line()
        return max(1, int((seconds - base) / slope)) if slope else None

    def _line(self) -> tuple[float, float]:
        spread = self._sum * self._sum_xx - self._sum_x * self._sum_x
        if spread < 1e-9 * self._sum_xx * self._sum:
            slope = 0.0  # all at the same load: more legs may cost nothing, as far as is known
        else:
            slope = max(0.0, (self._sum * self._sum_xy - self._sum_x * self._sum_y) / spread)
        return (self._sum_y - slope * self._sum_x) / self._sum, slope

    def prefill(self, tokens: int) -> float | None:
        """Return the seconds that so many tokens of a prompt take; None if not known."""
        return tokens * self._prefill if self._prefill is not None else None
