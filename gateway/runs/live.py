"""One run under way: feeds its executor, carries out what that wants, and writes down what happens."""

import asyncio
from collections.abc import Callable, Mapping, Sequence

import msgspec

from core.clock import Clock
from core.workflows import RunEvent, RunRecord, RunState
from gateway.runs.following import Following
from gateway.runs.history import (
    Appended,
    Attempted,
    Began,
    Finished,
    Happening,
    History,
    Retried,
    Settled,
    Stopped,
    Waiting,
    Wanted,
)  # fmt: skip
from gateway.runs.log import RunLog
from gateway.runs.work import Worker
from semantic_vars.calls import Client, Criteria
from semantic_vars.events import (
    Abort,
    Append,
    Cancel,
    Effect,
    Ended,
    Errand,
    Event,
    Failed,
    Put,
    Resolved,
    Start,
    Tick,
    Want,
)  # fmt: skip
from semantic_vars.events import Retried as AgainEffect
from semantic_vars.executor import Executor, Fact, key_of
from semantic_vars.graph import Bounds


class Saying(msgspec.Struct, frozen=True, tag_field="event", tag="variable.delta"):
    """A piece of text of a call under way."""

    variable: str
    attempt: int
    text: str


class Beginning(msgspec.Struct, frozen=True, tag_field="event", tag="call.started"):
    """A call is under way."""

    call: str
    attempt: int
    criteria: Criteria
    group: str | None


