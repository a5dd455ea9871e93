"""What happens to a run, and what it wants done: all frozen values, so that a log of events is a replay."""

from typing import Literal

import msgspec

from semantic_vars.budget import Spent
from semantic_vars.calls import Call, Cause, Criteria, Given, Server
from semantic_vars.prefixes import Beginning
from semantic_vars.values import Value
from semantic_vars.variable import Outcome, State


class Append(msgspec.Struct, frozen=True, tag=True):
    """More calls and variables. They may use what is there; what is there cannot use them."""

    calls: tuple[Call, ...] = ()
    variables: dict[str, Given] = {}
    outputs: tuple[str, ...] = ()


class Want(msgspec.Struct, frozen=True, tag=True):
    """Somebody asks for a variable, by name; ``deadline_s``: would like to have it so soon."""

    variable: str
    criteria: Criteria = "latency"
    deadline_s: float | None = None


class Done(msgspec.Struct, frozen=True, tag=True):
    """A call that was started has its value."""

    call: str
    epoch: int
    value: Value
    spent: Spent = Spent()


class Failed(msgspec.Struct, frozen=True, tag=True):
    """A call that was started has failed, or was aborted. ``can_retry``: it may go better another time."""

    call: str
    epoch: int
    cause: Cause
    code: str
    message: str
    can_retry: bool = True
    spent: Spent = Spent()


class Put(msgspec.Struct, frozen=True, tag=True):
    """Somebody sets a variable that is open, or that of a tool which the client runs; or says in ``failure`` why it
    will have no value."""

    variable: str
    value: Value = None
    failure: str | None = None


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """Nobody wants these calls any more, nor what only they need; with none, the whole run."""

    calls: tuple[str, ...] = ()


class Tick(msgspec.Struct, frozen=True, tag=True):
    """Time has passed; wanted by ``next_wakeup`` at the latest."""


Event = Append | Want | Done | Failed | Put | Cancel | Tick


class Request(msgspec.Struct, frozen=True, tag="request"):
    """Work for a model: the body of a request with everything filled in, and the schema of its answer.

    ``endpoint``: chat, completions or embeddings. ``beginnings``: of its prompt, for whoever knows where others were
    made that begin alike.
    """

    endpoint: Literal["chat", "completions", "embeddings"]
    body: dict[str, Value]
    schema: dict[str, Value] | None
    beginnings: tuple[Beginning, ...] = ()


class Errand(msgspec.Struct, frozen=True, tag="errand"):
    """Work for a tool. ``at_most_once``: it is not to be done again if it may have been done."""

    server: Server
    arguments: Value
    at_most_once: bool = False


Work = Request | Errand


class Standing(msgspec.Struct, frozen=True):
    """What a call is for: see ``objectives``. ``remaining_s``: from its start to the end of all that waits for it;
    ``run_s``: the longest of these in the run; ``run_calls``: how many calls it had before it when this was deduced, as
    far as was known; ``group``: the calls that end together, how many; ``due``: the earliest
    time at which what comes of it is wanted; ``left_s``: until then, or until the run's deadline, if there is one."""

    criteria: Criteria = "latency"
    level: int = 0
    remaining_s: float = 0.0
    run_s: float = 0.0
    run_calls: int = 1
    group: str | None = None
    due: float | None = None
    left_s: float | None = None


class Start(msgspec.Struct, frozen=True, tag=True):
    """Make a call, which sets ``variable``. It is answered by ``Done`` or ``Failed`` with the same ``epoch``, exactly
    once; what a client's tool has come to is ``Put`` into the variable."""

    call: str
    variable: str
    epoch: int
    work: Work
    standing: Standing
    timeout_s: float | None


class Prefill(msgspec.Struct, frozen=True, tag=True):
    """What a call's prompt begins with is known, and the rest of it is being made: an engine may compute the beginning
    meanwhile. Nothing has to answer."""

    call: str
    work: Request


class Abort(msgspec.Struct, frozen=True, tag=True):
    """Stop a call that was started; it still answers, and that counts for what it has spent alone."""

    call: str
    epoch: int


class Resolved(msgspec.Struct, frozen=True, tag=True):
    """A variable has its outcome, for good; ``call`` made it, if any did.

    ``key``: what it was made of, of calls that cost something, and of a race in which ``order`` its bodies came: with
    both in a ``Fact`` the same run comes to the same again.
    """

    variable: str
    call: str | None
    outcome: Outcome
    key: str | None = None
    order: tuple[int, ...] = ()


class Retried(msgspec.Struct, frozen=True, tag=True):
    """A call is made again: what it has said so far is void."""

    call: str
    attempt: int
    code: str
    message: str


class Ended(msgspec.Struct, frozen=True, tag=True):
    """All that was wanted has its outcome: ``done``, or the worst of them. More may be appended or wanted."""

    state: State


Effect = Start | Prefill | Abort | Resolved | Retried | Ended
