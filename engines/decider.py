"""What the dispatcher wants of whoever decides: the scheduler itself, or one that is shared with other gateways."""

from collections.abc import Sequence
from typing import Protocol

from core.ids import ModelName, RequestId, WorkerId
from routing.scheduler import Effect, Event


class Decider(Protocol):
    """Takes events and says what has to be done, some of it at once and some later, by ``Dispatcher.carry_out``.

    Every ``Start`` is for a request that it ``knows`` when the effect is carried out.
    """

    def on(self, event: Event) -> Sequence[Effect]:
        """Take one event and return what has to be done now, in this order."""

    def next_wakeup(self) -> float | None:
        """Return when a ``Tick`` is wanted at the latest; None if nothing waits for time to pass."""

    def knows(self, request: RequestId) -> bool:
        """Whether the request waits or runs, or a worker has not let go of it yet."""

    def num_waiting(self, model: ModelName) -> int:
        """Return how many requests of this process wait for the model."""

    def num_running(self, worker: WorkerId) -> int:
        """Return how many legs hold a slot of the worker, whoever runs them."""

    def is_tripped(self, worker: WorkerId) -> bool:
        """Return whether failures keep work away from the worker."""
