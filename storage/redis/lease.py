"""Leases with a fencing epoch: at any moment at most one replica may act as the holder of one.

Gray and Cheriton, "Leases" (SOSP 1989); the epoch is the fencing token that later work adds to it. Where we differ:
Redis alone is the referee and tells nobody when a lease ends, so a holder stops by itself, by its own clock, before
Redis lets go. What Redis does with a round is in ``lease.lua``, atomically.

What this rests on: clocks run at the same speed within ``DRIFT``, and one Redis that does not forget while it runs.
One that restarts empty may grant a lease that its last holder still believes in, for ``TTL_S`` at most: therefore
whoever acts on a holder's word checks the epoch, which no restart brings back.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec

from core.clock import Clock
from storage.redis.connection import Script

_SCRIPT = Script(Path(__file__).with_name("lease.lua").read_text())
_PREFIX = "{forebay}:"
_HOLD, _LOOK = 0, -1
_ENCODER = msgspec.msgpack.Encoder()


class Server(Protocol):
    """What leases want of ``RedisConnection``."""

    async def run_script(self, operation: str, script: Script, keys: Sequence[bytes], argument: bytes) -> Any:
        """Run the script on the server; raises ``RedisAwayError``."""


class Lease(msgspec.Struct, frozen=True):
    """Who holds a lease. ``valid_until``: monotonic; the holder does not act after it, nobody else gets it before."""

    epoch: int
    holder: str
    valid_until: float


class Round(msgspec.Struct, frozen=True):
    """What a round has found: the replicas that live, this one among them, and the leases that are held, by name.

    ``is_new``: before this round the server remembered no lease at all: it is a new one, or has lost everything.
    """

    replicas: tuple[str, ...]
    leases: Mapping[str, Lease]
    is_new: bool = False


class Leases:
    """The leases of one replica. Remembers nothing between rounds: Redis knows what is ours.

    ``ttl``: how long a lease lasts without a round; ``dead_after``: how long a replica is counted among the living
    without one. Seconds.
    """

    TTL_S = 2.0
    DEAD_AFTER_S = 2.0
    DRIFT = 0.05
    """How much slower than Redis' clock ours may run: a holder stops by this part of ``ttl`` early."""

    def __init__(
        self, server: Server, clock: Clock, replica: str, *, ttl: float = TTL_S, dead_after: float = DEAD_AFTER_S
    ) -> None:
        self._server = server
        self._clock = clock
        self._replica = replica
        self._ttl = ttl
        self._dead_after = dead_after

    async def hold(self, names: Sequence[str]) -> Round:
        """Say that this replica lives; take each lease if it is free, renew it if it is ours.

        Costs one call. Raises ``RedisAwayError``; then it is not known what Redis has done, and what was ours is ours
        until its ``valid_until``.
        """
        return await self._ask(names, [_HOLD] * len(names), lasts=True)

    async def look(self, names: Sequence[str]) -> Round:
        """Say that this replica lives, and see who holds what; nothing is taken or renewed.

        Raises ``RedisAwayError``.
        """
        return await self._ask(names, [_LOOK] * len(names), lasts=True)

    async def hand_over(self, name: str, epoch: int, successor: str) -> bool:
        """Give a lease to another replica, if it is still ours of that epoch and the other lives; return whether.

        Whoever asks has to act as its holder no more. The other learns of it in its next round. Raises
        ``RedisAwayError``; then it is not known whose it is.
        """
        found = await self._ask([name], [(epoch, successor)], lasts=True)
        lease = found.leases.get(name)
        return lease is not None and lease.holder == successor

    async def leave(self, epochs: Mapping[str, int]) -> None:
        """Give up leases, each only if it is still ours of that epoch, and leave the living.

        Raises ``RedisAwayError``; then the leases end by themselves.
        """
        await self._ask(list(epochs), list(epochs.values()), lasts=False)

    async def _ask(self, names: Sequence[str], wishes: Sequence[int | tuple[int, str]], *, lasts: bool) -> Round:
        keys = [f"{_PREFIX}{name}".encode() for name in ("replicas", "epochs", *(f"lease:{name}" for name in names))]
        argument = _ENCODER.encode((self._replica, _ms(self._ttl), _ms(self._dead_after), lasts, wishes))
        sent_at = self._clock.monotonic()  # before the server can have begun to count
        answer = await self._server.run_script("lease", _SCRIPT, keys, argument)
        replicas, is_new, *found = msgspec.msgpack.decode(answer)
        leases = {}
        for name, (epoch, holder, left) in zip(names, found, strict=True):
            if not epoch:
                continue
            ours = sent_at + self._ttl * (1 - self.DRIFT)
            theirs = self._clock.monotonic() + left / 1000
            leases[name] = Lease(int(epoch), holder, ours if holder == self._replica else theirs)
        return Round(tuple(replicas), leases, is_new)


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
