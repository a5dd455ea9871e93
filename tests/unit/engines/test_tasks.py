import asyncio

import pytest

from engines.tasks import Tasks


async def test_the_bodys_own_error_passes_as_it_is() -> None:
    with pytest.raises(KeyError):
        async with Tasks():
            raise KeyError


async def test_a_tasks_error_ends_the_body_and_comes_in_a_group() -> None:
    async def break_down() -> None:
        raise KeyError

    async def body() -> None:
        async with Tasks() as tasks:
            tasks.create_task(break_down())
            await asyncio.Event().wait()

    with pytest.raises(ExceptionGroup) as caught:
        await body()
    assert isinstance(caught.value.exceptions[0], KeyError)


async def test_a_cancelled_body_takes_its_tasks_along() -> None:
    entered = asyncio.Event()
    tasks = Tasks()

    async def body() -> None:
        async with tasks:
            tasks.create_task(asyncio.Event().wait())
            entered.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(body())
    await entered.wait()
    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task
