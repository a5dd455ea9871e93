"""What one gateway knows of its own requests for a model: enough to tell any scheduler where they stand."""

import msgspec

from core.ids import LegId, RequestId, WorkerId
from routing.replicas.names import request_of
from routing.scheduler import (
    Abort,
    Adopt,
    Cancel,
    CutFor,
    Effect,
    Event,
    FirstToken,
    LegEnded,
    Start,
    Submit,
    Tokens,
)


class Standing(msgspec.Struct):
    """One request. ``queued_at``: since when it waits, or when its last wait began. ``leg``: the one that runs, or
    whose end nobody has decided about yet; ``cut_for``: why it was told to end; ``ended``: how it ended."""

    submit: Submit
    queued_at: float
    num_legs: int = 0
    num_attempts: int = 0
    leg: LegId | None = None
    worker: WorkerId | None = None
    num_tokens: int = 0
    is_committed: bool = False
    is_cancelled: bool = False
    cut_for: CutFor | None = None
    ended: LegEnded | None = None

    @property
    def is_running(self) -> bool:
        """Whether it holds a slot."""
        return self.leg is not None and self.ended is None


class Standings:
    """All requests of this gateway for one model. Never asks; told of every event and effect, in their order."""

    def __init__(self) -> None:
        self._all: dict[RequestId, Standing] = {}

    def __len__(self) -> int:
        return len(self._all)

    def __contains__(self, request: RequestId) -> bool:
        return request in self._all

    def is_running(self, request: RequestId) -> bool:
        """Whether the request holds a slot."""
        standing = self._all.get(request)
        return standing is not None and standing.is_running

    def leg_of(self, request: RequestId) -> LegId | None:
        """Return the leg that the request runs, if it does."""
        standing = self._all.get(request)
        return standing.leg if standing is not None and standing.is_running else None

    def num_running(self, worker: WorkerId) -> int:
        """Return how many of these requests hold a slot of the worker."""
        return sum(standing.is_running and standing.worker == worker for standing in self._all.values())

    @property
    def num_waiting(self) -> int:
        """How many of these requests hold no slot."""
        return sum(not standing.is_running for standing in self._all.values())

    def note(self, event: Event) -> None:
        """Keep what has happened."""
        match event:
            case Submit():
                self._all[event.request] = Standing(event, event.now)
            case Adopt():
                self._all[event.submit.request] = Standing(event.submit, event.now - event.waited, event.num_legs)
            case Cancel():
                self._note_cancel(event)
            case LegEnded():
                self._note_end(event)
            case FirstToken():
                if (standing := self._all.get(request_of(event.leg))) is not None:
                    standing.is_committed = True
            case Tokens():
                if (standing := self._all.get(request_of(event.leg))) is not None:
                    standing.num_tokens += event.num
            case _:
                pass

    def obey(self, effect: Effect) -> bool:
        """Keep what has been decided; return whether it still means anything here."""
        if isinstance(effect, Abort):
            standing = self._all.get(request_of(effect.leg))
            if standing is None or not standing.is_running or standing.leg != effect.leg or effect.why == "cancelled":
                return False  # whoever cancels has ended the leg already
            standing.cut_for = effect.why
            return True
        standing = self._all.get(effect.request)
        if standing is None:
            return False
        if not isinstance(effect, Start):
            del self._all[effect.request]
            return True
        if standing.is_cancelled or standing.is_running:
            return False
        if standing.ended is not None and standing.ended.cause not in {"unreachable", "aborted"}:
            standing.num_attempts += 1
        standing.leg, standing.worker, standing.num_legs = effect.leg, effect.worker, effect.attempt
        standing.ended = standing.cut_for = None
        return True

    def retell(self, now: float) -> list[Event]:
        """Return events that tell a scheduler which knows nothing of these requests where they stand."""
        events: list[Event] = []
        for request, standing in self._all.items():
            events.append(
                Adopt(
                    submit=standing.submit,
                    now=now,
                    waited=now - standing.queued_at,
                    num_legs=standing.num_legs,
                    num_attempts=standing.num_attempts,
                    leg=standing.leg,
                    worker=standing.worker,
                    cut_for=standing.cut_for,
                    is_committed=standing.is_committed,
                    num_tokens=standing.num_tokens,
                )
            )
            if standing.is_cancelled:
                events.append(Cancel(request=request, now=now))
            if standing.ended is not None:
                events.append(standing.ended)
        return events

    def _note_cancel(self, event: Cancel) -> None:
        standing = self._all.get(event.request)
        if standing is None:
            return
        if standing.is_running:
            standing.is_cancelled = True
        else:
            del self._all[event.request]

    def _note_end(self, event: LegEnded) -> None:
        request = request_of(event.leg)
        standing = self._all.get(request)
        if standing is None or standing.leg != event.leg:
            return
        if standing.is_cancelled or event.cause == "done":
            del self._all[request]
            return
        standing.ended = event
        if event.cause != "unreachable":
            standing.queued_at = event.now
