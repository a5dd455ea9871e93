"""What ``lease.lua`` does, on a server whose clock the test turns, behind a network that the test delays."""

from collections.abc import Sequence
from typing import Any

import msgspec

from core.clock import Clock
from storage.redis.connection import Script


class LeaseServer:
    """Takes the script's calls. One contract suite holds it and the script."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._heard: dict[str, int] = {}
        self._epochs: dict[bytes, int] = {}
        self._leases: dict[bytes, tuple[int, str, int]] = {}

    async def run_script(self, operation: str, script: Script, keys: Sequence[bytes], argument: bytes) -> Any:
        return self.run(keys, argument)

    def run(self, keys: Sequence[bytes], argument: bytes) -> bytes:
        replica, ttl, dead_after, lasts, wishes = msgspec.msgpack.decode(argument)
        now = int(self._clock.wall() * 1000)
        self._heard.pop(replica, None)
        if lasts:
            self._heard[replica] = now
        self._heard = {name: at for name, at in self._heard.items() if at >= now - dead_after}
        self._leases = {key: lease for key, lease in self._leases.items() if lease[2] > now}
        answer: list[Any] = [list(self._heard), not self._epochs]
        for key, wish in zip(keys[2:], wishes, strict=True):
            epoch, holder, until = self._leases.get(key, (0, "", now))
            if not holder and wish == 0:
                epoch, holder = max(self._epochs.get(key, 0) + 1, now), replica
                self._epochs[key] = epoch
            if holder == replica and wish == 0:
                until = now + ttl
                self._leases[key] = (epoch, holder, until)
            elif holder == replica and wish == epoch:
                del self._leases[key]
                epoch, holder, until = 0, "", now
            elif isinstance(wish, list) and (holder, epoch) == (replica, wish[0]) and wish[1] in self._heard:
                epoch, holder, until = max(self._epochs[key] + 1, now), wish[1], now + ttl
                self._epochs[key] = epoch
                self._leases[key] = (epoch, holder, until)
            answer.append([epoch, holder, until - now])
        return msgspec.msgpack.encode(answer)
