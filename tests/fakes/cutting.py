"""A scheduler that cuts legs when a test says so, and has them go on where the test says."""

from collections import Counter
from collections.abc import Callable

from core.ids import LegId, ModelName, RequestId, WorkerId
from routing.scheduler import Abort, Cancel, CutFor, Effect, Event, LegEnded, Reject, Start, Submit, Tokens

_FAILURES = {"lost", "broken", "timed_out", "unreachable"}


class CuttingScheduler:
    """Starts everything at once on ``then``. What was ``cut``, or failed and can be continued, goes on at once.

    ``events`` holds all it was told, ``ended`` each ``LegEnded`` of them. ``cuts`` is asked after every piece of an
    answer, with how many there have been, whether to cut it there; the answer goes on at the next of ``workers`` then.
    ``num_others`` requests wait, it says.
    """

    def __init__(self, *workers: str) -> None:
        self.workers = [WorkerId(worker) for worker in workers or ("m-0",)]
        self.cuts: Callable[[int], bool] = lambda _: False
        self.why: CutFor = "preempted"
        self.num_others = 0
        self.submits: list[Submit] = []
        self._num_pieces: Counter[RequestId] = Counter()
        self.events: list[Event] = []
        self._legs: dict[LegId, Start] = {}
        self._current: dict[RequestId, LegId] = {}
        self._cut: set[LegId] = set()
        self._cancelled: set[RequestId] = set()

    @property
    def ended(self) -> list[LegEnded]:
        return [event for event in self.events if isinstance(event, LegEnded)]

    def cut(self, request: RequestId) -> list[Effect]:
        """Return what cuts the request's leg, for the dispatcher to carry out; nothing if none runs."""
        leg = self._current.get(request)
        if leg is None or leg in self._cut:
            return []
        self._cut.add(leg)
        return [Abort(leg=leg, why=self.why)]

    def on(self, event: Event) -> list[Effect]:
        """Take one event and return what follows from it."""
        self.events.append(event)
        match event:
            case Submit():
                self.submits.append(event)
                return [self._start(event.request, event.models[0], 0)]
            case Cancel() if (leg := self._current.get(event.request)) is not None:
                self._cancelled.add(event.request)
                return [Abort(leg=leg, why="cancelled")]
            case LegEnded():
                return self._after(event)
            case Tokens() if event.leg in self._legs:
                request = self._legs[event.leg].request
                self._num_pieces[request] += 1
                return self.cut(request) if self.cuts(self._num_pieces[request]) else []
            case _:
                return []

    def _start(self, request: RequestId, model: ModelName, number: int) -> Start:
        worker = self.workers[number % len(self.workers)]
        start = Start(LegId(f"{request}/{number}"), request, worker, model, number + 1)
        self._legs[start.leg] = start
        self._current[request] = start.leg
        return start

    def _after(self, event: LegEnded) -> list[Effect]:
        start = self._legs.pop(event.leg)
        del self._current[start.request]
        was_cut = event.leg in self._cut and event.cause == "aborted"
        if event.cause == "done" or start.request in self._cancelled:
            return []
        if event.can_resume and (was_cut or event.cause in _FAILURES):
            return [self._start(start.request, start.model, start.attempt)]
        return [Reject(start.request, why="failed")]

    def next_wakeup(self) -> float | None:
        return None

    def knows(self, request: RequestId) -> bool:
        return request in self._current

    def num_waiting(self, model: ModelName) -> int:
        return self.num_others

    def num_running(self, worker: WorkerId) -> int:
        return sum(start.worker == worker for start in self._legs.values())

    def is_tripped(self, worker: WorkerId) -> bool:
        return False
