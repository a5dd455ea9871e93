"""What happens to a run, as ``run.events()`` tells it: to be told apart with ``match``."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias


@dataclass(frozen=True, slots=True)
class Failure:
    """Why something failed. ``call`` is where it began; ``code`` is stable."""

    code: str | None
    message: str
    call: str | None


@dataclass(frozen=True, slots=True)
class RunStarted:
    """The run has been accepted."""

    run: str
    calls: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RunAppended:
    """Calls have been added."""

    run: str
    calls: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RunStopped:
    """Somebody has cancelled these calls; with none, the run."""

    run: str
    calls: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RunWanted:
    """Somebody has asked for a variable."""

    run: str
    variable: str
    criteria: str


@dataclass(frozen=True, slots=True)
class CallStarted:
    """A call is under way. Not told again after a broken connection."""

    call: str
    attempt: int
    criteria: str | None
    group: str | None


@dataclass(frozen=True, slots=True)
class CallRetried:
    """A call is made again: drop the text of the attempt before."""

    call: str
    attempt: int
    error: Failure | None


@dataclass(frozen=True, slots=True)
class CallWaiting:
    """A tool waits for a client, to be run and its variable set. Tools of this process are seen to by themselves."""

    call: str
    variable: str
    tool: str
    arguments: Any


@dataclass(frozen=True, slots=True)
class CallAttempted:
    """A tool that is used once at most is about to be used."""

    call: str
    variable: str


@dataclass(frozen=True, slots=True)
class VarDelta:
    """A piece of a variable's text. Not told again after a broken connection; ``VarDone`` has all of it."""

    variable: str
    attempt: int
    text: str


@dataclass(frozen=True, slots=True)
class VarDone:
    """A variable has its value, as JSON; elements of lists are told by their path, as ``part[3]``.

    ``usage`` is that of the run so far, as everywhere.
    """

    variable: str
    value: Any
    usage: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class VarFailed:
    """A variable will have no value, as a call failed."""

    variable: str
    error: Failure | None
    usage: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class VarSkipped:
    """A variable will have no value, as the graph says."""

    variable: str


@dataclass(frozen=True, slots=True)
class VarCancelled:
    """A variable will have no value, as nobody wants it any more."""

    variable: str


@dataclass(frozen=True, slots=True)
class RunDone:
    """All that was wanted is there."""

    run: str
    usage: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class RunFailed:
    """Something that was wanted has failed."""

    run: str
    usage: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class RunSkipped:
    """All has ended, and something that was wanted was skipped."""

    run: str
    usage: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class RunCancelled:
    """The run was cancelled."""

    run: str
    usage: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class Unknown:
    """Something that this client does not know, of a newer gateway."""

    event: str
    data: Mapping[str, Any]


RunEnded: TypeAlias = RunDone | RunFailed | RunSkipped | RunCancelled
VarEnded: TypeAlias = VarDone | VarFailed | VarSkipped | VarCancelled
Event: TypeAlias = (
    RunStarted
    | RunAppended
    | RunStopped
    | RunWanted
    | CallStarted
    | CallRetried
    | CallWaiting
    | CallAttempted
    | VarDelta
    | VarEnded
    | RunEnded
    | Unknown
)


def read(event: str, data: Mapping[str, Any]) -> Event:  # noqa: C901, PLR0912 - one case for each kind
    """Return an event of the wire. Raises ``KeyError``, ``TypeError`` or ``ValueError`` if its data lack something."""
    match event:
        case "run.started":
            return RunStarted(data["run"], tuple(data.get("calls", ())))
        case "run.appended":
            return RunAppended(data["run"], tuple(data.get("calls", ())))
        case "run.stopped":
            return RunStopped(data["run"], tuple(data.get("calls", ())))
        case "run.wanted":
            return RunWanted(data["run"], data["variable"], data["criteria"])
        case "call.started":
            return CallStarted(data["call"], int(data.get("attempt", 1)), data.get("criteria"), data.get("group"))
        case "call.retried":
            return CallRetried(data["call"], int(data.get("attempt", 1)), failure(data.get("error")))
        case "call.waiting":
            return CallWaiting(data["call"], data["variable"], data["tool"], data.get("arguments"))
        case "call.attempted":
            return CallAttempted(data["call"], data["variable"])
        case "variable.delta":
            return VarDelta(data["variable"], int(data.get("attempt", 1)), data["text"])
        case "variable.done":
            return VarDone(data["variable"], data.get("value"), data.get("usage"))
        case "variable.failed":
            return VarFailed(data["variable"], failure(data.get("error")), data.get("usage"))
        case "variable.skipped":
            return VarSkipped(data["variable"])
        case "variable.cancelled":
            return VarCancelled(data["variable"])
        case "run.done":
            return RunDone(data["run"], data.get("usage"))
        case "run.failed":
            return RunFailed(data["run"], data.get("usage"))
        case "run.skipped":
            return RunSkipped(data["run"], data.get("usage"))
        case "run.cancelled":
            return RunCancelled(data["run"], data.get("usage"))
    return Unknown(event, data)


def failure(error: Mapping[str, Any] | None) -> Failure | None:
    """Return an error of the wire; None if there is none."""
    if error is None:
        return None
    return Failure(error.get("code"), str(error.get("message", "")), error.get("call"))
