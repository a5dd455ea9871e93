"""Limits that several gateway processes share: the behaviour of ``LocalLimiter``, with the counts in Redis.

A call to Redis costs a hundred times what a reservation costs, so one call carries many: while one is on its way, what
comes in collects, and goes with the next. What Redis does with a call is in ``limits.lua``, atomically. Calls are
numbered, and one whose answer was lost is asked about again before the next, so that nothing is taken or given back
twice, and what was taken for callers who have gone is given back.

Redis may lose its counts (eviction, restart): windows and periods then begin anew, periods from what the ledger says;
each process tells its open answers again within ``HEARTBEAT_S``.
"""

import asyncio
import contextlib
import math
import secrets
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from core.clock import Clock
from core.errors import LimitsUnavailable
from routing.limits import (
    Claim,
    Granted,
    Kind,
    Meter,
    OpenAnswers,
    Refused,
    Verdict,
    counts_end_user,
    retry_after,
)
from storage.redis.connection import RedisAwayError, RedisConnection, Script

_SCRIPT = Script(Path(__file__).with_name("limits.lua").read_text())
_PREFIX = "{forebay}:"  # one hash tag: all counts of a request have to be on one node of a cluster
_COUNT = f"{_PREFIX}count:"
_KINDS: dict[Kind, int] = {"window": 0, "period": 1, "parallel": 2}
_IS_PERIOD = -1
_LARGEST = 2**62  # in picodollars 4.6 million USD; Lua's numbers are exact to 2**53, then to one part in 10**16
_KEPT_AFTER_END_S = 3600
_TTL_WITHOUT_END_S = 35 * 86400  # a total that is forgotten comes back from the ledger
_ENCODER = msgspec.msgpack.Encoder()
_ANSWER: msgspec.msgpack.Decoder[list[int]] = msgspec.msgpack.Decoder(list[int])


_Reservation = tuple[Claim, float, asyncio.Future[Verdict]]


class _Call:
    """What goes to Redis together. Its callers wait no longer than until ``give_up``, whatever becomes of it."""

    def __init__(self) -> None:
        self.number = 0
        self.reservations: list[_Reservation] = []
        self.corrections: dict[tuple[str, int], int] = {}
        self.give_up: asyncio.TimerHandle | None = None

    def fail(self) -> None:
        """Tell everyone who still waits that the counts cannot be reached."""
        if self.give_up is not None:
            self.give_up.cancel()
        for _, _, future in self.reservations:
            if not future.done():
                future.set_exception(_unavailable())


