"""Requests as the holder of a lease knows them: with their replica's name before their own.

Two clients may choose the same id at two gateways, and clocks of two machines have nothing in common: so the holder
names what it is told anew, and says itself when it was.
"""

from typing import assert_never

import msgspec

from core.ids import LegId, RequestId
from routing.replicas.messages import ReplicaId
from routing.scheduler import (
    Abort,
    Adopt,
    Cancel,
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
)


def request_of(leg: LegId) -> RequestId:
    """Return whose leg it is."""
    return RequestId(leg.rpartition("/")[0])


def from_replica(event: Event, replica: ReplicaId, now: float) -> Event:
    """Return what the holder's scheduler is told of a replica's event."""
    replace = msgspec.structs.replace
    match event:
        case Submit() | Cancel():
            return replace(event, request=RequestId(f"{replica}:{event.request}"), now=now)
        case Adopt():
            submit = replace(event.submit, request=RequestId(f"{replica}:{event.submit.request}"), now=now)
            leg = event.leg and LegId(f"{replica}:{event.leg}")
            return replace(event, submit=submit, leg=leg, now=now)
        case FirstToken() | Tokens() | Stalled() | LegEnded():
            return replace(event, leg=LegId(f"{replica}:{event.leg}"), now=now)
        case Worker() | Tick():
            return replace(event, now=now)
        case _:
            assert_never(event)


def to_replica(effect: Effect) -> tuple[ReplicaId, Effect]:
    """Return whom an effect of the holder's scheduler is for, and what that replica is told."""
    replace = msgspec.structs.replace
    match effect:
        case Start():
            replica, _, request = effect.request.partition(":")
            leg = LegId(effect.leg.partition(":")[2])
            return ReplicaId(replica), replace(effect, request=RequestId(request), leg=leg)
        case Abort():
            replica, _, own = effect.leg.partition(":")
            return ReplicaId(replica), replace(effect, leg=LegId(own))
        case Reject():
            replica, _, request = effect.request.partition(":")
            return ReplicaId(replica), replace(effect, request=RequestId(request))
        case _:
            assert_never(effect)
