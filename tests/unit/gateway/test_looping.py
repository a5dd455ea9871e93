"""A step that is done again and again outlives its own errors, and ends when it is stopped."""

import asyncio

from structlog.testing import capture_logs

from gateway.looping import LoopingCall


async def test_an_error_is_told_by_its_name_and_the_next_step_comes() -> None:
    num_steps = 0
    again = asyncio.Event()

    async def step() -> None:
        nonlocal num_steps
        num_steps += 1
        if num_steps == 1:
            raise ValueError("permission denied for table keys")
        again.set()

    loop = LoopingCall("directory_refresh", step, 0.0)
    with capture_logs() as told:
        loop.start()
        await again.wait()
        await loop.stop()

    assert [line["event"] for line in told] == ["directory_refresh_failed"]
    assert told[0]["exc_info"]


async def test_stopping_ends_a_step_half_way_and_waits_until_it_has_ended() -> None:
    begun = asyncio.Event()
    ended = []

    async def step() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.append(True)

    loop = LoopingCall("booking", step, 0.0)
    loop.start()
    await begun.wait()
    await loop.stop()

    assert ended


async def test_what_was_never_started_is_stopped_at_once() -> None:
    async def step() -> None:
        raise AssertionError

    await LoopingCall("upkeep", step, 0.0).stop()