class RedisLimiter:
    """Keeps the counts in Redis. An async context manager: leaving it takes this process's open answers out of them.

    ``open_answers``: given where another limiter of this process counts too. A caller waits at most the connection's
    ``command_timeout``; while the breaker is open, not at all.
    """

    HEARTBEAT_S = 1.0
    SETTLE_DELAY_S = 0.005
    MAX_RESERVATIONS_PER_CALL = 256
    MAX_CALLS_WAITING = 16

    def __init__(self, connection: RedisConnection, clock: Clock, open_answers: OpenAnswers | None = None) -> None:
        self._connection = connection
        self._clock = clock
        self._open = OpenAnswers() if open_answers is None else open_answers
        self._replica = secrets.token_hex(8)
        self._number = 0
        self._waiting: deque[_Call] = deque()
        self._unanswered: _Call | None = None
        self._corrections: dict[tuple[str, int], int] = {}
        self._changed: set[str] = set()  # parallel meters whose count Redis has to be told
        self._told: set[str] = set()  # those that it may hold a count of ours for
        self._wake = asyncio.Event()
        self._settle_timer: asyncio.TimerHandle | None = None
        self._group = asyncio.TaskGroup()
        self._tasks: list[asyncio.Task[None]] = []
        self._is_leaving = False

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        self._tasks = [self._group.create_task(work) for work in (self._send_for_ever(), self._beat_for_ever())]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_leaving = True
        for task in self._tasks:
            task.cancel()
        await self._group.__aexit__(None, None, None)
        self._fail_waiting()
        for key, count in list(self._open.counts.items()):
            self._open.add(key, -count)
        self._changed |= self._told
        with contextlib.suppress(RedisAwayError):  # then it will forget us by itself
            while self._has_work():
                await self._send_next()
        if self._settle_timer is not None:
            self._settle_timer.cancel()

    async def reserve(self, claim: Claim, now: float) -> Verdict:
        """Take all of a claim, or nothing; see ``Limiter``. Raises ``LimitsUnavailable``."""
        if not self._connection.is_up:
            raise _unavailable()
        future: asyncio.Future[Verdict] = asyncio.get_running_loop().create_future()
        self._call_with_room().reservations.append((claim, now, future))
        self._wake.set()
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                self._give_back(claim, future.result())
            raise

    def settle(self, claim: Claim, used: Sequence[int], granted: Granted) -> None:
        """Put what was really used in the place of what was taken; see ``Limiter``."""
        for meter, amount, really, at in zip(claim.meters, claim.amounts, used, granted.at, strict=True):
            if meter.kind == "parallel":
                self._open.add(meter.key, -amount)
                self._changed.add(meter.key)
            elif really != amount:
                name = (meter.key, at if meter.kind == "window" else _IS_PERIOD)
                self._corrections[name] = self._corrections.get(name, 0) + really - amount
        if self._settle_timer is None and self._connection.is_up:
            self._settle_timer = asyncio.get_running_loop().call_later(self.SETTLE_DELAY_S, self._settle_now)

    async def forget(self, tenant: str, end_user: str | None) -> None:
        """Delete the counts of an end user, or of all of a tenant's; see ``Limiter``.

        Goes through every key of the Redis, a thousand at a time.
        """
        prefix = _COUNT.encode()

        def is_theirs(name: bytes) -> bool:
            return counts_end_user(name.removeprefix(prefix).decode(errors="surrogatepass"), tenant, end_user)

        try:
            await self._connection.delete("forget", f"{_COUNT}*/end_user/{tenant}/*".encode(), is_theirs)
        except RedisAwayError as error:
            raise LimitsUnavailable(
                "the counts in Redis cannot be reached now, and hold names of end users; try again in a moment",
                retry_after=1.0,
            ) from error

    def _settle_now(self) -> None:
        self._settle_timer = None
        self._wake.set()

    def _give_back(self, claim: Claim, verdict: Verdict) -> None:
        """Undo a reservation whose caller has gone."""
        if isinstance(verdict, Granted):
            self.settle(claim, [0] * len(claim.meters), verdict)

    def _call_with_room(self) -> _Call:
        if self._waiting and len(self._waiting[-1].reservations) < self.MAX_RESERVATIONS_PER_CALL:
            return self._waiting[-1]
        if len(self._waiting) >= self.MAX_CALLS_WAITING:
            raise _unavailable()
        call = _Call()
        call.give_up = asyncio.get_running_loop().call_later(self._connection.command_timeout, call.fail)
        self._waiting.append(call)
        return call

    async def _send_for_ever(self) -> None:
        # Not for ever: a cancellation that comes while the client gives up a connection may be lost in it.
        while not self._is_leaving:
            await self._wake.wait()
            self._wake.clear()
            try:
                while self._has_work():
                    await self._send_next()
            except RedisAwayError:
                self._fail_waiting()

    async def _beat_for_ever(self) -> None:
        """Tell all that is open, which also tells that this process lives, and asks whether Redis is back."""
        while True:
            self._changed.update(self._open.counts, self._told)
            if self._unanswered is None and not self._waiting:
                self._waiting.append(_Call())
            self._wake.set()
            await asyncio.sleep(self.HEARTBEAT_S)

    def _has_work(self) -> bool:
        return bool(self._unanswered or self._waiting or self._corrections or self._changed)

    async def _send_next(self) -> None:
        """Send what waits, or, if the last call was not answered, ask what became of it."""
        call = self._unanswered
        if call is not None:
            # It comes without what its callers wanted, for they have gone: an answer to that is from the first time.
            answer = await self._send(call, (), ())
            self._finish(call, answer if answer else None)
        else:
            call = self._waiting.popleft() if self._waiting else _Call()
            call.reservations = [entry for entry in call.reservations if not entry[2].done()]
            call.corrections, self._corrections = self._corrections, {}
            self._number += 1
            call.number = self._number
            self._unanswered = call
            self._finish(call, await self._send_first(call))
        self._unanswered = None

    async def _send_first(self, call: _Call) -> list[int]:
        """Send a call with all that it carries. If it fails, the next one tells of open answers again."""
        for meters in {id(claim.meters): claim.meters for claim, _, _ in call.reservations}.values():
            self._changed.update([meter.key for meter in meters if meter.kind == "parallel"])
        changed, self._changed = self._changed, set()
        self._told |= changed
        counts = self._open.counts
        told = [(key, counts.get(key, 0)) for key in changed]
        try:
            answer = await self._send(call, call.reservations, told)
        except BaseException:
            self._changed |= changed
            raise
        self._told.difference_update([key for key, count in told if count == 0])
        return answer

    async def _send(
        self, call: _Call, reservations: Sequence[_Reservation], open_answers: Sequence[tuple[str, int]]
    ) -> list[int]:
        keys = _Keys(f"call:{self._replica}", "heard")
        shapes = _Shapes(keys)
        wanted = [(shapes.place(claim.meters, now), int(now), _sane(claim.amounts)) for claim, now, _ in reservations]
        argument = _ENCODER.encode(
            (
                self._replica,
                call.number,
                self._clock.wall(),
                [(keys.place(key), count) for key, count in open_answers],
                [(keys.place(key), at, delta) for (key, at), delta in call.corrections.items() if delta],
                shapes.terms,
                wanted,
            )
        )
        return _ANSWER.decode(await self._connection.run_script("limits", _SCRIPT, keys.names, argument))

    def _finish(self, call: _Call, answer: Sequence[int] | None) -> None:
        """Give each caller its verdict, and back what was taken for those who no longer wait."""
        if call.give_up is not None:
            call.give_up.cancel()
        if answer is None:
            return
        place = 0
        for claim, now, future in call.reservations:
            verdict, place = _verdict(claim, now, answer, place)
            if isinstance(verdict, Granted):
                for meter, amount in zip(claim.meters, claim.amounts, strict=True):
                    if meter.kind == "parallel":
                        self._open.add(meter.key, amount)
                        self._told.add(meter.key)
            if future.done():
                self._give_back(claim, verdict)
            else:
                future.set_result(verdict)

    def _fail_waiting(self) -> None:
        if self._unanswered is not None:
            self._unanswered.fail()
        for call in self._waiting:
            call.fail()
        self._waiting.clear()


