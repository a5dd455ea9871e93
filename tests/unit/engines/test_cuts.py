"""Legs that are cut and go on, under a clock that the test turns and a scheduler that cuts when told."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
from structlog.testing import capture_logs

from core.chat import Call, Timeouts, Usage
from core.errors import ForebayError, IdleTimeout, UpstreamBroken, WorkerLost
from engines.dispatcher import Bounds, Dispatcher
from engines.driver import Chunk, Continuation, Driver, Piece
from engines.run import Run
from routing.scheduler import FirstToken, LegEnded, Reject, Scheduler
from tests.fakes.clock import ManualClock
from tests.fakes.cutting import CuttingScheduler
from tests.fakes.drivers import Gate, ResumableDriver, ScriptedDriver, call, text
from tests.fakes.workers import view

LOOK_S = 0.1
TIMES = Timeouts(queue=5.0, first_token=10.0, idle=30.0, total=600.0)
END = Piece(ending={"finish_reason": "stop"}, usage=Usage(4, 3), prefilled=5)


def said(words: str | None, **choice: Any) -> bytes:
    delta = {} if words is None else {"content": words}
    event = {"id": "c", "model": "m", "choices": [{"index": 0, "delta": delta, "finish_reason": None} | choice]}
    return b"data: " + json.dumps(event).encode() + b"\n\n"


class House:
    def __init__(self, *drivers: ScriptedDriver) -> None:
        self.clock = ManualClock()
        self.drivers: dict[str, Driver] = {f"m-{index}": driver for index, driver in enumerate(drivers)}
        self.scheduler = CuttingScheduler(*self.drivers)
        self.dispatcher = Dispatcher(cast(Scheduler, self.scheduler), self.clock, self.drivers.get, Bounds())

    def start(self, asked: Call | None = None, *, inline: bool = False) -> tuple[Run, "asyncio.Task[bytes]"]:
        run = self.dispatcher.submit(asked or call(timeouts=TIMES), inline=inline)
        return run, asyncio.create_task(read(run))

    def cut(self, run: Run) -> None:
        self.dispatcher.carry_out(self.scheduler.cut(run.call.id))

    async def pass_time(self, seconds: float) -> None:
        await calm()
        while seconds > 0:
            self.clock.advance(min(seconds, LOOK_S))
            self.dispatcher.tick()
            seconds -= LOOK_S
        await calm()


@asynccontextmanager
async def house(*drivers: ScriptedDriver) -> AsyncIterator[House]:
    """Open a house; when it closes, nothing may be left of any request."""
    home = House(*drivers)
    with capture_logs():
        async with home.dispatcher:
            for name in home.drivers:
                home.dispatcher.on_worker(view(name))
            yield home
        await calm()
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert all(driver.num_running == 0 for driver in drivers)
    assert (home.dispatcher.num_open, home.dispatcher.num_running(view("m-0").id)) == (0, 0)


async def calm() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def read(run: Run) -> bytes:
    try:
        await run.first_byte()
        return b"".join([piece async for piece in run.chunks()])
    finally:
        run.close()


def words_of(body: bytes) -> str:
    events = [json.loads(frame[6:]) for frame in body.split(b"\n\n") if frame.startswith(b"data: {")]
    return "".join(choice["delta"].get("content") or "" for event in events for choice in event["choices"])


def cut_driver(*rests: tuple[Any, ...]) -> ResumableDriver:
    return ResumableDriver((text(said("one ")), Gate()), rests=rests)


@pytest.mark.parametrize("inline", [False, True])
async def test_the_client_of_a_leg_that_was_cut_reads_one_stream(inline: bool) -> None:
    driver = cut_driver((Piece("two ", 1), Gate()), (Piece("three", 1), END))
    async with house(driver) as home:
        run, reader = home.start(inline=inline)
        for _ in range(2):
            await calm()
            home.cut(run)
        body = await reader

    assert words_of(body) == "one two three"
    assert body.count(b'"stop"') == body.count(b"[DONE]") == 1
    assert [past.text for past in driver.pasts] == ["one ", "one two "]
    assert [(leg.cause, leg.recomputed) for leg in run.legs] == [("preempted", None), ("preempted", 1 + 4), ("done", 5)]
    assert run.usage == Usage(4, 3)
    assert reader.cancelling() == 0


@pytest.mark.parametrize("inline", [False, True])
async def test_a_cut_leg_ends_when_its_engine_has_let_go_and_its_slot_was_kept(inline: bool) -> None:
    driver = cut_driver((Piece("two", 1), END))
    driver.settle_gate = Gate()
    async with house(driver) as home:
        run, reader = home.start(inline=inline)
        await calm()
        home.cut(run)
        await calm()
        assert (home.scheduler.ended, driver.parked) == ([], [])

        driver.settle_gate.open()
        await reader

        assert (home.scheduler.ended[0].cause, home.scheduler.ended[0].can_resume) == ("aborted", True)
        assert driver.parked == [run.call]


async def test_every_leg_tells_its_first_token_and_what_it_had_to_process() -> None:
    async with house(cut_driver((Piece(prefilled=7), Piece("two", 1), END))) as home:
        run, reader = home.start()
        await calm()
        home.cut(run)
        await reader

        first = [(event.leg, event.prefilled) for event in home.scheduler.events if isinstance(event, FirstToken)]
        assert first == [(f"{run.call.id}/0", None), (f"{run.call.id}/1", 7)]
        assert home.scheduler.ended[-1].prefilled == 7


@pytest.mark.parametrize("inline", [False, True])
async def test_a_client_that_leaves_between_two_legs_leaves_nothing(inline: bool) -> None:
    driver = cut_driver((Piece("two", 1), END))
    driver.settle_gate = Gate()
    async with house(driver) as home:
        run, reader = home.start(inline=inline)
        await calm()
        home.cut(run)
        await calm()
        run.close()
        reader.cancel()
        await calm()
        driver.settle_gate.open()
        await calm()

        assert (driver.pasts, home.scheduler.ended[-1].can_resume) == ([], True)


@pytest.mark.parametrize("words", ['{"id":"c"}', said(None, delta={"tool_calls": [{"index": 0}]}).decode()[6:]])
async def test_a_leg_that_nobody_could_follow_is_not_cut(words: str) -> None:
    gate = Gate()
    driver = ResumableDriver((text(b"data: " + words.strip().encode() + b"\n\n"), gate, text(b"data: [DONE]\n\n")))
    async with house(driver) as home:
        run, reader = home.start()
        await calm()
        home.cut(run)
        await calm()
        gate.open()
        await reader

        assert [event.cause for event in home.scheduler.ended] == ["done"]


async def test_what_has_said_nothing_begins_anew_whatever_it_is() -> None:
    driver = ScriptedDriver((Gate(),), (text(said("one")), text(b"data: [DONE]\n\n", 0)))
    async with house(driver) as home:
        run, reader = home.start()
        await calm()
        home.cut(run)

        assert words_of(await reader) == "one"
        assert home.scheduler.submits[0].is_pinned


async def test_a_whole_answer_goes_on_from_what_its_engine_has_streamed() -> None:
    heard = text(b"", 1)
    heard.aside = (said("one "),)
    driver = ResumableDriver((heard, Gate()), rests=[(Piece("two", 1), END)])
    driver._progress_of_whole = True
    async with house(driver) as home:
        run, reader = home.start(call(stream=False, timeouts=TIMES), inline=True)
        await calm()
        home.cut(run)
        whole = json.loads(await reader)

    assert whole["choices"][0]["message"]["content"] == "one two"
    assert whole["usage"]["forebay"] == {"legs": 2, "recomputed_tokens": 5, "exactness": "prefix"}


@pytest.mark.parametrize("error", [WorkerLost("gone"), IdleTimeout("late")])
async def test_an_answer_whose_worker_fails_goes_on_at_another(error: ForebayError) -> None:
    broken = ResumableDriver((text(said("one ")), error))
    other = ResumableDriver(rests=[(Piece("two", 1), END)])
    async with house(broken, other) as home:
        run, reader = home.start()

        assert words_of(await reader) == "one two"
        assert [leg.worker for leg in run.legs] == ["m-0", "m-1"]


async def test_an_answer_that_cannot_go_on_ends_with_one_error() -> None:
    driver = ResumableDriver((text(said("one ")), WorkerLost("gone")))
    driver.class_ = "pinned"
    async with house(driver) as home:
        _, reader = home.start()

        with pytest.raises(WorkerLost):
            await reader
        assert not home.scheduler.ended[0].can_resume


async def test_a_begun_answer_that_no_worker_is_left_for_was_lost_and_not_refused() -> None:
    async with house(cut_driver()) as home:
        run, reader = home.start()
        await calm()
        home.dispatcher.carry_out([Reject(request=run.call.id, why="no_healthy_worker")])

        with pytest.raises(WorkerLost, match="no other is running"):
            await reader


class PartedDriver(ResumableDriver):
    """Has answers made in parts; each script but the last is one, and so is each rest without an ending."""

    def quantum(self, call: Call) -> int | None:
        return 1

    def run(self, call: Call, most: int | None = None) -> AsyncIterator[Chunk]:
        self.mosts = [most]
        return super().run(call)

    def resume(self, call: Call, past: Continuation, most: int | None = None) -> AsyncIterator[Piece]:
        self.mosts.append(most)
        return super().resume(call, past)


@pytest.mark.parametrize("inline", [False, True])
async def test_a_leg_in_parts_is_cut_when_a_part_has_ended_and_not_before(inline: bool) -> None:
    gate = Gate()
    driver = PartedDriver((text(said("one ")), gate), rests=[(Piece("two ", 1),), (Piece("three", 1), END)])
    async with house(driver) as home:
        home.scheduler.num_others = 1
        run, reader = home.start(inline=inline)
        await calm()
        home.cut(run)
        await calm()
        assert (home.scheduler.ended, driver.num_running) == ([], 1)
        gate.open()
        await calm()
        body = await reader

    assert words_of(body) == "one two three"
    assert [(event.cause, event.can_resume) for event in home.scheduler.ended] == [("aborted", True), ("done", False)]
    assert [leg.cause for leg in run.legs] == ["preempted", "done"]
    assert (driver.mosts, driver.closed) == ([1, 1, 1], 3)


async def test_a_leg_in_parts_whose_reader_holds_it_back_is_cut_at_once() -> None:
    driver = PartedDriver((text(said("one ")), Gate()), rests=[(Piece("two", 1), END)])
    async with house(driver) as home:
        home.scheduler.num_others = 1
        home.dispatcher.bounds = Bounds(undelivered_bytes=0)
        run = home.dispatcher.submit(call(timeouts=TIMES))
        await calm()
        assert run.is_held_back
        home.cut(run)
        await calm()

        assert [event.cause for event in home.scheduler.ended][:1] == ["aborted"]
        assert words_of(await read(run)) == "one two"


async def test_when_nobody_waits_any_more_all_the_rest_is_made_at_once() -> None:
    gate = Gate()
    driver = PartedDriver((text(said("one ")), gate), rests=[(Piece("two", 1), END)])
    async with house(driver) as home:
        home.scheduler.num_others = 1
        run, reader = home.start()
        await calm()
        home.scheduler.num_others = 0
        gate.open()

        assert words_of(await reader) == "one two"
        assert driver.mosts == [1, None]
        assert [leg.cause for leg in run.legs] == ["done"]


async def test_a_part_that_is_no_plain_text_ends_the_answer_with_one_error() -> None:
    driver = PartedDriver((text(said(None, delta={"tool_calls": [{"index": 0}]})),))
    async with house(driver) as home:
        home.scheduler.num_others = 1
        _, reader = home.start()

        with pytest.raises(UpstreamBroken):
            await reader


async def test_a_worker_that_cannot_continue_is_as_good_as_away() -> None:
    async with house(ResumableDriver((text(said("one ")), WorkerLost("gone"))), ScriptedDriver()) as home:
        home.drivers["m-0"].rests = [(Piece("two", 1), END)]  # type: ignore[attr-defined] # the driver that it is
        run, reader = home.start()

        assert words_of(await reader) == "one two"
        assert [leg.cause for leg in run.legs] == ["lost", "unreachable", "done"]


async def test_a_silent_stream_of_an_ill_worker_goes_on_elsewhere_and_of_a_healthy_one_waits() -> None:
    other = ResumableDriver(rests=[(Piece("two", 1), END)])
    async with house(cut_driver(), other) as home:
        _, reader = home.start()
        await home.pass_time(2.5)
        assert home.scheduler.ended == []

        home.dispatcher.on_worker(view("m-0", healthy=False))
        await home.pass_time(0.1)

        assert words_of(await reader) == "one two"


async def test_a_stream_that_pauses_by_nature_is_given_five_such_pauses() -> None:
    gate = Gate()
    slow = ResumableDriver((text(said("one ")), gate, text(said("two ")), Gate()))
    async with house(slow, ResumableDriver(rests=[(Piece("three", 1), END)])) as home:
        _, reader = home.start()
        await home.pass_time(1.0)
        gate.open()
        await calm()
        home.dispatcher.on_worker(view("m-0", healthy=False))
        await home.pass_time(4.9)
        assert home.scheduler.ended == []

        await home.pass_time(0.2)

        assert words_of(await reader) == "one two three"


async def test_a_worker_is_not_ill_because_it_drains() -> None:
    gate = Gate()
    async with house(ResumableDriver((text(said("one ")), gate, text(said("two")))), cut_driver()) as home:
        _, reader = home.start()
        await calm()
        home.dispatcher.on_worker(view("m-0", ready=False, draining=True))
        await home.pass_time(5.0)
        assert home.scheduler.ended == []

        gate.open()
        assert words_of(await reader) == "one two"


async def test_a_stream_that_stalled_once_is_given_five_times_as_long_the_next_time() -> None:
    driver = ResumableDriver((text(said("one ")), Gate()), rests=[(Piece("two ", 1), Gate()), (Piece("three", 1), END)])
    async with house(driver) as home:
        _, reader = home.start()
        await calm()
        home.dispatcher.on_worker(view("m-0", healthy=False))
        await home.pass_time(2.3)
        assert len(home.scheduler.ended) == 1

        await home.pass_time(9.0)
        assert len(home.scheduler.ended) == 1
        await home.pass_time(3.0)
        assert words_of(await reader) == "one two three"


async def test_a_silence_that_we_slept_through_ourselves_is_not_held_against_a_worker() -> None:
    async with house(cut_driver((Piece("two", 1), END))) as home:
        _, reader = home.start()
        await calm()
        home.dispatcher.on_worker(view("m-0", healthy=False))
        home.clock.advance(60.0 / 4)
        home.dispatcher.tick()
        await home.pass_time(1.9)
        assert home.scheduler.ended == []

        await home.pass_time(0.3)
        assert words_of(await reader) == "one two"


async def test_legs_of_an_earlier_incarnation_are_lost_and_go_on() -> None:
    driver = cut_driver((Piece("two", 1), END))
    async with house(driver) as home:
        _, reader = home.start()
        await calm()
        home.dispatcher.on_worker(view("m-0", incarnation=1))

        assert words_of(await reader) == "one two"
        assert [event.cause for event in home.scheduler.ended] == ["lost", "done"]


async def test_an_answer_cut_after_its_last_word_needs_no_further_leg_at_an_engine() -> None:
    last = said("one", finish_reason="stop")
    driver = ResumableDriver((text(last), Gate()))
    async with house(driver) as home:
        run, reader = home.start(call(timeouts=TIMES, wants_usage=True))
        await calm()
        home.cut(run)
        body = await reader

        assert driver.pasts == []
        assert body.endswith(b"data: [DONE]\n\n")
        assert (b'"usage"' in body, b"forebay" in body) == (True, False)


async def test_the_deadline_of_a_leg_that_goes_on_is_that_of_a_first_token() -> None:
    async with house(cut_driver((Gate(),), (Piece("two", 1), END))) as home:
        run, reader = home.start()
        await calm()
        home.cut(run)
        await home.pass_time(9.9)
        assert len(home.scheduler.ended) == 1

        await home.pass_time(0.2)

        assert words_of(await reader) == "one two"
        assert [event.cause for event in home.scheduler.ended if isinstance(event, LegEnded)][1] == "timed_out"
