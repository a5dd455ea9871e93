"""Runs and legs under a clock that the test turns, against a driver that plays scripts."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from core.chat import Call, Timeouts, Usage
from core.completer import Answer
from core.errors import (
    ClientIdle,
    Draining,
    FirstTokenTimeout,
    ForebayError,
    IdleTimeout,
    InternalError,
    NoHealthyWorker,
    QueueFull,
    QueueTimeout,
    TotalTimeout,
    UpstreamBroken,
    UpstreamBusy,
    UpstreamRefused,
    WorkerLost,
    WorkerUnreachable,
)
from core.ids import ModelName, WorkerId
from core.spans import traceparent_of_leg
from engines.dispatcher import Bounds, Dispatcher
from engines.driver import Driver
from engines.run import Run
from routing.scheduler import Limits, Scheduler
from tests.fakes.clock import ManualClock
from tests.fakes.drivers import COMMENT, Gate, Script, ScriptedDriver, call, text
from tests.fakes.workers import view

ONE, TWO, THREE, DONE = b"data: 1\n\n", b"data: 2\n\n", b"data: 3\n\n", b"data: [DONE]\n\n"
TIMES = Timeouts(queue=5.0, first_token=10.0, idle=3.0, total=60.0)
M0 = WorkerId("m-0")
BOUNDS, LIMITS = Bounds(), Limits()


class House:
    """A dispatcher with a worker per driver."""

    def __init__(self, *drivers: ScriptedDriver, bounds: Bounds, limits: Limits) -> None:
        self.clock = ManualClock()
        self.drivers: dict[str, Driver] = {f"m-{index}": driver for index, driver in enumerate(drivers)}
        self.scheduler = Scheduler(limits)
        self.dispatcher = Dispatcher(self.scheduler, self.clock, self.drivers.get, bounds)

    def start(self, call: Call, *, inline: bool = False) -> Run:
        return self.dispatcher.submit(call, inline=inline)

    async def pass_time(self, seconds: float) -> None:
        """Turn the clock, look at deadlines, and let tasks do what follows."""
        await calm()
        self.clock.advance(seconds)
        self.dispatcher.tick()
        await calm()


@asynccontextmanager
async def house(
    *scripts: Script | ScriptedDriver,
    slots: int = 1,
    bounds: Bounds = BOUNDS,
    limits: Limits = LIMITS,
) -> AsyncIterator[House]:
    """Open a house; when it closes, nothing may be left of any request."""
    drivers = [script if isinstance(script, ScriptedDriver) else ScriptedDriver(script) for script in scripts]
    home = House(*drivers, bounds=bounds, limits=limits)
    with capture_logs():  # structlog draws tracebacks with all their variables, which takes a tenth of a second each
        async with home.dispatcher:
            for name in home.drivers:
                home.dispatcher.on_worker(view(name, slots=slots))
            yield home
        await calm()
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert home.dispatcher.num_open == 0
    assert all(driver.num_running == 0 for driver in drivers)
    assert not home.scheduler._books.requests
    assert not home.scheduler._books.legs
    assert home.dispatcher.num_running(M0) == 0


async def calm() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def body_of(answer: Answer) -> bytes:
    return b"".join([piece async for piece in answer.chunks()])


async def error_of(answer: Answer) -> ForebayError:
    with pytest.raises(ForebayError) as caught:
        await answer.first_byte()
    return caught.value


async def test_a_stream_is_delivered_byte_for_byte() -> None:
    async with house((text(ONE), text(TWO), text(DONE, 0))) as home:
        run = home.start(call())
        served = await run.first_byte()

        assert await body_of(run) == ONE + TWO + DONE
        assert (served.worker, served.attempts, run.error) == ("m-0", 1, None)


@pytest.mark.parametrize("inline", [False, True])
async def test_a_whole_answer_is_there_when_first_byte_returns(inline: bool) -> None:
    usage = Usage(prompt_tokens=3, completion_tokens=2)
    async with house((text(b'{"a":1}', 2, usage),)) as home:
        run = home.start(call(stream=False), inline=inline)
        await run.first_byte()

        assert run.journal.is_complete
        assert (await body_of(run), run.usage) == (b'{"a":1}', usage)


async def test_the_first_token_deadline_counts_from_the_start_of_a_leg() -> None:
    async with house((Gate(),), limits=Limits(attempts=1)) as home:
        run = home.start(call(timeouts=TIMES))
        await home.pass_time(10.0)
        assert run.error is None

        await home.pass_time(0.1)

        assert isinstance(await error_of(run), FirstTokenTimeout)


async def test_the_idle_deadline_counts_from_the_last_chunk() -> None:
    gate = Gate()
    async with house((text(ONE), gate, text(TWO), Gate())) as home:
        run = home.start(call(timeouts=TIMES))
        await home.pass_time(2.0)
        gate.open()
        await home.pass_time(3.0)
        assert run.error is None

        await home.pass_time(0.1)

        assert isinstance(run.error, IdleTimeout)


@pytest.mark.parametrize("first", [(), (text(ONE),)])
async def test_keep_alive_comments_reset_no_deadline(first: Script) -> None:
    gate = Gate()
    async with house((*first, gate, COMMENT, Gate()), limits=Limits(attempts=1)) as home:
        run = home.start(call(timeouts=TIMES))
        await home.pass_time(2.9 if first else 9.9)
        gate.open()
        await home.pass_time(0.2)

        assert isinstance(run.error, IdleTimeout if first else FirstTokenTimeout)


async def test_comments_reach_the_client_after_the_first_byte_only() -> None:
    async with house((COMMENT, text(ONE), COMMENT)) as home:
        run = home.start(call())

        assert await body_of(run) == ONE + COMMENT.raw


@pytest.mark.parametrize("inline", [False, True])
async def test_the_total_deadline_counts_from_arrival_and_bounds_whole_answers(inline: bool) -> None:
    async with house((Gate(),)) as home:
        run = home.start(call(stream=False, timeouts=TIMES), inline=inline)
        asked = asyncio.create_task(error_of(run))
        await home.pass_time(59.9)
        assert not asked.done()

        await home.pass_time(0.2)

        assert isinstance(await asked, TotalTimeout)


async def test_the_queue_deadline_ends_a_request_that_waits() -> None:
    async with house((Gate(),)) as home:
        home.start(call())
        run = home.start(call(timeouts=TIMES))
        await home.pass_time(5.0)

        assert isinstance(await error_of(run), QueueTimeout)


async def test_a_full_queue_and_a_missing_model_are_told_at_once() -> None:
    async with house((Gate(),), limits=Limits(queue=1)) as home:
        for _ in range(2):
            home.start(call())

        assert isinstance(await error_of(home.start(call())), QueueFull)
        assert isinstance(await error_of(home.start(call(model="other"))), NoHealthyWorker)


@pytest.mark.parametrize("inline", [False, True])
@pytest.mark.parametrize(
    "error",
    [
        UpstreamBusy("busy", status=503, retry_after=0.0),
        UpstreamBroken("bad", status=500),
        WorkerLost("gone"),
        WorkerUnreachable("no"),
    ],
)
async def test_before_the_first_byte_a_retry_is_invisible(error: ForebayError, inline: bool) -> None:
    async with house(ScriptedDriver((error,), (text(ONE),))) as home:
        run = home.start(call(stream=not inline), inline=inline)
        served = await run.first_byte()

        assert (served.attempts, await body_of(run)) == (2, ONE)


@pytest.mark.parametrize("tells_progress", [True, False])
async def test_tokens_of_a_whole_answer_are_paid_for_whether_its_engine_tells_of_progress_or_not(
    tells_progress: bool,
) -> None:
    whole = ScriptedDriver((text(ONE, 60, Usage(5, 60)),), progress_of_whole=tells_progress)
    async with house(whole) as home:
        await body_of(home.start(call(stream=False), inline=False))
        await calm()
        view = home.scheduler.fairness_view(ModelName("m"))

    assert [tenant.attained for tenant in view.tenants] == [5 + 2 * 60]


@pytest.mark.parametrize("is_ours", [True, False])
async def test_each_leg_tells_its_engine_of_its_own_span_if_the_request_is_traced(is_ours: bool) -> None:
    traceparent = f"00-{'a' * 32}-{'b' * 16}-01"
    traced = msgspec.structs.replace(call(), traceparent=traceparent, has_leg_spans=is_ours)
    driver = ScriptedDriver((WorkerLost("gone"),), (text(ONE),))
    async with house(driver) as home:
        await body_of(home.start(traced))

    told = [asked.traceparent for asked in driver.calls]
    assert told == [traceparent_of_leg(traceparent, index) if is_ours else traceparent for index in range(2)]


async def test_after_the_first_byte_the_error_follows_what_was_delivered() -> None:
    driver = ScriptedDriver((text(ONE), WorkerLost("gone")), (text(TWO),))
    async with house(driver) as home:
        run = home.start(call())
        await run.first_byte()
        pieces = run.chunks()

        assert await anext(pieces) == ONE
        with pytest.raises(WorkerLost):
            await anext(pieces)
        assert len(driver.calls) == 1


async def test_what_an_engine_refuses_is_told_as_it_is() -> None:
    error = UpstreamRefused("no", status=422)
    async with house((error,)) as home:
        assert await error_of(home.start(call())) is error


async def test_a_whole_answer_may_be_larger_than_what_a_reader_may_lag() -> None:
    async with house((text(b"x" * 100), text(b"y")), bounds=Bounds(undelivered_bytes=10)) as home:
        run = home.start(call(stream=False))
        await run.first_byte()

        assert await body_of(run) == b"x" * 100 + b"y"


@pytest.mark.parametrize("script", [(), (text(b"", 3),), (COMMENT,)])
async def test_an_answer_without_a_byte_is_an_error_and_tried_again(script: Script) -> None:
    async with house(ScriptedDriver(script, (text(ONE),))) as home:
        run = home.start(call(stream=False))

        assert (await run.first_byte()).attempts == 2


async def test_a_close_before_the_legs_first_step_frees_the_slot() -> None:
    driver = ScriptedDriver((text(ONE),))
    async with house(driver) as home:
        run = home.start(call())
        run.close()
        await calm()

        assert (home.dispatcher.num_running(M0), driver.calls) == (0, [])


async def test_a_close_before_anybody_came_for_an_inline_answer_frees_the_slot_at_once() -> None:
    async with house((text(ONE),)) as home:
        run = home.start(call(stream=False), inline=True)
        run.close()

        assert home.dispatcher.num_running(M0) == 0


@pytest.mark.parametrize("inline", [False, True])
async def test_a_slot_is_taken_until_the_engine_has_let_go(inline: bool) -> None:
    driver = ScriptedDriver((Gate(),))
    driver.settle_gate = Gate()
    async with house(driver) as home:
        run = home.start(call(stream=not inline), inline=inline)
        reader = asyncio.create_task(run.first_byte())
        await calm()
        run.close()
        await calm()
        assert (driver.closed, driver.settled, home.dispatcher.num_running(M0)) == (1, [0], 1)

        driver.settle_gate.open()
        await calm()

        assert home.dispatcher.num_running(M0) == 0
        reader.cancel()


@pytest.mark.parametrize("inline", [False, True])
async def test_a_client_that_leaves_while_a_cut_leg_settles_does_not_free_the_slot_early(inline: bool) -> None:
    driver = ScriptedDriver((Gate(),), progress_of_whole=True)
    driver.settle_gate = Gate()
    async with house(driver) as home:
        run = home.start(call(stream=not inline, timeouts=TIMES), inline=inline)
        reader = asyncio.create_task(run.first_byte())
        await home.pass_time(10.1)
        run.close()
        reader.cancel()
        await calm()
        assert home.dispatcher.num_running(M0) == 1

        driver.settle_gate.open()
        await calm()

        assert home.dispatcher.num_running(M0) == 0


@pytest.mark.parametrize("inline", [False, True])
async def test_a_silent_leg_of_a_whole_answer_is_retried_in_the_same_request(inline: bool) -> None:
    driver = ScriptedDriver((Gate(),), (text(ONE),), progress_of_whole=True)
    async with house(driver) as home:
        run = home.start(call(stream=False, timeouts=TIMES), inline=inline)
        reader = asyncio.create_task(run.first_byte())
        await home.pass_time(10.1)

        assert (await reader).attempts == 2
        assert reader.cancelling() == 0


async def test_the_readers_own_cancellation_passes_through_an_inline_answer() -> None:
    async with house((Gate(),)) as home:
        run = home.start(call(stream=False), inline=True)

        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await run.first_byte()

        run.close()
        await calm()
        assert home.dispatcher.num_running(M0) == 0


@pytest.mark.parametrize("inline", [False, True])
async def test_an_unexpected_exception_ends_its_request_alone(inline: bool) -> None:
    gate = Gate()
    driver = ScriptedDriver((gate, text(ONE)), (KeyError("a bug"),))
    async with house(driver, slots=2) as home:
        other = home.start(call())
        await calm()

        assert isinstance(await error_of(home.start(call(stream=False), inline=inline)), InternalError)
        gate.open()
        assert await body_of(other) == ONE


async def test_an_exception_while_an_engine_settles_ends_nothing_else() -> None:
    gate = Gate()
    driver = ScriptedDriver((gate, text(ONE)), (Gate(),))
    driver.settle_error = ValueError("a bug")
    async with house(driver, slots=2) as home:
        other, run = home.start(call()), home.start(call())
        await calm()
        run.close()
        await calm()
        gate.open()

        assert await body_of(other) == ONE


async def test_a_worker_without_driver_is_unreachable_and_the_request_waits() -> None:
    async with house((text(ONE),)) as home:
        home.drivers.clear()
        run = home.start(call(timeouts=TIMES))
        for _ in range(60):
            await home.pass_time(0.1)

        assert isinstance(await error_of(run), QueueTimeout)


async def test_a_slow_reader_holds_the_engine_at_the_bound_and_its_reading_lets_it_go_on() -> None:
    driver = ScriptedDriver(tuple(text(b"0123456789") for _ in range(50)))
    async with house(driver, bounds=Bounds(undelivered_bytes=30)) as home:
        run = home.start(call(timeouts=TIMES))
        await run.first_byte()
        await calm()
        assert driver.num_yielded == 4

        pieces = run.chunks()
        assert await anext(pieces) == b"0123456789" * 4
        await anext(pieces)
        assert driver.num_yielded > 4
        async for _ in pieces:
            pass
        assert (driver.num_yielded, run.journal.num_undelivered_bytes) == (50, 0)


async def test_an_engine_that_is_held_back_is_not_called_idle() -> None:
    async with house((text(b"0123456789"), Gate()), bounds=Bounds(undelivered_bytes=5)) as home:
        run = home.start(call(timeouts=TIMES))
        await home.pass_time(50.0)

        assert run.error is None


async def test_a_reader_that_takes_nothing_is_cut() -> None:
    driver = ScriptedDriver((text(ONE), Gate()))
    async with house(driver, bounds=Bounds(client_idle=7.0)) as home:
        run = home.start(call())
        run.reader = reader = asyncio.create_task(asyncio.Event().wait())  # type: ignore[assignment] # any task
        await home.pass_time(7.0)
        assert run.error is None

        await home.pass_time(0.1)

        assert isinstance(run.journal.error, ClientIdle)
        assert (reader.cancelled(), driver.closed) == (True, 1)


async def test_a_reader_that_keeps_up_is_not_cut_while_the_engine_is_silent() -> None:
    async with house((text(ONE), Gate()), bounds=Bounds(client_idle=1.0)) as home:
        run = home.start(call(timeouts=Timeouts(idle=100.0)))
        run.reader = reader = asyncio.create_task(body_of(run))  # type: ignore[assignment] # any task
        await home.pass_time(50.0)

        assert (run.error, reader.done()) == (None, False)
        reader.cancel()


async def inline_reader(run: Run) -> bytes:
    await run.first_byte()
    run.sink = None
    return await body_of(run)


async def test_an_inline_streams_sink_takes_frames_at_once_and_again_when_pushed() -> None:
    gates = [Gate(), Gate(), Gate()]
    async with house((text(ONE), gates[0], text(TWO), gates[1], text(THREE), gates[2], text(DONE, 0))) as home:
        run, sunk, is_willing = home.start(call(), inline=True), list[bytes](), True
        run.sink = lambda frames: is_willing and not sunk.append(frames)  # type: ignore[func-returns-value]
        reader = asyncio.create_task(inline_reader(run))
        await calm()
        assert sunk == [ONE]

        is_willing = False
        for gate in gates[:2]:
            gate.open()
            await calm()
        assert sunk == [ONE]

        is_willing = True
        run.push()
        assert (sunk, run.journal.num_undelivered_bytes) == ([ONE, TWO + THREE], 0)
        is_willing = False
        gates[2].open()
        assert await reader == DONE


async def test_an_inline_streams_reader_that_takes_nothing_is_cancelled_and_its_engine_left() -> None:
    driver = ScriptedDriver((text(ONE), Gate()))
    async with house(driver, bounds=Bounds(client_idle=5.0)) as home:
        run = home.start(call(timeouts=Timeouts(idle=100.0)), inline=True)
        run.sink = lambda _: False
        run.reader = reader = asyncio.create_task(inline_reader(run))  # type: ignore[assignment] # any task
        await home.pass_time(5.1)

        assert isinstance(run.journal.error, ClientIdle)
        assert (reader.cancelled(), driver.closed) == (True, 1)


async def test_an_inline_stream_waits_for_room_and_goes_on_when_pushed() -> None:
    driver = ScriptedDriver((text(ONE), text(TWO), text(DONE, 0)))
    async with house(driver, bounds=Bounds(undelivered_bytes=1)) as home:
        run, sunk = home.start(call(), inline=True), list[bytes]()
        is_willing = False
        run.sink = lambda frames: is_willing and not sunk.append(frames)  # type: ignore[func-returns-value]
        reader = asyncio.create_task(inline_reader(run))
        await calm()
        assert (sunk, run.is_held_back) == ([], True)

        is_willing = True
        run.push()
        assert await reader == b""
        assert sunk == [ONE, TWO, DONE]


async def test_close_may_be_called_again_and_again() -> None:
    async with house((Gate(),)) as home:
        run = home.start(call())
        for _ in range(3):
            run.close()
            await calm()

        assert home.dispatcher.num_open == 0


async def test_a_close_after_the_end_is_no_cancellation() -> None:
    driver = ScriptedDriver((text(ONE),))
    async with house(driver) as home:
        run = home.start(call())
        await body_of(run)
        run.close()
        await calm()

        assert driver.settled == []


async def test_two_requests_of_one_id_do_not_meet() -> None:
    gate = Gate()
    async with house((gate, text(ONE)), slots=2) as home:
        first, second = home.start(call("same")), home.start(call("same"))
        first.close()
        await calm()
        gate.open()

        assert await body_of(second) == ONE
        assert first.call.id != second.call.id


async def test_emptied_returns_when_the_last_answer_is_closed() -> None:
    async with house((Gate(),)) as home:
        runs = [home.start(call()) for _ in range(2)]
        emptied = asyncio.create_task(home.dispatcher.emptied())
        runs[0].close()
        await calm()
        assert not emptied.done()

        runs[1].close()
        await emptied


async def test_whoever_leaves_with_an_error_gets_that_error() -> None:
    async def leave() -> None:
        async with house((Gate(),)) as home:
            home.start(call())
            raise KeyError

    with pytest.raises(KeyError):
        await leave()


async def test_leaving_tells_everybody_who_waits() -> None:
    readers: list[asyncio.Task[Any]] = []
    async with house((Gate(),), slots=2) as home:
        for inline in (True, False, True, False):
            run = home.start(call(stream=not inline), inline=inline)
            readers.append(asyncio.create_task(error_of(run)))
        await calm()
        home.start(call(stream=False), inline=True)

    for reader in readers:
        assert isinstance(await reader, Draining)


async def test_every_leg_is_recorded_with_its_worker_its_time_and_its_end() -> None:
    gate = Gate()
    async with house((gate, WorkerLost("gone")), (text(ONE), text(DONE, 0))) as home:
        run = home.start(call())
        await home.pass_time(2.0)
        gate.open()
        await run.first_byte()
        await body_of(run)

        assert [(leg.worker, leg.model, leg.at_s, leg.duration_s, leg.cause) for leg in run.legs] == [
            ("m-0", "m", 0.0, 2.0, "lost"),
            ("m-1", "m", 2.0, 0.0, "done"),
        ]


@pytest.mark.parametrize("inline", [False, True])
async def test_the_leg_of_an_answer_that_was_closed_is_recorded_at_once_and_only_once(inline: bool) -> None:
    async with house((Gate(),)) as home:
        run = home.start(call(stream=not inline), inline=inline)
        reader = asyncio.create_task(run.first_byte())
        await home.pass_time(1.5)
        run.close()
        assert [(leg.duration_s, leg.cause) for leg in run.legs] == [(1.5, "aborted")]

        reader.cancel()
        await calm()
        assert len(run.legs) == 1


async def test_a_leg_that_took_too_long_is_recorded_before_its_engine_lets_go() -> None:
    driver = ScriptedDriver((Gate(),))
    driver.settle_gate = Gate()
    async with house(driver, limits=Limits(attempts=1)) as home:
        run = home.start(call(timeouts=TIMES))
        await home.pass_time(11.0)
        assert [(leg.duration_s, leg.cause) for leg in run.legs] == [(11.0, "timed_out")]
        driver.settle_gate.open()
        await error_of(run)


STEPS = st.sampled_from(
    [
        text(ONE),
        text(b"", 1),
        COMMENT,
        "gate",
        WorkerLost("gone"),
        WorkerUnreachable("no"),
        UpstreamBusy("busy", status=503, retry_after=1.0),
        UpstreamRefused("no", status=400),
        RuntimeError("a bug"),
    ]
)


@given(
    scripts=st.lists(st.lists(STEPS, max_size=4), min_size=1, max_size=6),
    kinds=st.lists(st.sampled_from(["stream", "whole", "inline"]), min_size=1, max_size=6),
    closes=st.sets(st.integers(0, 5)),
    slots=st.integers(1, 2),
)
@settings(max_examples=40, deadline=None)
def test_every_waiter_is_answered_whatever_the_engine_does(
    scripts: list[list[Any]], kinds: list[str], closes: set[int], slots: int
) -> None:
    asyncio.run(everybody_is_answered(scripts, kinds, closes, slots))


async def everybody_is_answered(scripts: list[list[Any]], kinds: list[str], closes: set[int], slots: int) -> None:
    played = [tuple(Gate() if step == "gate" else step for step in script) for script in scripts]
    short = Timeouts(queue=3.0, first_token=1.5, idle=1.5, total=7.0)
    async with house(ScriptedDriver(*played), slots=slots, limits=Limits(attempts=2)) as home:
        runs = [home.start(call(stream=kind == "stream", timeouts=short), inline=kind == "inline") for kind in kinds]
        readers = [asyncio.create_task(read(run)) for run in runs]
        for second in range(9):
            if second in closes and second < len(runs):
                runs[second].close()
                readers[second].cancel()
            await home.pass_time(1.0)
        outcomes = await asyncio.gather(*readers, return_exceptions=True)

    for outcome in outcomes:
        assert isinstance(outcome, bytes | ForebayError | asyncio.CancelledError)


async def read(run: Run) -> bytes:
    try:
        await run.first_byte()
        return await body_of(run)
    finally:
        run.close()
