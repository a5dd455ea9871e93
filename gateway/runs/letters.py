"""Letters: what a run is asked for at a gateway that does not have it, written down for the one that has.

A letter is kept in the database until it is answered, and its answer is written together with what comes of it: so it
is done once, whichever gateway dies in between. Who has sent it and waits no longer takes it back; then it is not done.
"""

from typing import Protocol

import msgspec
import structlog

from core.errors import ForebayError, InternalError, InvalidRequest
from core.workflows import RunAnswer, RunLetter
from gateway.runs.history import Appended, Stopped, Wanted
from semantic_vars.calls import Criteria
from semantic_vars.events import Put

_log = structlog.get_logger(__name__)

_ASKED = msgspec.json.Decoder(Appended | Wanted | Stopped | Put)
_KINDS: list[type[InvalidRequest]] = [InvalidRequest, *InvalidRequest.__subclasses__()]
_REFUSALS: dict[str, type[ForebayError]] = {kind.code: kind for kind in _KINDS}


class Askable(Protocol):
    """What can be asked for something: a run that is alive here, or a letter to the gateway that has it."""

    def append(self, more: Appended) -> None:
        """Add calls and variables."""

    def want(self, variable: str, criteria: Criteria, deadline_s: float | None = None) -> None:
        """Ask for a variable, at a time perhaps."""

    def cancel(self, calls: tuple[str, ...]) -> None:
        """Give calls up, or with none the run."""

    def put(self, put: Put) -> None:
        """Set a variable from outside."""


class Letter:
    """Takes down what it is asked for, which is one thing, as ``body``."""

    def __init__(self) -> None:
        self.body = b""

    def append(self, more: Appended) -> None:
        """See ``Askable``."""
        self.body = msgspec.json.encode(more)

    def want(self, variable: str, criteria: Criteria, deadline_s: float | None = None) -> None:
        """See ``Askable``."""
        self.body = msgspec.json.encode(Wanted(variable, criteria, deadline_s))

    def cancel(self, calls: tuple[str, ...]) -> None:
        """See ``Askable``."""
        self.body = msgspec.json.encode(Stopped(calls))

    def put(self, put: Put) -> None:
        """See ``Askable``."""
        self.body = msgspec.json.encode(put)


class _Verdict(msgspec.Struct, frozen=True, omit_defaults=True):
    """How a letter was taken: done, or with a ``kind`` refused."""

    kind: str | None = None
    message: str = ""
    param: str | None = None


def answer_to(letter: RunLetter, run: Askable) -> RunAnswer:
    """Do what a letter asks for; return the answer, which says why if it cannot be."""
    try:
        match _ASKED.decode(letter.body):
            case Appended() as more:
                run.append(more)
            case Wanted(variable=variable, criteria=criteria, deadline_s=deadline_s):
                run.want(variable, criteria, deadline_s)
            case Stopped(calls=calls):
                run.cancel(calls)
            case Put() as put:
                run.put(put)
        verdict = _Verdict()
    except ForebayError as error:
        verdict = _Verdict(error.code, error.message, error.param)
    except Exception:  # noqa: BLE001 - whoever has sent it has to be told
        _log.exception("letter_failed", run=letter.run, letter=letter.number)
        verdict = _Verdict(InternalError.code, "an internal error of the gateway that has the run; its log has more")
    return RunAnswer(letter.number, msgspec.json.encode(verdict))


def check(answer: RunAnswer) -> None:
    """Raise the error that a letter was answered with, if it was refused."""
    verdict = msgspec.json.decode(answer.body, type=_Verdict)
    if verdict.kind is not None:
        raise _REFUSALS.get(verdict.kind, InternalError)(verdict.message, param=verdict.param)
