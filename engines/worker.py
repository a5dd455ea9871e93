"""The life of one worker as a pure state machine: events go in, states and times come out. No I/O, no tasks.

::

             start_began            became_ready           drain_began
    stopped ────────────> starting ──────────────> ready ───────────────> draining ──> stopped
               ▲              │                      │  <───────────────     │
               │              │ crashed              │   drain_called_off    │ stopped, crashed
               └─ (next_start_at has come) ─ failed <┘ <─────────────────────┘
"""

from enum import StrEnum

import msgspec

from core.clock import Clock
from core.ids import ModelName, WorkerId
from engines.driver import Capabilities, Health, Load
from engines.spec import Lifecycle

# An engine whose core died answers 500 to health checks and should exit by itself (vLLM: EngineDeadError). One that
# says for this long, without a break, that it is ill will not get well; one that answers nothing may just be busy.
ILL_FOR_GOOD_S = 30.0
# 2**16 times any base is more than any bound on a back-off.
LARGEST_EXPONENT = 16


class State(StrEnum):
    """Where a worker stands. Only a ready one is given work; a draining one finishes what it has."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"
    FAILED = "failed"


class WorkerStatus(msgspec.Struct, frozen=True):
    """What is known of a worker at one moment.

    ``healthy`` is the answer of the probes, with hysteresis; a ready worker may be unhealthy, which is a reason to
    prefer another and none to give up the last. ``is_wanted``: it is up or will be again. ``load`` is what the engine
    says of itself, ``since`` (Unix time) the last change of state, ``next_start_at`` (Unix time) the end of a failed
    worker's back-off, ``restarts`` how often it was started again. ``last_error`` stays after a recovery.
    ``context_tokens`` is what one request may use (None: unknown).
    """

    id: WorkerId
    model: ModelName
    engine: str
    state: State
    healthy: bool
    is_wanted: bool
    max_inflight: int
    since: float
    restarts: int = 0
    context_tokens: int | None = None
    last_error: str | None = None
    next_start_at: float | None = None
    pid: int | None = None
    url: str | None = None
    load: Load | None = None
    capabilities: Capabilities = Capabilities()

    @property
    def is_draining(self) -> bool:
        """Whether it finishes what it has and takes nothing new."""
        return self.state is State.DRAINING


class IllegalEvent(RuntimeError):
    """An event that cannot happen in this state: a fault of the caller."""


class Life:
    """One worker's life over all its starts. Begins stopped; times come from ``clock`` alone. ``lifecycle`` may be
    replaced at any time.

    ``since`` and ``next_start_at`` (None unless failed) are Unix times; ``last_error`` stays after a recovery.
    """

    def __init__(self, lifecycle: Lifecycle, clock: Clock) -> None:
        self.lifecycle = lifecycle
        self._clock = clock
        self._is_well = False
        self._num_good = 0
        self._num_bad = 0
        self._num_absent = 0
        self._ill_since: float | None = None
        self._ready_since: float | None = None
        self._crashes = 0
        self._num_starts = 0
        self._start_due = clock.monotonic()
        self.state = State.STOPPED
        self.since = clock.wall()
        self.next_start_at: float | None = None
        self.last_error: str | None = None

    # What holds

    @property
    def healthy(self) -> bool:
        """Whether it serves, as far as probes tell: not after ``fall`` bad ones in a row, again after ``rise`` good."""
        return self._is_well and self.state in (State.READY, State.DRAINING)

    @property
    def restarts(self) -> int:
        """How often it was started after the first time."""
        return max(0, self._num_starts - 1)

    @property
    def start_delay(self) -> float:
        """Seconds until it may be started; 0 if now."""
        return max(0.0, self._start_due - self._clock.monotonic())

    @property
    def is_ill_for_good(self) -> bool:
        """Whether it has answered that it is ill, and nothing else, for so long that only a restart will help."""
        ill_since = self._ill_since
        is_long = ill_since is not None and self._clock.monotonic() - ill_since >= ILL_FOR_GOOD_S
        return is_long and self._num_bad >= self.lifecycle.fall

    @property
    def is_out_of_reach(self) -> bool:
        """Whether the last ``fall`` probes found nobody there. Means something only where we own no process."""
        return self._num_absent >= self.lifecycle.fall

    # Events

    def start_requested(self) -> None:
        """An operator wants it now: earlier crashes no longer count."""
        self._crashes = 0
        self._start_due = self._clock.monotonic()

    def start_began(self) -> None:
        """Its process is being started, or its address probed for the first time."""
        self._move(State.STARTING, State.STOPPED, State.FAILED)
        self._num_starts += 1
        self._ready_since = None
        self._forget_probes()

    def became_ready(self) -> None:
        """It answered that it is well, and its capabilities are known."""
        self._move(State.READY, State.STARTING)
        self._forget_probes()
        self._is_well = True
        self._ready_since = self._clock.monotonic()

    def probed(self, health: Health) -> None:
        """A probe came back."""
        is_good = health == "ok"
        self._num_good = self._num_good + 1 if is_good else 0
        self._num_bad = 0 if is_good else self._num_bad + 1
        self._num_absent = self._num_absent + 1 if health == "unreachable" else 0
        if health != "unhealthy":
            self._ill_since = None
        elif self._ill_since is None:
            self._ill_since = self._clock.monotonic()
        if self._num_bad >= self.lifecycle.fall:
            self._is_well = False
        elif self._num_good >= self.lifecycle.rise:
            self._is_well = True

    def drain_began(self) -> None:
        """It gets no more work, and will be stopped."""
        self._move(State.DRAINING, State.STARTING, State.READY)

    def drain_called_off(self) -> None:
        """It gets work again, having never been stopped."""
        if self._ready_since is None:
            raise IllegalEvent("a worker that never was ready cannot return to it")
        self._move(State.READY, State.DRAINING)

    def stopped(self) -> None:
        """Nothing of it is left, as was wanted."""
        self._move(State.STOPPED, *State)

    def crashed(self, error: str) -> None:
        """It ended unasked, or could not start. The next start is put off, longer with each crash in a row."""
        self._crashes = 1 if self._has_proven_itself() else self._crashes + 1
        self._ready_since = None
        self._move(State.FAILED, *State)
        self.last_error = error
        exponent = min(self._crashes - 1, LARGEST_EXPONENT)
        delay = min(self.lifecycle.backoff_base * 2.0**exponent, self.lifecycle.backoff_max)
        self._start_due = self._clock.monotonic() + delay
        self.next_start_at = self._clock.wall() + delay

    def _has_proven_itself(self) -> bool:
        ready_since = self._ready_since
        return ready_since is not None and self._clock.monotonic() - ready_since >= self.lifecycle.backoff_reset

    def _forget_probes(self) -> None:
        self._num_good = self._num_bad = self._num_absent = 0
        self._ill_since = None
        self._is_well = False

    def _move(self, to: State, *allowed: State) -> None:
        if self.state not in allowed:
            raise IllegalEvent(f"a worker that is {self.state} cannot become {to}")
        if self.state is not to:
            self.state = to
            self.next_start_at = None
            self.since = self._clock.wall()
