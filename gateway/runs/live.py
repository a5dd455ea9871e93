"""One run under way: feeds its executor, carries out what that wants, and writes down what happens."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

import msgspec

from core.clock import Clock
from core.errors import Unavailable, UnknownId
from core.workflows import RunAnswer, RunEvent, RunLetter, RunRecord, RunState
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
    Used,
    Waiting,
    Wanted,
)  # fmt: skip
from gateway.runs.letters import answer_to
from gateway.runs.log import RunLog
from gateway.runs.spans import RunSpans
from gateway.runs.telling import SILENT, Telling
from gateway.runs.underway import UNDERWAY, Kind, Underway
from gateway.tracing import UNTRACED
from semantic_vars.calls import Client, Criteria
from semantic_vars.events import (
    Abort,
    Append,
    Cancel,
    Done,
    Effect,
    Ended,
    Errand,
    Event,
    Failed,
    Prefill,
    Put,
    Resolved,
    Start,
    Tick,
    Want,
    Work,
)  # fmt: skip
from semantic_vars.events import Retried as AgainEffect
from semantic_vars.executor import Executor, key_of
from semantic_vars.ports import Estimate
from storage.sql.workflows import Change

_AHEAD = 0  # in the place of an epoch: what is computed before the call begins


class Doing(Estimate, Protocol):
    """Who does the work of runs; ``Worker`` is how it is really done."""

    @property
    def prefills(self) -> bool:
        """Whether beginnings of prompts are to be computed ahead."""

    async def do(self, run: RunRecord, start: Start, on_text: Callable[[str], None]) -> Done | Failed:
        """Do what was started, and return how it ended."""

    async def prefill(self, run: RunRecord, ahead: Prefill) -> None:
        """Have the beginning of a prompt computed."""


class Beginning(msgspec.Struct, frozen=True, tag_field="event", tag="call.started"):
    """A call is under way."""

    call: str
    attempt: int
    criteria: Criteria
    group: str | None


class LiveRun:
    """A run that has not ended. ``history`` is what has happened, ``told`` what of it is durable: all that anybody is
    shown. With events in its ``history`` it goes on where another process has left it; ``executor`` is to begin from
    there.

    ``on_end`` is called when all that was wanted is there and durable, and more may still be asked for; or when the run
    is not ours any more.
    """

    def __init__(
        self,
        record: RunRecord,
        history: History,
        told: History,
        *,
        executor: Executor,
        worker: Doing,
        log: RunLog,
        clock: Clock,
        following: Following,
        on_end: Callable[["LiveRun"], None],
        telling: Telling = SILENT,
    ) -> None:
        self.record = record
        self.told = told
        self.following = following
        self._history = history
        self._worker = worker
        self._log = log
        self._clock = clock
        self._epoch = clock.wall() - clock.monotonic()
        self._counts = telling.counts
        self._tracing = telling.tracing
        self._spans = RunSpans.go_on(telling.tracing, record, history)
        self._underway: dict[str, Underway] = {}
        self._used = history.used or Used()
        self._on_end = on_end
        self._unwritten: list[RunEvent] = []
        self._untold: deque[Happening] = deque()
        self._answers: list[RunAnswer] = []
        self._answered: set[int] = set()
        self._tasks: dict[tuple[str, int], asyncio.Task[Any]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._alarms: list[asyncio.TimerHandle] = []
        self.is_gone = False
        self._executor = executor

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
        wall = self._clock.wall()
        events = [Tick(), *(event for one in self._history.asked for event in _events_of(one, wall))]
        self._counts.opened()
        if not self._history.number:
            self._counts.accepted()
            spans = self._spans = RunSpans.begin(self._tracing, self.record)
            span = spans.trace.traceparent.decode() if spans is not None else None
            parent = spans.parent if spans is not None else None
            self._note(Began(tuple(call.id for call in self._history.workflow.calls), span, parent))
        age_s = max(0.0, wall - self.record.created_at)
        effects = self._executor.begin(self._clock.monotonic() - age_s)
        for event in events:
            # It has ended only if nothing was asked for behind that; a call within another that was cancelled is not
            # there yet, and will find out by itself.
            with suppress(UnknownId):
                more = self._executor.on(event, self._clock.monotonic())
                effects = [one for one in effects if not isinstance(one, Ended) or isinstance(event, Tick)] + more
        self._carry_out(effects)

    # What is asked of it; all of these raise what ``Executor.on`` raises

    def append(self, more: Appended) -> None:
        """Add calls and variables, unless that was done under the same key."""
        known = {one.idempotency for one in self._history.asked if isinstance(one, Appended)}
        if more.idempotency is None or more.idempotency not in known:
            self._ask(Append(more.calls, more.variables, more.outputs), msgspec.structs.replace(more, at=self._now()))

    def want(self, variable: str, criteria: Criteria, deadline_s: float | None = None) -> None:
        """Ask for a variable, unless it is wanted so already, and as soon."""
        due = self._executor.due(variable)
        is_sooner = deadline_s is not None and (due is None or self._clock.monotonic() + deadline_s < due)
        if is_sooner or self._executor.criteria(variable) not in {criteria, "latency"}:
            wanted = Wanted(variable, criteria, deadline_s, self._now())
            self._ask(Want(variable, criteria, deadline_s), wanted)

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

    def answer(self, letter: RunLetter) -> None:
        """Do what another gateway asks for, unless that was done; the answer becomes durable with what comes of it."""
        if letter.number not in self._answered:
            self._answered.add(letter.number)
            self._answers.append(answer_to(letter, self))
            self._log.touch(self)

    # What the executor wants

    def _feed(self, event: Event) -> None:
        if not self.is_gone:
            self._carry_out(self._executor.on(event, self._clock.monotonic()))

    def _now(self) -> float:
        """Return Unix time, to the millisecond, that goes on evenly however the machine's clock is set."""
        return round(self._epoch + self._clock.monotonic(), 3)

    def _carry_out(self, effects: Sequence[Effect]) -> None:
        now = self._now()  # one for all: what ends and what that lets begin are at the same time
        for effect in effects:
            match effect:
                case Start():
                    self._start(effect, now)
                case Abort(call=call, epoch=epoch):
                    self._abort(call, epoch)
                case Resolved(variable=name) if name not in self._history.facts:
                    self._resolved(effect, now)
                case Prefill():
                    self._prefill(effect)
                case AgainEffect():
                    self._counts.call_retried(self._underway[effect.call].kind)
                    self._note(Retried(effect.call, effect.attempt, effect.code, effect.message))
                case Ended(state=state) if self._history.state == "running":
                    self._note(Finished(state, self._executor.spent, self._used, now))
                    self._ended(now)
                case _:
                    pass  # known from before the crash
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if (at := self._executor.next_wakeup()) is not None and not self.is_gone:
            after_s = max(0.0, at - self._clock.monotonic())
            self._timer = asyncio.get_running_loop().call_later(after_s, self._feed, Tick())

    def _resolved(self, effect: Resolved, now: float) -> None:
        made = None
        if effect.call is not None:
            underway = self._underway.pop(effect.call, None)
            if underway is not None:
                made = underway.made
                self._counts.call_ended(underway.kind, effect.outcome.state.value)
            if self._spans is not None:
                self._spans.call_ended(effect.call, effect.outcome, made, now)
        self._note(
            Settled(
                effect.variable, effect.call, effect.outcome, effect.key, effect.order, self._executor.spent,
                self._used, now, made,
            )
        )  # fmt: skip

    def _ended(self, now: float) -> None:
        history = self._history
        if history.num_ends == 1:  # else something was asked for that came later
            self._counts.run_lasted(now - self.record.created_at)
            if self._spans is not None:
                self._spans.run_ended(history.state, history, now)
        self._counts.ended(history.state)

    def _under_way(self, start: Start, now: float) -> Underway:
        underway = self._underway.get(start.call)
        if underway is None:
            waiting = self._history.waiting.get(start.variable)  # since before a crash, perhaps
            began = waiting.at or now if waiting is not None else now
            parent = self._spans.call_began(start, began) if self._spans is not None else UNTRACED
            underway = Underway(_kind_of(start.work), began, parent=parent, on_used=self._count_used)
            self._underway[start.call] = underway
            self._counts.call_started(underway.kind)
        underway.attempts += 1
        return underway

    def _count_used(self, more: Used) -> None:
        self._used = self._used.plus(more)

    @property
    def underway(self) -> tuple[str, ...]:
        """The calls that have begun and have no outcome; also those that wait for another attempt, or the client."""
        return tuple(self._underway)

    def _start(self, start: Start, now: float) -> None:
        work = start.work
        underway = self._under_way(start, now)
        if isinstance(work, Errand) and isinstance(work.server, Client):
            if start.variable not in self._history.waiting:
                self._note(Waiting(start.call, start.variable, work.server.tool, work.arguments, now))
            if start.timeout_s is not None:
                told = f"the client has not answered within {start.timeout_s:g} s"
                late = Failed(start.call, start.epoch, "timeout", "timeout", told)
                self._alarms.append(asyncio.get_running_loop().call_later(start.timeout_s, self._feed, late))
            return
        self._say(Beginning(start.call, start.epoch, start.standing.criteria, start.standing.group))
        if (ahead := self._tasks.get((start.call, _AHEAD))) is not None:
            ahead.cancel()  # the call itself computes the rest
        task = asyncio.get_running_loop().create_task(self._do(start, underway))
        self._tasks[start.call, start.epoch] = task
        task.add_done_callback(partial(self._done, start))

    async def _do(self, start: Start, underway: Underway) -> Event:
        UNDERWAY.set(underway)
        if isinstance(start.work, Errand) and start.work.at_most_once:
            self._note(Attempted(start.call, start.variable, key_of(start.work)))
            await self.durable()
        return await self._worker.do(self.record, start, lambda text: self._say_text(start, text))

    def _done(self, start: Start, task: "asyncio.Task[Event]") -> None:
        del self._tasks[start.call, start.epoch]
        self.following.fall_silent(start.variable, start.epoch)
        if task.cancelled() or task.exception() is not None:  # perhaps before its first step: it cannot say so itself
            self._feed(Failed(start.call, start.epoch, "engine", "cancelled", "cancelled", can_retry=False))
        else:
            self._feed(task.result())

    def _prefill(self, effect: Prefill) -> None:
        task = asyncio.get_running_loop().create_task(self._compute_ahead(effect))
        self._tasks[effect.call, _AHEAD] = task
        task.add_done_callback(lambda _: self._tasks.pop((effect.call, _AHEAD)))

    async def _compute_ahead(self, effect: Prefill) -> None:
        # No time of any call, so that it belongs to the run itself, and is traced if that is.
        parent = self._spans.trace.traceparent if self._spans is not None else UNTRACED
        UNDERWAY.set(Underway("llm", self._now(), parent=parent, on_used=lambda _: None))
        await self._worker.prefill(self.record, effect)

    async def durable(self) -> None:
        """Wait until all that has happened so far is durable. Raises ``Unavailable`` if it never will be."""
        number = self._history.number
        while self.told.number < number:
            if self.is_gone:
                raise Unavailable("the run went to another gateway before this was kept; try again", retry_after=1.0)
            await self.following.changed()

    def _abort(self, call: str, epoch: int) -> None:
        if (task := self._tasks.get((call, epoch))) is not None:
            task.cancel()
        else:  # the client's tool: nobody answers for it
            ended = Failed(call, epoch, "tool", "cancelled", "cancelled", can_retry=False)
            asyncio.get_running_loop().call_soon(self._feed, ended)

    def _say_text(self, start: Start, text: str) -> None:
        self.following.say_text(start.variable, start.epoch, text)

    def _say(self, saying: msgspec.Struct) -> None:
        if self.following.num_listeners:
            self.following.say(msgspec.json.encode(saying))

    # What is written down

    def _note(self, happening: Happening) -> None:
        self._history.add(happening)
        self._unwritten.append(RunEvent(self.id, self._history.number, msgspec.json.encode(happening)))
        self._untold.append(happening)
        self._log.touch(self)

    def settle_state(self) -> None:
        """Have the run's state written anew, whether or not anything has happened."""
        self._log.touch(self)

    def take_change(self, at: float) -> Change:
        """Return what is to be written; see ``Written``."""
        change = Change(self.id, tuple(self._unwritten), self.state, at, tuple(self._answers))
        self._unwritten, self._answers = [], []
        return change

    def written(self, events: Sequence[RunEvent]) -> None:
        """Show what is durable now; see ``Written``."""
        if events:
            for _ in events:
                self.told.add(self._untold.popleft())
            self.following.tell(events)
        if self.told.state != "running" and self.told.number == self._history.number:
            self._on_end(self)

    def lost(self) -> None:
        """Stop: a gateway goes on with it from what is durable; see ``Written``."""
        self._on_end(self)

    def leave(self) -> None:
        """Stop all work where it is; whoever goes on with the run makes again what was under way."""
        if not self.is_gone:
            self._counts.closed()
        self.is_gone = True
        for timer in (*self._alarms, *([self._timer] if self._timer is not None else ())):
            timer.cancel()
        for task in list(self._tasks.values()):
            task.cancel()
        self.following.end()

    async def left(self) -> None:
        """Wait until all work has stopped that ``leave`` has told to."""
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)


def _events_of(asked: Appended | Wanted | Stopped, now: float) -> tuple[Event, ...]:
    match asked:
        case Appended():
            return (Append(asked.calls, asked.variables, asked.outputs),)
        case Wanted():
            left_s = asked.deadline_s and max(0.0, asked.at + asked.deadline_s - now)
            return (Want(asked.variable, asked.criteria, left_s),)
        case Stopped(calls=()):
            return (Cancel(),)
        case Stopped(calls=calls):
            return tuple(Cancel((call,)) for call in calls)  # each for itself: one may not be there yet


def _kind_of(work: Work) -> Kind:
    if isinstance(work, Errand):
        return "tool"
    return "embed" if work.endpoint == "embeddings" else "llm"