class LiveRun:
    """A run that has not ended. ``history`` is what has happened, ``told`` what of it is durable: all that anybody is
    shown. With events in its ``history`` it goes on where another process has left it. ``facts`` are what another run
    of a like workflow has come to.

    ``on_end`` is called when all that was wanted is there and durable; more may still be asked for.
    """

    def __init__(
        self,
        record: RunRecord,
        history: History,
        told: History,
        *,
        worker: Worker,
        log: RunLog,
        clock: Clock,
        bounds: Bounds,
        following: Following,
        on_end: Callable[["LiveRun"], None],
        facts: Mapping[str, Fact] = {},
    ) -> None:
        self.record = record
        self.told = told
        self.following = following
        self._history = history
        self._worker = worker
        self._log = log
        self._clock = clock
        self._on_end = on_end
        self._unwritten: list[RunEvent] = []
        self._tasks: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._alarms: list[asyncio.TimerHandle] = []
        self.is_gone = False
        self._executor = Executor(
            history.workflow, worker, bounds=bounds, facts={**facts, **history.facts_to_go_on()}, spent=history.spent
        )

    @property
    def id(self) -> str:
        """The run's id."""
        return self.record.id

    @property
    def state(self) -> RunState:
        """What the run is after its last event."""
        return self._history.state

    def begin(self) -> None:
        """Start, or go on: what was asked for later is asked again, in its order."""
        asked = list(self._history.asked)
        if not self._history.number:
            self._note(Began(tuple(call.id for call in self._history.workflow.calls)))
        age_s = max(0.0, self._clock.wall() - self.record.created_at)
        effects = self._executor.begin(self._clock.monotonic() - age_s)
        for one in asked:
            match one:
                case Appended():
                    event: Event = Append(one.calls, one.variables, one.outputs)
                case Wanted():
                    event = Want(one.variable, one.criteria)
                case Stopped():
                    event = Cancel(one.calls)
            effects += self._executor.on(event, self._clock.monotonic())
        self._carry_out(effects)

    # What is asked of it; all of these raise what ``Executor.on`` raises

    def append(self, more: Appended) -> None:
        """Add calls and variables, unless that was done under the same key."""
        known = {one.idempotency for one in self._history.asked if isinstance(one, Appended)}
        if more.idempotency is None or more.idempotency not in known:
            self._ask(Append(more.calls, more.variables, more.outputs), more)

    def want(self, variable: str, criteria: Criteria) -> None:
        """Ask for a variable, unless it is wanted so already."""
        if self._executor.criteria(variable) not in {criteria, "latency"}:
            self._ask(Want(variable, criteria), Wanted(variable, criteria))

    def cancel(self, calls: tuple[str, ...]) -> None:
        """Give calls up, or with none the run."""
        self._ask(Cancel(calls), Stopped(calls))

    def put(self, put: Put) -> None:
        """Set a variable from outside."""
        self._carry_out(self._executor.on(put, self._clock.monotonic()))

    def _ask(self, event: Event, happening: Happening) -> None:
        effects = self._executor.on(event, self._clock.monotonic())
        self._note(happening)
        self._carry_out(effects)

    # What the executor wants

    def _feed(self, event: Event) -> None:
        if not self.is_gone:
            self._carry_out(self._executor.on(event, self._clock.monotonic()))

    def _carry_out(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            match effect:
                case Start():
                    self._start(effect)
                case Abort(call=call, epoch=epoch):
                    self._abort(call, epoch)
                case Resolved(variable=name) if name not in self._history.facts:
                    spent = self._executor.spent
                    self._note(Settled(name, effect.call, effect.outcome, effect.key, effect.order, spent))
                case AgainEffect():
                    self._note(Retried(effect.call, effect.attempt, effect.code, effect.message))
                case Ended(state=state) if self._history.state == "running":
                    self._note(Finished(state, self._executor.spent))
                case _:
                    pass  # known from before the crash
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if (at := self._executor.next_wakeup()) is not None and not self.is_gone:
            after_s = max(0.0, at - self._clock.monotonic())
            self._timer = asyncio.get_running_loop().call_later(after_s, self._feed, Tick())

    def _start(self, start: Start) -> None:
        work = start.work
        if isinstance(work, Errand) and isinstance(work.server, Client):
            if start.variable not in self._history.waiting:
                self._note(Waiting(start.call, start.variable, work.server.tool, work.arguments))
            if start.timeout_s is not None:
                told = f"the client has not answered within {start.timeout_s:g} s"
                late = Failed(start.call, start.epoch, "timeout", "timeout", told)
                self._alarms.append(asyncio.get_running_loop().call_later(start.timeout_s, self._feed, late))
            return
        self._say(Beginning(start.call, start.epoch, start.standing.criteria, start.standing.group))
        task = asyncio.get_running_loop().create_task(self._do(start))
        self._tasks[start.call, start.epoch] = task

    async def _do(self, start: Start) -> None:
        ended: Event = Failed(start.call, start.epoch, "engine", "cancelled", "cancelled", can_retry=False)
        try:
            if isinstance(start.work, Errand) and start.work.at_most_once:
                self._note(Attempted(start.call, start.variable, key_of(start.work)))
                await self.durable()
            ended = await self._worker.do(self.record, start, lambda text: self._say_text(start, text))
        except asyncio.CancelledError:
            pass  # aborted before it began
        finally:
            del self._tasks[start.call, start.epoch]
            self._feed(ended)

    async def durable(self) -> None:
        """Wait until all that has happened so far is durable."""
        number = self._history.number
        while self.told.number < number and not self.is_gone:
            await self.following.changed()

    def _abort(self, call: str, epoch: int) -> None:
        if (task := self._tasks.get((call, epoch))) is not None:
            task.cancel()
        else:  # the client's tool: nobody answers for it
            ended = Failed(call, epoch, "tool", "cancelled", "cancelled", can_retry=False)
            asyncio.get_running_loop().call_soon(self._feed, ended)

    def _say_text(self, start: Start, text: str) -> None:
        self._say(Saying(start.variable, start.epoch, text))

    def _say(self, saying: msgspec.Struct) -> None:
        if self.following.num_listeners:
            self.following.say(msgspec.json.encode(saying))

    # What is written down

    def _note(self, happening: Happening) -> None:
        self._history.add(happening)
        self._unwritten.append(RunEvent(self.id, self._history.number, msgspec.json.encode(happening)))
        self._log.touch(self)

    def settle_state(self) -> None:
        """Have the run's state written anew, whether or not anything has happened."""
        self._log.touch(self)

    def take_unwritten(self) -> tuple[RunEvent, ...]:
        """Return the events that are to be written; see ``Written``."""
        events, self._unwritten = tuple(self._unwritten), []
        return events

    def written(self, events: Sequence[RunEvent]) -> None:
        """Show what is durable now; see ``Written``."""
        if events:
            self.told.read(event.body for event in events)
            self.following.tell(events)
        if self.told.state != "running":
            self._on_end(self)

    def lost(self) -> None:
        """Stop: another gateway goes on with it; see ``Written``."""
        self.leave()

    def leave(self) -> None:
        """Stop all work where it is; whoever goes on with the run makes again what was under way."""
        self.is_gone = True
        for timer in (*self._alarms, *([self._timer] if self._timer is not None else ())):
            timer.cancel()
        for task in list(self._tasks.values()):
            task.cancel()
        self.following.end()

    async def left(self) -> None:
        """Wait until all work has stopped that ``leave`` has told to."""
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
