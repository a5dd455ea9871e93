"""One background response at one moment: its run, and how far that has come."""

from typing import Literal, TypeAlias

import msgspec

from core.workflows import RunRecord
from gateway.responses.asked import OUTPUT, Asked, asked_of, references_of
from gateway.responses.ids import id_of
from gateway.runs.history import History
from gateway.runs.live import LiveRun
from semantic_vars.variable import Outcome, State

Found: TypeAlias = LiveRun | tuple[RunRecord, History]
"""A run, alive or as it ended; see ``Runs.find``."""

Status = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]


class Background(msgspec.Struct, frozen=True):
    """A response. ``history`` is what of its run is durable; while the run is ``live`` here, it goes on."""

    record: RunRecord
    history: History
    asked: Asked
    live: LiveRun | None

    @property
    def id(self) -> str:
        """The response's id."""
        return id_of(self.record.id)

    @property
    def outcome(self) -> Outcome | None:
        """What became of the answer; None while it is not there."""
        return self.history.outcome(OUTPUT)

    @property
    def text(self) -> str:
        """The answer; nothing while it is not there."""
        outcome = self.outcome
        return str(outcome.value) if outcome is not None and outcome.state is State.DONE else ""

    @property
    def status(self) -> Status:
        """Where it is: queued as long as it waits for other responses."""
        outcome = self.outcome
        if outcome is None:
            return "queued" if self.waits_for else "in_progress"
        if outcome.state is State.DONE:
            return "incomplete" if self.is_cut else "completed"
        return "failed" if outcome.state is State.FAILED else "cancelled"

    @property
    def waits_for(self) -> tuple[str, ...]:
        """The responses that it refers to, and that it does not know the end of."""
        return tuple(one for one in references_of(self.history.workflow) if self.history.outcome(one) is None)

    @property
    def is_cut(self) -> bool:
        """Whether the answer has all the tokens that were allowed: an engine ends it there, as a rule in the middle."""
        end = self.history.ends.get(OUTPUT)
        limit = self.asked.max_output_tokens
        return limit is not None and end is not None and end.made is not None and end.made.used.completion >= limit


def background_of(found: Found) -> Background | None:
    """Return the response that a run is; None of one that is none."""
    live = found if isinstance(found, LiveRun) else None
    record, history = (found.record, found.told) if isinstance(found, LiveRun) else found
    asked = asked_of(history.workflow)
    return Background(record, history, asked, live) if asked is not None else None
