"""Owns the scheduler: feeds it events, carries out its effects, and runs every leg as a task of its own."""

import asyncio
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Self, assert_never

import msgspec
import structlog

from core.chat import CLASSES, Call
from core.clock import Clock
from core.completer import Served
from core.errors import (
    ClientIdle,
    Draining,
    FirstTokenTimeout,
    ForebayError,
    IdleTimeout,
    InternalError,
    InvalidRequest,
    NoHealthyWorker,
    QueueFull,
    QueueTimeout,
    TimedOut,
    TotalTimeout,
    UpstreamBroken,
    UpstreamBusy,
    UpstreamRefused,
    WorkerLost,
    WorkerUnreachable,
)
from core.ids import ModelName, RequestId, WorkerId
from core.spans import traceparent_of_leg
from engines.decider import Decider
from engines.driver import Chunk, Driver, bounded, resumable
from engines.parts import in_parts
from engines.run import Run
from engines.tasks import Tasks
from engines.transcript import read
from routing.scheduler import (
    Abort,
    Cancel,
    Cause,
    Effect,
    Event,
    FirstToken,
    LegEnded,
    Reject,
    Stalled,
    Start,
    Submit,
    Tick,
    Tokens,
    Worker,
    WorkerView,
)

_log = structlog.get_logger(__name__)

# How often deadlines are looked at: they pass at most this much late, and a request needs no timer of its own.
_WATCH_INTERVAL_S = 0.05

# A stream of a worker that is ill goes on elsewhere after this long a silence, or this many times its longest so far,
# whichever leg that was in: on a machine that is merely starved the next one has to be much longer.
_STALL_S = 2.0
_STALL_PAUSES = 5.0
# Who looks that much too late was starved itself: what engines said meanwhile may not have been heard yet.
_LATE_S = 1.0

# After so long in all in which a leg's engine waited for its reader, whoever waits may have the slot.
_HELD_S = 1.0

# Ends that another leg can make good, if it can go on from where this one ended.
_FAILURES: frozenset[Cause] = frozenset({"lost", "unreachable", "broken", "timed_out"})


class Bounds(msgspec.Struct, frozen=True):
    """``undelivered_bytes``: how far one reader may lag; ``client_idle``: for how long it may take nothing at all."""

    undelivered_bytes: int = 4 * 2**20
    client_idle: float = 60.0


