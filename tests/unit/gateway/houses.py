"""Runs that go on as they do in a gateway, without one: work is done by a function, and events are kept in memory."""

from collections.abc import Awaitable, Callable, Sequence
from typing import cast

from core.chat import Usage
from core.ids import TenantId
from core.workflows import RunEvent, RunRecord
from gateway.metrics import Metrics
from gateway.runs import work
from gateway.runs.following import Following
from gateway.runs.history import History
from gateway.runs.live import LiveRun
from gateway.runs.log import RunLog
from gateway.runs.telling import Telling
from gateway.runs.underway import UNDERWAY
from gateway.tracing import Finished as Traced
from gateway.tracing import Span, Tracing
from semantic_vars.budget import Spent
from semantic_vars.calls import Call, Workflow
from semantic_vars.events import Done, Failed, Prefill, Start, Work
from semantic_vars.executor import Executor
from semantic_vars.graph import USUAL
from storage.sql.workflows import Change
from tests.fakes.clock import ManualClock

Say = Callable[[Start], Awaitable[Done | Failed]]


class Worker:
    """Does what `say` does with a call; it takes a second, of which a quarter is spent in the queue."""

    prefills = True

    def __init__(self, clock: ManualClock, say: Say | None = None) -> None:
        self.parents: dict[str, bytes] = {}
        self.parents_ahead: dict[str, bytes] = {}
        self._clock = clock
        self._say = say or self._done

    async def do(self, run: RunRecord, start: Start, on_text: Callable[[str], None]) -> Done | Failed:
        underway = UNDERWAY.get()
        assert underway is not None
        self.parents[start.call] = underway.parent
        underway.waited(0.25)
        self._clock.advance(1.0)
        underway.worked(Usage(10, 3, 4), 0.5)
        return await self._say(start)

    async def prefill(self, run: RunRecord, ahead: Prefill) -> None:
        underway = UNDERWAY.get()
        assert underway is not None
        self.parents_ahead[ahead.call] = underway.parent
        underway.worked(Usage(10, 1, 0), 0.5)

    async def _done(self, start: Start) -> Done | Failed:
        return Done(start.call, start.epoch, "x", Spent(13, 0.5))

    def most(self, given: Work) -> Spent:
        return Spent(13, 0.5)

    def seconds(self, call: Call) -> float:
        return 1.0


class House:
    """A log that keeps events in memory, and runs whose spans are kept too."""

    def __init__(self, *, sample: float = 1.0, is_traced: bool = True) -> None:
        self.clock = ManualClock()
        self.began = self.clock.wall()
        self.metrics = Metrics()
        self.traced: list[Traced] = []
        self.events: list[RunEvent] = []
        self.tracing = Tracing(self._export, lambda: sample, draw=lambda: 0.5) if is_traced else None
        self.telling = Telling(self.metrics.runs, self.tracing)
        self.log = RunLog(self.telling.counting(self._write), self.clock)

    def _export(self, finished: Sequence[Traced]) -> bool:
        self.traced += finished
        return True

    async def _write(self, changes: Sequence[Change]) -> None:
        self.events += [event for change in changes for event in change.events]

    def run(self, given: Workflow, worker: Worker) -> LiveRun:
        """Return a run that was submitted, or that goes on behind the events that were kept."""
        record = RunRecord("run_1", TenantId("acme"), "key", b"", self.began, self.began, app="summary")
        history, told = History(given), History(given)
        for one in (history, told):
            one.read(event.body for event in self.events)
        doing = cast(work.Worker, worker)
        executor = Executor(
            given, doing, bounds=USUAL, facts=history.facts_to_go_on(), spent=history.spent, prefills=doing.prefills
        )
        return LiveRun(
            record, history, told, executor=executor, worker=doing, log=self.log, clock=self.clock,
            following=Following("run_1", nothing, told.number), on_end=lambda _: None, telling=self.telling,
        )  # fmt: skip

    async def through(self, given: Workflow, worker: Worker | None = None) -> LiveRun:
        """Run to the end."""
        async with self.log:
            run = self.run(given, worker or Worker(self.clock))
            run.begin()
            while run.told.state == "running":
                await run.following.changed()
            run.leave()
        if self.tracing is not None:
            await self.tracing.flush()
        return run

    @property
    def spans(self) -> dict[str, tuple[Span, int, int | None]]:
        """The spans, with their ids and their parents', by call; that of the run is the one without."""
        found = {}
        for span, trace in self.traced:
            assert isinstance(span, Span)
            path = str(span.attributes.get("forebay.call.path", ""))
            assert path not in found
            found[path] = span, trace.span_id, trace.parent_id
        return found

    def value(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(name, labels)


async def nothing(_run: str, _after: int) -> Sequence[RunEvent]:
    return ()
