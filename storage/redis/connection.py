"""A connection to Redis that costs little when Redis is away: waits are bounded, and a breaker spares them."""

import asyncio
import hashlib
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self

import structlog
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisError

from core.clock import Clock

_log = structlog.get_logger(__name__)

_PREFIX = "{forebay}:"
_SCAN_STEP = 1000


class RedisAwayError(Exception):
    """Redis could not be asked, or did not answer in time; whether it has done what it was asked is not known."""


class RedisConnection:
    """A client of one Redis or Valkey, with a breaker. An async context manager: leaving it closes the sockets.

    After ``breaker_failures`` failures in a row the breaker opens and every call fails at once; after ``breaker_open``
    seconds one call is let through to see whether Redis is back. Times in seconds. A call takes at most the sum of the
    two timeouts; one that needs no new connection, at most ``command_timeout``.
    """

    def __init__(
        self,
        url: str,
        clock: Clock,
        *,
        connect_timeout: float = 0.5,
        command_timeout: float = 0.2,
        breaker_failures: int = 3,
        breaker_open: float = 5.0,
    ) -> None:
        self._redis: Redis = Redis.from_url(
            url,
            socket_connect_timeout=connect_timeout,
            socket_timeout=command_timeout,
            retry=Retry(NoBackoff(), 0),
            protocol=2,
            driver_info=None,
        )
        self._execute: Callable[..., Awaitable[Any]] = self._redis.execute_command
        self._clock = clock
        self._longest = connect_timeout + command_timeout
        self.command_timeout = command_timeout
        self._breaker_failures = breaker_failures
        self._breaker_open = breaker_open
        self._failures = 0
        self._open_until: float | None = None
        self._is_probing = False
        self._num_errors: Counter[str] = Counter()

    @property
    def is_up(self) -> bool:
        """Whether the breaker is closed. While it is not, calls only serve to find out whether Redis is back."""
        return self._open_until is None

    @property
    def num_errors(self) -> Mapping[str, int]:
        """How many calls have failed, by operation; those that the breaker refused are not counted."""
        return self._num_errors

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._redis.aclose()

    async def run_script(self, operation: str, script: "Script", keys: Sequence[bytes], argument: bytes) -> Any:
        """Run a Lua script on the server and return its reply; the server is sent its text only if it lacks it.

        ``operation`` names the call in ``num_errors``. Raises ``RedisAwayError``, also for errors that Redis answers:
        one that is loading, out of memory or read-only is of no more use than one that is gone.
        """

        async def run() -> Any:
            try:
                return await self._execute("EVALSHA", script.sha, len(keys), *keys, argument)
            except NoScriptError:
                return await self._execute("EVAL", script.text, len(keys), *keys, argument)

        return await self._guarded(operation, run)

    async def delete(self, operation: str, pattern: bytes, is_meant: Callable[[bytes], bool]) -> None:
        """Delete the keys that match a pattern of Redis and are meant. Raises ``RedisAwayError``, maybe half-way.

        Goes through all keys of the server in steps that hold up nobody. Keys that appear meanwhile may stay.
        """
        cursor = b"0"
        while True:
            cursor, found = await self._guarded(operation, partial(self._scan, cursor, pattern))
            if names := [name for name in found if is_meant(name)]:
                await self._guarded(operation, partial(self._execute, "UNLINK", *names))
            if cursor == b"0":
                return

    async def _scan(self, cursor: bytes, pattern: bytes) -> tuple[bytes, list[bytes]]:
        following, names = await self._execute("SCAN", cursor, "MATCH", pattern, "COUNT", _SCAN_STEP)
        return str(int(following)).encode(), names

    async def publish(self, messages: Mapping[str, bytes]) -> None:
        """Send each channel's subscribers a message, all in one round trip. Raises ``RedisAwayError``.

        A message arrives at most once, and who does not listen at the moment misses it.
        """

        async def run() -> None:
            async with self._redis.pipeline(transaction=False) as pipeline:
                for channel, message in messages.items():
                    pipeline.publish(f"{_PREFIX}{channel}", message)
                await pipeline.execute()

        await self._guarded("publish", run)

    async def listen(self, channel: str, *, silence: float) -> AsyncGenerator[bytes | None, None]:
        """Yield None as soon as the subscription holds, then every message of the channel.

        Raises ``RedisAwayError`` when the connection breaks, or nothing came for ``silence`` seconds, as on one that is
        broken unnoticed; what was sent meanwhile is lost. The breaker has no part in it: whoever listens decides when
        to try again.
        """
        async with self._redis.pubsub() as subscription:
            try:
                async with asyncio.timeout(self._longest):
                    await subscription.subscribe(f"{_PREFIX}{channel}")
                while (message := await subscription.get_message(timeout=silence)) is not None:
                    yield message["data"] if message["type"] == "message" else None
            except (RedisError, OSError, TimeoutError) as error:
                raise RedisAwayError(str(error)) from error
            raise RedisAwayError(f"nothing was heard for {silence:g} s")

    async def _guarded(self, operation: str, run: Callable[[], Awaitable[Any]]) -> Any:
        """Run what asks Redis, within bounds, and tell the breaker how it went."""
        self._pass_breaker()
        try:
            async with asyncio.timeout(self._longest):
                reply = await run()
        except (RedisError, OSError, TimeoutError) as error:
            self._on_failure(operation, error)
            raise RedisAwayError(str(error)) from error
        except asyncio.CancelledError:
            self._is_probing = False
            raise
        self._on_success()
        return reply

    def _pass_breaker(self) -> None:
        if self._open_until is None:
            return
        if self._is_probing or self._clock.monotonic() < self._open_until:
            raise RedisAwayError("the breaker is open")
        self._is_probing = True

    def _on_success(self) -> None:
        if self._open_until is not None:
            _log.info("redis_back")
        self._failures = 0
        self._open_until = None
        self._is_probing = False

    def _on_failure(self, operation: str, error: Exception) -> None:
        self._num_errors[operation] += 1
        self._failures += 1
        self._is_probing = False
        if self._failures < self._breaker_failures:
            return
        if self._open_until is None:
            _log.warning("redis_away", error=str(error) or type(error).__name__, asks_again_after_s=self._breaker_open)
        self._open_until = self._clock.monotonic() + self._breaker_open


class Script:
    """A Lua script and the name that Redis knows it by."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
