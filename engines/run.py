"""One call under way: the journal that the engine writes, and the reader that follows it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

from core.chat import Call, Usage
from core.clock import Clock
from core.completer import Served
from core.errors import ForebayError
from core.records import LegRecord
from engines.transcript import Transcript
from routing.journal import Journal
from routing.scheduler import Cause, CutFor, Start


class Run:
    """Fits ``core.completer.Answer``. Written by ``engines/dispatcher.py``, read by one consumer.

    Times are monotonic seconds. ``reader`` is the consumer's task, if it wants to be cancelled when it has not taken
    anything for ``client_idle``; ``lags_since`` is since when something has waited for it.

    An ``is_inline`` run has no tasks of its own: its legs are driven, one after the other and each to its end, by
    whoever awaits ``first_byte``, which saves two task switches a request. Its ``sink`` takes a stream's frames
    meanwhile, the first too, or returns False when it cannot; ``push`` tries again. What it has not taken is left for
    ``chunks``.

    ``transcript`` is there once a leg was cut and another can go on. ``is_in_part``: the leg comes to an end soon by
    itself, and had better be cut there.
    """

    __slots__ = (
        "_clock",
        "_drive",
        "_held_s",
        "_held_since",
        "_is_closed",
        "_model",
        "_on_close",
        "_position",
        "_room",
        "_waiter",
        "arrived_at",
        "attempts",
        "can_resume",
        "cause",
        "cut_for",
        "has_first_byte",
        "has_progress",
        "has_spoken",
        "incarnation",
        "is_cut",
        "is_ending",
        "is_in_part",
        "is_inline",
        "is_pinned",
        "is_resumed",
        "is_stalled",
        "journal",
        "lags_since",
        "leg",
        "leg_error",
        "leg_started_at",
        "legs",
        "longest_pause",
        "num_untold",
        "pending",
        "progress_at",
        "queue_s",
        "queued_at",
        "reader",
        "retry_after",
        "served",
        "sink",
        "task",
        "transcript",
        "unrecorded",
        "watches_progress",
    )

    def __init__(
        self,
        call: Call,
        clock: Clock,
        *,
        on_close: Callable[["Run"], None],
        drive: Callable[["Run", Start], Awaitable[None]],
        is_inline: bool,
    ) -> None:
        self.journal = Journal(call)
        self.journal.on_change = self._wake
        self._clock = clock
        self._on_close = on_close
        self._drive = drive
        self._is_closed = False
        self.is_cut = False
        self.is_in_part = False
        self.is_inline = is_inline
        self.pending: Start | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._room: asyncio.Future[None] | None = None
        self._position = 0
        self.sink: Callable[[bytes], bool] | None = None
        now = clock.monotonic()
        self.arrived_at = now
        self.queued_at = now
        self.queue_s = 0.0
        self.attempts = 0
        self.lags_since = now
        self.reader: asyncio.Task[None] | None = None
        self.served: Served | None = None
        # The legs that have ended, or were told to end, in their order; one for each worker that was tried.
        self.legs: list[LegRecord] = []
        # The leg that runs now, if any, and how it ends.
        self.leg: Start | None = None
        self._model = call.model
        self.unrecorded: Start | None = None
        self.task: asyncio.Task[None] | None = None
        self.leg_started_at = now
        self.progress_at = now
        self.watches_progress = False
        self.incarnation = 0
        self.has_progress = False
        self.has_spoken = False
        self.longest_pause = 0.0
        self.num_untold = 0  # tokens of this leg that the scheduler has not heard of
        self.is_ending = False
        self.cut_for: CutFor | None = None
        self.can_resume = False
        self.is_resumed = False
        self.is_stalled = False
        self._held_s = self._held_since = 0.0
        self.cause: Cause = "aborted"
        self.leg_error: ForebayError | None = None
        self.retry_after: float | None = None
        # All legs together.
        self.is_pinned = True
        self.has_first_byte = False
        self.transcript: Transcript | None = None

    def begin_leg(self, start: Start, incarnation: int, now: float) -> None:
        """Forget how the leg before has ended: another one begins. Another model has nothing to go on with: what was
        kept of a whole answer is none of its own."""
        if self._model != start.model and not self.has_first_byte:
            self.transcript = None
            self.journal.asides.clear()
        self._model = start.model
        self.leg = self.unrecorded = start
        self.attempts = start.attempt
        self.incarnation = incarnation
        self.leg_started_at = self.progress_at = now
        self.queue_s += now - self.queued_at
        self.has_progress = self.has_spoken = self.is_ending = self.can_resume = self.is_in_part = False
        self.is_resumed = self.transcript is not None
        self.num_untold = 0
        self.is_stalled = False
        self._held_s = 0.0
        self.cut_for = None
        self.cause = "aborted"
        self.leg_error = None
        self.retry_after = None

    def end_leg(self) -> None:
        """Stop what the leg's task does, wherever it waits; only the first time counts.

        A leg that ends itself (its own news have made the scheduler cut it) waits for nothing: it looks at
        ``is_ending`` before it goes on.
        """
        if self.task is not None and not self.is_ending:
            self.is_ending = True
            if self.task is not asyncio.current_task():
                self.task.cancel()

    def cut(self) -> None:
        """End the reader that takes nothing, wherever it waits."""
        reader, self.reader = self.reader, None
        self.is_cut = True
        if reader is not None:
            reader.cancel()

    @property
    def is_closed(self) -> bool:
        """Whether nobody wants the answer any more."""
        return self._is_closed

    def record_leg(self, cause: Cause | CutFor, now: float) -> None:
        """Note that the leg which runs now has ended, or will be no more use; only the first time counts."""
        start, self.unrecorded = self.unrecorded, None
        if start is not None:
            began = self.leg_started_at
            at_s, duration_s = began - self.arrived_at, now - began
            recomputed = self._recomputed() if self.is_resumed else None
            self.legs.append(LegRecord(start.worker, start.model, at_s, duration_s, cause, recomputed))

    def _recomputed(self) -> int:
        transcript = self.transcript
        if transcript is None or not self.has_progress:
            return 0
        return transcript.expected if transcript.prefilled is None else transcript.prefilled

    @property
    def prefilled(self) -> int | None:
        """The tokens that this leg processed anew before it went on; None for a first leg, and if it does not tell."""
        return self.transcript.prefilled if self.transcript is not None else None

    def start_inline(self, start: Start) -> None:
        """Leave a leg to whoever awaits ``first_byte``."""
        self.pending = start
        self._wake()

    @property
    def call(self) -> Call:
        """The call itself."""
        return self.journal.call

    @property
    def usage(self) -> Usage:
        """What has been metered so far."""
        return self.journal.metered

    @property
    def error(self) -> ForebayError | None:
        """Why the answer ended early, if it did."""
        return self.journal.error

    async def first_byte(self) -> Served:
        """Wait until the answer is sure to follow, or, inline, until all of it is there; see ``Answer.first_byte``."""
        journal = self.journal
        is_stream = journal.call.stream
        while not journal.has_ended and (self.is_inline or not (is_stream and journal.frames)):
            start = self.pending
            if start is None:
                await self._changed()
                continue
            self.pending = None
            self.task = asyncio.current_task()
            await self._drive(self, start)
            if self.is_cut or (self._is_closed and not journal.has_ended):
                raise asyncio.CancelledError
        if journal.error is not None and not (is_stream and journal.frames):
            raise journal.error
        assert self.served is not None
        return self.served

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield what is in the journal and what comes, joined where the reader lags; raise if the answer was cut."""
        journal = self.journal
        while True:
            frames = journal.frames
            position = self._position
            if position < len(frames):
                piece = frames[position] if position + 1 == len(frames) else b"".join(frames[position:])
                self._position = len(frames)
                yield piece
                self._delivered(len(piece))
            elif journal.error is not None:
                raise journal.error
            elif journal.is_complete:
                return
            else:
                await self._changed()

    def close(self) -> None:
        """Let go of the answer; if it still runs, its worker is told to stop at once."""
        self.reader = self.sink = None
        self.journal.unfollow()  # with the sink, the ways from here back to here: what is over is freed at once
        self._is_closed = True
        self._on_close(self)

    async def room(self) -> None:
        """Wait until the reader has taken something. For the writer, when too much lies undelivered."""
        self._room = asyncio.get_running_loop().create_future()
        self._held_since = self._clock.monotonic()
        try:
            await self._room
        finally:
            self._room = None
            self.progress_at = self._clock.monotonic()  # it was us who did not listen, not the engine who was silent
            self._held_s += self.progress_at - self._held_since

    @property
    def is_held_back(self) -> bool:
        """Whether the writer waits for the reader."""
        return self._room is not None

    def held_s(self, now: float) -> float:
        """Return for how many seconds the leg that ``is_held_back`` now has waited for its reader, in all."""
        return self._held_s + now - self._held_since

    def _delivered(self, num_bytes: int) -> None:
        self.journal.num_delivered_bytes += num_bytes
        self.lags_since = self._clock.monotonic()
        if self._room is not None and not self._room.done():
            self._room.set_result(None)

    async def _changed(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def push(self) -> None:
        """Let the sink take all that waits, if it can."""
        frames = self.journal.frames
        position = self._position
        if self.sink is None or position == len(frames):
            return
        piece = frames[position] if position + 1 == len(frames) else b"".join(frames[position:])
        if self.sink(piece):
            self._position = len(frames)
            self._delivered(len(piece))

    def _wake(self) -> None:
        """There is news: for the sink, and for a reader that waits."""
        self.push()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
