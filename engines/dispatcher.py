"""Owns the scheduler: feeds it events, carries out its effects, and runs every leg as a task of its own."""

import asyncio
import secrets
from collections import Counter
from collections.abc import Callable, Sequence
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
from engines.driver import Chunk, Driver
from engines.run import Run
from engines.tasks import Tasks
from routing.scheduler import (
    Abort,
    Cancel,
    Cause,
    Effect,
    Event,
    FirstToken,
    LegEnded,
    Reject,
    Scheduler,
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
        scheduler: Scheduler,
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
            )
        )
        return run

    def on_worker(self, view: WorkerView) -> None:
        """Tell the scheduler that a worker has appeared or changed."""
        self._feed(Worker(view=view, now=self._clock.monotonic()))

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
        self._carry_out(self._scheduler.on(event))

    def _carry_out(self, effects: Sequence[Effect]) -> None:
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
        run.leg = run.unrecorded = start
        run.attempts = start.attempt
        run.cause = "aborted"
        run.leg_error = None
        run.retry_after = None
        now = self._clock.monotonic()
        run.leg_started_at = run.progress_at = now
        run.queue_s += now - run.queued_at
        if run.is_inline:
            run.start_inline(start)
            return
        run.task = self._tasks.create_task(self._run_leg(run, start))
        # A task that is cancelled before its first step never runs, and never closes its own books.
        run.task.add_done_callback(lambda task: self._leg_done(run, start) if task.cancelled() else None)

    def _abort(self, abort: Abort) -> None:
        run = self._runs.get(RequestId(abort.leg.rpartition("/")[0]))
        if run is None or run.leg is None:
            return
        # At once: who has closed an answer reads its legs before the cancelled task gets to run.
        run.record_leg("aborted", self._clock.monotonic())
        if run.task is not None:
            run.task.cancel()
        elif run.pending is not None:  # its reader has not come to it yet; else it has been cut already, and settles
            run.pending = None
            self._leg_done(run, run.leg)

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
            case "no_healthy_worker":
                error = NoHealthyWorker(f"no worker of {model!r} is running", retry_after=reject.retry_after)
            case _:
                assert_never(reject.why)
        run.journal.fail(error)

    # Legs

    async def _run_leg(self, run: Run, start: Start) -> None:
        driver = self._driver_of(start.worker)
        call = run.call if start.model == run.call.model else msgspec.structs.replace(run.call, model=start.model)
        try:
            if driver is None:
                raise WorkerUnreachable(f"worker {start.worker!r} is not running")
            run.watches_progress = driver.reports_progress(call)
            async with aclosing(driver.run(call)) as chunks:  # type: ignore[type-var] # drivers are generators
                async for chunk in chunks:
                    self._take(run, start, chunk)
                    # A whole answer is taken at its end: who waits for room in the middle of it waits for ever.
                    if run.call.stream and run.journal.num_undelivered_bytes > self.bounds.undelivered_bytes:
                        await run.room()
            if not run.has_first_byte:
                raise UpstreamBroken("the engine's answer is empty", status=502)
            run.cause = "done"
        except ForebayError as error:
            run.leg_error = error
            run.cause = cause_of(error)
            run.retry_after = error.retry_after
        except asyncio.CancelledError:
            run.cause = "aborted" if run.leg_error is None else "timed_out"
            run.task = None
            run.record_leg(run.cause, self._clock.monotonic())  # now: its engine may take long to let go
            self._settle_apart(run, start, driver)
            if run.leg_error is None and not run.journal.has_ended and not run.is_closed:
                raise  # it was not us: an inline run's reader, or the whole dispatcher, is cancelled
            if run.is_inline and (task := asyncio.current_task()) is not None:
                task.uncancel()  # it was the leg that was meant, not the reader whose task it runs in
            return
        except Exception:  # noqa: BLE001 - the border of a leg: one broken driver ends one request
            _log.exception("leg_failed", request_id=call.id, worker_id=start.worker)
            run.leg_error = InternalError(f"an internal error; the log tells more under {call.id}")
            run.cause = "aborted"  # our fault: the worker is not to blame, and another one would not help
        self._leg_done(run, start)

    def _settle_apart(self, run: Run, start: Start, driver: Driver | None) -> None:
        """Hold the slot of a leg that was cut until its engine has let go, whatever becomes of the leg's own task."""
        settling = self._settle(start, driver)
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

    async def _settle(self, start: Start, driver: Driver | None) -> None:
        try:
            if driver is not None:
                worker = start.worker
                await driver.settle(lambda: self._scheduler.num_running(worker) - self._num_settling[worker])
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
        self._feed(LegEnded(leg=start.leg, cause=cause, now=now, retry_after=run.retry_after))

    def _take(self, run: Run, start: Start, chunk: Chunk) -> None:
        """Write what the engine sent into the journal."""
        journal = run.journal
        if not chunk.is_progress:
            if run.has_first_byte:
                journal.append(chunk.raw, 0)
            return
        now = self._clock.monotonic()
        run.progress_at = now
        if chunk.usage is not None:
            journal.usage = chunk.usage
        is_first = bool(chunk.raw) and not run.has_first_byte
        if is_first:
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
            self._feed(FirstToken(leg=start.leg, now=now))
        if chunk.num_tokens and run.watches_progress:
            self._feed(Tokens(leg=start.leg, num=chunk.num_tokens, now=now))

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
        elif run.task is None or run.leg_error is not None or not run.watches_progress or run.is_held_back:
            return
        elif not run.has_first_byte and run.progress_at == run.leg_started_at:
            if now - run.leg_started_at > timeouts.first_token:
                self._end_leg(run, FirstTokenTimeout(f"the worker sent nothing within {timeouts.first_token:g} s"))
        elif now - run.progress_at > timeouts.idle:
            self._end_leg(run, IdleTimeout(f"the worker stopped sending for {timeouts.idle:g} s"))

    def _end_leg(self, run: Run, error: TimedOut) -> None:
        """End the leg alone: before the first byte another one may follow."""
        run.leg_error = error
        if run.task is not None:
            run.task.cancel()

    def _give_up(self, run: Run, error: TimedOut) -> None:
        """End the whole request."""
        run.journal.fail(error)
        self._feed(Cancel(request=run.call.id, now=self._clock.monotonic()))

    def _cut(self, run: Run, error: TimedOut) -> None:
        """End the request and the reader that takes nothing."""
        self._give_up(run, error)
        run.cut()


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