class Dispatcher:
    """Runs calls on workers. An async context manager: leaving it ends every leg.

    All of it lives on one event loop, so the scheduler is fed by one owner and needs no lock.
    """

    def __init__(
        self,
        scheduler: Decider,
        clock: Clock,
        driver_of: Callable[[WorkerId], Driver | None],
        bounds: Bounds,
    ) -> None:
        self._scheduler = scheduler
        self._clock = clock
        self._driver_of = driver_of
        self.bounds = bounds
        self._runs: dict[RequestId, Run] = {}
        self._tasks = Tasks()
        self._watcher: asyncio.Task[None] | None = None
        self._emptied = asyncio.Event()
        self._num_settling: Counter[WorkerId] = Counter()
        self._views: dict[WorkerId, WorkerView] = {}
        self._workers: dict[ModelName, dict[WorkerId, None]] = {}
        self._looked_at = self._awake_since = clock.monotonic()

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        self._watcher = self._tasks.create_task(self._watch())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
        for run in tuple(self._runs.values()):
            run.journal.fail(Draining("the server is shutting down"))
            run.close()
        await self._tasks.__aexit__(kind, error, trace)

    def submit(self, call: Call, *, inline: bool = False) -> Run:
        """Queue the call and return at once; see ``Completer.submit``, and ``Run`` for ``inline``."""
        if call.id in self._runs or self._scheduler.knows(call.id):  # clients may send one id twice; the books must not
            call = msgspec.structs.replace(call, id=RequestId(f"{call.id}-{secrets.token_hex(4)}"))
        run = Run(call, self._clock, on_close=self._close, drive=self._run_leg, is_inline=inline)
        run.is_pinned = self._is_pinned(call)
        self._runs[call.id] = run
        self._feed(
            Submit(
                request=call.id,
                tenant=call.context.tenant,
                models=(call.model, *call.fallbacks) if call.fallbacks else (call.model,),
                tokens_estimate=call.tokens_estimate,
                queue_timeout=call.timeouts.queue,
                now=run.arrived_at,
                rank=CLASSES.index(call.context.urgency),
                prompt_tokens=call.prompt_tokens_estimate,
                weight=call.context.weight,
                program=call.context.program or call.context.session or "",
                is_pinned=run.is_pinned,
                is_urgent=_is_urgent(call),
                deadline_s=call.context.deadline_s,
                role=call.context.role,
                prefixes=call.context.prefixes,
            )
        )
        return run

    def _is_pinned(self, call: Call) -> bool:
        """Whether the call's answer could not be continued by another leg, as far as the workers' drivers know."""
        return any(self._is_pinned_on(model, call) for model in (call.model, *call.fallbacks))

    def _is_pinned_on(self, model: ModelName, call: Call) -> bool:
        for worker in self._workers.get(model, ()):
            if (driver := self._driver_of(worker)) is not None:  # the workers of a model are alike
                able = resumable(driver)
                return able is None or able.exactness(call) == "pinned"
        return True

    def on_worker(self, view: WorkerView) -> None:
        """Tell the scheduler that a worker has appeared or changed; legs of an earlier incarnation are lost."""
        before = self._views.get(view.id)
        self._views[view.id] = view
        if before is None or before.model != view.model:
            if before is not None:
                del self._workers[before.model][view.id]
            self._workers.setdefault(view.model, {})[view.id] = None
        self._feed(Worker(view=view, now=self._clock.monotonic()))
        if before is not None and before.incarnation != view.incarnation:
            for run in tuple(self._runs.values()):
                if run.leg is not None and run.leg.worker == view.id and run.incarnation != view.incarnation:
                    self._end_leg(run, WorkerLost(f"worker {view.id!r} has started anew"))

    @property
    def num_open(self) -> int:
        """How many answers are not closed yet."""
        return len(self._runs)

    async def emptied(self) -> None:
        """Wait until every answer is closed."""
        while self._runs:
            self._emptied.clear()
            await self._emptied.wait()

    def num_running(self, worker: WorkerId) -> int:
        """How many slots of the worker are taken."""
        return self._scheduler.num_running(worker)

    def is_tripped(self, worker: WorkerId) -> bool:
        """Whether failures keep work away from the worker."""
        return self._scheduler.is_tripped(worker)

    def num_waiting(self, model: ModelName) -> int:
        """How many requests wait for a worker of the model."""
        return self._scheduler.num_waiting(model)

    # Effects

    def _feed(self, event: Event) -> None:
        if effects := self._scheduler.on(event):
            self.carry_out(effects)

    def carry_out(self, effects: Sequence[Effect]) -> None:
        """Do what has been decided. Called from outside for what no event of ours has caused: see ``Decider``."""
        for effect in effects:
            match effect:
                case Start():
                    self._start(effect)
                case Abort():
                    self._abort(effect)
                case Reject():
                    self._reject(effect)
                case _:
                    assert_never(effect)

    def _start(self, start: Start) -> None:
        run = self._runs[start.request]
        view = self._views.get(start.worker)
        run.begin_leg(start, view.incarnation if view is not None else 0, self._clock.monotonic())
        if run.is_inline:
            run.start_inline(start)
            return
        run.task = self._tasks.create_task(self._run_leg(run, start))
        # A task that is cancelled before its first step never runs, and never closes its own books.
        run.task.add_done_callback(lambda task: self._leg_done(run, start) if task.cancelled() else None)

    def _abort(self, abort: Abort) -> None:
        run = self._runs.get(RequestId(abort.leg.rpartition("/")[0]))
        if run is None or run.leg is None or run.leg.leg != abort.leg:
            return
        now = self._clock.monotonic()
        if abort.why == "cancelled":
            run.cut_for = None
            run.record_leg("aborted", now)
        elif run.is_in_part and not run.is_held_back:
            run.cut_for = abort.why
            return
        elif self._can_resume(run, self._driver_of(run.leg.worker)):
            run.cut_for = abort.why
            run.record_leg(abort.why, now)
        else:
            return  # better late than lost: the scheduler hears of its end when it comes
        # Recorded at once: who has closed an answer reads its legs before the cancelled task gets to run.
        run.end_leg()
        if run.pending is not None:  # its reader has not come to it yet; else it has been cut already, and settles
            run.pending = None
            run.can_resume = run.cut_for is not None
            self._leg_done(run, run.leg)

    def _can_resume(self, run: Run, driver: Driver | None) -> bool:
        """Whether another leg can follow the one that runs now, so that the client notices nothing but a pause."""
        journal = run.journal
        if journal.has_ended or run.is_closed:
            return False
        if run.transcript is not None:
            return True
        if run.has_first_byte or journal.asides:
            able = resumable(driver)
            if able is not None and able.exactness(run.call) != "pinned":
                run.transcript = read(journal)
        if run.transcript is None and not run.has_first_byte:
            journal.asides.clear()  # nothing was given: the next leg begins anew
            return True
        return run.transcript is not None

    def _reject(self, reject: Reject) -> None:
        run = self._runs.get(reject.request)
        if run is None:
            return
        model = run.call.model
        error: ForebayError
        match reject.why:
            case "failed":
                error = run.leg_error or WorkerLost(f"the worker of {model!r} was lost")
            case "queue_full":
                error = QueueFull(f"too many requests wait for {model!r}", retry_after=reject.retry_after)
            case "queue_timeout":
                error = QueueTimeout(f"no worker of {model!r} became free within {run.call.timeouts.queue:g} s",
                                     retry_after=reject.retry_after)  # fmt: skip
            case "no_healthy_worker" if run.has_first_byte:
                error = WorkerLost(
                    f"the worker of {model!r} ended in the middle of the answer, and no other is running"
                )
            case "no_healthy_worker":
                error = NoHealthyWorker(f"no worker of {model!r} is running", retry_after=reject.retry_after)
            case _:
                assert_never(reject.why)
        run.journal.fail(error)

    # Legs

    async def _run_leg(self, run: Run, start: Start) -> None:
        driver = self._driver_of(start.worker)
        call = run.call if start.model == run.call.model else msgspec.structs.replace(run.call, model=start.model)
        if call.has_leg_spans and call.traceparent is not None:
            call = msgspec.structs.replace(call, traceparent=traceparent_of_leg(call.traceparent, len(run.legs)))
        try:
            if driver is None:
                raise WorkerUnreachable(f"worker {start.worker!r} is not running")
            run.watches_progress = driver.reports_progress(call)
            async with aclosing(self._chunks(run, driver, call)) as chunks:  # type: ignore[type-var] # generators
                async for chunk in chunks:
                    self._take(run, start, chunk)
                    if run.is_ending:
                        raise asyncio.CancelledError
                    # A whole answer is taken at its end: who waits for room in the middle of it waits for ever.
                    if run.call.stream and run.journal.num_undelivered_bytes > self.bounds.undelivered_bytes:
                        await run.room()
            if not run.has_first_byte:
                raise UpstreamBroken("the engine's answer is empty", status=502)
            run.cause = "done"
        except ForebayError as error:
            # Without its frames: they hold the run, and the two would wait for the collector together.
            run.leg_error = error.with_traceback(None)
            run.cause = cause_of(error)
            run.retry_after = error.retry_after
            run.can_resume = run.cause in _FAILURES and self._can_resume(run, driver)
        except asyncio.CancelledError:
            run.cause = "aborted" if run.leg_error is None else cause_of(run.leg_error)
            was_meant = run.cut_for is not None or run.leg_error is not None
            run.can_resume = was_meant and self._can_resume(run, driver)
            run.task = None
            run.record_leg(run.cut_for or run.cause, self._clock.monotonic())  # now: its engine may take long to let go
            self._settle_apart(run, start, driver)
            if not was_meant and not run.journal.has_ended and not run.is_closed:
                raise  # it was not us: an inline run's reader, or the whole dispatcher, is cancelled
            if run.is_inline and (task := asyncio.current_task()) is not None:
                task.uncancel()  # it was the leg that was meant, not the reader whose task it runs in
            return
        except Exception:  # noqa: BLE001 - the border of a leg: one broken driver ends one request
            _log.exception("leg_failed", request_id=call.id, worker_id=start.worker)
            run.leg_error = InternalError(f"an internal error; the log tells more under {call.id}")
            run.cause = "aborted"  # our fault: the worker is not to blame, and another one would not help
        self._leg_done(run, start)

    def _chunks(self, run: Run, driver: Driver, call: Call) -> AsyncIterator[Chunk]:
        """Return the answer's chunks, from its beginning or from where the leg before was cut."""
        model = call.model
        if self._scheduler.num_waiting(model) and not run.is_pinned and (parted := bounded(driver, call)) is not None:
            return in_parts(run, parted, call, lambda: self._scheduler.num_waiting(model) > 0)
        if run.transcript is None:
            return driver.run(call)
        able = resumable(driver)
        if able is None:
            raise WorkerUnreachable(f"the engine of this worker of {call.model!r} cannot continue an answer")
        return run.transcript.go_on(able, call)

    def _settle_apart(self, run: Run, start: Start, driver: Driver | None) -> None:
        """Hold the slot of a leg that was cut until its engine has let go, whatever becomes of the leg's own task."""
        settling = self._settle(run, start, driver)
        try:
            task = self._tasks.create_task(settling)
        except RuntimeError:  # the dispatcher has been left
            settling.close()
            self._leg_done(run, start)
            return
        self._num_settling[start.worker] += 1

        def settled(_: object) -> None:
            self._num_settling[start.worker] -= 1
            self._leg_done(run, start)

        task.add_done_callback(settled)

    async def _settle(self, run: Run, start: Start, driver: Driver | None) -> None:
        try:
            if driver is None:
                return
            worker = start.worker

            def num_expected() -> int:
                return self._scheduler.num_running(worker) - self._num_settling[worker]

            if run.cut_for is not None and (able := resumable(driver)) is not None:
                await able.park(run.call, num_expected)
            else:
                await driver.settle(num_expected)
        except Exception:  # noqa: BLE001 - an error here would end every other leg
            _log.exception("settle_failed", leg=start.leg, worker_id=start.worker)

    def _leg_done(self, run: Run, start: Start) -> None:
        """Close the books of a leg, however it ended. Only the first time counts."""
        if run.leg is not start:
            return
        run.leg = None
        run.task = None
        now = self._clock.monotonic()
        run.record_leg(run.cause, now)
        run.queued_at = now
        if run.cause == "done":
            run.journal.complete()
        cause: Cause = "hurried" if run.cause == "timed_out" and run.call.has_own_timeouts else run.cause
        self._feed(
            LegEnded(
                leg=start.leg,
                cause=cause,
                now=now,
                retry_after=run.retry_after,
                can_resume=run.can_resume,
                prefilled=self._prefilled(run),
                num_tokens=run.num_untold,
            )
        )

    def _prefilled(self, run: Run) -> int | None:
        """Return what the leg that has ended processed of its prompt, if its engine has told."""
        if run.is_resumed:
            return run.prefilled
        usage = run.journal.usage
        return usage.prompt_tokens - usage.cached_tokens if usage is not None else None

    def _take(self, run: Run, start: Start, chunk: Chunk) -> None:
        """Write what the engine sent into the journal."""
        journal = run.journal
        if not chunk.is_progress:
            if run.has_first_byte:
                journal.append(chunk.raw, 0)
            return
        now = self._clock.monotonic()
        if not run.has_progress:
            run.has_progress = True
        elif (pause := now - run.progress_at) > run.longest_pause:
            run.longest_pause = pause
        run.progress_at = now
        if chunk.usage is not None:
            journal.usage = chunk.usage
        if chunk.aside:
            journal.asides += chunk.aside
        is_first = bool(chunk.raw) and not run.has_spoken
        if is_first:
            run.has_spoken = True
            if not run.has_first_byte:
                run.has_first_byte = True
                run.served = Served(
                    model=start.model,
                    worker=start.worker,
                    attempts=start.attempt,
                    queue_s=run.queue_s,
                    engine_s=now - run.leg_started_at,
                )
        if journal.num_undelivered_bytes == 0:
            run.lags_since = now
        journal.append(chunk.raw, chunk.num_tokens)
        # The client comes first, the books after.
        if is_first and run.call.stream:
            self._feed(FirstToken(leg=start.leg, now=now, prefilled=run.prefilled))
        run.num_untold += chunk.num_tokens
        if run.num_untold and run.watches_progress:
            num, run.num_untold = run.num_untold, 0
            self._feed(Tokens(leg=start.leg, num=num, now=now))

    def _close(self, run: Run) -> None:
        if self._runs.get(run.call.id) is not run:
            return
        if self._scheduler.knows(run.call.id):
            self._feed(Cancel(request=run.call.id, now=self._clock.monotonic()))
        del self._runs[run.call.id]
        if not self._runs:
            self._emptied.set()

    # Deadlines

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_WATCH_INTERVAL_S)
            self.tick()

    def tick(self) -> None:
        """Look at the clock: let the scheduler act on passed time, and end what is too late."""
        now = self._clock.monotonic()
        if now - self._looked_at > _LATE_S:
            self._awake_since = now
        self._looked_at = now
        wakeup = self._scheduler.next_wakeup()
        if wakeup is not None and wakeup <= now:
            self._feed(Tick(now=now))
        for run in tuple(self._runs.values()):
            self._check(run, now)

    def _check(self, run: Run, now: float) -> None:
        timeouts = run.call.timeouts
        lag_limit = self.bounds.client_idle
        if run.reader is not None and run.journal.num_undelivered_bytes and now - run.lags_since > lag_limit:
            self._cut(run, ClientIdle(f"the client has read nothing for {lag_limit:g} s"))
        elif run.journal.has_ended:
            return
        elif now - run.arrived_at > timeouts.total:
            self._give_up(run, TotalTimeout(f"the answer was not complete within {timeouts.total:g} s"))
        elif run.is_held_back:
            if run.leg is not None and not run.is_stalled and run.held_s(now) > _HELD_S:
                run.is_stalled = True
                self._feed(Stalled(leg=run.leg.leg, now=now))
        elif run.task is None or run.leg_error is not None or not run.watches_progress:
            return
        elif not run.has_progress:
            if now - run.leg_started_at > timeouts.first_token:
                self._end_leg(run, FirstTokenTimeout(f"the worker sent nothing within {timeouts.first_token:g} s"))
        elif now - run.progress_at > timeouts.idle:
            self._end_leg(run, IdleTimeout(f"the worker stopped sending for {timeouts.idle:g} s"))
        elif not run.is_pinned and run.leg is not None:
            view = self._views.get(run.leg.worker)
            silence = now - max(run.progress_at, self._awake_since)
            if view is not None and not view.is_healthy and silence > max(_STALL_S, _STALL_PAUSES * run.longest_pause):
                run.longest_pause = silence
                self._end_leg(run, WorkerLost(f"worker {run.leg.worker!r} is ill and has stopped sending"))

    def _end_leg(self, run: Run, error: ForebayError) -> None:
        """End the leg alone: another one may follow."""
        if run.task is not None and not run.is_ending:
            run.leg_error = error
            run.end_leg()

    def _give_up(self, run: Run, error: TimedOut) -> None:
        """End the whole request."""
        run.journal.fail(error)
        self._feed(Cancel(request=run.call.id, now=self._clock.monotonic()))

    def _cut(self, run: Run, error: TimedOut) -> None:
        """End the request and the reader that takes nothing."""
        self._give_up(run, error)
        run.cut()


def _is_urgent(call: Call) -> bool:
    """Whether somebody reads the answer as it comes: said so, or of the most urgent class."""
    context = call.context
    return context.objective == "latency" if context.objective is not None else context.urgency == CLASSES[0]


def cause_of(error: ForebayError) -> Cause:
    """Return what an error says of the worker it came from."""
    match error:
        case UpstreamRefused() | InvalidRequest():
            return "refused"
        case UpstreamBusy():
            return "busy"
        case WorkerUnreachable():
            return "unreachable"
        case WorkerLost():
            return "lost"
        case TimedOut():
            return "timed_out"  # a connection that was not accepted in time: waiting for it is an attempt
        case _:
            return "broken"
