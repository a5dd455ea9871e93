"""What legs cost their worker: the part of a step that all share, and what each of them adds to it.

Unlike ``pace.py``, which tells how long a leg waits for a token whatever others do meanwhile, this tells what the
worker's time goes into. It has two kinds of time: *pure* time, in which all its legs have their prompts behind them,
and *mixed* time, in which a prompt is computed. In pure time a step of n legs takes s + n·d, where s is what all share
(the weights are read once). In mixed time every token, of a prompt or an answer, takes c, and every prompt an s. Both
times and their tokens are counted; s, d and c follow; d is c at least, since a token of an answer also reads its
context. What was never seen is tried for a while: other numbers of legs, and pure time. Where answers come whole nobody
knows which time is which, and nothing is told.
"""

import math


class Cost:
    """Counts of one worker. All operations cost O(1)."""

    TELLING = 64
    """Tokens that have to be seen of either before anything is said."""
    MANY = 2
    """From so many legs on fewer are tried, and below more."""
    TRIED_S = 30.0
    """For so long in all other numbers are tried, unless something is learned; a worker that stays full cannot tell."""
    WHOLE = 16
    """After an answer that came whole, nothing is told for so many that do not."""
    REMEMBERED_S = 120.0
    """When so many seconds of either kind have been counted, half of them are forgotten."""

    __slots__ = (
        "_at", "_is_trying", "_mixed_s", "_mixed_tokens", "_num_legs", "_num_prompting", "_num_prompts", "_num_unknown",
        "_prompt_tokens", "_pure_n", "_pure_nn", "_pure_ny", "_pure_s", "_pure_tokens", "_pure_y", "_tried_s",
    )  # fmt: skip

    def __init__(self) -> None:
        self._at = 0.0
        self._num_legs = self._num_prompting = self._num_unknown = 0
        self._is_trying = False
        self._tried_s = 0.0
        self._mixed_s = self._mixed_tokens = self._num_prompts = self._prompt_tokens = 0.0
        # Of pure time: seconds, and the sums of a line through the time of a step, y, over n, by tokens.
        self._pure_s = self._pure_tokens = self._pure_n = self._pure_nn = self._pure_y = self._pure_ny = 0.0

    def start(self, now: float) -> None:
        """A leg starts, with its prompt to be computed."""
        self._count_time(now)
        self._num_legs += 1
        self._num_prompting += 1

    def begin(self, now: float) -> None:
        """The prompt of a leg is done."""
        self._count_time(now)
        self._num_prompting -= 1
        self._num_prompts += 1

    def deliver(self, num: int) -> None:
        """Answers have grown by so many tokens."""
        if self._num_prompting:
            self._mixed_tokens += num
        else:
            self._pure_tokens += num
            self._pure_n += num * self._num_legs
            self._pure_nn += num * self._num_legs**2

    def computed(self, num: int) -> None:
        """The engine has told that it has computed so many tokens of a prompt."""
        self._prompt_tokens += num

    def end(self, now: float, *, has_begun: bool) -> None:
        """A leg has ended."""
        self._count_time(now)
        self._num_legs -= 1
        if not has_begun:
            self._num_prompting -= 1
        elif self._num_unknown:
            self._num_unknown -= 1

    def pass_over(self) -> None:
        """The leg that has just ended gave its answer whole: when its prompt was done is not known."""
        self._num_unknown = self.WHOLE
        self._prompt_tokens = self._mixed_s = self._mixed_tokens = self._num_prompts = 0.0

    def best_legs(self, num: float, *, prompt: int, answer: int) -> float | None:
        """Return how many at a time of ``num`` legs of such prompts and answers, in tokens, end soonest in the mean
        (``focus.py`` derives it); None if that cannot be told, as where the engine does not tell what it computes. 0
        while only pure time is missing, or time with fewer legs: both come with less to do, and are tried for
        ``TRIED_S``."""
        if self._num_unknown or self._prompt_tokens < self.TELLING:
            return None
        if self._pure_tokens < self.TELLING:
            return self._try_fewer()
        step_s, num_legs = self._pure_y / self._pure_tokens, self._pure_n / self._pure_tokens
        tokens = self._prompt_tokens + self._mixed_tokens - self._num_prompts * num_legs
        if tokens < self._num_prompts * num_legs:
            return None
        token_s = max(0.0, self._mixed_s - self._num_prompts * step_s) / tokens
        if (slope_s := self._slope()) is None and num_legs >= self.MANY:
            return self._try_fewer()
        self._is_trying, self._tried_s = False, 0.0
        leg_s = max(token_s, slope_s or 0.0)
        shared_s = max(0.0, step_s - num_legs * leg_s)
        own_s = token_s * prompt + leg_s * answer
        return math.sqrt(num * shared_s * answer / own_s) if own_s else None

    def _try_fewer(self) -> float | None:
        self._is_trying = self._tried_s < self.TRIED_S
        return 0.0 if self._is_trying else None

    def _slope(self) -> float | None:
        """How much longer a step takes with one leg more; None if the number of legs was always about the same."""
        spread = self._pure_tokens * self._pure_nn - self._pure_n**2
        if spread <= 0.01 * self._pure_n**2:
            return None
        return (self._pure_tokens * self._pure_ny - self._pure_n * self._pure_y) / spread

    def _count_time(self, now: float) -> None:
        passed, self._at = max(0.0, now - self._at), max(now, self._at)
        if self._is_trying and self._num_legs:
            self._tried_s += passed
        if self._num_prompting:
            self._mixed_s += passed
            if self._mixed_s > self.REMEMBERED_S:
                self._mixed_s /= 2
                self._mixed_tokens /= 2
                self._num_prompts /= 2
                self._prompt_tokens /= 2
        elif self._num_legs:
            self._pure_s += passed
            self._pure_y += passed * self._num_legs
            self._pure_ny += passed * self._num_legs**2
            if self._pure_s > self.REMEMBERED_S:
                self._pure_s /= 2
                self._pure_tokens /= 2
                self._pure_n /= 2
                self._pure_nn /= 2
                self._pure_y /= 2
                self._pure_ny /= 2
