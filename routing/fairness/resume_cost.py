"""What it costs to go on with a request that was cut: which share of its context the engine computes again."""


class ResumeCost:
    """Of one worker, learned from the legs that were resumed on it.

    ``home``: the leg goes on where it ran before, and the engine may still hold its cache; elsewhere it holds what
    other requests happen to share. A mean of the first few and then a moving average, since what an engine keeps
    depends on what else it has to do.
    """

    WEIGHT = 0.25
    FIRST_GUESS = 0.25  # at home; the first leg that goes on corrects it at once

    __slots__ = ("_away", "_home")

    def __init__(self) -> None:
        self._home = (self.FIRST_GUESS, 0)
        self._away = (1.0, 0)

    def tokens(self, context: int, *, is_home: bool) -> int:
        """Return how many of a context's tokens will probably have to be computed again."""
        return int(context * (self._home if is_home else self._away)[0])

    def observe(self, context: int, recomputed: int, *, is_home: bool) -> None:
        """A leg with so many tokens of context was resumed, and so many of them were computed again."""
        if context <= 0:
            return
        share = min(1.0, recomputed / context)
        if is_home:
            self._home = self._learn(self._home, share)
        else:
            self._away = self._learn(self._away, share)

    def _learn(self, known: tuple[float, int], share: float) -> tuple[float, int]:
        mean, num = known
        return mean + max(self.WEIGHT, 1 / (num + 1)) * (share - mean), num + 1
