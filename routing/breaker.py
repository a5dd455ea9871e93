"""When a worker has failed too often to be given work, and when to try it again."""


class Breaker:
    """Counts failures of one worker in a row.

    Closed: work flows. Open: none does, for a cool-down that doubles with each failed trial. Half-open (the
    cool-down is over): one request, the trial, is let through; its success closes the breaker. Only what the worker
    is to blame for may be told to it: a request that an engine refuses with a 4xx is no failure.
    """

    THRESHOLD = 2  # one broken connection may be a keep-alive race; two in a row are not
    COOLDOWN_S = 0.25  # an embedded engine is back in under a second
    MAX_COOLDOWN_S = 10.0

    def __init__(self) -> None:
        self._failures = 0
        self._cooldown_s = self.COOLDOWN_S
        self._open_until: float | None = None
        self._has_trial = False

    @property
    def open_until(self) -> float | None:
        """When a trial may start; None while closed."""
        return self._open_until

    def allows(self, now: float) -> bool:
        """Whether the worker may be given one more request."""
        return self._open_until is None or (now >= self._open_until and not self._has_trial)

    def on_start(self) -> bool:
        """A leg starts on this worker. Return whether it is the trial, which is to be told when it ends."""
        self._has_trial = self._open_until is not None
        return self._has_trial

    def on_success(self) -> None:
        """A leg on this worker ended well."""
        self._failures = 0
        self._cooldown_s = self.COOLDOWN_S
        self._open_until = None
        self._has_trial = False

    def on_failure(self, now: float, *, was_trial: bool) -> None:
        """A leg on this worker ended badly, and not by the request's fault."""
        self._failures += 1
        if self._failures < self.THRESHOLD:
            return
        if was_trial:
            self._cooldown_s = min(2 * self._cooldown_s, self.MAX_COOLDOWN_S)
            self._has_trial = False
        self._open_until = now + self._cooldown_s

    def trip(self, now: float) -> float:
        """Open, as after the first failures that were too many; return until when."""
        self._failures = self.THRESHOLD
        self._open_until = now + self._cooldown_s
        return self._open_until

    def on_inconclusive(self, *, was_trial: bool) -> None:
        """A leg ended in a way that says nothing of the worker; if it was the trial, another is free to start."""
        if was_trial:
            self._has_trial = False
