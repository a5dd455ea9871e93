"""Whether the beginning of a prompt is worth to be computed ahead of its call: a budget, and whether it was of use.

Kept per model. What is computed ahead may be at most a twentieth of what calls of runs use; and where the calls that
came later did not find it in the cache, nothing is computed ahead for ten minutes.
"""

from collections import OrderedDict, deque

from core.chat import Usage
from core.clock import Clock
from core.ids import ModelName

SHARE = 0.05
BURST = 8_000  # tokens that may be saved up
PAUSE_S = 600.0
_LOOKED_AT = 16
_ENOUGH = 8
_FOUND = 0.5  # of what was computed ahead: a chat template may end it otherwise
_REMEMBERED = 4_096

Key = tuple[str, str]
"""A run, and a call of it by its path."""


class _Model:
    def __init__(self) -> None:
        self.left = float(BURST)
        self.hits: deque[bool] = deque(maxlen=_LOOKED_AT)
        self.off_until = 0.0


class Ahead:
    """The budgets and records of all models."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._models: dict[ModelName, _Model] = {}
        self._expected: OrderedDict[Key, int] = OrderedDict()

    def begin(self, key: Key, model: ModelName, tokens: int) -> bool:
        """Return whether so many tokens may be computed ahead for a call, and take them from the budget if so."""
        state = self._models.setdefault(model, _Model())
        if tokens > state.left or self._clock.monotonic() < state.off_until:
            return False
        state.left -= tokens
        self._expected[key] = tokens
        if len(self._expected) > _REMEMBERED:
            self._expected.popitem(last=False)
        return True

    def used(self, key: Key, model: ModelName, usage: Usage) -> None:
        """A call has used so much: it fills the budget, and tells whether what was computed for it was of use."""
        state = self._models.setdefault(model, _Model())
        state.left = min(BURST, state.left + SHARE * (usage.prompt_tokens + usage.completion_tokens))
        expected = self._expected.pop(key, None)
        if expected is None:
            return
        state.hits.append(usage.cached_tokens >= _FOUND * expected)
        if len(state.hits) >= _ENOUGH and sum(state.hits) < len(state.hits) / 2:
            state.off_until = self._clock.monotonic() + PAUSE_S
            state.hits.clear()
