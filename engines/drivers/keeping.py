"""How much of an answer that was cut its engine computes again when it goes on: asked now and then, and learned.

vLLM tells it for an answer that goes on only at its end, or when it is asked for one token first, which costs a step of
its whole batch. An engine that has kept nearly all of the last few answers is asked only for every eighth.
"""

_SURE_AFTER = 4  # answers in a row of which nearly all was kept
_ASKED_EVERY = 8
_FEW = 32  # tokens: two of vLLM's blocks; it keeps whole blocks alone
_NEARLY_ALL = 7 / 8
_WEIGHT = 0.25


class Keeping:
    """What one engine has kept of late. ``expected``: tokens that it will probably compute again."""

    __slots__ = ("_mean", "_num_kept", "_num_unasked")

    def __init__(self) -> None:
        self._mean = 0.0
        self._num_kept = 0
        self._num_unasked = 0

    def asks_now(self) -> bool:
        """Whether to ask for the answer that goes on now; each call counts as one."""
        self._num_unasked += 1
        if self._num_kept >= _SURE_AFTER and self._num_unasked < _ASKED_EVERY:
            return False
        self._num_unasked = 0
        return True

    def learn(self, context: int, prefilled: int) -> None:
        """Of so many tokens of prompt and answer so many were computed again."""
        self._mean += (_WEIGHT if self._num_kept else 1.0) * (prefilled - self._mean)
        self._num_kept = self._num_kept + 1 if prefilled <= max(_FEW, (1 - _NEARLY_ALL) * context) else 0

    @property
    def expected(self) -> int:
        """Tokens that it will probably compute again of an answer that goes on."""
        return round(self._mean)
