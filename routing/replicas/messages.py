"""What gateways tell each other. The scheduler's events and effects are the protocol; this is the envelope.

A *session* is what one replica has told the holder of one model's lease since it last told everything. Within a session
messages are numbered without a gap, both ways. What was lost is never asked for again: whoever misses a message begins
a new session, in which the replica tells all it has. So nothing but the replica's own books has to be kept.
"""

from collections.abc import Mapping
from typing import NewType

import msgspec

from core.ids import ModelName, WorkerId
from routing.scheduler import Effect, Event, Memory

ReplicaId = NewType("ReplicaId", str)
"""One gateway process, from its start to its end. Holds no ``:``."""


class Events(msgspec.Struct, frozen=True, tag="events"):
    """To the holder: what happened here. ``number`` 0 begins the session and tells everything."""

    model: ModelName
    epoch: int
    session: int
    number: int
    events: tuple[Event, ...] = ()


class Effects(msgspec.Struct, frozen=True, tag="effects"):
    """From the holder: what has to be done. ``running``: the slots taken of each worker, by all replicas."""

    model: ModelName
    epoch: int
    session: int
    number: int
    effects: tuple[Effect, ...] = ()
    running: Mapping[WorkerId, int] = {}


class Summons(msgspec.Struct, frozen=True, tag="summons"):
    """From the holder: begin a session after ``session``, which I cannot use; 0 if I know of none."""

    model: ModelName
    epoch: int
    session: int = 0


class Learned(msgspec.Struct, frozen=True, tag="learned"):
    """From the holder, with every beat: what its scheduler knows by now, for whoever comes after it. May be lost."""

    model: ModelName
    epoch: int
    memory: Memory


class Handover(msgspec.Struct, frozen=True, tag="handover"):
    """From a holder: the lease is yours now, look."""

    model: ModelName


Message = Events | Effects | Summons | Learned | Handover


class Envelope(msgspec.Struct, frozen=True):
    """All that one replica has for another at a moment."""

    sender: ReplicaId
    messages: tuple[Message, ...] = ()


_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(Envelope)


def pack(envelope: Envelope) -> bytes:
    """Return the envelope as MessagePack."""
    return _ENCODER.encode(envelope)


def unpack(packed: bytes) -> Envelope:
    """Return the envelope; raises ``ValueError`` for what is none."""
    return _DECODER.decode(packed)
