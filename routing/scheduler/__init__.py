"""Who runs where, and when: a synchronous machine. Events go in, effects come out, nothing else happens.

One owner feeds it (``engines/dispatcher.py``; a simulator under a virtual clock does the same), so it has no lock.
Requests wait here and not in the engines: a worker is never given more than ``max_inflight`` of them, and which
worker it will be is decided when one has room, not before. ``DESIGN.md`` above this package tells the rules.
"""

from routing.scheduler.decisions import Decision
from routing.scheduler.effects import Abort, CutFor, Effect, Reject, Start, Why
from routing.scheduler.events import (
    Adopt,
    Cancel,
    Cause,
    Event,
    FirstToken,
    LegEnded,
    Stalled,
    Submit,
    Tick,
    Tokens,
    Worker,
    WorkerView,
)
from routing.scheduler.machine import BUSY_PAUSE_S, Limits, Scheduler
from routing.scheduler.memory import Memory
from routing.scheduler.views import FairnessView, TenantView

__all__ = [
    "BUSY_PAUSE_S",
    "Abort",
    "Adopt",
    "Cancel",
    "Cause",
    "CutFor",
    "Decision",
    "Effect",
    "Event",
    "FairnessView",
    "FirstToken",
    "LegEnded",
    "Limits",
    "Memory",
    "Reject",
    "Scheduler",
    "Stalled",
    "Start",
    "Submit",
    "TenantView",
    "Tick",
    "Tokens",
    "Why",
    "Worker",
    "WorkerView",
]