def _verdict(claim: Claim, now: float, answer: Sequence[int], place: int) -> tuple[Verdict, int]:
    """Read one reservation's part of an answer, which begins at ``place``; return also where the next one's begins."""
    meters = claim.meters
    if refused := answer[place]:
        index, wait = refused - 1, answer[place + 1]
        after = retry_after(meters[index], claim.amounts[index], now, float(wait) if wait >= 0 else None)
        return Refused(index, after), place + 2
    middle = place + 1 + len(meters)
    end = middle + len(meters)
    remaining = [meter.limit - used for meter, used in zip(meters, answer[place + 1 : middle], strict=True)]
    return Granted(tuple(remaining), tuple(answer[middle:end]), is_local=False), end


class _Keys:
    """The keys of a call, each once; the script names them by their place, counted from 1."""

    def __init__(self, *names: str) -> None:
        self.names = [f"{_PREFIX}{name}".encode() for name in names]
        self._places: dict[str, int] = {}

    def place(self, key: str) -> int:
        """Return the place of a count's key."""
        place = self._places.get(key)
        if place is None:
            self.names.append(f"{_COUNT}{key}".encode(errors="surrogatepass"))
            place = self._places[key] = len(self.names)
        return place


class _Shapes:
    """What the reservations of a call have in common: the meters of each kind of caller, told once."""

    def __init__(self, keys: _Keys) -> None:
        self._keys = keys
        self._places: dict[int, int] = {}
        self.terms: list[list[tuple[int, ...]]] = []

    def place(self, meters: tuple[Meter, ...], now: float) -> int:
        """Return the place of these meters, counted from 1. They have to stay alive as long as this is used."""
        place = self._places.get(id(meters))
        if place is None:
            self.terms.append([_terms(meter, self._keys.place(meter.key), now) for meter in meters])
            place = self._places[id(meters)] = len(self.terms)
        return place


def _terms(meter: Meter, place: int, now: float) -> tuple[int, ...]:
    """Return what the script is told of a meter."""
    return place, _KINDS[meter.kind], min(meter.limit, _LARGEST), min(meter.seed, _LARGEST), _ttl(meter, now)


def _sane(amounts: tuple[int, ...]) -> tuple[int, ...]:
    """Return amounts that the script can hold: callers choose them. More than the largest limit is as good as that."""
    if max(amounts, default=0) <= _LARGEST:
        return amounts
    return tuple(min(amount, 2 * _LARGEST - 1) for amount in amounts)


def _ttl(meter: Meter, now: float) -> int:
    """Return for how many seconds Redis keeps a period's count."""
    return math.ceil(max(0.0, meter.ends_at - now)) + _KEPT_AFTER_END_S if meter.ends_at else _TTL_WITHOUT_END_S


def _unavailable() -> LimitsUnavailable:
    return LimitsUnavailable("the counts of limits cannot be reached now; try again in a moment", retry_after=1.0)
