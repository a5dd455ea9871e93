"""What the scheduler is told. All are frozen values that can be sent and logged; ``now`` is monotonic seconds."""

from typing import Literal

import msgspec

from core.chat import Prefix, Role
from core.ids import LegId, ModelName, RequestId, TenantId, WorkerId
from routing.scheduler.effects import CutFor

Cause = Literal["done", "refused", "busy", "broken", "lost", "unreachable", "timed_out", "hurried", "aborted"]
"""How a leg ended. ``refused``: the request's own fault; ``unreachable``: the worker never saw the request;
``hurried``: it missed a deadline of the caller's own choice, which says nothing of the worker."""


class WorkerView(msgspec.Struct, frozen=True):
    """What decisions know of a worker. ``may_return``: not ready now, and something is being done about it.
    ``is_draining``: it gets no new work, and what can go on elsewhere is moved away as soon as there is room.
    ``kv_tokens``: how many tokens of context its engine's memory holds, of all legs together; None if that is not known
    or never binds. ``num_prefixes``: of how many prompts that begin differently its caches keep something, where they
    count so."""

    id: WorkerId
    model: ModelName
    is_ready: bool
    is_healthy: bool
    may_return: bool
    max_inflight: int
    incarnation: int = 0
    is_draining: bool = False
    kv_tokens: int | None = None
    num_prefixes: int | None = None


class Submit(msgspec.Struct, frozen=True, tag="submit"):
    """A request has come. ``models``: the one asked for, then its fallbacks. ``rank``: its place among its tenant's
    own, the lower the sooner. ``weight``: its tenant's share, beside the others'. ``program``: which of the tenant's
    programs it belongs to. ``is_pinned``: it must not be cut by choice. ``tokens_estimate``: the prompt and the longest
    answer; ``prompt_tokens``: the prompt's part of it. ``is_urgent``: somebody reads the answer as it comes.
    ``deadline_s``, ``role``, ``prefixes``: as in ``core.chat.CallContext``."""

    request: RequestId
    tenant: TenantId
    models: tuple[ModelName, ...]
    tokens_estimate: int
    queue_timeout: float
    now: float
    rank: int = 0
    prompt_tokens: int = 0
    weight: float = 1.0
    program: str = ""
    is_pinned: bool = True
    is_urgent: bool = False
    deadline_s: float | None = None
    role: Role | None = None
    prefixes: tuple[Prefix, ...] = ()


class FirstToken(msgspec.Struct, frozen=True, tag="first_token"):
    """The leg's first byte is there: from now on the request is bound to this answer. ``prefilled``: the tokens that
    the engine really processed for the prompt; None if it does not tell, or not yet."""

    leg: LegId
    now: float
    prefilled: int | None = None


class Tokens(msgspec.Struct, frozen=True, tag="tokens"):
    """The engine has delivered ``num`` more output tokens."""

    leg: LegId
    num: int
    now: float


class Stalled(msgspec.Struct, frozen=True, tag="stalled"):
    """The leg's engine has been kept waiting by the reader of the answer, for a while in all. Told once for a leg."""

    leg: LegId
    now: float


class LegEnded(msgspec.Struct, frozen=True, tag="leg_ended"):
    """The leg is over and its slot is free; ``retry_after`` is the engine's own advice, in seconds.

    ``can_resume``: another leg can go on where this one ended, so that the client notices nothing. ``prefilled``: as in
    ``FirstToken``, where the engine tells it only at the end. ``num_tokens``: output tokens that no ``Tokens`` has told
    of, as of a whole answer that comes in one piece.
    """

    leg: LegId
    cause: Cause
    now: float
    retry_after: float | None = None
    can_resume: bool = False
    prefilled: int | None = None
    num_tokens: int = 0


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """Nobody wants the answer any more. A running leg's slot counts as taken until its ``LegEnded``."""

    request: RequestId
    now: float


class Worker(msgspec.Struct, frozen=True, tag="worker"):
    """A worker has appeared or changed."""

    view: WorkerView
    now: float


class Tick(msgspec.Struct, frozen=True, tag="tick"):
    """Time has passed."""

    now: float


class Adopt(msgspec.Struct, frozen=True, tag="adopt"):
    """A request that another scheduler had in its books, as the gateway that has its client knows where it stands.

    ``waited``: how much of its wait is over; ``num_legs``: the number of its next leg. With a ``leg`` it holds a slot
    of ``worker``, even of one that is full; ``cut_for``: why that leg has been told to end. ``num_tokens`` have been
    delivered. What is known of the request already is forgotten first; nothing is charged. One that waits begins with
    the next ``Tick`` at the earliest, so that all that is told together takes turns.
    """

    submit: Submit
    now: float
    waited: float = 0.0
    num_legs: int = 0
    num_attempts: int = 0
    leg: LegId | None = None
    worker: WorkerId | None = None
    cut_for: CutFor | None = None
    is_committed: bool = False
    num_tokens: int = 0


Event = Submit | FirstToken | Tokens | Stalled | LegEnded | Cancel | Worker | Tick | Adopt
