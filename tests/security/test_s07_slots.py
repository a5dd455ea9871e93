"""S7: who reads slowly, or not at all, holds no slot: others are served, and nothing of its own answer is lost.

Production's scheduler and dispatcher, over a driver that counts.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from core.chat import Call
from core.ids import ModelName, TenantId, WorkerId
from engines.dispatcher import Bounds, Dispatcher
from engines.driver import Chunk, Continuation, Exactness, Piece
from engines.run import Run
from routing.fairness.policy import Fairness
from routing.scheduler import Limits, Scheduler
from tests.fakes.clock import ManualClock
from tests.fakes.drivers import ScriptedDriver, call
from tests.fakes.workers import view

MODEL = ModelName("m")
LENGTH = 2000
DONE = b"data: [DONE]\n\n"


def frame(number: int) -> bytes:
    return b'data: {"id":"x","choices":[{"index":0,"delta":{"content":"%d "}}]}\n\n' % number


class Counter(ScriptedDriver):
    """Counts to the call's `max_tokens`, a token at a time, and goes on from wherever it was cut."""

    async def run(self, call: Call) -> AsyncIterator[Chunk]:
        """Count from 0."""
        self.num_running += 1
        try:
            for number in range(call.max_tokens):
                yield Chunk(frame(number), 1)
                await asyncio.sleep(0)
            yield Chunk(DONE, 0)
        finally:
            self.num_running -= 1

    def exactness(self, call: Call) -> Exactness:
        """Any answer can go on."""
        return "token"

    async def resume(self, call: Call, past: Continuation) -> AsyncIterator[Piece]:
        """Count on."""
        self.num_running += 1
        try:
            for number in range(len(past.texts), call.max_tokens):
                yield Piece(f"{number} ", 1, prefilled=len(past.texts))
                await asyncio.sleep(0)
            yield Piece(ending={"finish_reason": "stop"})
        finally:
            self.num_running -= 1

    async def park(self, call: Call, num_expected: Callable[[], int]) -> None:
        """Keep nothing."""
        await self.settle(num_expected)


class House:
    """A dispatcher over one worker with a few slots."""

    def __init__(self, slots: int, bounds: Bounds) -> None:
        self.clock = ManualClock()
        self.scheduler = Scheduler(Limits(), {MODEL: Fairness(threshold=100)})
        self.driver = Counter()
        self.dispatcher = Dispatcher(self.scheduler, self.clock, lambda _: self.driver, bounds)
        self.slots = slots

    def ask(self, tenant: str, length: int = LENGTH) -> Run:
        return self.dispatcher.submit(call(tenant=tenant, max_tokens=length))

    def given(self, tenant: str) -> float:
        """Return what the tenant has been charged."""
        tenants = self.scheduler.fairness_view(MODEL).tenants
        return next(one.attained for one in tenants if one.tenant == TenantId(tenant))

    async def passes(self, steps: int) -> None:
        """Let the engine work, while time passes."""
        for step in range(steps):
            await asyncio.sleep(0)
            self.clock.advance(0.001)
            if step % 50 == 49:
                self.dispatcher.tick()


@asynccontextmanager
async def house(*, slots: int = 1, undelivered: int = 4 * 2**20) -> AsyncIterator[House]:
    home = House(slots, Bounds(undelivered_bytes=undelivered, client_idle=600.0))
    async with home.dispatcher:
        home.dispatcher.on_worker(view("m-0", slots=slots))
        yield home


async def numbers_of(run: Run) -> list[int]:
    """Read an answer to its end, and return what was counted in it."""
    text = b"".join([piece async for piece in run.chunks()])
    run.close()
    return [int(part.partition(b' "}')[0]) for part in text.split(b'"content":"')[1:]]


async def test_an_answer_that_nobody_reads_takes_its_slot_no_longer_than_any_other() -> None:
    async with house() as home:
        unread = home.ask("slow")
        await unread.first_byte()
        await home.passes(3 * LENGTH)
        assert home.dispatcher.num_running(WorkerId("m-0")) == 0

        other = home.ask("other", 5)
        await other.first_byte()
        assert await numbers_of(other) == list(range(5))
        assert home.scheduler.fairness_view(MODEL).preemptions == 0
        assert await numbers_of(unread) == list(range(LENGTH))


async def test_an_engine_that_waits_for_a_slow_reader_is_given_to_who_else_wants_it() -> None:
    async with house(undelivered=16 * 2**10) as home:
        slow = home.ask("slow")
        await slow.first_byte()
        await home.passes(3 * LENGTH)
        assert home.dispatcher.num_running(WorkerId("m-0")) == 1, "it waits for its reader"
        assert slow.is_held_back

        other = home.ask("other", 5)
        async with asyncio.timeout(5):
            await other.first_byte()
        assert await numbers_of(other) == list(range(5))
        assert home.scheduler.fairness_view(MODEL).preemptions == 1

        reading = asyncio.create_task(numbers_of(slow))
        await home.passes(5 * LENGTH)
        assert await reading == list(range(LENGTH)), "it is read at last, and whole"


async def test_a_crowd_of_slow_readers_on_every_slot_keeps_nobody_waiting() -> None:
    async with house(slots=4, undelivered=16 * 2**10) as home:
        crowd = [home.ask("slow") for _ in range(12)]
        await home.passes(6 * LENGTH)
        assert home.dispatcher.num_running(WorkerId("m-0")) == 4

        for _ in range(20):
            other = asyncio.create_task(numbers_of(home.ask("other", 5)))
            await home.passes(2000)
            assert other.done()
            assert await other == list(range(5))
        first_time = sum(4 + 2 * len(run.journal.frames) for run in crowd)
        assert home.given("slow") > first_time, "what was computed again for them is theirs"
        for run in crowd:
            run.close()


async def test_who_leaves_early_is_charged_for_what_was_produced() -> None:
    async with house() as home:
        left = home.ask("gone")
        await left.first_byte()
        await home.passes(300)
        produced = len(left.journal.frames)
        left.close()
        await home.passes(10)

        assert produced > 50
        assert home.given("gone") == 4 + 2 * produced
        assert home.dispatcher.num_running(WorkerId("m-0")) == 0
