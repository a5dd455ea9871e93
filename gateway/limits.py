"""Which counts the limits use: this process's own, or those that several gateways share."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec

from core.clock import Clock
from gateway.settings import RedisSettings
from routing.limits import FallbackLimiter, Limiter, LocalLimiter, OpenAnswers
from storage.redis.connection import RedisConnection
from storage.redis.limits import RedisLimiter


class Counting(msgspec.Struct, frozen=True):
    """The limiter in use, and the connection behind it, if there is one."""

    limiter: Limiter
    redis: RedisConnection | None = None


@asynccontextmanager
async def open_limiter(settings: RedisSettings, clock: Clock) -> AsyncIterator[Counting]:
    """Count in Redis where the settings name one, else here. A Redis that is away delays no start."""
    if settings.url is None:
        yield Counting(LocalLimiter())
        return
    connection = RedisConnection(
        settings.url.get_secret_value(),
        clock,
        connect_timeout=settings.connect_timeout,
        command_timeout=settings.command_timeout,
        breaker_failures=settings.breaker_failures,
        breaker_open=settings.breaker_open,
    )
    open_answers = OpenAnswers()
    async with connection, RedisLimiter(connection, clock, open_answers) as shared:
        if settings.on_failure == "deny":
            yield Counting(shared, connection)
        else:
            local = LocalLimiter(1 / settings.replicas, open_answers)
            yield Counting(FallbackLimiter(shared, local), connection)
